"""The map from one tokenizer's vocabulary to another's: same bytes onto same bytes, the rest composed.

A map is a sparse matrix M (anchor tokens × donor tokens). With the donor's embeddings E (donor, dim),

    M E  (anchor, dim)     is an embedding in the donor's space for every anchor token.

Rows of M, by kind of anchor token:

- shared: one entry of 1 on the donor token with the same bytes;
- role: one entry of 1 on the donor's special token with the same role (eos, bos, unk, pad), else the same
  literal;
- composed: `mean`: 1/n on each of the n tokens into which the donor cuts the bytes;
  `first`: 1 on the first of them, which makes M a map of next-token probabilities;
- partial: as `mean` or `first`, but the donor has no token for some of the bytes;
- unknown: no entry.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from polymerge.align.pieces import cut
from polymerge.align.token_bytes import FALLBACK, ByteView, as_view

Method = Literal["mean", "first"]


class Kind(IntEnum):
    """How an anchor token is known to the donor."""

    SHARED = 0
    ROLE = 1
    COMPOSED = 2
    PARTIAL = 3
    UNKNOWN = 4


@dataclass(frozen=True, eq=False)
class VocabMap:
    """M[rows[i], columns[i]] = weights[i], rows ascending; kinds (anchor,) holds `Kind` values."""

    rows: Int64[Tensor, " entry"]
    columns: Int64[Tensor, " entry"]
    weights: Float[Tensor, " entry"]
    kinds: Int64[Tensor, " anchor"]
    donor_size: int

    def embed(self, donor_embeddings: Float[Tensor, "donor dim"]) -> Float[Tensor, "anchor dim"]:
        """M E in the dtype and on the device of E, computed in float32 at least; rows of unknown tokens are zero.

        E may have padding rows after the donor's tokens. Raises ValueError if it has fewer rows than tokens.
        """
        dtype = torch.promote_types(donor_embeddings.dtype, torch.float32)
        known = donor_embeddings.to("cpu", dtype)  # where the map is
        if len(known) < self.donor_size:
            raise ValueError(f"{len(known)} donor embeddings; expected a row for each of {self.donor_size} tokens")
        place, size = torch.stack([self.rows, self.columns]), (len(self.kinds), len(known))
        matrix = torch.sparse_coo_tensor(place, self.weights.to(dtype), size, check_invariants=False).coalesce()
        return (matrix @ known).to(donor_embeddings)


def shared(anchor: Any, donor: Any) -> tuple[Int64[Tensor, " pair"], Int64[Tensor, " pair"]]:
    """Ids of tokens with the same bytes, anchor ids ascending; special tokens by role, else by literal.

    anchor, donor: fast tokenizers or their ByteViews. Where a tokenizer has several tokens for the same bytes
    (SentencePiece: `A` and `<0x41>`), the one written the same way is taken, else the one that is used in
    text. Raises PreflightError for a tokenizer without exact bytes.
    """
    a, d = as_view(anchor), as_view(donor)
    same: dict[tuple[str, bytes], int] = {}
    content: dict[bytes, int] = {}
    literal: dict[bytes, int] = {}
    order = sorted(range(len(d.pieces)), key=lambda i: FALLBACK.fullmatch(d.pieces[i]) is not None)  # stable
    for i in order:
        if not d.special[i]:
            same.setdefault((d.pieces[i], d.surface[i]), i)
            content.setdefault(d.surface[i], i)
        elif d.pieces[i]:
            literal.setdefault(d.surface[i], i)
    roles: dict[int, int] = {}
    for role, i in a.roles.items():
        if role in d.roles:
            roles.setdefault(i, d.roles[role])
    pairs: list[tuple[int, int]] = []
    for i, (piece, data) in enumerate(zip(a.pieces, a.surface, strict=True)):
        if a.special[i]:
            target = roles.get(i, literal.get(data)) if piece else None
        else:
            target = same.get((piece, data), content.get(data))
        if target is not None:
            pairs.append((i, target))
    table = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return table[:, 0].contiguous(), table[:, 1].contiguous()


def vocab_map(anchor: Any, donor: Any, *, method: Method = "mean") -> VocabMap:
    """The map from the anchor's tokens to the donor's: fast tokenizers or their ByteViews.

    Raises PreflightError for a tokenizer without exact bytes.
    """
    a, d = as_view(anchor), as_view(donor)
    ids, targets = shared(a, d)
    special = torch.tensor(a.special, dtype=torch.bool)
    kinds = torch.full((len(a.pieces),), int(Kind.UNKNOWN), dtype=torch.int64)
    kinds[ids] = torch.where(special[ids], int(Kind.ROLE), int(Kind.SHARED))
    rest = torch.nonzero((kinds == Kind.UNKNOWN) & ~special)[:, 0]
    found = cut(d, (a.surface[i] for i in rest.tolist()))
    rows, columns, weights = _pieces(rest.tolist(), found, first=method == "first")
    kinds[rest] = torch.tensor(
        [_covered(a.surface[i], f, d) for i, f in zip(rest.tolist(), found, strict=True)],
        dtype=torch.int64,
    )
    rows, columns = torch.cat([ids, rows]), torch.cat([targets, columns])
    weights = torch.cat([torch.ones(len(ids), dtype=torch.float64), weights])
    order = rows.argsort(stable=True)
    return VocabMap(rows[order], columns[order], weights[order], kinds, len(d.pieces))


def _covered(data: bytes, pieces: Sequence[int], donor: ByteView) -> int:
    if not pieces:
        return int(Kind.UNKNOWN)
    whole = b"".join(donor.surface[i] for i in pieces) == data
    return int(Kind.COMPOSED if whole else Kind.PARTIAL)


def _pieces(ids: list[int], found: list[list[int]], *, first: bool) -> tuple[Tensor, Tensor, Tensor]:
    used = [f[:1] if first else f for f in found]
    counts = torch.tensor([len(f) for f in used], dtype=torch.int64)
    rows = torch.tensor(ids, dtype=torch.int64).repeat_interleave(counts)
    columns = torch.tensor([j for f in used for j in f], dtype=torch.int64)
    return rows, columns, (1 / counts.double()).repeat_interleave(counts)
