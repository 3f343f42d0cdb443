"""Shared fixtures. Under pytest beartype checks the types and tensor shapes of every polymerge function."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

jaxtyping.install_import_hook("polymerge", "beartype.beartype")

os.environ["OMP_NUM_THREADS"] = "1"  # for tiny models more threads only cost, here and in the commands that tests start

import torch  # noqa: E402

BYTES = 257  # tokens of the byte tokenizer: every byte, and the end of text

SMALL: dict[str, Any] = {"intermediate_size": 48, "num_key_value_heads": 2}
HEADS = SMALL | {"head_dim": 8}
UNPADDED = SMALL | {"pad_token_id": None}
TINY: dict[str, dict[str, Any]] = {
    "llama": HEADS,
    "mistral": HEADS | {"sliding_window": None},
    "qwen2": SMALL,
    "qwen3": HEADS,
    "gemma": HEADS,
    "gemma2": HEADS | {"query_pre_attn_scalar": 8, "sliding_window": 8},
    "gemma3_text": HEADS | {"query_pre_attn_scalar": 8, "sliding_window": 8, "sliding_window_pattern": 2},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 64},
    "granite": SMALL | {"attention_multiplier": 0.5, "logits_scaling": 2.0},
    "olmo2": UNPADDED,
    "olmo3": UNPADDED | {"sliding_window": 8},
    "phi3": UNPADDED,
    "smollm3": UNPADDED | {"no_rope_layer_interval": 2},
    "stablelm": SMALL,
    "starcoder2": SMALL,
}


def byte_tokenizer() -> Any:
    """A byte-level BPE without merges, one token a byte: built in code, exact for any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def save_tiny_model(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **changes: Any,
) -> Path:
    """Save a tiny random model of a family with the byte tokenizer; `changes` are config keys."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": BYTES,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": BYTES - 1,
        **TINY[family],
        **changes,
    }
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).to(dtype)
    torch.set_rng_state(state)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The byte tokenizer."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def save_model() -> Callable[..., Path]:
    """`save_model(folder, family, seed=…, dtype=…, max_shard_size=…, **config)`."""
    return save_tiny_model


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory) -> Path:
    """A cache of the benchmark's experts, for tests that do not ask how these are trained."""
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="session")
def assets() -> Path:
    """The shared test material; skips where it is not on this machine."""
    folder = os.environ.get("POLYMERGE_ASSETS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("POLYMERGE_ASSETS names no folder with the shared texts and models")
    return Path(folder)


def _forget_remote_code() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture
def remote_code_cache(tmp_path, monkeypatch):
    """A cache of its own for code that checkpoints bring, and nothing of other caches still imported."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "modules").mkdir()
    # First: transformers only appends its cache, and another test's may be there already.
    monkeypatch.setattr(sys, "path", [str(tmp_path / "modules"), *sys.path])
    _forget_remote_code()
    yield
    _forget_remote_code()  # a later test would look for its own below this one's folder
