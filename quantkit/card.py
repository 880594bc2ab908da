"""The model card (README.md) of a written folder: facts in, Markdown out.

Three rules hold it together:

- everything that is not written here is escaped by default (`_finish`), so no name, tag or id can act as Markdown,
  HTML or front matter; the parent's card is quoted as inert text;
- measured values have a fixed width, so that the size of the file is known before anything is measured: cards that
  differ only in error figures, counts of non-finite weights or SHA-256 sums have the same number of bytes;
- what is not known is said in words ("not evaluated"), never left as an empty placeholder.

The licence is the parent's. A recipe may name it where the parent does not, and may never change it.

Source of the conventions: the Hub's model card documentation and huggingface_hub 2.4.0, which the tests use as the
reader; here it would cost 0.2 s of import, so the front matter is written with PyYAML.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import yaml

from quantkit.errors import RecipeError
from quantkit.parent_card import (
    HUB_LICENCES,
    ParentCard,
    carried,
    carried_tags,
    clean_line,
    clean_text,
    core_scalar,
    is_hub_id,
    is_language,
    licence_id,
    licences_mentioned,
    read_parent_card,
    unique,
)
from quantkit.version import __version__

__all__ = [
    "CardFacts",
    "ErrorRow",
    "FileRow",
    "ParentCard",
    "front_matter",
    "read_parent_card",
    "render_card",
    "validate_front_matter",
]

MAX_QUOTE = 64_000  # characters of the parent's body that are quoted; a longer one is cut at a line
RELATIONS = ("quantized", "finetune", "adapter", "merge")
# The floors of pyproject.toml (a test compares them): nothing older was tried.
FLOORS = {"transformers": "5.0", "torch": "2.6", "accelerate": "1.1", "bitsandbytes": "0.49"}
# Tag -> the paper that describes the method.
PAPERS = {
    "nf4": ("QLoRA: Efficient Finetuning of Quantized LLMs", "2305.14314"),
    "fp4": ("QLoRA: Efficient Finetuning of Quantized LLMs", "2305.14314"),
    "llm.int8": ("LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", "2208.07339"),
    "int8": ("LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", "2208.07339"),
    "gptq": ("GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", "2210.17323"),
    "wanda": ("A Simple and Effective Pruning Approach for Large Language Models", "2306.11695"),
    "sparsegpt": ("SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", "2301.00774"),
}


@dataclass(frozen=True)
class ErrorRow:
    """Relative Frobenius error, |restored - original| / |original|, over the tensors of one kind of module."""

    kind: str
    tensors: int
    weights: int
    mean: float
    worst: float


@dataclass(frozen=True)
class FileRow:
    """A written file; `sha256` is 64 hexadecimal digits, any digits while the card is only being planned."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class CardFacts:
    """All that a card says. `errors`, `nonfinite` and the sums in `files` are measured; the rest the plan knows.

    For the planned size to hold, `errors`, `nonfinite` and `files` must have the same rows before and after a run:
    give every kind of module its row, with zeros before.
    """

    name: str
    base_model: str | None  # Hub id of the direct parent, if there is one
    source_name: str  # Hub id or folder name
    revision: str | None
    license: str | None  # named by the recipe; see `_licence`
    quantized_by: str | None
    parent: ParentCard
    method_title: str
    bits: int
    tags: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]
    source_bytes: int
    output_bytes: int
    bits_per_weight: float  # of the quantized layers
    model_bits_per_weight: float
    parameters: int
    architecture: str
    kept: tuple[tuple[str, int], ...]  # kind of module left unquantized, bytes
    errors: tuple[ErrorRow, ...]
    error_note: str
    nonfinite: tuple[tuple[str, int], ...]  # kind of module, weights that are NaN or infinite in the source
    files: tuple[FileRow, ...]
    loader: Literal["transformers", "quantkit"]
    chat: bool
    warnings: tuple[str, ...]
    config: Mapping[str, Any]
    stripped: tuple[str, ...]
    command: str
    recipe_yaml: str
    versions: tuple[tuple[str, str], ...]
    plan_hash: str
    evaluation: None = None


# ---------------------------------------------------------------------------------------------------- licence


@dataclass(frozen=True)
class _Licence:
    ids: tuple[str, ...]
    name: str | None
    link: str | None
    named_by: Literal["parent", "recipe", "nobody"]
    mentioned: tuple[str, ...]

    @property
    def terms(self) -> list[str]:
        return _terms(self.ids)

    @property
    def mentioned_terms(self) -> list[str]:
        return _terms(self.mentioned)


def _terms(licences: Iterable[str]) -> list[str]:
    """In words, what these licences oblige to: a reminder of their restrictions, not a reading of them."""
    names = list(licences)
    return [text for part, text in _TERMS if any(re.search(part, name) for name in names)]


_TERMS = (
    (r"-nc-|noncommercial|-research", "the weights may not be used commercially"),
    (r"-nd-", "the licence forbids sharing adapted versions, and a quantized copy may be one: ask its authors first"),
    (r"-sa-|gpl", "adapted versions are shared under the same licence"),
    (r"openrail|bloom-rail", "its restrictions on use must be passed on with every copy"),
    (r"llama|gemma|grok", "its acceptable use policy and its notice go with every copy"),
)


def _licence(facts: CardFacts) -> _Licence:
    """The parent's licence, or the recipe's where the parent names none.

    Raises RecipeError for an unknown licence, for one that differs from the parent's, and for one that is milder than
    a restrictive licence named in the parent's text.
    """
    meta, mentioned = facts.parent.metadata, licences_mentioned(facts.parent.body)
    stated = meta.get("license")
    raw = [item for item in (stated if isinstance(stated, list) else [stated]) if isinstance(item, str)]
    named = [name for name in unique(map(licence_id, raw)) if name not in ("", "unknown", "none")]
    override = None if facts.license is None else licence_id(facts.license)
    if override is not None:
        _check_override(override, named, mentioned)
    if not named:
        if override is None or override == "unknown":
            return _Licence(("unknown",), None, None, "nobody", mentioned)
        return _Licence((override,), None, None, "recipe", mentioned)

    # The Hub refuses ids outside its list; `other` with a name says the same thing in its terms.
    strange = [name for name in named if name not in HUB_LICENCES]
    ids = unique("other" if name in strange else name for name in named)
    title = meta.get("license_name")
    name = (clean_line(title)[:100].strip() or None) if isinstance(title, str) else None
    if "other" in ids and not name:
        name = re.sub(r"[^a-z0-9.]+", "-", "-".join(strange).lower()).strip("-")[:100] or "not-named-by-the-parent"
    return _Licence(tuple(ids), name, _licence_link(facts, meta.get("license_link")), "parent", mentioned)


def _check_override(override: str, named: list[str], mentioned: tuple[str, ...]) -> None:
    where = "the licence of the recipe"
    if named and named != [override]:
        raise RecipeError(
            f"the licence {override!r} is not the parent's ({', '.join(named)}); a quantized copy cannot be relicensed",
            where=where,
            hint="leave the licence out: the parent's is carried over",
        )
    if not named and (override not in HUB_LICENCES or override == "other"):
        near = difflib.get_close_matches(override, HUB_LICENCES, 1, 0.5)
        raise RecipeError(
            f"{override!r} is not a licence id that the Hub knows by itself",
            where=where,
            hint=f"did you mean {near[0]!r}?" if near else "leave it out: the card then says that it is unknown",
        )
    strict = [name for name in mentioned if _terms([name])]
    if not named and strict and override not in mentioned:
        raise RecipeError(
            f"the parent's card names the licence {strict[0]} in its text; {override!r} would relicense it",
            where=where,
            hint=f"write {strict[0]!r}, or leave the licence out",
        )


def _licence_link(facts: CardFacts, link: object) -> str | None:
    """The parent's link; a file name is made absolute unless that file is in our folder too."""
    if not isinstance(link, str):
        return None
    if re.fullmatch(r"https?://[\w.-]+(?:/[\w./%#?=&+~-]*)?", link, re.ASCII) and len(link) <= 500:
        return link
    if re.fullmatch(r"[A-Za-z][\w-]*(?:\.(?:md|txt))?", link, re.ASCII):
        if any(row.name == link for row in facts.files):
            return link
        if facts.base_model is not None:
            return f"https://huggingface.co/{facts.base_model}/blob/{_commit(facts) or 'main'}/{link}"
    return None


def _commit(facts: CardFacts) -> str | None:
    """The revision if it is a commit: a branch moves, and other text cannot stand in a link."""
    return facts.revision if facts.revision and re.fullmatch(r"[0-9a-f]{40}", facts.revision) else None


# ---------------------------------------------------------------------------------------------------- front matter


def front_matter(facts: CardFacts) -> dict[str, Any]:
    """The card's metadata. Raises RecipeError if the recipe's part of it is one that the Hub would refuse."""
    licence = _licence(facts)
    inherited, _ = carried(facts.parent)
    data: dict[str, Any] = {
        "base_model": facts.base_model,
        "base_model_relation": "quantized",
        "license": licence.ids[0] if len(licence.ids) == 1 else list(licence.ids),
        "license_name": licence.name,
        "license_link": licence.link,
        "language": inherited.pop("language", None),
        "language_bcp47": inherited.pop("language_bcp47", None),
        "pipeline_tag": inherited.pop("pipeline_tag"),
        "library_name": "transformers",
        "quantized_by": facts.quantized_by,
        "tags": unique([*facts.tags, *carried_tags(facts.parent)]),
        **inherited,
    }
    data = {key: value for key, value in data.items() if value is not None}
    if problems := validate_front_matter(data):
        raise RecipeError(
            f"the Hub would refuse the card: {problems[0]}", where="front matter of README.md", hint="see the recipe"
        )
    return data


def validate_front_matter(data: Mapping[str, Any]) -> list[str]:
    """What the Hub, or a careful reader, would refuse in this front matter. Needs no network."""
    problems = []
    if "base_model" in data and not all(map(is_hub_id, _listed(data["base_model"]))):
        problems.append(f"base_model is not a repository id of the Hub: {data['base_model']!r}")
    if data.get("base_model_relation", "quantized") not in RELATIONS:
        problems.append(f"base_model_relation must be one of {', '.join(RELATIONS)}")
    licences = _listed(data.get("license", []))
    if not licences:
        problems.append("license is missing; write 'unknown' if it is not known")
    known = sorted(HUB_LICENCES)  # a list: what is looked up may be unhashable
    problems += [f"license is not one of the Hub's ids: {name!r}" for name in licences if name not in known]
    if "other" in licences and not data.get("license_name"):
        problems.append("license 'other' needs license_name")
    for code in [*_listed(data.get("language", [])), *_listed(data.get("language_bcp47", []))]:
        if not is_language(code, region=True):
            problems.append(f"language is not an ISO 639 code: {code!r}")
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) and 0 < len(tag) <= 100 for tag in tags):
        problems.append("tags must be a list of short texts")
    elif len(set(tags)) < len(tags):
        problems.append("tags must be unique")
    for key in ("pipeline_tag", "library_name", "license_name", "license_link", "quantized_by"):
        if key in data and not (isinstance(data[key], str) and 0 < len(data[key]) <= 500):
            problems.append(f"{key} must be a short text")
    if not all(map(is_hub_id, _listed(data.get("datasets", [])))):
        problems.append("datasets must be repository ids of the Hub")
    for key, value in data.items():
        # Example prompts may have lines, and so may a stop string; nothing else may.
        check = clean_text if key in ("widget", "inference") else clean_line
        if any(text != check(text) for text in _texts([key, value])):
            problems.append(f"{key if isinstance(key, str) else 'a key'!r} holds line breaks or unprintable characters")
    return problems or _yaml_problems(data)


def _yaml_problems(data: Mapping[str, Any]) -> list[str]:
    """Whether it is plain data and the block is read back as it was meant, by the Hub's own pattern."""
    try:
        json.dumps(data, allow_nan=False)  # YAML alone would take sets and dates, which other readers do not know
        block = _block(data)
        match = re.match(r"(\s*---\n)([\S\s]*?)(\n---[ \t]*(\n|$))", block)
        sound = match is not None and match.end() == len(block) and yaml.safe_load(match[2]) == dict(data)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        return [f"it cannot be written as YAML ({clean_line(str(error))[:80]})"]
    return [] if sound else ["it is not read back from YAML as it was written"]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _texts(value: Any) -> Iterator[str]:
    """All texts in nested plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(list(value.items()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


class _Dumper(yaml.SafeDumper):
    """Block style, no anchors, and quotes wherever YAML 1.1 or 1.2 would read a text as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # With a line break only double quotes keep the text on one line, out of reach of the closing `---`. PyYAML itself
    # quotes what YAML 1.1 would misread (`no`), but not what 1.2 would (`1e-5`).
    style = '"' if "\n" in text else "'" if core_scalar(text) != text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _block(data: Mapping[str, Any]) -> str:
    body = yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)
    return f"---\n{body}---\n"


# ---------------------------------------------------------------------------------------------------- escaping


class _Markdown(str):
    """Text that is Markdown already. Everything else is escaped on its way into the card."""


def _escape(text: str) -> _Markdown:
    """`text` on one line as prose or table cell: nothing in it is markup, and addresses are not made links."""
    text = re.sub(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", _public(clean_line(text)))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # At the start of a list item or a paragraph these would open a heading, a rule or a list.
    text = re.sub(r"\A(\d*)(?=[#+-]+(?:\s|\Z)|(?<=\d)[.)](?:\s|\Z))", r"\1\\", text)
    return _Markdown(re.sub(r"(?i)www\.", "www&#46;", text.replace("://", "&#58;//")))


def _code(text: object) -> _Markdown:
    """`text` on one line as a code span; with entities where backticks could not hold it."""
    line = _public(clean_line(str(text))) or "(empty)"
    if not re.search(r"[`|<\\]", line):
        return _Markdown(f"`{line}`")
    entities = (c if c.isalnum() or c in " .-/" or ord(c) > 127 else f"&#{ord(c)};" for c in line)
    return _Markdown(f"<code>{''.join(entities)}</code>")


def _codes(items: Iterable[object]) -> _Markdown:
    return _Markdown(", ".join(map(_code, items)))


def _fence(text: str, info: str) -> _Markdown:
    """`text` as a fenced block that nothing inside can close."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return _Markdown(f"{ticks}{info}\n{text}\n{ticks}")


def _listing(text: str, info: str) -> _Markdown:
    return _fence(_public(clean_text(text)).strip("\n"), info)


def _public(text: str) -> str:
    """`text` with absolute paths cut to their last part: where a file lay on somebody's disk is nobody's business."""
    text = re.sub(r"(?i)file:/{1,3}(?=[^\s/])", "/", text)
    text = re.sub(r"""(['"])(?:~|/|[A-Za-z]:[\\/])[^'"\n]*?([^'"/\\\n]*)[/\\]?\1""", r"\1\2\1", text)
    start, part = r"""(?<![^\s='"(\[,])(?:~|[A-Za-z]:)?""", r"""[^\s'"<>|,;()/\\]"""
    return re.sub(rf"{start}(?:/|(?<=:)\\)(?:{part}+[/\\])*({part}+)[/\\]?", r"\1", text)


def _finish(value: Any) -> _Markdown:
    return value if isinstance(value, _Markdown) else _escape(str(value))


# ---------------------------------------------------------------------------------------------------- rendering


def render_card(facts: CardFacts) -> str:
    """README.md for these facts. Raises RecipeError as `front_matter` does, ValueError for a sum that is not one."""
    data = front_matter(facts)
    base = facts.base_model
    versions = dict(facts.versions)
    quote, quote_notes = _quoted(facts.parent.body)
    inherited, left_out = carried(facts.parent)
    licence = _licence(facts)
    taken = [key for key in inherited if key in facts.parent.metadata and key in data]
    return _template().render(
        facts=facts,
        data=data,
        front_matter=_Markdown(_block(data)),
        name=_short_name(facts.name),
        source=_Markdown(f"[{_code(base)}]({_address(facts)})") if base else _code(_short_name(facts.source_name)),
        version=versions.get("quantkit", __version__),
        licence=licence,
        taken=["license", *taken] if licence.named_by == "parent" else taken,
        grandparents=[x for x in _listed(facts.parent.metadata.get("base_model", [])) if is_hub_id(x) and x != base],
        notes=[*facts.parent.problems, *left_out, *quote_notes],
        quote=_fence(quote, "text") if quote else None,
        stale=_stale_claims(facts.parent.body, facts.config),
        # A name fit for a folder or a repository is a better stand-in than none; a title is neither.
        variable=_Markdown(f'"{facts.name if is_hub_id(facts.name) else "path/or/repo-id"}"'),
        needs=_needs(facts),
        source_bits=8 * facts.source_bytes / facts.parameters if facts.parameters else None,
        percent=_percent,
        count=_count,
        sha256=_sum,
        papers=_papers(facts.tags),
    )


def _papers(tags: Iterable[str]) -> list[tuple[str, str]]:
    """Title and arXiv number of the papers behind these tags."""
    return list(dict.fromkeys(PAPERS[tag.lower()] for tag in tags if tag.lower() in PAPERS))


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        finalize=_finish,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # that is for HTML; `finalize` escapes for Markdown
    )
    environment.filters.update(code=_code, codes=_codes, listing=_listing, size=_size, big=_big)
    return environment.get_template("card.md.j2")


def _address(facts: CardFacts) -> str:
    commit = _commit(facts)
    return f"https://huggingface.co/{facts.base_model}" + (f"/tree/{commit}" if commit else "")


def _short_name(text: str) -> str:
    """A Hub id as it is; of anything else the last part, in case a caller gives a path."""
    line = clean_line(text)
    return line if is_hub_id(line) else re.split(r"[/\\]", line.rstrip("/\\"))[-1] or "model"


def _needs(facts: CardFacts) -> list[str]:
    names = ["transformers", "torch", "accelerate"]
    if "bitsandbytes" in facts.tags:
        names.append("bitsandbytes")
    own = [f"quantkit>={__version__}"] if facts.loader == "quantkit" else []
    return own + [f"{name}>={FLOORS[name]}" for name in names]


def _percent(value: float) -> _Markdown:
    """Always ten characters."""
    return _Markdown(f"{min(value, 99.99999) * 100:8.3f} %" if math.isfinite(value) else "     n/a %")


def _count(value: int) -> _Markdown:
    """Always fifteen characters, up to a trillion."""
    return _Markdown(f"{value:>15,d}")


def _sum(value: str) -> _Markdown:
    """Always sixty-six characters."""
    if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise ValueError(f"not a SHA-256 sum: {value!r}")
    return _Markdown(f"`{value.lower()}`")


def _size(nbytes: int) -> str:
    """In decimal units, as the Hub shows sizes."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if nbytes >= 1000**power:
            return f"{nbytes / 1000**power:.2f} {unit}"
    return f"{nbytes} bytes"


def _big(number: int) -> str:
    for power, word in ((3, "billion"), (2, "million")):
        if number >= 1000**power:
            return f"{number / 1000**power:.2f} {word}"
    return f"{number:,}"


def _quoted(body: str) -> tuple[str, list[str]]:
    """The parent's text as it is quoted, and notes on what the quotation leaves out."""
    notes = []
    lines = clean_text(body).split("\n")
    kept = [line for line in lines if "[more information needed]" not in line.lower()]
    if len(kept) < len(lines):
        notes.append("lines that its authors had left to be filled in are not quoted")
    text = "\n".join(kept).strip("\n")
    if len(text) > MAX_QUOTE:
        cut = text.rfind("\n", MAX_QUOTE // 2, MAX_QUOTE)
        notes.append(f"the quotation ends after {MAX_QUOTE // 1000} thousand of its {len(text):,} characters")
        text = text[: cut if cut > 0 else MAX_QUOTE]
    return text, notes


def _stale_claims(body: str, config: Mapping[str, Any]) -> list[str]:
    """What the parent's text says and the written configuration does not bear out."""
    claims = []
    inner = config.get("text_config")
    text_config = inner if isinstance(inner, Mapping) else config
    layers = text_config.get("layer_types")
    slides = (bool(text_config.get("sliding_window")) and text_config.get("use_sliding_window") is not False) or (
        isinstance(layers, list) and "sliding_attention" in layers
    )
    if config and not slides and re.search(r"sliding[-\s]+window", body, re.IGNORECASE):
        claims.append(
            "The parent's card speaks of sliding-window attention. The configuration of this model sets no sliding "
            "window, so every layer attends to the whole context."
        )
    if re.search(r"load_in_[48]bit|BitsAndBytesConfig", body):
        claims.append(
            "The parent's card shows how to quantize while loading (load_in_4bit or similar). That is for the parent; "
            "this copy is quantized already and is loaded as shown above."
        )
    return claims
