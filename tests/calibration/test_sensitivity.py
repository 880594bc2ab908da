"""Squares of gradients, against autograd through the whole model; energies, against sums token by token."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from eval_models import build, quiet_transformers
from mixed_models import Streamed, streamed
from transformers import AutoModelForCausalLM

from quantkit.calibration.energies import Energies, read_squares, to_bytes
from quantkit.calibration.sensitivity import SEED, Sensitivity, Squares, _drawn, _ordinary
from quantkit.calibration.statistics import Statistics
from quantkit.calibration.stream import Stream

ROWS, LENGTH, SHORT, FIRST = 4, 24, (2, 16), 1
Tensors = dict[str, torch.Tensor]


def whole(source: Path, ids: torch.Tensor) -> tuple[Tensors, Tensors]:
    """By linear: gradients of the loss of drawn tokens by what it gives, and what it gets, [rows, length, …]."""
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).requires_grad_(False)
    generator = torch.Generator().manual_seed(SEED)
    gradients: dict[str, list[torch.Tensor]] = {}
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:

            def note(_: object, x: tuple[torch.Tensor], y: torch.Tensor, name: str = name) -> None:
                inputs.setdefault(name, []).append(x[0][0].detach())
                y.register_hook(lambda g: gradients.setdefault(name, []).append(g[0].clone()))  # type: ignore[no-untyped-call]

            module.register_forward_hook(note)
    for row in ids:
        embedded = model.get_input_embeddings()(row[None].long()).requires_grad_()
        logits = model(inputs_embeds=embedded).logits[0]
        drawn = _drawn(logits.detach(), generator)
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]
    return {n: torch.stack(g) for n, g in gradients.items()}, {n: torch.stack(x) for n, x in inputs.items()}


def test_squares_and_energies_are_those_of_the_whole_model(tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    ids = torch.randint(3, 250, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    short = ids[FIRST : FIRST + SHORT[0], : SHORT[1]]
    gradients, inputs = whole(source, short)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    energies: Tensors = {}
    with streamed(source) as made:
        layers = made.layers
        squares = Sensitivity(*made.parts, short, layers, scratch, torch.float32).run()
        squares = read_squares(to_bytes(squares))
        assert squares.keys() == gradients.keys() == {name for layer in layers for name in layer}
        for name, g in gradients.items():
            tokens = squares[name].tokens
            assert tokens is not None
            torch.testing.assert_close(tokens, g.square().sum(2), rtol=1e-3, atol=1e-9)
            torch.testing.assert_close(squares[name].outputs, g.double().square().mean((0, 1)), rtol=1e-3, atol=1e-12)
        gathered = Energies(squares, FIRST)

        def look(_: tuple[str, ...], seen: Statistics) -> Tensors:
            for name in seen.weights:
                means, total, weight = gathered.take(name, seen)
                assert means is squares[name].outputs
                energies[name] = total / weight
            return dict(seen.weights)

        with closing(Stream(*made.parts, ids, layers, scratch, full=False)) as stream:
            stream.watch = gathered.add
            stream.begin()
            for index in range(len(layers)):
                stream.layer(index, look)
    assert not gathered.sums
    for name, x in inputs.items():
        a = gradients[name].square().sum(2)
        wanted = torch.einsum("rt,rti,rtj->ij", a, x, x) / a.sum()
        torch.testing.assert_close(energies[name], wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def split(made: Streamed, ids: torch.Tensor) -> Tensors:
    """The same of a model with experts, whose weights are all in memory: Σ g² over all tokens, by linear."""
    skeleton, weights = made.parts
    sums: Tensors = {}
    for places in skeleton.inside:
        skeleton.fill(places, weights)
    for name, linear in ((n, x) for layer in made.layers for n, x in layer.items()):

        def add(g: torch.Tensor, name: str = name) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + g.reshape(-1, g.shape[-1]).double().square().sum(0)

        def note(_module: object, _x: object, y: torch.Tensor, add: Callable[[torch.Tensor], None] = add) -> None:
            y.register_hook(add)  # type: ignore[no-untyped-call]

        skeleton.model.get_submodule(linear.place.module).register_forward_hook(note)
    generator = torch.Generator().manual_seed(SEED)
    with skeleton.embedded(weights, ids) as (hidden, calls):
        rows, calls = [x.clone() for x in hidden], [_ordinary(call) for call in calls]
    logits = skeleton.logits(weights, gradients=True)
    for row in rows:
        x = row.requires_grad_()
        for index, call in enumerate(calls):
            x = skeleton.run(index, x, call)
        scores = logits(x)
        drawn = _drawn(scores.detach(), generator)
        torch.nn.functional.cross_entropy(scores, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]
    return sums


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_experts_one_by_one_give_what_they_give_together(tmp_path: Path, kind: str) -> None:
    source = build(tmp_path / "source", kind)
    ids = torch.randint(3, 250, SHORT, generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with streamed(source) as made:
        found = Sensitivity(*made.parts, ids, made.layers, scratch, torch.float32).run()
    with streamed(source) as made:
        wanted = split(made, ids)
    assert any(".experts." in name for name in found)
    assert found.keys() == {name for name, total in wanted.items() if total.any()}
    for name, own in found.items():
        torch.testing.assert_close(own.outputs * ids.numel(), wanted[name], rtol=1e-3, atol=1e-9)


def test_without_gradients_all_tokens_count_alike() -> None:
    weight, hessian = torch.ones(3, 4), torch.eye(4)
    seen = Statistics({"a": weight, "b": weight}, {}, hessian, tokens=7)
    energies = Energies({"b": Squares(torch.ones(3, dtype=torch.float64), None)}, 0)
    energies.add(("a", "b"), 0, torch.ones(5, 4))
    for name, mean in (("a", 0.0), ("b", 1.0)):
        means, energy, tokens = energies.take(name, seen)
        assert (means == mean).all()
        assert (len(means), energy is hessian, tokens) == (3, True, 7.0)
