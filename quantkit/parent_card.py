"""The parent's model card: untrusted text, read without ever failing, and what of it a derivative may repeat.

A card is Markdown whose first block, between two `---` lines, is YAML. In the wild that block is missing, broken, not a
mapping, or flattened into prose by whoever scraped it. Reading never raises: whatever cannot be used becomes a line in
`problems`, which our own card then shows.

The YAML is composed with PyYAML's safe loader and turned into plain data here, by the YAML 1.2 core rules: `no` is
Norwegian and not False, `2024-01-01` is text, aliases and tags are refused, a key given twice is noticed.

Sources: the Hub's block pattern and repository id rules as in huggingface_hub 2.4.0 (`repocard.py`, `_validators.py`);
licence ids as the Hub's validator lists them (huggingface_hub issue 4218, May 2026, and hub-docs).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

MAX_CARD = 1_000_000  # characters; more than a hundred times an ordinary card
MAX_BLOCK = 64_000  # characters of front matter: PyYAML's scanner is slow, and nobody's metadata is longer
MAX_DEPTH = 24
# Leading blank lines are allowed by the Hub; the closing line may end the file.
FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\n(.*?)(?:\n|(?<=\n))---[ \t]*(?:\n|\Z)", re.DOTALL)

HUB_LICENCES = frozenset(
    """
    apache-2.0 mit openrail openrail++ bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
    gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 lgpl-lr isc h-research intel-research lppl-1.3c ms-pl apple-ascl
    apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other
    """.split()  # noqa: SIM905 (a list of eighty quoted strings is harder to read and to compare)
)

# C0 and C1 controls, text-direction marks and overrides, byte order marks, tag characters (invisible text), surrogates
# and non-characters. None of them carries meaning in a card; several hide or reorder what a reader sees.
_UNWANTED = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\ufffe\uffff\U000e0000-\U000e007f]"
)
_LINE_ENDS = re.compile("\r\n|[\r\x85\u2028\u2029]")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060-\u2064]")
_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?:{_NAME}/)?{_NAME}")
_LANGUAGE = re.compile(r"[a-z]{2,3}|multilingual|code")
_REGION = re.compile(r"([A-Za-z]{2,3})(?:[-_][A-Za-z0-9]{2,8}){1,3}")
_SLUG = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")


@dataclass(frozen=True)
class ParentCard:
    """What a parent's card says. `metadata` holds plain data only (text, numbers, booleans, lists, mappings).

    `origin` tells where the metadata was found: a sound `front matter`, a `broken` one (a few simple lines may have
    been saved from it), lines of `prose`, or `none`.
    """

    metadata: Mapping[str, Any]
    body: str
    origin: Literal["front matter", "prose", "broken", "none"]
    problems: tuple[str, ...]


# ---------------------------------------------------------------------------------------------------- text


def clean_text(text: str) -> str:
    """`text` with `\\n` line ends and without control, text-direction and other unprintable characters."""
    return _UNWANTED.sub("", _LINE_ENDS.sub("\n", text))


def clean_line(text: str) -> str:
    """`text` on one line: `clean_text`, invisible characters dropped, white space made single spaces."""
    return " ".join(_INVISIBLE.sub("", clean_text(text)).split())


def is_hub_id(text: object) -> bool:
    """Whether `text` can be a repository id of the Hub (`name` or `owner/name`), by huggingface_hub's rules."""
    return (
        isinstance(text, str)
        and _HUB_ID.fullmatch(text) is not None
        and "--" not in text
        and ".." not in text
        and not text.endswith(".git")
    )


def is_language(text: object, *, region: bool = False) -> bool:
    """Whether `text` has the shape of an ISO 639 code (or is `multilingual` or `code`), with a region if allowed."""
    if not isinstance(text, str):
        return False
    return _LANGUAGE.fullmatch(text) is not None or (region and _REGION.fullmatch(text) is not None)


def licence_id(raw: str) -> str:
    """A licence in the Hub's spelling: `Apache 2.0` is `apache-2.0`. Not every result is one that the Hub knows."""
    return re.sub(r"[\s_]+", "-", clean_line(raw).lower())


# ---------------------------------------------------------------------------------------------------- reading


def read_parent_card(text: str | None) -> ParentCard:
    """Read a card as found. Never raises; see `ParentCard.origin` and `.problems` for what could not be used."""
    problems: list[str] = []
    if text is None or not text.strip("\ufeff \t\r\n"):
        return ParentCard({}, "", "none", ("the parent has no model card",))
    text = text.removeprefix("\ufeff")
    if len(text) > MAX_CARD:
        problems.append(f"the card is longer than {MAX_CARD:,} characters; the rest was not read")
        text = text[:MAX_CARD]
    if _UNWANTED.search(text):
        problems.append("control or text-direction characters were removed")
    text = _without_page_text(clean_text(text), problems)

    block, body, closed = _split(text)
    metadata: dict[str, Any] = {}
    origin: Literal["front matter", "prose", "broken", "none"] = "none"
    if block is None:
        problems.append("the card has no front matter")
        metadata = _recover(_flattened(text.split("\n")), _PLAUSIBLE, problems)
        if metadata:
            origin = "prose"
            problems.append("its metadata was recovered from lines of its text: " + ", ".join(metadata))
    else:
        try:
            found = _load(block, problems, closed=closed)
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
            # ValueError and OverflowError: PyYAML lets them out for escapes beyond Unicode and absurd directives.
            # The broken block stays in the body: a reader of the quotation should see what could not be read.
            origin, body = "broken", text
            problems.append(f"the front matter is not sound YAML ({_reason(error)})")
            simple = ("license", "language", "pipeline_tag")
            metadata = _recover(block.split("\n"), {key: _PLAUSIBLE[key] for key in simple}, problems)
            if metadata:
                problems.append("simple lines of it could still be read: " + ", ".join(metadata))
        else:
            if isinstance(found, dict):
                origin, metadata = "front matter", found
            else:
                origin, body = "broken", text
                problems.append("the front matter is not a mapping of keys to values")
    return ParentCard(metadata, body.strip("\n"), origin, tuple(unique(problems)[:20]))


def _split(text: str) -> tuple[str | None, str, bool]:
    """The front matter block or None, the body, and whether the block was closed by a second `---` line."""
    match = FRONT_MATTER.match(text)
    if match:
        return match[1], text[match.end() :], True
    opening = re.match(r"\s*---[ \t]*\n(?=[A-Za-z_][\w-]*:)", text)
    if opening:  # what stands before the first empty line was meant
        return text[opening.end() :].partition("\n\n")[0], text, False
    return None, text, True


def _reason(error: Exception) -> str:
    """One short line of a YAML error; the long form quotes the parent's text."""
    mark = getattr(error, "problem_mark", None)
    place = f", line {mark.line + 2}" if mark is not None else ""  # counted from the `---` line
    return clean_line(str(getattr(error, "problem", None) or "a malformed number or escape"))[:120] + place


class _Loader(yaml.SafeLoader):
    """Refuses aliases (a few of them can stand for terabytes) and deep nesting before either costs anything."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not read here", self.get_mark())
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, "nested too deeply", self.get_mark())
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _load(block: str, problems: list[str], *, closed: bool) -> Any:
    if not closed:
        raise yaml.MarkedYAMLError(problem="it is never closed")
    if len(block) > MAX_BLOCK:
        raise yaml.MarkedYAMLError(problem=f"longer than {MAX_BLOCK:,} characters")
    node = yaml.compose(block, Loader=_Loader)
    return {} if node is None else _plain(node, problems, top=True)


def _plain(node: yaml.Node, problems: list[str], *, top: bool = False) -> Any:
    """A composed node as plain data. A licence given twice keeps every value: we must not choose the milder one."""
    if isinstance(node, yaml.MappingNode):
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = clean_line(str(key_node.value)) if isinstance(key_node, yaml.ScalarNode) else ""
            if not key:
                problems.append("a key of the front matter is not text")
                continue
            value = _plain(value_node, problems)
            if key in data:
                problems.append(f"the key {key[:40]!r} stands twice in the front matter")
                if top and key == "license" and data[key] != value:
                    value = [*_as_list(data[key]), *_as_list(value)]
            data[key] = value
        return data
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, problems) for item in node.value]
    text = clean_text(str(node.value))
    return core_scalar(text) if isinstance(node, yaml.ScalarNode) and node.style is None else text


def core_scalar(text: str) -> str | int | float | bool | None:
    """What an unquoted scalar means by YAML 1.2's core rules, octal and hexadecimal numbers left as text."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text[0] in "tT"
    if re.fullmatch(r"[-+]?[0-9]{1,18}", text):
        return int(text)
    if re.fullmatch(r"[-+]?(?:[0-9]{1,30}\.?[0-9]{0,30}|\.[0-9]{1,30})(?:[eE][-+]?[0-9]{1,2})?", text):
        return float(text)
    return text


def _without_page_text(text: str, problems: list[str]) -> str:
    """`text` without what was scraped along with it from the Hub's page: its foot, masked e-mail addresses."""
    text = re.sub(r"\[email[ \xa0]protected\]", "(e-mail address masked by the web page)", text)
    found = list(re.finditer(r"^[^\w\n]*Downloads last month[^\w\n]*$", text, re.MULTILINE))
    if not found:
        return text
    tail = text[found[-1].start() :].split("\n")
    if len(tail) > 30 or max(map(len, tail)) > 300:
        return text
    problems.append("text of the Hub's page at the end of the card was removed")
    return text[: found[-1].start()]


# ---------------------------------------------------------------------------------------------------- recovery

_KEY_LINE = re.compile(r"([A-Za-z_][\w-]*):(?:[ \t]+(.*?))?[ \t]*")
_ITEM_LINE = re.compile(r"[ \t]*-[ \t]+(\S.*?)[ \t]*")
_FENCE_LINE = re.compile(r" {0,3}(```+|~~~+)")


def _one(check: Any) -> Any:
    return lambda values: values[0] if len(values) == 1 and check(values[0]) else None


def _many(check: Any) -> Any:
    return lambda values: values if values and all(map(check, values)) else None


# Key -> what its values must look like to be believed when they do not stand in YAML.
_PLAUSIBLE: dict[str, Any] = {
    "license": _one(lambda text: licence_id(text) in HUB_LICENCES),
    "license_name": _one(lambda text: _SLUG.fullmatch(text.lower().replace(".", "-")) is not None),
    "license_link": _one(lambda text: re.fullmatch(r"https?://[\w./%#-]+|LICENSE(\.md|\.txt)?", text) is not None),
    "language": _many(is_language),
    "library_name": _one(lambda text: _SLUG.fullmatch(text) is not None),
    "pipeline_tag": _one(lambda text: _SLUG.fullmatch(text) is not None),
    "datasets": _many(is_hub_id),
    "base_model": _one(is_hub_id),
    "tags": _many(lambda text: re.fullmatch(r"[\w.+:-]{1,60}", text) is not None),
}


def _flattened(lines: Sequence[str]) -> list[str]:
    """The lines that look like front matter in prose: runs of `key: value` and `- item` with two known keys or more.

    One known key alone is too little: a text may well contain the line `license: mit` about something else. Fenced
    code is left out for the same reason.
    """
    runs: list[list[str]] = [[]]
    fence = ""
    for line in lines:
        mark = _FENCE_LINE.match(line)
        if mark and (not fence or mark[1].startswith(fence)):
            fence = "" if fence else mark[1]
        if fence or (line.strip() and not _KEY_LINE.fullmatch(line) and not _ITEM_LINE.fullmatch(line)):
            if runs[-1]:
                runs.append([])
        else:
            runs[-1].append(line)

    def known(run: list[str]) -> int:
        return len({match[1] for line in run if (match := _KEY_LINE.fullmatch(line))} & _PLAUSIBLE.keys())

    return [line for run in runs if known(run) >= 2 for line in run]


def _recover(lines: Sequence[str], checks: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Values of the keys in `checks` from lines that are not YAML; a key that says two things is left out."""
    found: dict[str, list[list[str]]] = {}
    items: list[str] | None = None
    for line in lines:
        if match := _KEY_LINE.fullmatch(line):
            items = None
            if match[1] in checks:
                inline = (match[2] or "").split(" #")[0].strip()
                items = [part for part in re.split(r"[\s,]+", inline.strip("[]")) if part] if inline[:1] == "[" else []
                if inline and inline[:1] != "[":
                    items.append(inline)
                found.setdefault(match[1], []).append(items)
        elif items is not None and (match := _ITEM_LINE.fullmatch(line)):
            items.append(match[1])
        elif line.strip():
            items = None
    result: dict[str, Any] = {}
    for key, candidates in found.items():
        unquoted = [[re.sub(r"\A(['\"])(.*)\1\Z", r"\2", value) for value in values] for values in candidates]
        if any(values != unquoted[0] for values in unquoted):
            problems.append(f"the key {key!r} has several values; none was used")
        elif (value := checks[key](unquoted[0])) is not None:
            result[key] = value
    return result


# ---------------------------------------------------------------------------------------------------- carrying over

# Tags that name another file format or number format, or that the Hub derives by itself.
_UNTRUE_TAGS = frozenset(
    """
    conversion mistral-src
    custom_code custom-code gguf ggml gptq gptqmodel autogptq awq autoawq exl2 exl3 exllamav2 exllamav3 mlx bnb
    bitsandbytes nf4 fp4 fp8 nvfp4 mxfp4 int4 int8 llm.int8 llm-int8 w4a16 w8a8 w8a16 hqq aqlm eetq quip quip# spqr
    onnx openvino ctranslate2 tensorrt tensorrt-llm coreml tflite compressed-tensors llmcompressor llm-compressor
    auto-round autoround intel/auto-round torchao quanto optimum-quanto modelopt imatrix marlin quantized quantization
    pruned pruning sparsity sparse wanda sparsegpt magnitude owl
    quantkit llama.cpp llama-cpp pytorch tf jax flax rust safetensors transformers endpoints_compatible
    autotrain_compatible text-generation-inference text-embeddings-inference has_space model-index
    """.split()  # noqa: SIM905
)
_UNTRUE_TAG = re.compile(
    r"(?:base_model|license|region|dataset|deploy|doi|diffusers):.*|\d+([._]\d+)?[-_ ]?(?:bits?|bpw)|i?q\d(_\w+)?"
)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def carried_tags(parent: ParentCard) -> list[str]:
    """The parent's tags that are still true of a quantized copy."""
    tags = (clean_line(tag) for tag in _as_list(parent.metadata.get("tags")) if isinstance(tag, str))
    return [t for t in tags if 0 < len(t) <= 100 and t.lower() not in _UNTRUE_TAGS and not _UNTRUE_TAG.match(t.lower())]


def carried(parent: ParentCard) -> tuple[dict[str, Any], list[str]]:
    """Front matter that a copy takes over from its parent as it is, and notes on what could not be taken over."""
    data: dict[str, Any] = {}
    notes: list[str] = []

    def note_rest(key: str, given: Iterable[Any], kept: int) -> None:
        if len(list(given)) > kept:
            notes.append(f"part of the parent's {key} is malformed and was left out")

    languages = _as_list(parent.metadata.get("language"))
    spelled = [text.strip() for text in languages if isinstance(text, str)]
    kept = [text.lower() for text in spelled if is_language(text.lower(), region=True)]
    if kept:
        # The Hub takes bare codes here and wants regional ones under a key of their own.
        data["language"] = unique(re.split("[-_]", text)[0] for text in kept)
        if regional := [text for text in spelled if _REGION.fullmatch(text)]:
            data["language_bcp47"] = unique(text.replace("_", "-") for text in regional)
    note_rest("language", languages, len(kept))

    tag = parent.metadata.get("pipeline_tag", "text-generation")
    data["pipeline_tag"] = tag if isinstance(tag, str) and _SLUG.fullmatch(tag) else "text-generation"
    note_rest("pipeline_tag", [tag], int(tag == data["pipeline_tag"]))

    datasets = _as_list(parent.metadata.get("datasets"))
    if ids := unique(item for item in datasets if is_hub_id(item)):
        data["datasets"] = ids
    note_rest("datasets", unique(map(str, datasets)), len(ids))

    inference = parent.metadata.get("inference")
    if isinstance(inference, bool) or _is_inference(inference):
        data["inference"] = inference
    elif inference is not None:
        notes.append("the parent's inference settings are malformed and were left out")

    widgets = _as_list(parent.metadata.get("widget"))
    if sound := [widget for item in widgets[:20] if (widget := _widget(item))]:
        data["widget"] = sound
    note_rest("widget", widgets, len(sound))
    return data, notes


def unique(items: Iterable[str]) -> list[str]:
    """`items` in order, each once."""
    return list(dict.fromkeys(items))


def _is_inference(value: Any) -> bool:
    """`{parameters: {name: number, boolean, short text, or list of short texts}}` and nothing else."""
    if not isinstance(value, dict) or value.keys() != {"parameters"} or not isinstance(value["parameters"], dict):
        return False

    def short(item: Any) -> bool:
        return isinstance(item, str) and len(item) <= 500

    return all(
        re.fullmatch(r"[A-Za-z_]\w{0,60}", name)
        and (isinstance(item, (bool, int, float)) or short(item) or (isinstance(item, list) and all(map(short, item))))
        for name, item in value["parameters"].items()
    )


def _widget(value: Any) -> dict[str, Any] | None:
    """The known keys of one example (`text` or `messages`, `example_title`), or None if it is not one."""
    if not isinstance(value, dict):
        return None
    widget = {key: value[key] for key in ("text", "example_title") if isinstance(value.get(key), str)}
    messages = value.get("messages")
    if isinstance(messages, list) and messages:
        if not all(
            isinstance(m, dict) and m.keys() == {"role", "content"} and all(isinstance(v, str) for v in m.values())
            for m in messages
        ):
            return None
        widget["messages"] = messages
    return widget if "text" in widget or "messages" in widget else None


# Only licences with a version: `Gemma` or `Llama3.1` in a text is more often a model than a licence.
_VERSIONED = {name for name in HUB_LICENCES if "." in name and not name.startswith("llama")}
_MENTION = re.compile(
    r"(?<![\w-])(?:"
    + "|".join(re.escape(name).replace(r"\-", r"[-_ .]?") for name in sorted(_VERSIONED, key=len, reverse=True))
    + r"|apache licen[cs]e,? (?:version |v)?2\.0|mit licen[cs]e)(?![\w-])",
    re.IGNORECASE | re.ASCII,
)


def licences_mentioned(body: str) -> tuple[str, ...]:
    """Licences that the text of a card names in prose, as `CC-BY-NC-SA 4.0` or `Apache 2.0`.

    A mention may be about a data set or about another model, so it never becomes our licence; it is shown, and a
    restrictive one forbids to set a milder licence by hand.
    """
    flat = {re.sub(r"[-_ .]", "", name): name for name in HUB_LICENCES}
    found = []
    for match in _MENTION.finditer(body):
        words = match[0].lower()
        name = "apache-2.0" if words.startswith("apache") else "mit" if words.startswith("mit") else words
        found.append(flat[re.sub(r"[-_ .]", "", name)])
    return tuple(unique(found))
