"""Planted maps: what each aligner recovers, and what it cannot (relative reconstruction error of the anchor's data)."""

import pytest
import torch

from polymerge.align import matching, procrustes, transport
from polymerge.align.correlation import Correlation

ROWS, UNITS = 400, 24


def data(units=UNITS, rows=ROWS, seed=0):
    """Correlated features with distinct spectra, (row, unit)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, units, generator=g, dtype=torch.float64)
    return x @ torch.randn(units, units, generator=g, dtype=torch.float64)


def planted(kind, n=UNITS, seed=1):
    """An orthogonal map of a kind: B = A M."""
    g = torch.Generator().manual_seed(seed)
    eye = torch.eye(n, dtype=torch.float64)
    permutation = eye[torch.randperm(n, generator=g)]
    if kind == "permutation":
        return permutation
    if kind == "signed permutation":
        return permutation * (torch.randint(0, 2, (n,), generator=g) * 2.0 - 1)
    return torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]


def correlation(b, a):
    moments = Correlation(b.shape[1], a.shape[1])
    for rows in zip(b.split(100), a.split(100), strict=True):
        moments.add(*rows)
    return moments.matrix()


def error(a, b, q):
    return float((b @ q - a).norm() / a.norm())


def align(name, b, a):
    """The map that an aligner finds, for b → a."""
    if name == "procrustes":
        return procrustes.orthogonal(b.T @ a)
    similarity = correlation(b, a)
    if name == "assignment":
        return matching.selection(matching.assign(similarity), b.shape[1], a.shape[1])
    return transport.mean_map(transport.plan(1 - similarity, 0.0 if name == "exact transport" else 0.005))


RECOVERS = {
    "assignment": {"permutation"},
    "exact transport": {"permutation"},
    "sinkhorn": {"permutation"},
    "procrustes": {"permutation", "signed permutation", "rotation"},
}


@pytest.mark.parametrize("kind", ["permutation", "signed permutation", "rotation"])
@pytest.mark.parametrize("name", RECOVERS)
def test_which_maps_an_aligner_recovers(name, kind):
    a = data()
    b = a @ planted(kind)
    found = error(a, b, align(name, b, a))
    if kind in RECOVERS[name]:
        assert found < (1e-5 if name == "sinkhorn" else 1e-10)
    else:
        assert found > 0.3


def test_a_wide_epsilon_blurs_a_permutation():
    a = data()
    b = a @ planted("permutation")
    similarity = correlation(b, a)
    errors = [error(a, b, transport.mean_map(transport.sinkhorn(1 - similarity, e))) for e in (0.01, 0.06, 0.3)]
    assert errors[0] < errors[1] < errors[2]
    assert errors[2] > 0.2


@pytest.mark.parametrize("epsilon", [0.0, 0.02])
@pytest.mark.parametrize("copies", [2, 3])
def test_transport_handles_copies_at_unequal_widths_with_the_right_scale(copies, epsilon):
    """Every unit of A stands `copies` times in B, outgoing weights shared: means and shares undo it, n P does not."""
    a = data()
    order = torch.randperm(copies * UNITS, generator=torch.Generator().manual_seed(3))
    b = a.repeat_interleave(copies, 1)[:, order]
    coupling = transport.plan(1 - correlation(b, a), epsilon)
    tolerance = 1e-10 if epsilon == 0 else 0.02
    assert error(a, b, transport.mean_map(coupling)) < tolerance
    assert error(a, b, b.shape[1] * coupling) == pytest.approx(copies - 1, abs=tolerance * copies)
    # A writer that reads B's copies, each with its share, equals the one that reads A.
    writer = torch.randn(5, UNITS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    spread = (writer / copies).repeat_interleave(copies, 1)[:, order]
    torch.testing.assert_close(spread @ transport.share_map(coupling), writer, atol=tolerance * 3, rtol=0)


@pytest.mark.parametrize(("n", "m"), [(6, 6), (6, 4), (4, 6), (5, 7)])
def test_plans_have_uniform_marginals_and_sinkhorn_tends_to_the_exact_plan(n, m):
    cost = torch.rand(n, m, generator=torch.Generator().manual_seed(n + m), dtype=torch.float64)
    exact, soft = transport.exact(cost), transport.sinkhorn(cost, 0.005, sweeps=20000)
    for coupling in (exact, soft):
        torch.testing.assert_close(coupling.sum(1), torch.full((n,), 1 / n, dtype=torch.float64), atol=1e-4, rtol=0)
        torch.testing.assert_close(coupling.sum(0), torch.full((m,), 1 / m, dtype=torch.float64), atol=1e-4, rtol=0)
    best, near = float((cost * exact).sum()), float((cost * soft).sum())
    assert near == pytest.approx(best, abs=0.02)


def test_sinkhorn_of_a_stack_is_the_stack_of_sinkhorns_and_survives_small_epsilon():
    costs = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stacked = transport.sinkhorn(costs, 0.05)
    torch.testing.assert_close(stacked, torch.stack([transport.sinkhorn(c, 0.05) for c in costs]), atol=1e-7, rtol=0)
    assert torch.isfinite(transport.sinkhorn(costs, 1e-5)).all()


def test_transport_says_what_it_cannot():
    with pytest.raises(ValueError, match="regularisation above 0"):
        transport.sinkhorn(torch.rand(2, 2), 0.0)
    with pytest.raises(ValueError, match="take epsilon > 0"):
        transport.exact(torch.rand(101, 103))


@pytest.mark.parametrize(("narrow", "wide"), [(16, 24), (24, 24)])
def test_procrustes_recovers_isometric_embeddings_both_ways(narrow, wide):
    small = data(narrow)
    into = planted("rotation", wide)[:narrow]
    large = small @ into
    up = procrustes.orthogonal(small.T @ large)
    assert error(large, small, up) < 1e-10
    torch.testing.assert_close(up @ up.T, torch.eye(narrow, dtype=torch.float64))
    assert error(small, large, procrustes.orthogonal(large.T @ small)) < 1e-10


def test_procrustes_cannot_undo_unequal_scales():
    a = data()
    scales = torch.linspace(0.2, 5, UNITS, dtype=torch.float64)
    b = a @ planted("rotation") * scales
    assert error(a, b, procrustes.orthogonal(b.T @ a)) > 0.3


def test_procrustes_stays_where_nothing_is_seen():
    x = data()
    x[:, 10:] = 0
    torch.testing.assert_close(procrustes.orthogonal(x.T @ x), torch.eye(UNITS, dtype=torch.float64), atol=1e-8, rtol=0)


def test_pair_factors_recover_phase_and_scale_of_rotary_pairs():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, 12, generator=g, dtype=torch.float64), torch.randn(8, 12, generator=g, dtype=torch.float64)
    z = torch.polar(torch.rand(4, generator=g, dtype=torch.float64) + 0.5, 6 * torch.rand(4, generator=g).double())
    block, inverse = procrustes.pair_block(z), procrustes.pair_block(1 / z.conj())
    moved_q, moved_k = (block.T @ q), (inverse.T @ k)
    before, after = (
        torch.einsum("hpn,pm->hnm", procrustes.as_complex(x), procrustes.as_complex(y).conj())
        for x, y in ((q, k), (moved_q, moved_k))
    )
    torch.testing.assert_close(after, before)
    fq, fk = procrustes.pair_factors(*(procrustes.as_complex(x) for x in (moved_q, moved_k, q, k)))
    torch.testing.assert_close(procrustes.pair_block(fq).T @ moved_q, q)
    torch.testing.assert_close(procrustes.pair_block(fk).T @ moved_k, k)


def test_heads_are_matched_in_groups_with_their_order():
    """KV groups permuted, query heads permuted inside each: recovered; ungrouped matching would be free to mix them."""
    g = torch.Generator().manual_seed(2)
    groups, ratio = 4, 3
    a = torch.randn(groups * ratio, 50, generator=g, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    inside = torch.stack([torch.randperm(ratio, generator=g) for _ in range(groups)])
    rows = (order[:, None] * ratio + inside).flatten()
    for pair in matching.heads(a[rows] @ a.T, ratio, groups + 1):
        assert pair.target == order[pair.source]
        assert [int(rows[pair.source * ratio + s]) for s in pair.order] == [
            pair.target * ratio + p for p in range(ratio)
        ]


def test_clusters_pair_twins_first():
    """Twins across and within models are merged, the odd ones out stay alone."""
    a = data()
    twins = torch.cat([a, a[:, :8] + 0.01 * data(8, seed=5), a[:, :4]], dim=1)
    found = matching.clusters(correlation(twins, twins), UNITS)
    expected = [[i, UNITS + i, UNITS + 8 + i] if i < 4 else [i, UNITS + i] if i < 8 else [i] for i in range(UNITS)]
    assert sorted(found) == sorted(expected)


def test_correlation_is_numpys_and_dead_units_have_none():
    a, b = data(), data(7, seed=9)
    b[:, 3] = 2.0
    ours = correlation(b, a)
    theirs = torch.corrcoef(torch.cat([b, a], dim=1).T)[:7, 7:]
    alive = [i for i in range(7) if i != 3]
    torch.testing.assert_close(ours[alive], theirs[alive])
    assert float(ours[3].abs().max()) == 0
