"""Tiny random models, made once a session, and the command line as a user runs it."""

from __future__ import annotations

import gc
import json
import os
import shutil
import struct
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import warm

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test may reach for a network
# Before anything loads OpenMP: idle threads of one worker are not to keep those of another from the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Fixtures of several files of tests.
pytest_plugins = ["bad_inputs", "convert_inputs", "convert_jobs", "hub_server", "meanings", "round_trips"]
# So that their assertions say what differs.
pytest.register_assert_rewrite("attacks.torch_files", "card_facts", "prune_runs", "resuming")

Run = Callable[..., "subprocess.CompletedProcess[str]"]

TINY: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "vocab_size": 256},
    "mistral": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256, "sliding_window": None},
    "qwen2": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "vocab_size": 256, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 256},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256},
    "mixtral": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "vocab_size": 256, "num_local_experts": 4, "sliding_window": None},
}  # fmt: skip


def make_tiny(model_type: str, folder: Path, *, dtype: str = "bfloat16", seed: int = 0, **changes: Any) -> Path:
    """A random model of that architecture in `folder`, as transformers saves it, with a word-level tokenizer."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **{**TINY[model_type], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, max_shard_size=changes.get("max_shard_size", "5GB"))
    vocabulary = {f"w{i}": i for i in range(config.vocab_size)}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}\n')
    return folder


def headers_alone(source: Path, folder: Path) -> Path:
    """A copy in `folder` whose safetensors files end after their headers."""
    shutil.copytree(source, folder)
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as f:
            f.truncate(8 + struct.unpack("<Q", f.read(8))[0])
    return folder


@pytest.fixture
def quiet() -> Iterator[None]:
    """transformers without progress bars."""
    from eval_models import quiet_transformers

    with quiet_transformers():
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny("llama") → the folder of that model, bf16. Read only: shared by all tests."""
    made: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = make_tiny(model_type, tmp_path_factory.mktemp(model_type) / model_type)
        return made[model_type]

    return get


@pytest.fixture(scope="session")
def exl2_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model in bfloat16, and a folder in EXL2 made of it; beside that, what was measured. Read only."""
    from mixed_models import make

    return make(tmp_path_factory.mktemp("exl2"), "exl2", 4.5, halves=True)


@pytest.fixture(scope="session")
def quantkit() -> Run:
    """quantkit("plan", SRC, …) runs the program in a process of its own; output as text, exit code in returncode."""

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        return warm.run([*map(str, arguments)], **options)

    return run


@pytest.fixture(scope="session", autouse=True)
def _guards(request: pytest.FixtureRequest) -> bool:
    """For tests on a GPU that is not there; before the first test of a process, as any may go back through a model."""
    if not any("guards" in getattr(item, "fixturenames", ()) for item in request.session.items):
        return False
    from pretend_gpu import load_guards

    assert request.config.cache is not None
    return load_guards(request.config.cache.mkdir("guards"))


@pytest.fixture
def guards(_guards: bool) -> None:
    if not _guards:
        pytest.skip("no C++ compiler")


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """What is imported by now stays: to look for garbage in all of torch takes a third of a second each time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """For the solvers one thread of torch, unless a test asks for more: where other processes are at work, threads of
    OpenMP wait for each other."""
    if request.path.parent.name != "solvers":
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
