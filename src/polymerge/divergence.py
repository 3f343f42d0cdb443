"""KL divergence between two models' next-token distributions, with its gradient made in the same pass."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK_CPU, CHUNK_GPU = 2**18, 2**26
"""Logits at a time: what a core's cache holds, or enough to keep a GPU busy."""


def kl(
    student: Float[Tensor, "*position vocab"], teacher: Float[Tensor, "*position other"]
) -> Float[Tensor, "*position"]:
    """KL(teacher ‖ student) = Σ_v p_v (log p_v − log q_v) in nats from logits; differentiable in the student.

    In float32 at least. Where one vocabulary is longer, its last rows only pad it: the teacher's are left out.
    """
    loss: Tensor = _Kl.apply(student.flatten(0, -2), teacher.flatten(0, -2))  # type: ignore[no-untyped-call]
    return loss.view(student.shape[:-1])


class _Kl(torch.autograd.Function):
    """Of positions, some at a time; the gradient is softmax(student) − teacher.

    Autograd would keep four tensors of the logits' size and go over memory for each: a large vocabulary fills it.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        vocab = min(student.shape[-1], teacher.shape[-1])
        chunk = max(1, (CHUNK_CPU if student.device.type == "cpu" else CHUNK_GPU) // student.shape[-1])
        losses = []
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for at in range(0, len(student), chunk):
            log_q, log_p = (_wide(x[at : at + chunk]) for x in (student, teacher[:, :vocab]))
            log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)
            p = log_p.exp()
            losses.append(log_p.sub_(log_q[:, :vocab]).mul_(p).sum(-1))
            if gradient is not None:
                log_q.exp_()[:, :vocab] -= p
                gradient[at : at + chunk] = log_q
        ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient)[:, None], None


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
