"""What most families share with llama: a norm before attention and MLP, RoPE, grouped KV heads, these names."""

from dataclasses import replace
from typing import Any

from polymerge.errors import FamilyError
from polymerge.model.rope import frequencies, parameters
from polymerge.model.spec import Spec, Stored, stored

CLAIMED = frozenset({
    "attention_dropout", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters",
    "tie_word_embeddings", "vocab_size",
})  # fmt: skip

_AT = "model.layers.{layer}."

TENSORS: tuple[Stored, ...] = (
    stored("model.embed_tokens.weight", "vocab resid", "embed.weight"),
    stored(_AT + "input_layernorm.weight", "resid", "norm1.weight"),
    stored(_AT + "self_attn.q_proj.weight", "(head hd) resid", "q.weight"),
    stored(_AT + "self_attn.k_proj.weight", "(kvhead hd) resid", "k.weight"),
    stored(_AT + "self_attn.v_proj.weight", "(kvhead hd) resid", "v.weight"),
    stored(_AT + "self_attn.o_proj.weight", "resid (head hd)", "o.weight"),
    stored(_AT + "post_attention_layernorm.weight", "resid", "norm2.weight"),
    stored(_AT + "mlp.gate_proj.weight", "ff resid", "gate.weight"),
    stored(_AT + "mlp.up_proj.weight", "ff resid", "up.weight"),
    stored(_AT + "mlp.down_proj.weight", "resid ff", "down.weight"),
    stored("model.norm.weight", "resid", "norm.weight"),
    stored("lm_head.weight", "vocab resid", "head.weight", when="head"),
)

QKV_BIAS: tuple[Stored, ...] = (
    stored(_AT + "self_attn.q_proj.bias", "(head hd)", "q.bias", when="qkv_bias"),
    stored(_AT + "self_attn.k_proj.bias", "(kvhead hd)", "k.bias", when="qkv_bias"),
    stored(_AT + "self_attn.v_proj.bias", "(kvhead hd)", "v.bias", when="qkv_bias"),
)

O_BIAS: tuple[Stored, ...] = (stored(_AT + "self_attn.o_proj.bias", "resid", "o.bias", when="o_bias"),)

MLP_BIAS: tuple[Stored, ...] = (
    stored(_AT + "mlp.gate_proj.bias", "ff", "gate.bias", when="mlp_bias"),
    stored(_AT + "mlp.up_proj.bias", "ff", "up.bias", when="mlp_bias"),
    stored(_AT + "mlp.down_proj.bias", "resid", "down.bias", when="mlp_bias"),
)

NORM_BIAS: tuple[Stored, ...] = (
    stored(_AT + "input_layernorm.bias", "resid", "norm1.bias"),
    stored(_AT + "post_attention_layernorm.bias", "resid", "norm2.bias"),
    stored("model.norm.bias", "resid", "norm.bias"),
)

QK_NORM: tuple[Stored, ...] = (
    stored(_AT + "self_attn.q_norm.weight", "hd", "q_norm.weight", when="qk_norm"),
    stored(_AT + "self_attn.k_norm.weight", "hd", "k_norm.weight", when="qk_norm"),
)

TINY: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def biases(config: Any) -> set[str]:
    """The features of those biases that a config of this group has a key for."""
    return ({"qkv_bias", "o_bias"} if config.attention_bias else set()) | (
        {"mlp_bias"} if getattr(config, "mlp_bias", False) else set()
    )


def read(
    config: Any,
    features: set[str],
    *,
    window: int | None = None,
    layer_norm: float | None = None,
    activation: str | None = None,
) -> Spec:
    """The spec of a config of this group, with the features that the family has found in it.

    `layer_norm`: the epsilon of LayerNorms (None: RMSNorms, by the config's); `activation`: None: the config's.
    """
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs, scale = frequencies(config, head_size)
    return Spec(
        family=config.model_type,
        vocab=config.vocab_size,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_size=head_size,
        mlp=config.intermediate_size,
        norm="rms" if layer_norm is None else "layer",
        eps=config.rms_norm_eps if layer_norm is None else layer_norm,
        activation=activation or config.hidden_act,
        gated=True,
        tied=bool(config.tie_word_embeddings),
        max_positions=config.max_position_embeddings,
        frequencies=pairs,
        rope_scale=scale,
        rope_theta=float(parameters(config)["rope_theta"]),
        window=window,
        features=frozenset(features | (set() if config.tie_word_embeddings else {"head"})),
    )


def by_layer_type(config: Any, spec: Spec) -> Spec:
    """The spec with the rotation and the window of each layer, as `layer_types` names them."""
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    for kind in config.layer_types:
        if kind not in windows:
            raise FamilyError(f"config.json: layer_types has {kind!r}; supported: {', '.join(windows)}")
    return replace(spec, each=tuple((*frequencies(config, spec.head_size, t), windows[t]) for t in config.layer_types))


def write(spec: Spec) -> dict[str, Any]:
    """The config of a merged model of this group."""
    return {
        "vocab_size": spec.vocab,
        "hidden_size": spec.width,
        "intermediate_size": spec.mlp,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_size,
        "hidden_act": spec.activation,
        "rms_norm_eps": spec.eps,
        "max_position_embeddings": spec.max_positions,
        "tie_word_embeddings": spec.tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
    }
