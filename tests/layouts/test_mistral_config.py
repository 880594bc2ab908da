"""params.json ↔ Facts ↔ config.json by themselves: no torch, no transformers. test_mistral_config_transformers.py has
what transformers makes of the configs, test_mistral_bad_config.py what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_models import GOLDEN, MINISTRAL_3, MIXTRAL, V01, V02, Json, facts_of, through_json

from quantkit.errors import SourceError
from quantkit.layouts.mistral_config import (
    Facts,
    Yarn,
    config_of_facts,
    context_of_config,
    default_context,
    facts_of_config,
    facts_of_params,
    generation,
    params_of_facts,
    restore_config,
)

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"

# --- every generation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("params", "name", "context", "assumed", "essentials"), GOLDEN)
def test_every_generation(params: Json, name: str, context: int, assumed: bool, essentials: Json) -> None:
    facts = facts_of(params)
    assert generation(facts) == name
    assert default_context(facts) == (context, assumed)
    config = config_of_facts(facts, dtype="BF16", context=context)
    assert {key: config[key] for key in essentials} == essentials
    assert facts_of_config(config, where="config.json") == (facts, [])


def test_every_generation_comes_back_as_the_file_it_was() -> None:
    for params, *_ in GOLDEN:
        expected = {**params, "rope_theta": params.get("rope_theta", 1e4)}
        expected.pop("quantization", None)  # the weights say that
        facts = facts_of(params)
        written, _ = params_of_facts(facts, profile="current", context=default_context(facts)[0])
        assert written == expected


def test_the_config_is_complete() -> None:
    config = config_of_facts(facts_of(V01), dtype="F16", context=32768)
    assert list(config) == sorted(config)
    assert config == {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "dtype": "float16",
        "eos_token_id": 2, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True,
        "vocab_size": 32000,
    }  # fmt: skip
    assert "dtype" not in config_of_facts(facts_of(V01), dtype=None, context=1)


@pytest.mark.parametrize("name", ["stories15m-mistral-src", "stories260k-mistral-src"])
def test_real_params(name: str) -> None:
    path = SHARED / name / "params.json"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    params = json.loads(path.read_text())
    facts, notes = facts_of_params(params, where=str(path))
    assert facts.rope_theta == 10000.0
    assert len(notes) == ("rope_theta" not in params)
    assert generation(facts) == "other"
    assert params_of_facts(facts, profile="current", context=None)[0] == {**params, "rope_theta": 10000.0}


@pytest.mark.parametrize(("name", "kind"), [("mixtral-8x7b", "Mixtral"), ("mistral-7b-lily", "7B v0.2")])
def test_real_configs(name: str, kind: str) -> None:
    path = SHARED / "configs" / name / "config.json"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    config = json.loads(path.read_text())
    facts, notes = facts_of_config(config, where=str(path))
    assert (generation(facts), notes) == (kind, [])
    assert facts == facts_of(MIXTRAL if name == "mixtral-8x7b" else V02)
    assert context_of_config(config, where=str(path)) == 32768
    params, notes = params_of_facts(facts, profile="current", context=32768)
    assert notes == []
    assert facts_of_params(params, where="params.json") == (facts, [])
    fresh = config_of_facts(facts, dtype="BF16", context=32768)
    restored = {key: value for key, value in config.items() if key != "_name_or_path"}
    restored["torch_dtype"] = "bfloat16"  # Lily says float32, and holds the other
    assert restore_config(facts, config, fresh) == (restored, True)


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, quantkit.layouts.mistral_config; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert {"torch", "transformers", "numba"}.isdisjoint(out.split())


# --- round trips ------------------------------------------------------------------------------------------------------

sizes = st.integers(1, 2**20)
numbers = st.floats(1e-12, 1e12)


@st.composite
def yarns(draw: st.DrawFn) -> Yarn:
    return Yarn(
        factor=draw(st.floats(1.01, 1e4)),
        original_context=draw(sizes),
        beta=draw(st.floats(0.1, 1e4)),
        alpha=draw(st.floats(0.1, 1e4)),
        apply_scale=draw(st.booleans()),
        query_beta=draw(st.none() | st.floats(1e-6, 10)),
    )


@st.composite
def models(draw: st.DrawFn) -> Facts:
    """Any model that both files can say."""
    period, repeats = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    window = draw(sizes)
    pattern = draw(st.lists(st.sampled_from([None, window]), min_size=period, max_size=period))
    n = next(d for d in range(1, period + 1) if period % d == 0 and pattern[:d] * (period // d) == pattern)
    windows = () if pattern[:n] == [None] else tuple(pattern[:n])
    yarn = draw(st.none() | yarns())
    experts = 0
    if len(windows) < 2 and not (yarn and yarn.query_beta):
        experts = draw(st.sampled_from([0, 1, 8, 64]))
    elif yarn and len(windows) > 1:
        yarn = Yarn(yarn.factor, yarn.original_context, yarn.beta, yarn.alpha, yarn.apply_scale)
    kv = draw(st.integers(1, 64))
    return Facts(
        dim=draw(sizes), n_layers=period * repeats, head_dim=2 * draw(sizes), hidden_dim=draw(sizes),
        n_heads=kv * draw(st.integers(1, 16)), n_kv_heads=kv, norm_eps=draw(numbers), vocab_size=draw(sizes),
        rope_theta=draw(numbers), windows=windows, experts=experts, experts_per_token=min(experts, draw(st.just(2))),
        tied=draw(st.booleans()), yarn=yarn,
    )  # fmt: skip


@given(models())
@settings(max_examples=300, deadline=None)
def test_params_and_back(facts: Facts) -> None:
    params, _ = params_of_facts(facts, profile="current", context=None)
    assert facts_of_params(through_json(params), where="params.json") == (facts, [])


@given(models(), st.sampled_from(["BF16", "F16", "F32", None]))
@settings(max_examples=300, deadline=None)
def test_config_and_back(facts: Facts, dtype: str | None) -> None:
    config = config_of_facts(facts, dtype=dtype, context=default_context(facts)[0])
    assert facts_of_config(through_json(config), where="config.json") == (facts, [])
    assert len(facts.layer_windows) == facts.n_layers


@given(models())
@settings(max_examples=100, deadline=None)
def test_the_profile_of_2023_says_the_same_or_refuses(facts: Facts) -> None:
    try:
        params, _ = params_of_facts(facts, profile="one-file-ref-2023", context=4096)
    except SourceError:
        assert facts.rope_theta != 1e4 or facts.tied or facts.experts or facts.yarn or facts.mixed_windows
        return
    assert params.keys() == V01.keys()
    back = facts_of(params)
    assert back == facts or (not facts.windows and back.windows == (4096,))


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_nine_keys_of_2023() -> None:
    assert params_of_facts(facts_of(V01), profile="one-file-ref-2023", context=None) == (V01, [])
    assert params_of_facts(facts_of(V01), profile="current", context=None) == ({**V01, "rope_theta": 1e4}, [])


def test_2023_without_a_window_gets_the_whole_context() -> None:
    facts = facts_of({**V02, "rope_theta": 1e4})
    params, notes = params_of_facts(facts, profile="one-file-ref-2023", context=2048)
    assert params == {**V01, "sliding_window": 2048}
    (note,) = notes
    assert "2048 was written, the whole context" in note
    _, notes = params_of_facts(facts, profile="one-file-ref-2023", context=131072)
    assert notes[1:] == ["the code of 2023 ends at 128000 tokens"]


def test_who_can_read_it_is_said() -> None:
    _, notes = params_of_facts(facts_of(MINISTRAL_3), profile="current", context=262144)
    assert any("mistral-inference 1.6 ignores yarn" in note for note in notes)
    assert any("mistral-inference 1.6 misses output.weight" in note for note in notes)
