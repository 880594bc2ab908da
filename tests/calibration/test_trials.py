"""Trials of kinds of linears, against whole models with those weights exchanged."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from eval_models import build
from mixed_models import streamed
from transformers import AutoModelForCausalLM

from quantkit.calibration.trials import EVERY, Trials, kind_of

ROWS, LENGTH = 2, 22


def test_divergences_are_those_of_whole_models(tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 250, (ROWS, LENGTH), generator=generator, dtype=torch.int32)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with streamed(source) as made:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        layers = made.layers
        kinds = {name: kind_of(name, index) for index, layer in enumerate(layers) for name in layer}
        others = {}
        for name in kinds:
            weight = model.get_submodule(name).weight.detach()
            others[name] = weight + 0.1 * torch.randn(weight.shape, generator=generator) * weight.std()
        with closing(Trials(*made.parts, ids, layers, kinds, scratch, torch.float32)) as trials:
            assert not trials.kept(1, dict.fromkeys(trials.states, 0))
            trials.begin(0)
            for index, layer in enumerate(layers):
                for name in layer:
                    trials.keep(name, others[name])
                trials.layer(index)
                sums = trials.sums(index + 1)
                assert None not in sums.values()
                assert trials.kept(index + 1, sums)
            found = trials.divergences()

    def predicted() -> torch.Tensor:
        with torch.inference_mode():
            return model(ids.long()).logits[:, EVERY - 1 :: EVERY].log_softmax(2)  # type: ignore[no-any-return]

    plain = predicted()
    assert found.keys() == set(kinds.values())
    for kind, divergence in found.items():
        originals = {name: model.get_submodule(name).weight.data for name in kinds if kinds[name] == kind}
        for name in originals:
            model.get_submodule(name).weight.data = others[name]
        wanted = float((plain.exp() * (plain - predicted())).sum(2).mean())
        for name, weight in originals.items():
            model.get_submodule(name).weight.data = weight
        assert wanted > 1e-5
        assert divergence == pytest.approx(wanted, rel=1e-2)


@pytest.mark.parametrize(
    ("module", "layer", "kind"),
    [
        ("model.layers.11.self_attn.o_proj", 11, "self_attn.o_proj"),
        ("model.layers.1.mlp.experts.1.down_proj", 1, "mlp.experts.*.down_proj"),
        ("transformer.h.3.mlp.c_fc", 3, "mlp.c_fc"),
    ],
)
def test_kinds(module: str, layer: int, kind: str) -> None:
    assert kind_of(module, layer) == kind
