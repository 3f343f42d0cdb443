"""SmolLM3 (Hugging Face 2025): Llama without rotation in every fourth layer."""

from dataclasses import replace
from typing import Any

from polymerge.families import _gated
from polymerge.model.spec import Family, Spec


def _read(config: Any) -> Spec:
    spec = _gated.read(config, _gated.biases(config))
    return replace(spec, each=tuple(
        (spec.frequencies if rotated else (), spec.rope_scale, config.sliding_window if "sliding" in kind else None)
        for rotated, kind in zip(config.no_rope_layers, config.layer_types, strict=True)
    ))  # fmt: skip


FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    tensors=_gated.TENSORS + _gated.QKV_BIAS + _gated.O_BIAS + _gated.MLP_BIAS,
    read=_read,
    claimed=_gated.CLAIMED
    | {
        "attention_bias", "layer_types", "max_window_layers", "mlp_bias", "no_rope_layer_interval", "no_rope_layers",
        "sliding_window", "use_sliding_window",
    },
    tiny={**_gated.TINY, "no_rope_layers": [1, 0], "pad_token_id": None},
    prefix="model.",
    buffers=("rotary_emb.inv_freq",),
)  # fmt: skip
