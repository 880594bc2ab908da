"""`exl2`: every linear in a mix of widths of its own, found by measuring what each costs (exllamav2's format)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from quantkit.checkpoint.header import TensorSpec
from quantkit.methods import exl2_format
from quantkit.methods.base import Array, Description, Method, Mixed, Mixing, Report, Selection, WeightSpec
from quantkit.methods.exl2_format import Mix

VERSION = "0.3.2"  # of exllamav2, whose format this is
# Widths and groups that linears choose from, as exllamav2 0.3.2's kernels are compiled for: any other is read by a slow
# one. Below 3 bits, a few rows in more bits are worth their price in every linear.
OPTIONS = (
    "0.05:3_64/0.95:2_64", "0.1:3_64/0.9:2_64", "0.25:3_64/0.75:2_64", "0.05:6_32/0.2:3_64/0.75:2_64",
    "0.1:4_128/0.9:3_128", "0.25:4_128/0.75:3_128", "0.1:4_32/0.9:3_32", "0.5:4_64/0.5:3_64",
    "4_128", "4_32", "0.1:5_128/0.9:4_128", "0.1:5_32/0.9:4_32", "0.5:5_64/0.5:4_64",
    "0.1:6_128/0.9:5_128", "0.1:6_32/0.9:5_32", "6_128", "6_32", "8_128",
)  # fmt: skip
# Of the head by its bits, as exllamav2 writes it: its most active inputs get more.
HEADS = {2: "0.3:4_32/0.7:2_32", 3: "0.15:4_32/0.85:3_32", 4: "0.15:6_32/0.85:4_32", 5: "0.15:6_128/0.85:5_128",
         6: "0.15:8_128/0.85:6_128", 8: "8_128"}  # fmt: skip
# By exllamav2's architectures: those whose linears it looks for under the names that they have in transformers.
READ = frozenset(
    ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3", "gemma3_text", "cohere",
     "cohere2", "granite", "starcoder2")
)  # fmt: skip
CENTRED = frozenset(("qwen3", "qwen3_moe"))  # it takes their norms of heads for Cohere's


class Exl2(Mixed):
    """EXL2 (exllamav2): bits by linear."""

    bits: float = Field(4.0, gt=0, le=8, description="bits per weight of the linears together, at the most")
    head_bits: Literal[2, 3, 4, 5, 6, 8, 16] = Field(6, description="bits of the head, where it is not the embedding")
    effort: Literal["low", "default", "high"] = Field("default", description="time for quality")
    damp: float = Field(0.03, gt=0, lt=1, description="part of the mean diagonal that is added to the Hessian")

    @field_validator("mixes")
    @classmethod
    def _mixes(cls, value: dict[str, str]) -> dict[str, str]:
        return {module: str(Mix.parse(text)) for module, text in value.items()}

    def mix(self, module: str) -> Mix:
        return Mix.parse(self.mixes[module])


class _Rounder:
    """Encodes a weight that comes whole, in one slab, every weight for itself: its inputs were not seen."""

    def __init__(self, spec: WeightSpec, params: Exl2, device: str) -> None:
        self.spec, self.mix = spec, params.mix(spec.module)
        self.tensors: dict[str, Array] = {}
        self.report = Report(0.0, 0.0)

    def main_offset(self, start: int) -> int:
        return 0

    def encode(self, x: Array, start: int) -> Array:
        import torch

        from quantkit.kernels.floats import to_float32
        from quantkit.solvers.exl2 import nearest

        spec = self.spec
        weight = to_float32(x.reshape(-1), spec.dtype).reshape(spec.rows, spec.columns)
        coded = nearest(torch.from_numpy(weight), self.mix.groups(spec.columns), torch.arange(spec.columns))
        self.tensors = exl2_format.pack(coded, spec, self.mix)
        difference = (weight - coded.restore()).reshape(-1)
        self.report = Report(float(np.vdot(difference, difference)), float(np.vdot(weight, weight)))
        return self.tensors.pop(f"{spec.module}.q_weight")

    def finish(self) -> tuple[dict[str, Array], Report]:
        return self.tensors, self.report


class _Restorer:
    """Decodes a weight whole."""

    def __init__(self, spec: WeightSpec, params: Exl2, companions: Mapping[str, Array]) -> None:
        self.spec, self.mix, self.companions = spec, params.mix(spec.module), companions

    def decode(self, raw: npt.NDArray[np.uint8], start: int, count: int) -> npt.NDArray[np.float32]:
        main = exl2_format.outputs(self.spec, self.mix)[0]
        tensors = {**self.companions, main.name: raw.view(np.int32).reshape(main.shape)}
        return exl2_format.unpack(tensors, self.spec, self.mix).restore().reshape(-1)


def _outputs(spec: WeightSpec, params: Exl2) -> tuple[TensorSpec, ...]:
    return exl2_format.outputs(spec, params.mix(spec.module))


def _pack(coded: Any, spec: WeightSpec, params: Exl2) -> dict[str, Array]:
    return exl2_format.pack(coded, spec, params.mix(spec.module))


def _solve(found: Any, params: Exl2, targets: Any, masks: Any) -> Iterator[tuple[str, Any]]:
    from quantkit.solvers.exl2 import Exl2Solver, Work
    from quantkit.solvers.group import solve_group

    work = Work(4, 2) if params.effort == "high" else Work()
    solver = Exl2Solver(lambda name, columns: params.mix(name).groups(columns), work, params.damp)
    return solve_group(found, solver, targets, masks)


def _trial(params: Exl2, option: str) -> Any:
    from quantkit.solvers.exl2 import Exl2Solver, Work

    mix = Mix.parse(option)
    return Exl2Solver(lambda _, columns: mix.groups(columns), Work(0, 0), params.damp)


def _streams(params: Exl2) -> tuple[str, ...]:
    return ("quantized",) if params.effort == "low" else ("quantized", "full")


def _config(params: Exl2, dtype: str, selection: Selection) -> dict[str, Any]:
    head = params.mixes.get("lm_head")
    head_bits = 16 if head is None or "lm_head" not in selection.encoded else Mix.parse(head).parts[-1][1]
    return {"quant_method": "exl2", "version": VERSION, "bits": params.bits, "head_bits": head_bits}


def _reader_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Its loader looks for rope_theta and rope_scaling where transformers 4 had them, and takes a default otherwise:
    fluent nonsense, without a word of warning."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    found = {} if "rope_theta" not in rope or "rope_theta" in config else {"rope_theta": rope["rope_theta"]}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if scaling.get("rope_type", "default") != "default" and "rope_scaling" not in config:
        found["rope_scaling"] = scaling
    return found


def _describe(params: Exl2) -> Description:
    aims = "each layer's own output" if params.effort == "low" else "the full-precision model's outputs"
    settings = (
        ("Bits", f"at most {params.bits:g} per weight of the linears, in mixes of 2 to 8"),
        ("Format", f"EXL2, exllamav2 {VERSION}"),
        ("Other tensors", "fp16"),
        ("Order of rounding", "by activation"),
        ("Aimed at", aims),
        ("Effort", params.effort),
    )
    slug = f"exl2-{params.bits:.1f}" if params.bits == round(params.bits, 1) else f"exl2-{params.bits:g}"
    return Description("EXL2", slug, ("exl2",), settings)


def _reader_notes(selection: Selection, params: Exl2) -> tuple[str, ...]:
    asked = "head_bits" in params.model_fields_set and params.head_bits != 16
    if not asked or "lm_head" in selection.encoded:
        return ()
    return (f"head_bits {params.head_bits} changes nothing: this model's head is its embedding, or left alone",)


def _loader(architecture: str, params: Exl2) -> tuple[str, str]:
    if architecture in CENTRED:
        return "exllamav2", (
            "exllamav2 0.3.2 takes the mean away from each head's query and key before it scales them, which this "
            "architecture does not: what it predicts is somewhat off, whoever quantized the model"
        )
    if architecture in READ:
        return "exllamav2", ""
    return "none", "exllamav2, the only program that reads EXL2, does not know the linears of this architecture by name"


METHOD = Method(
    name="exl2",
    bits=0,
    needs="hessian",
    params=Exl2,
    outputs=_outputs,
    granule=lambda _: 0,
    encoder=_Rounder,
    decoder=_Restorer,
    config=_config,
    describe=_describe,
    refuses=lambda spec, _: exl2_format.refuses(spec),
    reader_config=_reader_config,
    devices=("cpu", "cuda"),
    others="F16",  # its kernels take no other bias
    reader_notes=_reader_notes,
    head=lambda params: HEADS.get(params.head_bits),
    loader=_loader,
    streams=_streams,
    solve=_solve,
    pack=_pack,
    mixing=Mixing(
        label=lambda _: "exl2",
        options=lambda *_: OPTIONS,
        cost=lambda _, spec, option: Mix.parse(option).cost(spec),
        trial=_trial,
    ),
)
