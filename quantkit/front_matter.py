"""The card's first block, which the Hub reads: licence, parent, languages, tags; checked without a network.

The licence is the parent's. A recipe may name it where the parent does not, and may never change it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from quantkit.card_facts import CardFacts
from quantkit.errors import RecipeError
from quantkit.parent_card import (
    HUB_LICENCES,
    carried,
    carried_tags,
    clean_line,
    clean_text,
    core_scalar,
    is_hub_id,
    is_language,
    licence_id,
    licences_mentioned,
    unique,
)

# Of what loads a folder that transformers does not.
LIBRARIES = {"exllamav2": "exllamav2", "gptqmodel": "gptqmodel", "auto-gptq": "auto-gptq"}
RELATIONS = ("quantized", "finetune", "adapter", "merge")


@dataclass(frozen=True)
class Licence:
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


def licence_of(facts: CardFacts) -> Licence:
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
            return Licence(("unknown",), None, None, "nobody", mentioned)
        return Licence((override,), None, None, "recipe", mentioned)

    # The Hub refuses ids outside its list; `other` with a name says the same thing in its terms.
    strange = [name for name in named if name not in HUB_LICENCES]
    ids = unique("other" if name in strange else name for name in named)
    title = meta.get("license_name")
    name = (clean_line(title)[:100].strip() or None) if isinstance(title, str) else None
    if "other" in ids and not name:
        name = re.sub(r"[^a-z0-9.]+", "-", "-".join(strange).lower()).strip("-")[:100] or "not-named-by-the-parent"
    return Licence(tuple(ids), name, _licence_link(facts, meta.get("license_link")), "parent", mentioned)


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
            return f"https://huggingface.co/{facts.base_model}/blob/{commit_of(facts) or 'main'}/{link}"
    return None


def commit_of(facts: CardFacts) -> str | None:
    """The revision if it is a commit: a branch moves, and other text cannot stand in a link."""
    return facts.revision if facts.revision and re.fullmatch(r"[0-9a-f]{40}", facts.revision) else None


# ---------------------------------------------------------------------------------------------------- front matter


def front_matter(facts: CardFacts) -> dict[str, Any]:
    """The card's metadata. Raises RecipeError if the recipe's part of it is one that the Hub would refuse."""
    licence = licence_of(facts)
    inherited, _ = carried(facts.parent)
    data: dict[str, Any] = {
        "base_model": facts.base_model,
        "base_model_relation": "quantized" if facts.base_model else None,
        "license": licence.ids[0] if len(licence.ids) == 1 else list(licence.ids),
        "license_name": licence.name,
        "license_link": licence.link,
        "language": inherited.pop("language", None),
        "language_bcp47": inherited.pop("language_bcp47", None),
        "pipeline_tag": inherited.pop("pipeline_tag"),
        "library_name": LIBRARIES.get(facts.loader, "transformers") if facts.layout == "hf" else None,
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
    if "base_model" in data and not all(map(is_hub_id, listed(data["base_model"]))):
        problems.append(f"base_model is not a repository id of the Hub: {data['base_model']!r}")
    if data.get("base_model_relation", "quantized") not in RELATIONS:
        problems.append(f"base_model_relation must be one of {', '.join(RELATIONS)}")
    licences = listed(data.get("license", []))
    if not licences:
        problems.append("license is missing; write 'unknown' if it is not known")
    known = sorted(HUB_LICENCES)  # a list: what is looked up may be unhashable
    problems += [f"license is not one of the Hub's ids: {name!r}" for name in licences if name not in known]
    if "other" in licences and not data.get("license_name"):
        problems.append("license 'other' needs license_name")
    for code in [*listed(data.get("language", [])), *listed(data.get("language_bcp47", []))]:
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
    if not all(map(is_hub_id, listed(data.get("datasets", [])))):
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
        block = yaml_block(data)
        match = re.match(r"(\s*---\n)([\S\s]*?)(\n---[ \t]*(\n|$))", block)
        sound = match is not None and match.end() == len(block) and yaml.safe_load(match[2]) == dict(data)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        return [f"it cannot be written as YAML ({clean_line(str(error))[:80]})"]
    return [] if sound else ["it is not read back from YAML as it was written"]


def listed(value: Any) -> list[Any]:
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


def yaml_block(data: Mapping[str, Any]) -> str:
    body = yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)
    return f"---\n{body}---\n"
