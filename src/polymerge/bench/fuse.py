"""FuseLLM: distillation from the fused distributions of all experts, together with plain language modelling.

    minimise  λ · CE(next token) + (1 − λ) · CE(P ‖ student),   P: of all experts' distributions on a text, those with
                                                                the least cross-entropy on it (MinCE)

"Knowledge Fusion of Large Language Models" (Wan et al., ICLR 2024), λ = 0.9 as there. Experts here share a tokenizer,
so that nothing has to be aligned and P keeps the full vocabulary instead of the most likely tokens. Up to a constant
the loss is KL(λ · one-hot + (1 − λ) · P ‖ student): a teacher like any other, by which any trainer can go.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

MODELLING = 0.9
"""λ, the weight of plain language modelling."""


def fused(
    log_probs: Float[Tensor, "expert row time vocab"], following: Int[Tensor, "row time"], modelling: float = MODELLING
) -> Float[Tensor, "row time vocab"]:
    """Log of λ · one-hot(`following`) + (1 − λ) · P; where `following` is negative (unknown) of P alone."""
    known = following >= 0
    losses = -log_probs.gather(-1, following.clamp_min(0).expand(len(log_probs), -1, -1)[..., None])[..., 0]
    best = (losses * known).sum(-1).argmin(0)
    chosen = log_probs[best, torch.arange(len(best), device=best.device)].exp()
    gold = F.one_hot(following.clamp_min(0), chosen.shape[-1]).to(chosen)
    share = modelling * known.to(chosen)[..., None]
    return (share * gold + (1 - share) * chosen).clamp_min(torch.finfo(chosen.dtype).tiny).log()


class FusedTeacher(torch.nn.Module):
    """Experts (causal LMs of transformers) as one teacher, whose logits know the next token of what they read."""

    def __init__(self, experts: Sequence[Any], modelling: float = MODELLING) -> None:
        super().__init__()
        self.experts, self.modelling = torch.nn.ModuleList(experts), modelling

    def forward(self, input_ids: Int[Tensor, "row time"], **_: Any) -> Any:
        """`logits` (row, time, vocab); the last position's are P's alone."""
        log_probs = [e(input_ids=input_ids, use_cache=False).logits.float().log_softmax(-1) for e in self.experts]
        vocab = min(x.shape[-1] for x in log_probs)  # beyond it: rows that only pad a vocabulary
        following = F.pad(input_ids[:, 1:], (0, 1), value=-1)
        stacked = torch.stack([x[..., :vocab] for x in log_probs])
        return SimpleNamespace(logits=fused(stacked, following, self.modelling))
