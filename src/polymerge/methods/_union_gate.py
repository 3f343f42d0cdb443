"""The union's gate: weights of K experts from how well each has predicted what came so far.

It travels with union checkpoints (`_union_modeling.py` has the formulas). Shapes: B batch, T tokens, K experts.
"""

import math

import torch
from torch import Tensor


class BayesGate:
    """Online Bayes with fixed share over K experts, in log space, one state per sequence.

    It sees nothing but how well each expert predicted what was read: `evidence` (B, n, K), the
    log-probability that expert k gave to the n-th piece of text. The pieces are tokens here; experts with
    other tokenizers only need a common way to cut the text into pieces.
    """

    def __init__(self, prior: Tensor, alpha: float) -> None:
        self.log_prior, self.alpha = prior.log(), alpha

    def start(self, batch: int) -> Tensor:
        """Log weights (B, K) before anything was read."""
        return self.log_prior.expand(batch, -1)

    def scan(self, log_weights: Tensor, evidence: Tensor, scored: Tensor) -> Tensor:
        """Log weights (B, n, K) after each of n pieces.

        Args:
            log_weights: (B, K) before the first piece.
            evidence: (B, n, K); anything, NaN included, where not scored.
            scored: (B, n) bool; False leaves the weights alone (padding, a first token).
        """
        # An infinite surprise for everybody would make all weights NaN.
        evidence = torch.where(scored[..., None], evidence, 0.0).clamp(min=-1e30)
        if self.alpha == 0:
            return torch.log_softmax(log_weights[:, None] + evidence.cumsum(1), -1)
        keep, share = math.log1p(-self.alpha), math.log(self.alpha / evidence.shape[-1])
        out = []
        for t in range(evidence.shape[1]):
            posterior = torch.log_softmax(log_weights + evidence[:, t], -1) + keep
            shared = torch.logaddexp(posterior, posterior.new_tensor(share))
            log_weights = torch.where(scored[:, t, None], shared, log_weights)
            out.append(log_weights)
        return torch.stack(out, 1)

    @staticmethod
    def abstain(log_weights: Tensor, evidence: Tensor, awake: Tensor) -> Tensor:
        """Evidence (B, K) in which those not awake (K,) predicted as well as the mixture of those awake."""
        awake_weights = log_weights.masked_fill(~awake, -torch.inf)
        joint = torch.where(awake, awake_weights + evidence, -torch.inf)
        mixture = torch.logsumexp(joint, -1) - torch.logsumexp(awake_weights, -1)
        return torch.where(awake, evidence, mixture[:, None])
