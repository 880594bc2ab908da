"""What transformers makes of the configs that are written, and that what is read is what it computes."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mistral_models import GOLDEN, V01, V02, Json, facts_of, through_json

from quantkit.layouts.mistral_config import Facts, Yarn, config_of_facts, context_of_config, facts_of_config
from quantkit.layouts.mistral_facts import COMMON
from quantkit.layouts.mistral_hf_config import CLASSES, MINISTRAL3_ROPE

YARN = Yarn(4.0, 16, 32.0, 1.0, apply_scale=True)
SCALED = Yarn(4.0, 16, 32.0, 1.0, apply_scale=False, query_beta=0.1)


@pytest.fixture(autouse=True)
def complaints() -> Iterator[list[str]]:
    """What transformers logs, anew each time; a test that expects some takes it out of the list."""
    records: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    logger, handler = logging.getLogger("transformers"), Handler(logging.WARNING)
    logger.addHandler(handler)
    type(logger).warning_once.cache_clear()
    yield records
    logger.removeHandler(handler)
    assert records == []


def load(config: Json, folder: Path) -> Any:
    (folder / "config.json").write_text(json.dumps(config, allow_nan=False))
    return transformers.AutoConfig.from_pretrained(folder)


def make(config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("params", [row[0] for row in GOLDEN])
def test_transformers_uses_every_fact(params: Json, tmp_path: Path) -> None:
    facts = facts_of(params)
    written = config_of_facts(facts, dtype="BF16", context=262144)
    config = load(written, tmp_path)
    assert [getattr(config, row.hf) for row in COMMON] == [getattr(facts, row.fact) for row in COMMON]
    assert config.rope_parameters == written["rope_parameters"]
    assert config.rope_parameters["rope_theta"] == facts.rope_theta
    assert config.tie_word_embeddings == facts.tied
    assert config.sliding_window == max((size for size in facts.windows if size), default=None)
    assert config.max_position_embeddings == 262144
    assert config.dtype == torch.bfloat16
    assert config.hidden_act == "silu"
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert (config.architectures, config.model_type) == (written["architectures"], written["model_type"])
    if facts.experts:
        assert (config.num_local_experts, config.num_experts_per_tok) == (facts.experts, facts.experts_per_token)
    if facts.mixed_windows:
        kinds = {"full_attention": None, "sliding_attention": config.sliding_window}
        assert tuple(kinds[name] for name in config.layer_types) == facts.layer_windows
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert facts_of_config(again, where="config.json") == (facts, [])


# --- the traps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", list(CLASSES))
def test_the_defaults_are_those_of_transformers(model_type: str) -> None:
    architecture, ours = CLASSES[model_type]
    assert hasattr(transformers, architecture)
    theirs = transformers.AutoConfig.for_model(model_type)
    for key in {*ours} - {"rope_theta", "sliding_window"}:
        assert getattr(theirs, key) == ours[key], key
    assert getattr(theirs, "sliding_window", None) == ours["sliding_window"]
    if model_type == "ministral3":
        assert MINISTRAL3_ROPE.items() <= theirs.rope_parameters.items()
        theirs = transformers.AutoConfig.for_model(model_type, rope_parameters={})
    assert (
        theirs.rope_parameters == {"rope_type": "default", "rope_theta": ours["rope_theta"]}
        or model_type == "ministral3"
    )
    assert theirs.rope_parameters["rope_theta"] == ours["rope_theta"]
    assert context_of_config({"model_type": model_type}, where="c") == theirs.max_position_embeddings


@pytest.mark.parametrize("model_type", list(CLASSES))
def test_a_silent_config_means_what_transformers_computes(model_type: str, tmp_path: Path) -> None:
    bare = {"model_type": model_type, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
            "num_attention_heads": 8, "vocab_size": 64}  # fmt: skip
    facts, _ = facts_of_config(bare, where="config.json")
    config = load(bare, tmp_path)
    assert facts.n_kv_heads == config.num_key_value_heads
    assert facts.norm_eps == config.rms_norm_eps
    assert facts.rope_theta == config.rope_parameters["rope_theta"]
    assert facts.head_dim == (getattr(config, "head_dim", None) or 32 // 8)
    assert facts.windows == ((config.sliding_window,) if getattr(config, "sliding_window", None) else ())
    assert facts.tied == config.tie_word_embeddings
    # pad_token_id 11 and a factor that is not context / original are of the class itself
    written = load(config_of_facts(facts, dtype=None, context=config.max_position_embeddings), tmp_path)
    for row in COMMON:
        assert getattr(written, row.hf) == (getattr(config, row.hf, None) or getattr(facts, row.fact)), row


def test_a_window_that_is_not_there_stays_away(tmp_path: Path) -> None:
    """MistralConfig's own is 4096, 1e-6 and theta 10000: a key left out would change the model."""
    written = config_of_facts(facts_of(V02), dtype="BF16", context=32768)
    assert load(written, tmp_path).sliding_window is None
    for key, value in (("sliding_window", 4096), ("rms_norm_eps", 1e-6)):
        silent = {name: content for name, content in written.items() if name != key}
        assert getattr(load(silent, tmp_path), key) == value
        found, notes = facts_of_config(silent, where="config.json")
        assert found != facts_of(V02)
        assert len(notes) == 1


def test_both_generations_of_rope_keys(tmp_path: Path) -> None:
    """transformers 4 reads rope_theta, transformers 5 goes by rope_parameters and ignores the other."""
    written = config_of_facts(facts_of(V01), dtype="BF16", context=32768)
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 10000.0
    for key in ("rope_theta", "rope_parameters"):
        alone = {name: content for name, content in written.items() if name != key}
        assert load(alone, tmp_path).rope_parameters["rope_theta"] == 10000.0
        assert facts_of_config(alone, where="config.json") == (facts_of(V01), [])
    assert load({**written, "rope_theta": 5.0}, tmp_path).rope_parameters["rope_theta"] == 10000.0


def test_heads_that_are_not_dim_by_heads(tmp_path: Path) -> None:
    """Nemo: 5120 / 32 is 160, and its heads have 128."""
    facts = Facts(40, 1, 16, 48, 4, 2, 1e-5, 64, 1e6)
    model = make(load(config_of_facts(facts, dtype=None, context=64), tmp_path))
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (64, 40)
    assert attention.k_proj.weight.shape == (32, 40)


def test_a_use_sliding_window_that_transformers_ignores(tmp_path: Path) -> None:
    """That is why it is refused beside a window."""
    windowed = config_of_facts(Facts(32, 2, 16, 48, 4, 2, 1e-5, 64, 1e6, windows=(2,)), dtype=None, context=64)
    full = {**windowed, "sliding_window": None}
    ids = torch.arange(12)[None]
    with torch.no_grad():
        a, b, c = (make(load(config, tmp_path))(ids).logits
                   for config in (windowed, {**windowed, "use_sliding_window": False}, full))  # fmt: skip
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)


def test_mixed_windows_are_applied_layer_by_layer(tmp_path: Path) -> None:
    facts = Facts(32, 4, 16, 48, 4, 2, 1e-5, 64, 1e6, windows=(None, 3))
    model = make(load(config_of_facts(facts, dtype=None, context=64), tmp_path))
    assert type(model).__name__ == "MinistralForCausalLM"
    with torch.no_grad():
        attentions = model(torch.arange(10)[None], output_attentions=True).attentions
    for weights, window in zip(attentions, facts.layer_windows, strict=True):
        seen = (weights[0, 0, -1] > 0).sum().item()
        assert seen == (window or 10)


def test_uniform_windows_are_applied_everywhere(tmp_path: Path) -> None:
    for facts in (Facts(32, 2, 16, 48, 4, 2, 1e-5, 64, 1e6, windows=(3,)),
                  Facts(32, 2, 16, 48, 4, 2, 1e-5, 64, 1e6, windows=(3,), experts=4, experts_per_token=2)):  # fmt: skip
        model = make(load(config_of_facts(facts, dtype=None, context=64), tmp_path))
        with torch.no_grad():
            attentions = model(torch.arange(10)[None], output_attentions=True).attentions
        assert [(weights[0, 0, -1] > 0).sum().item() for weights in attentions] == [3, 3]


# --- yarn -------------------------------------------------------------------------------------------------------------


def frequencies(facts: Facts) -> torch.Tensor:
    """From the description of yarn: each pair's frequency, kept, divided by the factor, or in between."""
    assert facts.yarn
    yarn, half = facts.yarn, facts.head_dim // 2
    plain = [facts.rope_theta ** (-2 * j / facts.head_dim) for j in range(half)]

    def pair(rotations: float) -> float:  # the pair that turns so often within original_context
        return (
            facts.head_dim
            * math.log(yarn.original_context / (rotations * 2 * math.pi))
            / (2 * math.log(facts.rope_theta))
        )

    low, high = max(math.floor(pair(yarn.beta)), 0), min(math.ceil(pair(yarn.alpha)), facts.head_dim - 1)
    kept = [1 - min(max((j - low) / max(high - low, 0.001), 0), 1) for j in range(half)]
    return torch.tensor([f * k + f / yarn.factor * (1 - k) for f, k in zip(plain, kept, strict=True)])


@pytest.mark.parametrize(
    ("yarn", "experts", "windows", "kind"),
    [
        (YARN, 0, (), "Mistral"),
        (YARN, 4, (), "Mixtral"),
        (YARN, 0, (None, 8), "Ministral"),
        (SCALED, 0, (), "Ministral3"),
        (SCALED, 0, (8,), "Ministral3"),
        (Yarn(16.0, 128, 4.0, 1.0, apply_scale=False), 0, (), "Mistral"),
    ],
)
def test_yarn_is_what_the_model_turns_by(
    yarn: Yarn, experts: int, windows: tuple[int | None, ...], kind: str, tmp_path: Path
) -> None:
    facts = Facts(32, 2, 16, 48, 4, 2, 1e-5, 64, 1e6, windows=windows, yarn=yarn, experts=experts,
                  experts_per_token=min(2, experts))  # fmt: skip
    config = load(config_of_facts(facts, dtype=None, context=int(yarn.original_context * yarn.factor)), tmp_path)
    model = make(config)
    assert type(model).__name__ == f"{kind}ForCausalLM"
    rotary = model.model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, frequencies(facts), rtol=1e-5, atol=0)
    growth = 1 + 0.1 * math.log(yarn.factor) if yarn.apply_scale else 1.0
    assert rotary.attention_scaling == pytest.approx(growth)
    with torch.no_grad():
        assert model(torch.arange(40)[None]).logits.isfinite().all()
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert facts_of_config(again, where="config.json") == (facts, [])


def test_queries_are_scaled(tmp_path: Path) -> None:
    """ministral3 takes beta and original context from rope_parameters; without a beta its code fails, which is why yarn
    alone is written as mistral."""
    scaled = config_of_facts(Facts(32, 1, 16, 48, 4, 2, 1e-5, 64, 1e6, yarn=SCALED), dtype=None, context=64)
    assert scaled["model_type"] == "ministral3"
    assert (scaled["rope_parameters"]["llama_4_scaling_beta"], scaled["pad_token_id"]) == (0.1, None)
    without = through_json(scaled)
    del without["rope_parameters"]["llama_4_scaling_beta"]
    model = make(load(without, tmp_path))
    with pytest.raises(TypeError), torch.no_grad():
        model(torch.arange(4)[None])
    facts, _ = facts_of_config(without, where="config.json")
    assert facts.yarn is not None
    assert facts.yarn.query_beta is None
    plain = config_of_facts(facts, dtype=None, context=64)
    assert plain["model_type"] == "mistral"
    ids = torch.arange(24)[None]
    with torch.no_grad():
        a = make(load(plain, tmp_path))(ids).logits
        b = make(load(scaled, tmp_path))(ids).logits
    torch.testing.assert_close(a[:, :16], b[:, :16])  # before position 16 the scale is 1
    assert not torch.allclose(a[:, 20:], b[:, 20:])


def test_the_same_weights_as_llama(tmp_path: Path) -> None:
    """A llama model without extras computes the same as mistral without a window."""
    llama = transformers.AutoConfig.for_model(
        "llama", hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, rms_norm_eps=1e-5, head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )  # fmt: skip
    llama.save_pretrained(tmp_path)
    facts, notes = facts_of_config(json.loads((tmp_path / "config.json").read_text()), where="config.json")
    assert notes == []
    one, other = make(llama), make(load(config_of_facts(facts, dtype=None, context=64), tmp_path))
    other.load_state_dict(one.state_dict())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(one(ids).logits, other(ids).logits)
