"""The config of a union: its experts' configs, and how they are mixed. It travels with union checkpoints."""

import math
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

# Of a nested config: what belongs to a file or a run, not to the architecture.
_NOT_ARCHITECTURE = (
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "architectures",
    "auto_map",
)


class UnionConfig(PreTrainedConfig):  # type: ignore[misc]
    """What a union is made of.

    Args:
        experts: the experts' own configs, as dicts with `model_type`.
        alpha: share of the weight that is spread evenly after every token, 0 <= alpha < 1.
        skip_below: gate weight under which an expert sleeps while decoding; 0 never skips. Sharing gives
            every expert at least alpha/K, so a threshold has an effect only above alpha/K, and it must stay
            below 1/K so that somebody always runs. With alpha > 0 sharing lifts a sleeper to the threshold
            within about K * skip_below / alpha tokens, and it wakes: so late can a change of domain be
            noticed. With alpha = 0 it sleeps until a call brings several tokens. With two experts the output
            differs in total variation by at most the weight that the sleeper would have had.
        prior: weight of each expert before the first token, default 1/K.
        vocab_size: tokens that the union predicts; default the smallest of the experts' (the larger ones only
            differ by padding rows, which get probability 0). Experts with the anchor's tokenizer count.
        tokenizers: bytes of each tokenizer's table in the weights, the anchor's first; none if all are one.
        expert_tokenizers: which of them each expert has.

    Raises:
        ValueError: alpha, skip_below, prior, vocab_size or the tokenizers out of range; skip_below with several
            tokenizers.
    """

    model_type = "polymerge_union"
    _auto_class = "AutoConfig"

    def __init__(
        self,
        experts: Sequence[dict[str, Any]] = (),
        *,
        alpha: float = 0.01,
        skip_below: float = 0.0,
        prior: Sequence[float] | None = None,
        vocab_size: int | None = None,
        use_cache: bool = True,
        tokenizers: Sequence[int] = (),
        expert_tokenizers: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        if tokenizers:  # absent otherwise: a union of one tokenizer is written as it always was
            self.tokenizers, self.expert_tokenizers = list(tokenizers), list(expert_tokenizers)
        self.experts = [{k: v for k, v in e.items() if k not in _NOT_ARCHITECTURE} for e in experts]
        self.alpha, self.skip_below, self.use_cache = float(alpha), float(skip_below), bool(use_cache)
        configs, count = self.expert_configs(), max(len(self.experts), 1)
        self.prior = [1.0 / count] * count if prior is None else [float(p) for p in prior]
        spoken = list(expert_tokenizers) if tokenizers else [0] * len(configs)
        if len(spoken) != len(configs) or (configs and 0 not in spoken) or (tokenizers and skip_below):
            raise ValueError(
                f"union: expert_tokenizers is {spoken} and skip_below {skip_below}, expected one number per expert, "
                "0 (the anchor's tokenizer) among them, and skip_below 0 where tokenizers differ"
            )
        smallest = min((c.vocab_size for c, t in zip(configs, spoken, strict=True) if not t), default=0)
        self.vocab_size = smallest if vocab_size is None else int(vocab_size)
        self._check(count, smallest)
        # What generate() and other tools ask of any decoder's config.
        self.num_hidden_layers = max((c.num_hidden_layers for c in configs), default=0)
        self.hidden_size = max((c.hidden_size for c in configs), default=0)
        self.num_attention_heads = max((c.num_attention_heads for c in configs), default=0)
        readers = [c for c, t in zip(configs, spoken, strict=True) if not t]
        lengths = [n for c in readers if (n := getattr(c, "max_position_embeddings", None))]
        self.max_position_embeddings = min(lengths, default=None)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(key, getattr(configs[0], key, None) if configs else None)
        kwargs.setdefault("tie_word_embeddings", False)  # each expert's own config says whether it is tied
        for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"):
            kwargs.pop(key, None)  # derived above; present when read back from config.json
        super().__init__(**kwargs)

    def expert_configs(self) -> list[Any]:
        """One fresh config object per expert."""
        return [AutoConfig.for_model(**expert) for expert in self.experts]

    def _check(self, count: int, smallest: int) -> None:
        if not 0 <= self.alpha < 1:
            raise ValueError(f"union: alpha is {self.alpha}, expected 0 <= alpha < 1")
        floor = self.alpha / count
        if self.skip_below and count > 1 and not floor < self.skip_below < 1 / count:
            raise ValueError(
                f"union: skip_below is {self.skip_below}, expected 0 (never skip) or a value between alpha/K "
                f"= {floor:g} (every expert's least weight) and 1/K = {1 / count:g}; raise it or lower alpha"
            )
        if len(self.prior) != count or min(self.prior) < 0 or not math.isclose(sum(self.prior), 1, rel_tol=1e-6):
            raise ValueError(f"union: prior is {self.prior}, expected {count} weights >= 0 whose sum is 1")
        if not 0 <= self.vocab_size <= smallest:
            raise ValueError(f"union: vocab_size is {self.vocab_size}, the smallest expert has {smallest}")
