"""GPT-NeoX and Pythia (Black et al. 2022): LayerNorm, partial RoPE, fused QKV, attention and MLP in parallel."""

from typing import Any

from polymerge.model.rope import frequencies
from polymerge.model.spec import Family, Spec, stored

_AT = "gpt_neox.layers.{layer}."


def _read(config: Any) -> Spec:
    head_size = config.hidden_size // config.num_attention_heads
    pairs, scale = frequencies(config, head_size)
    features = {"mlp_bias"}
    if config.attention_bias:
        features |= {"qkv_bias", "o_bias"}
    if not config.tie_word_embeddings:
        features.add("head")
    return Spec(
        family="gpt_neox",
        vocab=config.vocab_size,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_size=head_size,
        mlp=config.intermediate_size,
        norm="layer",
        eps=config.layer_norm_eps,
        activation=config.hidden_act,
        gated=False,
        tied=bool(config.tie_word_embeddings),
        max_positions=config.max_position_embeddings,
        frequencies=pairs,
        rope_scale=scale,
        rope_theta=float(config.rope_parameters["rope_theta"]),
        parallel=bool(config.use_parallel_residual),
        features=frozenset(features),
    )


FAMILY = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    tensors=(
        stored("gpt_neox.embed_in.weight", "vocab resid", "embed.weight"),
        stored(_AT + "input_layernorm.weight", "resid", "norm1.weight"),
        stored(_AT + "input_layernorm.bias", "resid", "norm1.bias"),
        stored(
            _AT + "attention.query_key_value.weight",
            "(head qkv hd) resid",
            "q.weight",
            "k.weight",
            "v.weight",
        ),
        stored(
            _AT + "attention.query_key_value.bias",
            "(head qkv hd)",
            "q.bias",
            "k.bias",
            "v.bias",
            when="qkv_bias",
        ),
        stored(_AT + "attention.dense.weight", "resid (head hd)", "o.weight"),
        stored(_AT + "attention.dense.bias", "resid", "o.bias", when="o_bias"),
        stored(_AT + "post_attention_layernorm.weight", "resid", "norm2.weight"),
        stored(_AT + "post_attention_layernorm.bias", "resid", "norm2.bias"),
        stored(_AT + "mlp.dense_h_to_4h.weight", "ff resid", "up.weight"),
        stored(_AT + "mlp.dense_h_to_4h.bias", "ff", "up.bias"),
        stored(_AT + "mlp.dense_4h_to_h.weight", "resid ff", "down.weight"),
        stored(_AT + "mlp.dense_4h_to_h.bias", "resid", "down.bias"),
        stored("gpt_neox.final_layer_norm.weight", "resid", "norm.weight"),
        stored("gpt_neox.final_layer_norm.bias", "resid", "norm.bias"),
        stored("embed_out.weight", "vocab resid", "head.weight", when="head", also=("lm_head.weight",)),
    ),
    read=_read,
    claimed=frozenset(
        {
            "attention_bias",
            "attention_dropout",
            "classifier_dropout",
            "hidden_act",
            "hidden_dropout",
            "hidden_size",
            "intermediate_size",
            "layer_norm_eps",
            "max_position_embeddings",
            "num_attention_heads",
            "num_hidden_layers",
            "rope_parameters",
            "rotary_emb_base",
            "rotary_pct",
            "tie_word_embeddings",
            "use_parallel_residual",
            "vocab_size",
            "partial_rotary_factor",
        }
    ),  # fmt: skip
    tiny={
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "rotary_pct": 0.5,
    },
    prefix="gpt_neox.",
    buffers=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
)
