"""What a decoder computes, and how a Hugging Face family stores it: data, no code per family.

A family file holds one `Family`: a table of stored tensors with named axes, the reading of its config,
and a tiny config for the tests. The engine (`decoder.py`) knows roles only, never a family's name.

Roles of one layer, canonical axes (matrices are always "out in"):

    norm1.weight norm1.bias norm2.*             resid
    q.weight                                    (head hd) resid         q.bias      (head hd)
    k.weight v.weight                           (kvhead hd) resid       k.bias ...  (kvhead hd)
    q_norm.weight k_norm.weight                 hd
    q_norm_all.weight                           (head hd)               k_norm_all.weight  (kvhead hd)
    o.weight                                    resid (head hd)         o.bias      resid
    o_norm.weight down_norm.weight              resid
    gate.weight up.weight                       ff resid                gate.bias up.bias   ff
    down.weight                                 resid ff                down.bias   resid

and outside the layers: embed.weight "vocab resid", positions.weight "position resid", norm.weight, norm.bias
"resid", head.weight "vocab resid".
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

CANONICAL: Mapping[str, str] = {
    "embed.weight": "vocab resid",
    "positions.weight": "position resid",
    "head.weight": "vocab resid",
    **{f"{norm}.{kind}": "resid" for norm in ("norm", "norm1", "norm2") for kind in ("weight", "bias")},
    "q.weight": "(head hd) resid",
    "q.bias": "(head hd)",
    **{f"{role}.weight": "(kvhead hd) resid" for role in "kv"},
    **{f"{role}.bias": "(kvhead hd)" for role in "kv"},
    "q_norm.weight": "hd",
    "k_norm.weight": "hd",
    "q_norm_all.weight": "(head hd)",
    "k_norm_all.weight": "(kvhead hd)",
    "o_norm.weight": "resid",
    "down_norm.weight": "resid",
    "o.weight": "resid (head hd)",
    "o.bias": "resid",
    **{f"{role}.weight": "ff resid" for role in ("gate", "up")},
    **{f"{role}.bias": "ff" for role in ("gate", "up")},
    "down.weight": "resid ff",
    "down.bias": "resid",
}


@dataclass(frozen=True)
class Spec:
    """What one decoder computes. Sizes are counts; `frequencies` are radians per token of each rotary pair.

    Attributes:
        each: frequencies, the factor on cos and sin, and the window of every layer, where layers differ in them; empty:
            all have those of the model.
        score_cap: c, where attention's scores are bent below it as c tanh(x / c); `logit_cap`: the same of logits.
        factors: (role, number) pairs for a family that multiplies where others do not, such as a Granite's states after
            the embedding. Weights come from the source with them, so that the engine needs no such thing.
        features: which optional tensors there are (`Stored.when`), and "write_norms": what attention and MLP write is
            normalised; "read_raw": they read the stream as it is; "qk_norm", "qk_norm_all": queries and keys are
            normalised, per head or as one.
    """

    family: str
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    norm: Literal["rms", "layer"]
    eps: float
    activation: str
    gated: bool
    tied: bool
    max_positions: int
    frequencies: tuple[float, ...] = ()
    rope_scale: float = 1.0
    rope_theta: float = 10000.0
    window: int | None = None
    each: tuple[tuple[tuple[float, ...], float, int | None], ...] = ()
    parallel: bool = False
    score_cap: float | None = None
    logit_cap: float | None = None
    factors: tuple[tuple[str, float], ...] = ()
    features: frozenset[str] = field(default_factory=frozenset)

    @property
    def has_constants(self) -> bool:
        """Whether maps have constant parts: biases, LayerNorm's shift, or a plain unit seen as a gated one."""
        return self.norm == "layer" or not self.gated or bool(self.features & {"qkv_bias", "o_bias", "mlp_bias"})

    @property
    def llama_like(self) -> bool:
        """Whether a Llama computes the same but for sizes, activation, biases and norms of each head's q and k."""
        plain = self.norm == "rms" and self.gated and not self.parallel and bool(self.frequencies) and not self.each
        capped = self.score_cap is not None or self.logit_cap is not None
        return plain and not capped and not self.features & {"qk_norm_all", "read_raw", "write_norms"}

    def at(self, layer: int) -> "Spec":
        """The same, with the rotation and the window of one layer."""
        if not self.each:
            return self
        frequencies, scale, window = self.each[layer]
        return replace(self, frequencies=frequencies, rope_scale=scale, window=window, each=())

    def sizes(self) -> dict[str, int]:
        """The length of every named axis."""
        return {
            "vocab": self.vocab,
            "resid": self.width,
            "head": self.heads,
            "kvhead": self.kv_heads,
            "hd": self.head_size,
            "ff": self.mlp,
            "position": self.max_positions,
            "qkv": 3,
        }


@dataclass(frozen=True)
class Stored:
    """One stored tensor: its name ("{layer}" inside a layer), its axes, and the role or roles that it holds.

    A fused tensor has an axis "qkv" and three roles or, where its parts stand one after the other and may differ in
    length, "(head hd | kvhead hd | kvhead hd) resid". `when` names the `Spec.features` entry without which the tensor
    does not exist; `also` lists other names under which releases have stored it; `plus` is added to what is stored.
    """

    name: str
    axes: str
    roles: tuple[str, ...]
    when: str | None = None
    also: tuple[str, ...] = ()
    plus: float = 0.0

    def parts(self) -> tuple["Stored", ...]:
        """A row for each role of parts that stand one after the other, along the first axis."""
        first, rest = self.axes.removeprefix("(").split(")")
        axes = [f"({part.strip()}){rest}" for part in first.split("|")]
        return tuple(replace(self, axes=a, roles=(role,)) for a, role in zip(axes, self.roles, strict=True))


@dataclass(frozen=True)
class Family:
    """A Hugging Face decoder family as a table.

    `claimed` are the config keys that `read` understands, `harmless` those that change nothing at
    inference; any other key that differs from its default is refused by name. `write` makes the config of a
    merged model (None: the family is a source only). `bias` lists the roles that carry a bias in
    every model of the family as Hugging Face builds it by default.
    """

    model_type: str
    architecture: str
    tensors: tuple[Stored, ...]
    read: Callable[[Any], Spec]
    claimed: frozenset[str]
    tiny: Mapping[str, Any]
    prefix: str = ""
    buffers: tuple[str, ...] = ()
    write: Callable[[Spec], dict[str, Any]] | None = None
    bias: frozenset[str] = field(default_factory=frozenset)
    qk_norm: bool = False
    divides_width: bool = False


HARMLESS = frozenset({
    "architectures", "auto_map", "axolotl_config", "base_model_name_or_path", "bos_token_id", "chunk_size_feed_forward",
    "dtype", "eos_token_id", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "is_llama_config",
    "label2id", "max_sequence_length", "mergekit_version", "model_name", "model_type", "neftune_noise_alpha",
    "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict",
    "sep_token_id", "task_specific_params", "tokenizer_class", "torch_dtype", "transformers.js_config",
    "transformers_version", "trust_remote_code", "unsloth_fixed", "unsloth_version", "use_cache",
})  # fmt: skip
"""Config keys that never change the logits of a causal language model at inference; so do none that begin with `_`."""
NEUTRAL = {"rotary_scaling_factor": 1.0}
"""Keys that transformers does not read, with the value that changes nothing."""


def axis_lengths(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape that axes stand for, "(head hd | hd) resid" -> (head * hd + hd, resid)."""
    groups = re.findall(r"\(([^)]*)\)|(\S+)", axes)
    parts = [(inner or single).split("|") for inner, single in groups]
    return tuple(sum(math.prod(sizes[a] for a in part.split()) for part in group) for group in parts)


def stored(
    name: str, axes: str, *roles: str, when: str | None = None, also: tuple[str, ...] = (), plus: float = 0.0
) -> Stored:
    """A row of a family table."""
    return Stored(name, axes, roles, when, also, plus)
