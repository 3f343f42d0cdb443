"""Moments are additive, and their solution is that of weighted least squares on the rows."""

import torch

from polymerge.calibrate.moments import Moments


def rows(n=200, inputs=7, outputs=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, inputs, generator=g).double(), torch.randn(n, outputs, generator=g).double()
    return x, y, torch.rand(n, generator=g).double()


def filled(*parts):
    moments = Moments.zeros(7, 3)
    for x, y, w in parts:
        moments.add(x, y, w)
    return moments


def test_moments_of_batches_are_those_of_the_joined_rows():
    a, b = rows(seed=1), rows(seed=2)
    joined = filled(tuple(torch.cat(p) for p in zip(a, b, strict=True)))
    summed = filled(a, b)
    torch.testing.assert_close(summed.gram, joined.gram)
    torch.testing.assert_close(summed.solve(1e-4), joined.solve(1e-4))


def test_solution_is_weighted_least_squares():
    x, y, w = rows()
    root = w.sqrt()[:, None]
    expected = torch.linalg.lstsq(x * root, y * root).solution
    torch.testing.assert_close(filled((x, y, w)).solve(1e-14), expected)


def test_a_negative_weight_takes_rows_back():
    x, y, w = rows()
    moments = filled((x, y, w))
    moments.add(x[:50], y[:50], -w[:50])
    torch.testing.assert_close(moments.gram, filled((x[50:], y[50:], w[50:])).gram)


def test_rows_of_weight_zero_count_for_nothing():
    x, y, w = rows()
    w[:100] = 0
    kept = filled((x[100:], y[100:], w[100:]))
    torch.testing.assert_close(filled((x, y * (w > 0)[:, None] + 1e6 * (w == 0)[:, None], w)).cross, kept.cross)


def test_ridge_does_not_depend_on_the_scale_of_the_inputs():
    x, y, w = rows()
    small, large = filled((x, y, w)).solve(0.1), filled((x * 1e3, y, w)).solve(0.1)
    torch.testing.assert_close(small, large * 1e3)


def test_what_rounding_left_of_a_difference_can_be_solved():
    """Rows counted and taken back in float32: the rest is small, and slightly indefinite."""
    generator = torch.Generator().manual_seed(0)
    loud, quiet = (torch.randn(600, 40, generator=generator) * scale for scale in (100.0, 0.1))
    quiet[:, 20:] = 0
    moments = Moments.zeros(40, 1)
    moments.add(quiet, quiet[:, :1], torch.ones(600))
    moments.add_gram(loud, torch.ones(600))
    for rows in loud.split(7):
        moments.add_gram(rows, -torch.ones(len(rows)))
    assert float(torch.linalg.eigvalsh(moments.gram)[0]) < -1e-4 * float(moments.gram.diagonal().mean())
    assert torch.isfinite(moments.solve(1e-4)).all()
    torch.linalg.cholesky(moments.damped(1e-4))
