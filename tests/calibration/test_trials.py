"""Trials of kinds of linears, against whole models with those weights exchanged."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from eval_models import build, quiet_transformers
from transformers import AutoModelForCausalLM

from quantkit.architectures import find
from quantkit.architectures import linears as linears_of
from quantkit.calibration.skeleton import Skeleton
from quantkit.calibration.stream import Linear
from quantkit.calibration.trials import EVERY, Trials, kind_of
from quantkit.calibration.weights import CheckpointWeights
from quantkit.checkpoint.reader import SourceFiles
from quantkit.layouts import open_checkpoint

ROWS, LENGTH = 2, 22


def test_divergences_are_those_of_whole_models(tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    checkpoint = open_checkpoint(source)
    architecture = find(checkpoint.config)
    assert architecture is not None
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 250, (ROWS, LENGTH), generator=generator, dtype=torch.int32)
    (tmp_path / "scratch").mkdir()
    with quiet_transformers(), SourceFiles(checkpoint.folder, checkpoint.files) as files:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        skeleton = Skeleton(checkpoint.config, checkpoint.tensors, checkpoint.folder)
        places = {p.name: p for layer in skeleton.inside for p in layer}
        layers: list[dict[str, Linear]] = [{} for _ in skeleton.layers]
        kinds: dict[str, str] = {}
        for x in linears_of(architecture, checkpoint.config, checkpoint.tensors):
            if x.layer >= 0:
                layers[x.layer][x.module] = Linear(places[f"{x.module}.weight"], x.transposed, x.expert)
                kinds[x.module] = kind_of(x.module, x.layer)
        others = {}
        for name in kinds:
            weight = model.get_submodule(name).weight.detach()
            others[name] = weight + 0.1 * torch.randn(weight.shape, generator=generator) * weight.std()
        weights = CheckpointWeights(checkpoint, files)
        with closing(Trials(skeleton, weights, ids, layers, kinds, tmp_path / "scratch", torch.float32)) as trials:
            assert not trials.kept(1)
            trials.begin(0)
            for index, layer in enumerate(layers):
                trials.layer(index, {name: others[name] for name in layer})
                assert trials.kept(index + 1)
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
