"""`gptq` with a number of bits that linears have together: each has a width and a group size of its own.

In the gptq format what most linears have is the configuration's, and `dynamic` names the others; in compressed-tensors
every kind of linear is a group of the configuration. Linears that readers compute as one are written alike.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from pydantic import Field, field_validator, model_validator

from quantkit.checkpoint.header import TensorSpec
from quantkit.methods import gptq, gptq_config, gptq_format, pack_quantized
from quantkit.methods.base import Array, Decoder, Description, Encoder, Method, Mixed, Mixing, Selection, WeightSpec
from quantkit.methods.gptq import BITS, Gptq
from quantkit.methods.gptq_format import GROUPS
from quantkit.solvers.coded import Coded

_MIX = re.compile(r"([2348])_(32|64|128|-1)")


class MixedGptq(Gptq, Mixed):
    """GPTQ, bits by linear. Without a group size, each linear chooses between 32 and the largest that divides it."""

    bits: float = Field(4.0, gt=0, le=16, description="bits per weight of the linears together, at the most")

    @field_validator("mixes")
    @classmethod
    def _mixes(cls, value: dict[str, str]) -> dict[str, str]:
        for text in value.values():
            if not _MIX.fullmatch(text):
                raise ValueError(f"{text!r} is no form of a linear\nwrite BITS_GROUPSIZE, such as 3_64")
        return value

    @model_validator(mode="after")
    def _natural(self) -> MixedGptq:
        if self.act_order == "group":
            raise ValueError("act_order group is one setting for all linears, which have groups of several sizes here")
        return self

    def own(self, module: str) -> tuple[int, Gptq]:
        """Bits and parameters of a linear whose mix is known."""
        return self.written(self.mixes[module])

    def written(self, mix: str) -> tuple[int, Gptq]:
        bits, _, size = mix.partition("_")
        keys = {key: getattr(self, key) for key in Gptq.model_fields}
        return int(bits), Gptq.model_validate({**keys, "group_size": int(size)})


def _options(params: MixedGptq, spec: WeightSpec) -> tuple[str, ...]:
    """From the cheapest to the best."""
    sizes = [params.group_size] if params.group_size is not None else [_largest(spec.columns), 32]
    return tuple(f"{bits}_{size}" for bits in BITS for size in dict.fromkeys(sizes))


def _largest(columns: int) -> int:
    return next((size for size in GROUPS if columns % size == 0), 32)


def _outputs(spec: WeightSpec, params: MixedGptq) -> tuple[TensorSpec, ...]:
    return gptq.outputs(*_of(params, spec))


def _of(params: MixedGptq, spec: WeightSpec) -> tuple[int, WeightSpec, Gptq]:
    bits, own = params.own(spec.module)
    return bits, spec, own


def _cost(params: MixedGptq, spec: WeightSpec, mix: str) -> int:
    bits, own = params.written(mix)
    return sum(8 * t.nbytes for t in gptq.outputs(bits, spec, own))


def _encoder(spec: WeightSpec, params: MixedGptq, device: str) -> Encoder:
    return gptq.Rounder(*_of(params, spec), device)


def _decoder(spec: WeightSpec, params: MixedGptq, companions: Mapping[str, Array]) -> Decoder:
    return gptq.Restorer(*_of(params, spec), companions)


def _pack(coded: Any, spec: WeightSpec, params: MixedGptq) -> dict[str, Array]:
    bits, own = params.own(spec.module)
    return gptq.pack(bits, coded, spec, own)


def _unpack(tensors: Mapping[str, Array], spec: WeightSpec, params: MixedGptq) -> Coded:
    bits, own = params.own(spec.module)
    return gptq.unpack(bits, tensors, spec, own)


def _solve(found: Any, params: MixedGptq, targets: Any, masks: Any) -> Iterator[tuple[str, Any]]:
    from quantkit.solvers.group import GptqSolver, settings_for, solve_group

    grids = {name: gptq.grid(*params.own(name)) for name in found.weights}
    settings = settings_for(gptq.settings(next(iter(grids.values())), params), params.effort)
    return solve_group(found, GptqSolver(settings, grids), targets, masks)


def _trial(params: MixedGptq, mix: str) -> Any:
    from dataclasses import replace

    from quantkit.solvers.group import GptqSolver

    return GptqSolver(replace(gptq.settings(gptq.grid(*params.written(mix)), params), refits=0, passes=0))


def _by_mix(params: MixedGptq, selection: Selection) -> dict[str, list[str]]:
    """Modules by how they are written, the most frequent first."""
    found: dict[str, list[str]] = {}
    for mix, _ in Counter(params.mixes[module] for module in selection.encoded).most_common():
        found[mix] = [module for module in selection.encoded if params.mixes[module] == mix]
    return found


def _config(params: MixedGptq, dtype: str, selection: Selection) -> dict[str, Any]:
    by_mix = _by_mix(params, selection)
    (usual, _), *others = by_mix.items()
    if params.format != "gptq":
        schemes = [(*params.written(mix), modules) for mix, modules in by_mix.items()]
        return pack_quantized.mixed_config(schemes, selection)
    bits, own = params.written(usual)
    table = gptq_config.config(bits, own, selection, params.damp)
    exceptions: dict[str, dict[str, int]] = {}
    for mix, modules in others:
        width, its = params.written(mix)
        assert its.group_size is not None
        said = {"bits": width, "group_size": int(its.group_size)}
        exceptions |= {rf"+:^{re.escape(module)}$": said for module in modules}
    table["dynamic"] = {**table.get("dynamic", {}), **exceptions}
    return table


def _describe(params: MixedGptq) -> Description:
    about = gptq.describe("gptq", 0, params)
    grid = "symmetric" if params.sym else "asymmetric"
    form = f"at most {params.bits:g} per weight of the linears, in 2, 3, 4 or 8 bits each, {grid}"
    settings = (("Bits", form), *(row for row in about.settings if row[0] != "Grid"))
    tags = tuple(tag for tag in about.tags if tag != "0-bit")
    return Description("GPTQ", f"gptq-{params.bits:g}", tags, settings)


def _reader_notes(selection: Selection, params: MixedGptq) -> tuple[str, ...]:
    widths = {params.own(module)[0] for module in selection.encoded}
    odd = next((bits for bits in sorted(widths) if bits not in (4, 8)), 8)
    return gptq_config.reader_notes(odd, selection, params)


def _loader(architecture: str, params: MixedGptq) -> tuple[str, str]:
    program, warning = gptq_config.loader(architecture, params)
    if params.format != "gptq" or program == "none":
        return program, warning
    if program == "auto-gptq":
        return "none", f"gptqmodel 7.7 does not know {architecture}'s names, and auto-gptq one width for all linears"
    if architecture == "phi3":
        return "none", "transformers with optimum knows one width for all linears, and gptqmodel 7.7 not this model"
    return "gptqmodel", "transformers with optimum takes all linears to have one width: load it with gptqmodel"


METHOD = Method(
    name="gptq",
    bits=0,
    needs="hessian",
    params=MixedGptq,
    outputs=_outputs,
    granule=lambda _: 0,
    encoder=_encoder,
    decoder=_decoder,
    config=_config,
    describe=_describe,
    devices=("cpu", "cuda"),
    refuses=gptq_format.refuses,
    extra_files=gptq_config.extra_files,
    reader_notes=_reader_notes,
    loader=_loader,
    streams=gptq.streams,
    solve=_solve,
    pack=_pack,
    unpack=_unpack,
    mixing=Mixing(
        label=lambda params: f"gptq, {'symmetric' if params.sym else 'asymmetric'}, {params.group_size or 'any'} group",
        options=_options,
        cost=_cost,
        trial=_trial,
        together=partial(gptq_config.computed_at_once),
    ),
)
