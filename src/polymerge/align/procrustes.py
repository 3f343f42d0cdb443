"""Orthogonal alignment: rotations of a residual stream or of a head's values, phases of rotary pairs.

    Q = argmin ‖X_B Q − X_A‖,  QᵀQ = 1 or QQᵀ = 1      = U Vᵀ  of the SVD of X_Bᵀ X_A        (Schönemann 1966)

A stream under RMSNorm is free up to a rotation once γ is absorbed by its readers; a stream of other width goes in by a
semi-orthogonal Q. A rotary pair of queries and keys is free up to z = a + bi, as complex numbers commute with the
rotation: queries times z, keys times 1/z̄.

What Procrustes recovers: rotations, hence signed permutations, and isometric embeddings at unequal widths, of streams
of full rank. What it cannot: scales of single units, and general linear maps.
"""

import torch
from jaxtyping import Complex, Float
from torch import Tensor

PRIOR = 1e-6
"""Weight of "stay where you are" against the mean singular value: decides directions in which nothing is seen."""


def orthogonal(cross: Float[Tensor, "source target"], prior: float = PRIOR) -> Float[Tensor, "source target"]:
    """The (semi-)orthogonal Q nearest to a cross-moment X_Bᵀ X_A, float64.

    Orthonormal rows where source ≤ target, else orthonormal columns.
    """
    c = cross.double()
    scale = c.norm() / min(c.shape) ** 0.5
    stay = torch.eye(*c.shape, dtype=c.dtype, device=c.device)
    u, _, vh = torch.linalg.svd(c / scale.clamp_min(1e-300) + prior * stay, full_matrices=False)
    q: Tensor = u @ vh
    return q


def as_complex(x: Float[Tensor, "... hd n"]) -> Complex[Tensor, "... pair n"]:
    """Rows of a head as rotary pairs: coordinate p and p + hd/2 are real and imaginary part."""
    half = x.shape[-2] // 2
    return torch.complex(x[..., :half, :].double(), x[..., half:, :].double())


def pair_factors(
    q: Complex[Tensor, "head pair n"],
    k: Complex[Tensor, "pair n"],
    q_anchor: Complex[Tensor, "head pair n"],
    k_anchor: Complex[Tensor, "pair n"],
) -> tuple[Complex[Tensor, " pair"], Complex[Tensor, " pair"]]:
    """What to multiply a KV group's query and key pairs with, to come nearest to the anchor's; products are kept.

    The phase maximises the sum of inner products of queries and keys; the modulus gives both the anchor's proportion
    of query to key norm.
    """
    nq, nk, nqa, nka = (x.abs().pow(2).sum(-1).clamp_min(1e-300) for x in (q.transpose(0, 1).flatten(1), k,
                        q_anchor.transpose(0, 1).flatten(1), k_anchor))  # fmt: skip
    modulus = ((nqa * nk) / (nka * nq)).pow(0.25)
    dead = (torch.minimum(nq, nk) < 1e-200) | (torch.minimum(nqa, nka) < 1e-200)
    modulus = torch.where(dead, torch.ones_like(modulus), modulus)
    # Queries and keys count alike in the phase, whatever their norms.
    seen = (q_anchor.conj() * q).sum((0, 2)) / (nq * nqa).sqrt() + (k_anchor.conj() * k).sum(-1) / (nk * nka).sqrt()
    size = seen.abs()
    phase = torch.where(size > 1e-12, seen.conj() / size.clamp_min(1e-12), torch.ones_like(seen))
    return phase * modulus, phase / modulus


def pair_block(z: Complex[Tensor, " pair"]) -> Float[Tensor, "hd hd"]:
    """The map B of a head's coordinates with Bᵀ x = z x on every rotary pair."""
    x, y = torch.diag(z.real), torch.diag(z.imag)
    return torch.cat([torch.cat([x, y], dim=1), torch.cat([-y, x], dim=1)])
