"""What to do, as data: a frozen Recipe, read from YAML, from options, or from both.

Order of precedence: the file, then `--set`, then options. Every error names the key, its line, and the nearest key
that exists.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from quantkit.calibration.data import Calibration
from quantkit.errors import RecipeError
from quantkit.layouts.base import NativeOptions
from quantkit.methods import METHODS, find_method
from quantkit.methods.base import Method, Mixed, Mixing, Parameters
from quantkit.pruning import Prune

DEPTH = 2  # of a recipe: keys in blocks
SHARD_SIZE = 5 * 10**9
# Keys of a quantize block that say that linears differ in bits, whatever their number.
MIXING = frozenset(Mixed.model_fields) - {"bits"}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(value: object) -> int:
    """Bytes from an int or from "5GB", "512MiB", "1.5 GB"; ValueError otherwise."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(value).upper())
    if not match:
        raise ValueError(f"{value!r} is not a size; write bytes, or a number with KB, MB, GB, MiB or GiB")
    try:
        return int(float(match[1]) * _UNITS[match[2]])
    except OverflowError:
        raise ValueError("the size is beyond all measure") from None


Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Quantize(_Block):
    """`quantize:`, which method, and which modules it leaves alone. `params` holds the method's own keys."""

    method: str = "bnb"
    bits: int | float = 4
    skip: tuple[str, ...] = ()
    params: Parameters

    @property
    def implementation(self) -> Method[Any]:
        found = find_method(self.method, self.bits, mixed=isinstance(self.params, Mixed))
        assert found is not None
        return found


class Convert(_Block):
    """`convert:`, which layout to write, and how. `profile` is for whom a mistral-src folder is written: today's
    programs, or the reference program of September 2023."""

    to: Literal["hf", "mistral"]
    profile: Literal["current", "one-file-ref-2023"] = "current"
    weights_format: Literal["safetensors", "pth"] | None = None
    tokenizer: bool = True
    check: bool = True

    @model_validator(mode="after")
    def _native_only(self) -> Convert:
        if self.to == "hf" and self.profile != "current":
            raise ValueError("profile is for a folder in the mistral layout")
        if self.to == "hf" and self.weights_format == "pth":
            raise ValueError("weights_format pth is for a folder in the mistral layout")
        return self


class Native(_Block):
    """`native:`, what the params.json of a source leaves unsaid, and what of the source is read."""

    rope_theta: Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False, strict=False)] | None = None
    context: int | None = Field(None, ge=1, lt=2**31)
    text_only: bool = False

    @property
    def options(self) -> NativeOptions:
        return NativeOptions(self.rope_theta, self.context, self.text_only)


class Card(_Block):
    """`card:`, what only the publisher knows. language: a summary in it stands before the English text; None is that of
    the parent, if its card names one of these alone."""

    base_model: str | None = None
    license: str | None = None
    quantized_by: str | None = None
    language: Literal["en", "fr", "ja"] | None = None


class Resources(_Block):
    """`resources:`, how to run. Only `device` can change the output: a GPU rounds a few weights in a million apart."""

    device: str = "cpu"
    threads: int | None = Field(None, ge=1, le=256)
    max_memory: Size | None = None


class Recipe(_Block):
    source: str
    revision: str | None = None
    output: str | None = None
    prune: Prune | None = None
    quantize: Quantize | None
    convert: Convert | None = None
    native: Native = Native()
    calibration: Calibration | None = None
    shard_size: Size | None = None
    allow_nonfinite: bool = False
    card: Card = Card()
    resources: Resources = Resources()

    def canonical(self) -> dict[str, Any]:
        """The part of the recipe that determines the output's bytes, as plain data with stable keys."""
        table: dict[str, Any] = {}
        if self.prune is not None:
            table["prune"] = self.prune.canonical()
        if (quantize := self.quantize) is not None:
            table["quantize"] = {
                "method": quantize.method,
                "bits": quantize.bits,
                **quantize.params.model_dump(),
                "skip": list(quantize.skip),
            }
        if self.convert is not None:
            table["convert"] = self.convert.model_dump(exclude_none=True)
        if (native := self.native.model_dump(exclude_defaults=True)) != {}:
            table["native"] = native
        if self.calibration is not None:
            table["calibration"] = self.calibration.model_dump(exclude_none=True)
        return table | {
            "shard_size": self.largest_file,
            "allow_nonfinite": self.allow_nonfinite,
            "card": self.card.model_dump(),
            "device": self.resources.device.partition(":")[0],  # which of several alike is no matter
        }

    @property
    def needs(self) -> Literal["nothing", "norms", "hessian"]:
        """What has to be known of the linears' inputs."""
        wanted = {
            self.prune.needs if self.prune is not None else "nothing",
            self.quantize.implementation.needs if self.quantize is not None else "nothing",
        }
        return "hessian" if "hessian" in wanted else "norms" if "norms" in wanted else "nothing"

    @property
    def mixing(self) -> Mixing[Any] | None:
        """How bits are spread over linears, if that is to be done."""
        return None if self.quantize is None else self.quantize.implementation.mixing

    @property
    def largest_file(self) -> int | None:
        """Bytes of tensors in a weight file at most: 5 GB if nothing is said. None, no limit, for a native folder:
        Mistral's own programs read a single file."""
        native = self.convert is not None and self.convert.to == "mistral"
        return self.shard_size or (None if native else SHARD_SIZE)

    def to_yaml(self, source: str, revision: str | None) -> str:
        """A recipe file that reproduces this run: the source by the name given, no path of this machine."""
        table = {"source": source, **({"revision": revision} if revision else {}), **self.canonical()}
        device = table.pop("device")
        if device != "cpu":
            table["resources"] = {"device": device}
        table["card"] = {k: v for k, v in table["card"].items() if v is not None}
        if not table.get("quantize", {}).get("skip", True):
            del table["quantize"]["skip"]
        if self.mixing is not None:  # what need not be said
            usual = {key: field.get_default(call_default_factory=True) for key, field in Mixed.model_fields.items()}
            kept = {k: v for k, v in table["quantize"].items() if k not in MIXING or v != usual[k]}
            table["quantize"] = kept
        if self.shard_size is None:
            del table["shard_size"]
        table = {k: v for k, v in table.items() if v not in ({}, False)}
        return yaml.safe_dump(table, sort_keys=False, allow_unicode=True)


_BLOCKS: dict[str, type[BaseModel]] = {
    "prune": Prune, "convert": Convert, "native": Native, "calibration": Calibration, "card": Card,
    "resources": Resources,
}  # fmt: skip


class _Fail(Protocol):
    def __call__(self, what: str, keys: tuple[str, ...], hint: str = "") -> RecipeError: ...


def load_recipe(
    path: Path | None,
    assignments: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    *,
    verb: Literal["quantize", "convert", "prune"] | None = None,
) -> Recipe:
    """A Recipe from a YAML file (or none), `--set key=value` assignments and options given as {dotted key: value}.
    `verb` is what it must do; None leaves that to the recipe.

    Raises RecipeError. Options that are None were not given.
    """
    table: dict[str, Any] = {}
    lines: dict[tuple[str, ...], int] = {}
    if path is not None:
        table, lines = _read_yaml(path)
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {assignment!r} is not KEY=VALUE", hint="for example --set quantize.bits=8")
        try:
            _put(table, key.strip(), yaml.safe_load(value))
        except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that no calendar has
            raise RecipeError(f"--set {key}: the value is not YAML", where=value, hint="quote it") from None
    for key, value in (options or {}).items():
        if value is not None:
            _put(table, key, value)
    where = str(path) if path else ""
    if verb == "quantize":
        table.setdefault("quantize", {})
    elif verb == "convert" and "convert" not in table:
        raise RecipeError("which layout is to be written?", where=where, hint="add --to hf or --to mistral")
    elif verb == "prune":
        table.setdefault("prune", {})
    recipe = build_recipe(table, where=where, lines=lines)
    if verb in ("convert", "prune") and recipe.quantize is not None:
        raise RecipeError("the recipe quantizes, too", where=where, hint="do it with `quantkit run` or `quantize`")
    if verb == "convert" and recipe.prune is not None:
        raise RecipeError("the recipe prunes, too", where=where, hint="do it with `quantkit run` or `prune`")
    return recipe


def build_recipe(
    table: Mapping[str, Any], *, where: str = "", lines: Mapping[tuple[str, ...], int] | None = None
) -> Recipe:
    """Validates plain data into a Recipe; RecipeError names the key (and its line, where `lines` knows it)."""

    def fail(what: str, keys: tuple[str, ...], hint: str = "") -> RecipeError:
        line = (lines or {}).get(keys)
        place = f"{where}, line {line}" if where and line else where
        return RecipeError(what, where=place, hint=hint)

    table = dict(table)
    for key in ("quantize", "convert", "prune"):
        if not isinstance(table.get(key, {}), dict):
            raise fail(f"{key} is not a block of keys", (key,), f"write `{key}:` and indent its keys below")
    implementation: Method[Any] | None = None
    if "quantize" not in table and not table.keys().isdisjoint(("convert", "prune")):
        table["quantize"] = None
    else:
        implementation, block = _method(table.get("quantize", {}), fail)
    try:
        if implementation is not None:
            table["quantize"] = _quantize(implementation, block, fail)
        for key, model in _BLOCKS.items():
            if isinstance(table.get(key), dict):
                table[key] = model.model_validate(table[key])
        converted = table.get("convert")
        if implementation is not None and isinstance(converted, Convert) and converted.to == "mistral":
            raise fail(
                f"{implementation.name} weights have no form in the mistral layout: no program would read them there",
                ("convert", "to"), "leave out either the quantize block or the convert block",
            )  # fmt: skip
        prune = table.get("prune")
        calibrated = implementation is not None and (
            implementation.needs != "nothing" or implementation.mixing is not None
        )
        calibrated |= isinstance(prune, Prune) and prune.needs != "nothing"
        if table.get("calibration") is not None and not calibrated:
            named = "a conversion" if implementation is None else f"method {implementation.name}"
            named = "magnitude pruning" if isinstance(prune, Prune) and implementation is None else named
            raise fail(f"{named} looks at no text", ("calibration",), "leave --calib and the calibration block out")
        if calibrated:
            table["calibration"] = table.get("calibration") or Calibration()
        if table.get("allow_nonfinite") is True and table["quantize"] is None and prune is None:
            raise fail(
                "allow_nonfinite is about quantizing; a conversion copies NaN as it is", ("allow_nonfinite",),
                "leave it out",
            )  # fmt: skip
        return Recipe.model_validate(table)
    except ValidationError as e:
        error = e.errors()[0]
        title = e.title
    prefix: tuple[str, ...] = ()
    if title == "Quantize" or (implementation is not None and title == implementation.params.__name__):
        prefix = ("quantize",)
    prefix = next(((key,) for key, model in _BLOCKS.items() if model.__name__ == title), prefix)
    keys = (*prefix, *(str(part) for part in error["loc"]))
    dotted = ".".join(keys)
    if error["type"] == "extra_forbidden":
        models: list[type[BaseModel]] = [Recipe, *_BLOCKS.values()]
        known = next((m for m in models if m.__name__ == title), None)
        names, other = list(known.model_fields) if known is not None else [], []
        if known is None and implementation is not None:
            names = [*implementation.params.model_fields, "method", "bits", "skip"]
            other = [n for m in METHODS.values() for n in m.params.model_fields]
        if keys[-1] in other:
            what = "this"
            if implementation is not None:
                what = f"{implementation.name} with {implementation.bits or 'mixed'} bits"
            raise fail(f"{keys[-1]} does not apply to {what}", keys, "leave it out")
        raise fail(f"unknown key {dotted!r}", keys, _did_you_mean(keys[-1], names))
    if error["type"] == "missing":
        raise fail(f"{dotted} is missing", keys, "name it in the recipe or on the command line")
    message, _, hint = str(error["msg"]).removeprefix("Value error, ").partition("\n")
    if not hint:
        hint = f"it is {reprlib.repr(error['input'])}" if error["loc"] else "leave it out"
    raise fail(f"{dotted}: {message[0].lower()}{message[1:]}", keys, hint)


def _method(block: Mapping[str, Any], fail: _Fail) -> tuple[Method[Any], dict[str, Any]]:
    """The method that a quantize block names, and what the block says besides."""
    block = dict(block)
    method, bits = block.pop("method", "bnb"), block.pop("bits", 4)
    names = sorted({name for name, _ in METHODS})
    if method not in names:
        near = _did_you_mean(method if isinstance(method, str) else "", names)
        raise fail(f"unknown method {reprlib.repr(method)}", ("quantize", "method"), near)
    widths = sorted(b for name, b in METHODS if name == method and b)
    if isinstance(bits, float) and bits in widths:
        bits = int(bits)
    uniform = bits in widths and type(bits) is int and block.keys().isdisjoint(MIXING)
    number = type(bits) in (int, float) or not widths
    if (mixed := METHODS.get((method, 0))) is not None and number and not uniform:
        return mixed, {**block, "bits": float(bits) if type(bits) is int else bits}
    if type(bits) is not int or bits not in widths:
        choice = " or ".join(map(str, widths))
        raise fail(
            f"method {method} has no {reprlib.repr(bits)}-bit form", ("quantize", "bits"), f"use --bits {choice}"
        )
    return METHODS[method, bits], block


def _quantize(method: Method[Any], block: dict[str, Any], fail: _Fail) -> Quantize:
    skip = block.pop("skip", ())
    skip = [skip] if isinstance(skip, str) else skip
    params = method.params.model_validate(block)
    if not isinstance(skip, (list, tuple)):
        raise fail("skip is not a list of patterns", ("quantize", "skip"), "for example [lm_head, layers.0]")
    bits = params.bits if isinstance(params, Mixed) else method.bits
    return Quantize.model_validate({"method": method.name, "bits": bits, "skip": tuple(skip), "params": params})


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _put(table: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for key in path:
        inner = table.setdefault(key, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"{key} is not a block, so {dotted} cannot be set", hint="write its keys below it")
        table = inner
    table[last] = value


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    try:
        text = path.read_text("utf-8")
    except OSError as e:
        raise RecipeError(f"the recipe cannot be read: {e.strerror}", where=str(path), hint="check the path") from None
    except UnicodeDecodeError:
        raise RecipeError("the recipe is not UTF-8 text", where=str(path), hint="save it as UTF-8") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        table = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as e:
        mark = getattr(e, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise RecipeError(
            f"the recipe is not valid YAML: {getattr(e, 'problem', None) or e}", where=place,
            hint="a recipe is lines of `key: value`, inner keys indented by spaces",
        ) from None  # fmt: skip
    if not isinstance(table, dict):
        raise RecipeError("the recipe is not a table of keys", where=str(path), hint="begin with `source: …`")
    lines: dict[tuple[str, ...], int] = {}
    _note_lines(node, (), lines, str(path))
    return table, lines


def _note_lines(node: Any, prefix: tuple[str, ...], lines: dict[tuple[str, ...], int], where: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*prefix, str(key.value))
            line = key.start_mark.line + 1
            if path in lines:
                raise RecipeError(
                    f"the key {'.'.join(path)!r} stands twice", where=f"{where}, line {line}", hint="leave one of them"
                )
            lines[path] = line
            if len(path) < DEPTH:  # no further: an alias may lead round in circles
                _note_lines(value, path, lines, where)
