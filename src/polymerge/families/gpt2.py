"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, fused QKV, plain MLP, matrices stored "in out"."""

from typing import Any

from polymerge.errors import FamilyError
from polymerge.model.spec import Family, Spec, stored

_AT = "transformer.h.{layer}."


def _read(config: Any) -> Spec:
    for key, plain in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if bool(getattr(config, key)) != plain:
            raise FamilyError(f"config.json: {key} is {getattr(config, key)}; only {plain} is supported")
    return Spec(
        family="gpt2",
        vocab=config.vocab_size,
        width=config.n_embd,
        layers=config.n_layer,
        heads=config.n_head,
        kv_heads=config.n_head,
        head_size=config.n_embd // config.n_head,
        mlp=config.n_inner or 4 * config.n_embd,
        norm="layer",
        eps=config.layer_norm_epsilon,
        activation=config.activation_function,
        gated=False,
        tied=bool(config.tie_word_embeddings),
        max_positions=config.n_positions,
        features=frozenset(
            {"qkv_bias", "o_bias", "mlp_bias", "positions"} | (set() if config.tie_word_embeddings else {"head"})
        ),
    )


FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    tensors=(
        stored("transformer.wte.weight", "vocab resid", "embed.weight"),
        stored("transformer.wpe.weight", "position resid", "positions.weight"),
        stored(_AT + "ln_1.weight", "resid", "norm1.weight"),
        stored(_AT + "ln_1.bias", "resid", "norm1.bias"),
        stored(_AT + "attn.c_attn.weight", "resid (qkv head hd)", "q.weight", "k.weight", "v.weight"),
        stored(_AT + "attn.c_attn.bias", "(qkv head hd)", "q.bias", "k.bias", "v.bias"),
        stored(_AT + "attn.c_proj.weight", "(head hd) resid", "o.weight"),
        stored(_AT + "attn.c_proj.bias", "resid", "o.bias"),
        stored(_AT + "ln_2.weight", "resid", "norm2.weight"),
        stored(_AT + "ln_2.bias", "resid", "norm2.bias"),
        stored(_AT + "mlp.c_fc.weight", "resid ff", "up.weight"),
        stored(_AT + "mlp.c_fc.bias", "ff", "up.bias"),
        stored(_AT + "mlp.c_proj.weight", "ff resid", "down.weight"),
        stored(_AT + "mlp.c_proj.bias", "resid", "down.bias"),
        stored("transformer.ln_f.weight", "resid", "norm.weight"),
        stored("transformer.ln_f.bias", "resid", "norm.bias"),
        stored("lm_head.weight", "vocab resid", "head.weight", when="head"),
    ),
    read=_read,
    claimed=frozenset(
        {
            "activation_function",
            "add_cross_attention",
            "attn_pdrop",
            "embd_pdrop",
            "layer_norm_epsilon",
            "n_ctx",
            "n_embd",
            "n_head",
            "n_inner",
            "n_layer",
            "n_positions",
            "reorder_and_upcast_attn",
            "resid_pdrop",
            "scale_attn_by_inverse_layer_idx",
            "scale_attn_weights",
            "summary_activation",
            "summary_first_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
            "tie_word_embeddings",
            "vocab_size",
        }
    ),  # fmt: skip
    tiny={"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    prefix="transformer.",
    buffers=("attn.bias", "attn.masked_bias"),
)
