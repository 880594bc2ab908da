"""The model card (README.md) of a written folder: facts in, Markdown out.

Three rules hold it together:

- everything that is not written here is escaped by default (`_finish`), so no name, tag or id can act as Markdown,
  HTML or front matter; the parent's card is quoted as inert text;
- measured values have a fixed width, so that the size of the file is known before anything is measured: cards that
  differ only in error figures, counts of non-finite weights or SHA-256 sums have the same number of bytes;
- what is not known is said in words ("not evaluated"), never left as an empty placeholder.

Source of the conventions: the Hub's model card documentation and huggingface_hub 2.4.0, which the tests use as the
reader; here it would cost 0.2 s of import, so the front matter is written with PyYAML.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2

from quantkit.card_facts import CardFacts, ErrorRow, FileRow
from quantkit.front_matter import commit_of, front_matter, licence_of, listed, validate_front_matter, yaml_block
from quantkit.parent_card import (
    ParentCard,
    carried,
    clean_line,
    clean_text,
    is_hub_id,
    read_parent_card,
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
# The floors of pyproject.toml (a test compares them): nothing older was tried.
FLOORS = {
    "transformers": "5.0",
    "torch": "2.6",
    "accelerate": "1.1",
    "bitsandbytes": "0.49",
    "gptqmodel": "7.0",
    "optimum": "2.0",
    "compressed-tensors": "0.17",
}
# The last set that auto-gptq imports with; tests/interop/requirements has it whole.
AUTO_GPTQ = ("auto-gptq==0.7.1", "transformers==4.45.2", "optimum==1.23.3", "accelerate==0.34.2", "peft==0.13.2")
# Tag -> the paper that describes the method.
PAPERS = {
    "nf4": ("QLoRA: Efficient Finetuning of Quantized LLMs", "2305.14314"),
    "fp4": ("QLoRA: Efficient Finetuning of Quantized LLMs", "2305.14314"),
    "gptq": ("GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", "2210.17323"),
    "wanda": ("A Simple and Effective Pruning Approach for Large Language Models", "2306.11695"),
    "sparsegpt": ("SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", "2301.00774"),
    "owl": (
        "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
        "2310.05175",
    ),
    "int8": ("LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", "2208.07339"),
}


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
    licence = licence_of(facts)
    taken = [key for key in inherited if key in facts.parent.metadata and key in data]
    kind = "quantized" if facts.bits is not None else "converted" if facts.pruning is None else "pruned"
    return _template(kind).render(
        facts=facts,
        data=data,
        front_matter=_Markdown(yaml_block(data)),
        name=_short_name(facts.name),
        source=_Markdown(f"[{_code(base)}]({_address(facts)})") if base else _code(_short_name(facts.source_name)),
        version=versions.get("quantkit", __version__),
        licence=licence,
        taken=["license", *taken] if licence.named_by == "parent" else taken,
        grandparents=[x for x in listed(facts.parent.metadata.get("base_model", [])) if is_hub_id(x) and x != base],
        notes=[*facts.parent.problems, *left_out, *quote_notes],
        quote=_fence(quote, "text") if quote else None,
        stale=_stale_claims(facts.parent.body, facts.config, quantized=facts.bits is not None),
        # A name fit for a folder or a repository is a better stand-in than none; a title is neither.
        variable=_Markdown(f'"{facts.name if is_hub_id(facts.name) else "path/or/repo-id"}"'),
        needs=_needs(facts),
        has_tokenizer=any("token" in row.name or row.name == "tekken.json" for row in facts.files),
        pickled=any(row.name.endswith(".pth") for row in facts.files),
        length=_Markdown(f" --max-model-len {facts.context}" if type(facts.context) is int else ""),
        language=_language(facts),
        source_bits=8 * facts.source_bytes / facts.parameters if facts.parameters else None,
        percent=_percent,
        count=_count,
        sha256=_sum,
        papers=_papers(facts.tags),
    )


def _language(facts: CardFacts) -> str:
    """Of the summary: what the recipe says, or the one language that the parent names, if there is a template in it."""
    if facts.language is not None:
        return facts.language
    named = {str(code).lower().split("-")[0] for code in listed(facts.parent.metadata.get("language", []))}
    return named.pop() if named in ({"fr"}, {"ja"}) else "en"


def _papers(tags: Iterable[str]) -> list[tuple[str, str]]:
    """Title and arXiv number of the papers behind these tags."""
    return list(dict.fromkeys(PAPERS[tag.lower()] for tag in tags if tag.lower() in PAPERS))


@functools.cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        finalize=_finish,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # that is for HTML; `finalize` escapes for Markdown
    )
    environment.filters.update(code=_code, codes=_codes, listing=_listing, size=_size, big=_big, french=_french)
    return environment.get_template(f"{name}.md.j2")


def _address(facts: CardFacts) -> str:
    commit = commit_of(facts)
    return f"https://huggingface.co/{facts.base_model}" + (f"/tree/{commit}" if commit else "")


def _short_name(text: str) -> str:
    """A Hub id as it is; of anything else the last part, in case a caller gives a path."""
    line = clean_line(text)
    return line if is_hub_id(line) else re.split(r"[/\\]", line.rstrip("/\\"))[-1] or "model"


def _needs(facts: CardFacts) -> list[str]:
    if facts.loader == "auto-gptq":
        return list(AUTO_GPTQ)
    names = ["transformers", "torch", "accelerate"]
    names += [name for name in ("bitsandbytes", "compressed-tensors") if name in facts.tags]
    if "gptq" in facts.tags and "compressed-tensors" not in facts.tags:
        names += ["gptqmodel"] if facts.loader == "gptqmodel" else ["gptqmodel", "optimum"]
    own = [f"quantkit>={__version__}"] if facts.loader == "quantkit" else []
    return own + [f"{name}>={FLOORS[name]}" for name in names]


def _percent(value: float | None) -> _Markdown:
    """Always ten characters."""
    if value is None or not math.isfinite(value):
        return _Markdown("     n/a %")
    return _Markdown(f"{min(value, 99.99999) * 100:8.3f} %")


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


def _french(text: str) -> _Markdown:
    """Numbers and sizes as they are written in French. A number has as many bytes as before, so no thin space."""
    found = str(text).replace(",", " ").replace(".", ",")
    for unit, word in (("bytes", "octets"), ("kB", "ko"), ("MB", "Mo"), ("GB", "Go"), ("TB", "To")):
        found = found.replace(unit, word)
    return _Markdown(found)


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


def _stale_claims(body: str, config: Mapping[str, Any], *, quantized: bool) -> list[str]:
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
    if quantized and re.search(r"load_in_[48]bit|BitsAndBytesConfig", body):
        claims.append(
            "The parent's card shows how to quantize while loading (load_in_4bit or similar). That is for the parent; "
            "this copy is quantized already and is loaded as shown above."
        )
    return claims
