"""Union: one causal language model that holds K experts whole and mixes their next-token distributions.

    p(x_t | x_<t) = Σ_k w_k(t) p_k(x_t | x_<t)
    w_k(1)        = prior_k
    w_k(t+1)      = (1-α) · w_k(t) p_k(x_t | x_<t) / p(x_t | x_<t)  +  α/K

α = 0 is the Bayes mixture, whose total log loss is at most the best expert's plus ln K (uniform prior).
α > 0 is the fixed-share update, which follows a text that changes domain half-way
(Herbster & Warmuth, "Tracking the best expert", Machine Learning 32, 1998).

While decoding one token at a time, an expert whose weight is below `skip_below` in every row of the batch
does not run: it sleeps. A sleeping expert abstains: its likelihood is taken to be the mixture's, so that its
weight only moves by the share α (Freund, Schapire, Singer & Warmuth, "Using and combining predictors that
specialize", STOC 1997). It wakes when its weight is above the threshold again, or when a call brings several
tokens; it then reads the tokens that it missed in one call, and the gate is replayed over them with the true
likelihoods.

Experts whose tokenizer is not the anchor's (tokenizer 0) are donors: they read bytes and predict the anchor's
tokens. The formulas are the same, so the bound holds for what they predict there; what a donor loses by
predicting the anchor's tokens instead of its own is the boundary cost, in bits per byte (`_union_donors.py`).

Gradients do not pass through donors, they never sleep, and they read row by row: per byte of text a short call
for each head that the byte completes.

This file and those beside it that it imports are copied into the folder of every union checkpoint, so they import
torch, tokenizers and transformers only.
Shapes: B batch, T tokens, K experts, V the anchor's vocabulary, D a donor's. Log-probabilities are in nats.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

# Relative: transformers takes along, with a checkpoint's code, the files that it imports so.
from ._union_cache import UnionCache
from ._union_config import UnionConfig
from ._union_donors import CACHE, Projection, Reader, Readers, Vocabulary
from ._union_gate import BayesGate


@dataclass
class UnionOutput(CausalLMOutputWithPast):  # type: ignore[misc]
    """`CausalLMOutputWithPast` and `gate_weights` (B, T, K), which mixed the prediction at each position."""

    loss: Tensor | None = None  # any precision: the base class says float32
    logits: Tensor | None = None
    gate_weights: Tensor | None = None


class UnionForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """K causal language models over one vocabulary, mixed by a `BayesGate`. It has no weights of its own.

    `expert_calls[k]` and `expert_tokens[k]` count forward passes of expert k and the tokens per row that they
    read, since the last `reset_counts()`.
    """

    config_class = UnionConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _auto_class = "AutoModelForCausalLM"
    _is_stateful = True  # the gate cannot step back: no assisted decoding
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: UnionConfig, experts: Sequence[PreTrainedModel] | None = None) -> None:
        attention = config._attn_implementation  # noqa: SLF001 - None unless the user asked for one
        super().__init__(config)
        if not config.experts:
            raise ValueError("union: config.experts is empty, expected one config per expert")
        if experts is None:
            asked = {} if attention in (None, "sdpa") else {"attn_implementation": attention}
            experts = [AutoModelForCausalLM.from_config(c, **asked) for c in config.expert_configs()]
        self.experts = nn.ModuleList(experts)
        self.donors = [k for k, t in enumerate(getattr(config, "expert_tokenizers", ())) if t]
        # A buffer travels wherever the weights do; it is read when it is first needed.
        for i, size in enumerate(getattr(config, "tokenizers", ())):
            self.register_buffer(f"tokenizer_{i}", torch.zeros(size, dtype=torch.uint8))
        self._projections: dict[int, Projection] = {}
        self.reset_counts()
        self.post_init()

    @classmethod
    def from_experts(
        cls,
        models: Sequence[PreTrainedModel],
        prior: Sequence[float] | None = None,
        alpha: float = 0.01,
        skip_below: float = 0.0,
        tables: Sequence[bytes] = (),
        expert_tokenizers: Sequence[int] = (),
    ) -> "UnionForCausalLM":
        """A union that holds these very models (no copy is made), in evaluation mode.

        tables: of the tokenizers, the anchor's first, if they differ (`polymerge.methods.union.tables`).
        expert_tokenizers: which of them each model has.

        Raises:
            ValueError: see `UnionConfig`.
        """
        configs = [model.config.to_dict() for model in models]
        config = UnionConfig(
            experts=configs,
            prior=prior,
            alpha=alpha,
            skip_below=skip_below,
            tokenizers=[len(table) for table in tables],
            expert_tokenizers=expert_tokenizers,
        )
        config.dtype = models[0].dtype if models else None
        union = cls(config, models)
        for i, table in enumerate(tables):
            setattr(union, f"tokenizer_{i}", torch.tensor(list(table), dtype=torch.uint8))
        union.eval()
        return union

    def post_init(self) -> None:
        """Collect what transformers must know of the experts: it looks at direct children only."""
        super().post_init()
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_no_split_modules"):
            getattr(self, name).update(*(getattr(expert, name) or () for expert in self.experts))
        for name in ("_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_load_missing"):
            getattr(self, name).update(*(getattr(expert, name) or () for expert in self.experts))

    def init_weights(self) -> None:
        """Nothing to do: the experts' own constructors did it, and given models must stay as they are."""
        self.tie_weights()

    def reset_counts(self) -> None:
        """Set `expert_calls` and `expert_tokens` to zero."""
        self.expert_calls = [0] * len(self.experts)
        self.expert_tokens = [0] * len(self.experts)

    def new_cache(self) -> UnionCache:
        """An empty cache."""
        return UnionCache(
            [
                Readers(self._projection(k)) if k in self.donors else DynamicCache(config=expert.config)
                for k, expert in enumerate(self.experts)
            ]
        )

    def gate_weights(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Weights (B, T, K) that mix the prediction made at position t: of token t+1, before it is seen."""
        weights: Tensor = self(input_ids, attention_mask, use_cache=False, logits_to_keep=1).gate_weights
        return weights

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        *,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> UnionOutput | tuple[Tensor, ...]:
        """Log-probabilities of the mixture.

        Args:
            input_ids: (B, T), the tokens not yet in the cache.
            attention_mask: (B, cached + T), 0 at padding. Padding neither attends nor moves the gate.
            position_ids: (B, T), default: counted over the attention mask.
            past_key_values: None, an empty cache, or the `UnionCache` of the call before.
            cache: the same by the name that it has from transformers 5.24 on.
            labels: (B, T), -100 where not scored; the loss is in nats per scored token.
            use_cache: whether to return a cache, default the config's.
            logits_to_keep: how many last positions (or which) get logits; 0 means all.
            return_dict: False returns a tuple.
            num_items_in_batch: divides the summed loss in place of the number of labels (for gradient
                accumulation).
            **kwargs: what generate() passes along; hidden states and attentions are refused.

        Returns:
            `logits` (B, T or fewer, V) are log-probabilities; `gate_weights` (B, T, K).

        Raises:
            ValueError: no `input_ids`, a mask that is not (B, cached + T), a filled cache of another model,
                or a request for hidden states or attentions.
        """
        refused = [
            k
            for k in ("inputs_embeds", "output_hidden_states", "output_attentions")
            if kwargs.get(k) is not None and kwargs[k] is not False
        ]
        if input_ids is None or refused:
            raise ValueError(f"union: needs input_ids and cannot take {refused}; ask a member of model.experts")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        state = self._open(past_key_values if cache is None else cache, use_cache)
        mask = self._mask(attention_mask, input_ids, state.length)
        if position_ids is None:
            position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)
        positions = position_ids[..., -input_ids.shape[1] :].expand_as(input_ids)

        self._remember(state, input_ids, positions, mask)
        run, log_weights = self._choose(state, input_ids.shape[1])
        keep = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        kept = slice(None) if self.donors else keep
        log_probs = {k: self._run_expert(k, state, input_ids.shape[1], mask, kept) for k in run if k not in self.donors}
        if self.donors:
            log_probs |= self._run_donors(state, input_ids, mask, log_probs)
            log_probs = {k: scores[:, keep] for k, scores in log_probs.items()}
        weights = self._settle(state, run, log_weights, input_ids.shape[1])

        # The sleepers' weight goes to those who run.
        mixing = torch.log_softmax(weights[:, keep][..., run], -1)
        parts = [log_probs[k] + mixing[..., i, None].to(log_probs[k]) for i, k in enumerate(run)]
        logits = functools.reduce(torch.logaddexp, parts)
        loss = None if labels is None else _loss(logits, labels, num_items_in_batch)
        output = UnionOutput(
            loss=loss, logits=logits, gate_weights=weights.exp(), **{CACHE: state if use_cache else None}
        )
        return output.to_tuple() if return_dict is False else output

    def _open(self, past: Cache | None, use_cache: bool) -> UnionCache:
        """The cache of this call; without `use_cache` one that holds the gate only."""
        if isinstance(past, UnionCache):
            return past
        # generate() prepares an empty DynamicCache, which cannot hold several models.
        if past is not None and (type(past) is not DynamicCache or past.offloading or past.get_seq_length()):
            raise ValueError(
                f"union: the cache is a {type(past).__name__}, expected the UnionCache that the call "
                "before returned, or none; leave out cache_implementation"
            )
        return self.new_cache() if use_cache else UnionCache([None] * len(self.experts))

    @staticmethod
    def _mask(mask: Tensor | None, ids: Tensor, past: int) -> Tensor:
        shape = (ids.shape[0], past + ids.shape[1])
        if mask is None:
            return ids.new_ones(shape)
        if mask.shape != shape:
            raise ValueError(f"union: attention_mask is {tuple(mask.shape)}, expected {shape} (batch, cached + new)")
        return mask

    def _gate(self, device: torch.device) -> BayesGate:
        # float64 makes the gate's own rounding irrelevant; it is (B, K) numbers a token.
        wide = torch.float32 if device.type == "mps" else torch.float64
        return BayesGate(torch.tensor(self.config.prior, dtype=wide, device=device), self.config.alpha)

    def _remember(self, cache: UnionCache, ids: Tensor, positions: Tensor, mask: Tensor) -> None:
        """Append the new tokens to the cache's pending ones, with the evidence that is known already."""
        real = mask[:, -ids.shape[1] :].bool()
        if not cache.gate:
            start = self._gate(ids.device).start(ids.shape[0])
            nothing = torch.zeros_like(real[:, 0])  # nobody predicts the first token
            cache.gate = {"log_weights": start, "base": start, "real": nothing}
        # A prediction counts if it was made at a token and is about a token.
        scored = real & torch.cat([cache.gate["real"][:, None], real[:, :-1]], 1)
        evidence = cache.gate["base"].new_full((*ids.shape, len(self.experts)), torch.nan)
        for k, last in cache.last.items():
            if not cache.lag[k]:
                evidence[:, 0, k] = last.gather(-1, ids[:, :1])[:, 0]
        cache.append(ids=ids, positions=positions, evidence=evidence, scored=scored)
        cache.gate["real"], cache.length = real[:, -1], cache.length + ids.shape[1]

    def _choose(self, cache: UnionCache, count: int) -> tuple[list[int], Tensor | None]:
        """Who runs now, and with which log weights (B, 1, K) if that isn't everybody."""
        everybody = list(range(len(self.experts)))
        first = cache.length == count
        if count > 1 or first or not self.config.skip_below or cache.experts[0] is None:
            return everybody, None
        now, device = cache.gate["log_weights"], cache.pending["ids"].device
        gate, awake = self._gate(device), [not lag for lag in cache.lag]
        evidence, scored = cache.pending["evidence"][:, -1], cache.pending["scored"][:, -1:]
        evidence = gate.abstain(now, evidence, torch.tensor(awake, device=device))
        log_weights = gate.scan(now, evidence[:, None], scored)
        wanted = (log_weights[:, 0].exp().amax(0) >= self.config.skip_below).tolist()
        # One waker wakes all, so that a single replay makes every weight exact again.
        if any(want and not up for want, up in zip(wanted, awake, strict=True)):
            return everybody, None
        run = [k for k in everybody if wanted[k] and awake[k]]
        return (everybody, None) if len(run) == len(everybody) else (run, log_weights)

    def _run_expert(self, k: int, cache: UnionCache, count: int, mask: Tensor, keep: slice | Tensor) -> Tensor:
        """Log-probabilities (B, kept, V) of expert k at the new positions, after it read what it missed."""
        unread, expert_cache = cache.lag[k] + count, cache.experts[k]
        ids = cache.pending["ids"][:, -unread:]
        output = self.experts[k](
            input_ids=ids,
            attention_mask=mask,
            position_ids=cache.pending["positions"][:, -unread:],
            use_cache=expert_cache is not None,
            **{CACHE: expert_cache},
        )
        self.expert_calls[k] += 1
        self.expert_tokens[k] += unread
        logits = output.logits[..., : self.config.vocab_size]
        log_probs = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
        if unread > 1:
            evidence = cache.pending["evidence"]
            seen = log_probs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].to(evidence)
            # Not in place: autograd may need what was there.
            columns = list(evidence.unbind(-1))
            columns[k] = torch.cat([columns[k][:, : 1 - unread], seen], 1)
            cache.pending["evidence"] = torch.stack(columns, -1)
        cache.last[k] = log_probs[:, -1]
        return log_probs[:, -count:][:, keep]

    def _run_donors(self, cache: UnionCache, ids: Tensor, mask: Tensor, done: dict[int, Tensor]) -> dict[int, Tensor]:
        """Log-probabilities (B, T, V) of the donors at the new positions; `done`: of the other experts."""
        prior = torch.tensor(self.config.prior, dtype=torch.float64)
        # Even where all of them have a prior of zero.
        shares = torch.log_softmax(prior[list(done)].clamp(min=1e-300).log(), -1)
        parts = [scores.detach().cpu().double() + share for scores, share in zip(done.values(), shares, strict=True)]
        anchor = functools.reduce(torch.logaddexp, parts)
        real, tokens, out = mask[:, -ids.shape[1] :].bool().tolist(), ids.tolist(), {}
        for k in self.donors:
            readers = cache.experts[k] or Readers(self._projection(k))
            readers.rows = readers.rows or [Reader(readers.projection) for _ in tokens]
            scores = anchor.clone()
            for row, reader in enumerate(readers.rows):
                for t, token in enumerate(tokens[row]):
                    if real[row][t]:
                        reader.take(self.experts[k], token)
                        scores[row, t] = reader.predict(anchor[row, t])
            self.expert_calls[k] += 1
            self.expert_tokens[k] += ids.shape[1]
            log_probs = scores.to(next(iter(done.values())))
            seen = log_probs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            columns = list(cache.pending["evidence"].unbind(-1))
            columns[k] = torch.cat([columns[k][:, :1], seen.to(columns[k])], 1)
            cache.pending["evidence"] = torch.stack(columns, -1)
            cache.last[k], out[k] = log_probs[:, -1], log_probs
        return out

    def _projection(self, donor: int) -> Projection:
        if donor not in self._projections:
            which = self.config.expert_tokenizers[donor]
            tables = [bytes(getattr(self, f"tokenizer_{i}").tolist()) for i in (0, which)]
            anchor, other = map(Vocabulary, tables)
            self._projections[donor] = Projection(anchor, other, self.config.vocab_size)
        return self._projections[donor]

    def _settle(self, cache: UnionCache, run: list[int], log_weights: Tensor | None, count: int) -> Tensor:
        """Log weights (B, T, K) at the new positions; the cache is brought up to date."""
        if log_weights is None:  # everybody ran: the gate is exact from `base` on
            pending, base = cache.pending, cache.gate["base"]
            weights = self._gate(base.device).scan(base, pending["evidence"], pending["scored"])[:, -count:]
            cache.gate["log_weights"] = weights[:, -1]
            cache.forget_pending()
            return weights
        cache.gate["log_weights"] = log_weights[:, -1]
        cache.lag = [0 if k in run else lag + 1 for k, lag in enumerate(cache.lag)]
        return log_weights


def _loss(log_probs: Tensor, labels: Tensor, count: Tensor | int | None) -> Tensor:
    """Mean negative log-probability of the labels, each predicted one position earlier."""
    flat, target = log_probs[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(log_probs.device)
    if count is None:
        return nn.functional.nll_loss(flat, target, ignore_index=-100)
    return nn.functional.nll_loss(flat, target, ignore_index=-100, reduction="sum") / count
