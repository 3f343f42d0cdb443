"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases on queries, keys and values."""

from typing import Any

from polymerge.errors import FamilyError
from polymerge.families import _gated
from polymerge.model.spec import Family, Spec


def no_sliding_layers(config: Any) -> None:
    """Refuse windows that differ from layer to layer: one merged layer can't have two."""
    if config.use_sliding_window:
        raise FamilyError(
            "config.json: use_sliding_window is true; windows on some layers only are not supported. "
            "Set it to false if your texts are shorter than the window"
        )


def _read(config: Any) -> Spec:
    no_sliding_layers(config)
    return _gated.read(config, {"qkv_bias"})


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    tensors=_gated.TENSORS + _gated.QKV_BIAS,
    read=_read,
    claimed=_gated.CLAIMED | {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"},
    tiny={**_gated.TINY, "tie_word_embeddings": True},
    prefix="model.",
    buffers=("rotary_emb.inv_freq",),
    write=_gated.write,
    bias=frozenset({"q", "k", "v"}),
)
