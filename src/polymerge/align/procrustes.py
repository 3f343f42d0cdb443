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

TINY = 1e-200
"""Squared norms below this are no weights at all."""

SEEN = 1e-10
"""Singular values below this share of the largest say nothing about direction."""


def orthogonal(cross: Float[Tensor, "source target"]) -> Float[Tensor, "source target"]:
    """The (semi-)orthogonal Q nearest to a cross-moment X_Bᵀ X_A, float64.

    Orthonormal rows where source ≤ target, else orthonormal columns. Directions in which nothing is seen stay where
    they are, as far as the others leave room.
    """
    c = cross.double()
    u, s, vh = torch.linalg.svd(c, full_matrices=True)
    rank = int((s > SEEN * s[0]).sum()) if len(s) else 0
    stay = torch.eye(*c.shape, dtype=c.dtype, device=c.device)
    u0, v0 = u[:, rank:], vh[rank:].T
    left, _, right = torch.linalg.svd(u0.T @ stay @ v0, full_matrices=False)
    q: Tensor = u[:, :rank] @ vh[:rank] + u0 @ left @ right @ v0.T
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
    dead = torch.stack([nq, nk, nqa, nka]).amin(0) < TINY
    modulus = torch.where(dead, torch.ones_like(modulus), modulus)
    # Queries and keys count alike in the phase, whatever their norms.
    seen = (q_anchor.conj() * q).sum((0, 2)) / (nq * nqa).sqrt() + (k_anchor.conj() * k).sum(-1) / (nk * nka).sqrt()
    size = seen.abs()
    phase = torch.where(size > SEEN, seen.conj() / size.clamp_min(SEEN), torch.ones_like(seen))
    return phase * modulus, phase / modulus


def pair_block(z: Complex[Tensor, " pair"]) -> Float[Tensor, "hd hd"]:
    """The map B of a head's coordinates with Bᵀ x = z x on every rotary pair."""
    x, y = torch.diag(z.real), torch.diag(z.imag)
    return torch.cat([torch.cat([x, y], dim=1), torch.cat([-y, x], dim=1)])
