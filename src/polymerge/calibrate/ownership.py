"""Where in a text each expert matters: o_k(x, t) in [0, 1], 1 for at least one expert at every position.

Two ways, both without looking ahead:

- `by_prefix`: the label of a calibration text, softened where the domain can't be known yet. An expert owns position t
  as much as its own texts begin with x_1..x_t, relative to the expert whose texts do so most: the first tokens belong
  to everyone, and a token that only one domain uses settles it at once.
- `by_gate`: the weights of the union's Bayesian gate (no labels), relative to the largest.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def by_prefix(
    tokens: Int[Tensor, "row time"], owner: Int[Tensor, " row"], experts: int
) -> Float[Tensor, "expert row time"]:
    """Ownership from labels: n_k(prefix) / N_k over its maximum."""
    rows, time = tokens.shape
    totals = torch.bincount(owner, minlength=experts).double().clamp_min(1)
    prefix = torch.zeros(rows, dtype=torch.long)
    owned = torch.zeros(experts, rows, time)
    for t in range(time):
        pair = torch.stack([prefix, tokens[:, t]], dim=1)
        _, prefix = torch.unique(pair, dim=0, return_inverse=True)
        counts = torch.bincount(prefix * experts + owner, minlength=(int(prefix.max()) + 1) * experts)
        share = counts.view(-1, experts).double() / totals
        owned[:, :, t] = (share / share.amax(1, keepdim=True))[prefix].T.float()
    return owned


def by_gate(log_probs: Float[Tensor, "expert row next"], alpha: float = 0.01) -> Float[Tensor, "expert row time"]:
    """Ownership from each expert's log-probability of the next token (row, time - 1): gate weights over their maximum.

    Position t holds the weights after tokens 1..t (Herbster & Warmuth 1998, fixed share).
    """
    experts, rows, steps = log_probs.shape
    weights = log_probs.new_full((experts, rows), 1.0 / experts)
    owned = [weights]
    for t in range(steps):
        posterior = (weights.clamp_min(1e-30).log() + log_probs[:, :, t]).softmax(0)
        weights = (1 - alpha) * posterior + alpha / experts
        owned.append(weights)
    stacked = torch.stack(owned, dim=-1)
    return stacked / stacked.amax(0, keepdim=True)
