"""Aligners recover planted maps; pruning costs are the true error increases."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from polymerge.align import depth, prune
from polymerge.align import width as stream
from polymerge.align.heads import expand_groups, placement
from polymerge.align.width import Basis, allot, heed, residual_basis
from polymerge.calibrate.ownership import by_gate, by_prefix
from polymerge.model import decoder
from polymerge.model.source import Source
from polymerge.model.spec import Spec


def spec(head_size, theta=10000.0, rotary=None, **changes):
    pairs = head_size // 2 if rotary is None else rotary
    frequencies = tuple(theta ** (-i / max(pairs, 1)) for i in range(pairs))
    return Spec(
        family="llama", vocab=32, width=32, layers=2, heads=2, kv_heads=2, head_size=head_size, mlp=16, norm="rms",
        eps=1e-6, activation="silu", gated=True, tied=False, max_positions=64, frequencies=frequencies, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("times", [1, 2, 3])
def test_heads_go_into_heads_of_a_multiple_of_their_size_without_loss(times):
    small, large = spec(8), spec(8 * times)
    place = placement(small, large)
    assert place.worst_angle < 1e-6
    q, k, v = (torch.randn(3, 9, 2, 8, dtype=torch.float64) for _ in range(3))
    plain = decoder.attend(small, *(x.flatten(-2) for x in (q, k, v)))
    moved = decoder.attend(large, *(place.place(x, value=x is v).flatten(-2) for x in (q, k, v)))
    inside = moved.unflatten(-1, (2, -1))[..., list(place.plain)].flatten(-2)
    torch.testing.assert_close(inside, plain, atol=1e-7, rtol=0)


def test_pairs_find_their_frequency_wherever_it_is():
    source = spec(8)
    shuffled = torch.tensor([2, 0, 3, 1])
    target = replace(source, frequencies=tuple(source.frequencies[i] for i in shuffled))
    rotary = placement(source, target).rotary[:4]
    assert [target.frequencies[i] for i in rotary] == list(source.frequencies)


def test_pairs_without_rotation_go_to_the_slowest_ones():
    place = placement(spec(8, rotary=0), spec(32))
    assert sorted(place.rotary[::2]) == [12, 13, 14, 15]
    assert 0 < place.worst_angle < 1


def test_other_bases_are_placed_approximately_and_say_so():
    assert placement(spec(8, theta=500.0), spec(8)).worst_angle > 0.1


@pytest.mark.parametrize("rotary", [4, 2, 0])
def test_scaled_rotation_keeps_its_scores(rotary):
    """The factor is on what is rotated: all of a head, half of it or nothing; the rest goes to pairs at rest."""
    small = spec(8, rotary=rotary, rope_scale=1.3)
    large = replace(spec(16), frequencies=(*small.frequencies, *[1e-9] * (8 - rotary)))
    place = placement(small, large)
    q, k, v = (torch.randn(2, 5, 2, 8, dtype=torch.float64) for _ in range(3))
    plain = decoder.attend(small, *(x.flatten(-2) for x in (q, k, v)))
    moved = decoder.attend(large, *(place.place(x, value=x is v).flatten(-2) for x in (q, k, v)))
    inside = moved.unflatten(-1, (2, -1))[..., list(place.plain)].flatten(-2)
    torch.testing.assert_close(inside, plain, atol=1e-6, rtol=0)


def test_groups_expand_to_the_common_ratio():
    x = torch.arange(2.0)[None, :, None].expand(1, 2, 4)
    assert expand_groups(x, 4, 2)[0, :, 0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("layers", "target"), [(2, 2), (2, 5), (3, 6), (3, 7), (5, 6), (4, 31)])
def test_depth_map_increases_strictly_from_the_first_to_the_last_and_evenly(layers, target):
    hosts = depth.spread(layers, target)
    assert (hosts[0], hosts[-1]) == (0, target - 1)
    steps = {b - a for a, b in pairwise(hosts)}
    assert min(steps) >= 1
    assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize(("layers", "target", "hosts"), [(2, 4, (1, 3)), (3, 6, (1, 3, 5)), (4, 4, (0, 1, 2, 3))])
def test_centred_depth_map_takes_the_middle_of_equal_shares(layers, target, hosts):
    assert depth.spread(layers, target, "centred") == hosts


@pytest.mark.parametrize("rule", ["ends", "centred"])
def test_depth_map_of_one_layer_is_the_middle(rule):
    assert depth.spread(1, 5, rule) == (2,)


@pytest.mark.parametrize("rule", ["ends", "centred"])
@pytest.mark.parametrize(("layers", "hosts"), [(4, (0, 0, 1, 1)), (5, (0, 0, 1, 2, 2)), (3, (0, 0, 0))])
def test_a_deeper_expert_has_neighbours_in_one_layer(rule, layers, hosts):
    target = hosts[-1] + 1
    assert depth.spread(layers, target, rule) == hosts
    assert depth.most(layers, target) == max(map(hosts.count, hosts))
    assert depth.most(target, layers) == 1


def solved(x, y, ridge=1e-6):
    gram = x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype)
    return gram, torch.linalg.solve(gram, x.T @ y)


@pytest.mark.parametrize("group", [1, 2])
def test_pruning_removes_the_group_whose_loss_costs_least(group):
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(300, 8, generator=g).double(), torch.randn(300, 4, generator=g).double()
    y += x @ (torch.randn(8, 4, generator=g).double() * torch.linspace(0.2, 2, 8)[:, None])
    gram, weights = solved(x, y)
    kept = prune.keep_groups([prune.Writer(gram, weights)], group, 8 // group - 1)

    def error(without):
        stay = [i for i in range(8) if i // group != without]
        return (y - x[:, stay] @ solved(x[:, stay], y)[1]).pow(2).sum()

    dropped = (set(range(8 // group)) - set(kept.tolist())).pop()
    assert dropped == min(range(8 // group), key=error)


def test_pruning_drops_one_of_two_equal_inputs_first():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)).double()
    x[:, 5] = x[:, 2]
    y = x @ torch.ones(6, 2, dtype=torch.float64)
    kept = prune.keep_groups([prune.Writer(*solved(x, y, 1e-3))], 1, 5).tolist()
    assert len({2, 5} & set(kept)) == 1


def test_a_row_that_begins_with_an_empty_state_says_little_about_what_is_heard(save_model, tmp_path):
    """A padding token's embedding is zero, and so is the stream where it begins a row: its gradient means nothing."""
    save_model(tmp_path, "llama", num_hidden_layers=8)
    source = Source(tmp_path, dtype=torch.float64)
    outer = source.outer()
    outer["embed.weight"][0] = 0
    source.outer = lambda: outer
    tokens = torch.randint(1, 200, (8, 16), generator=torch.Generator().manual_seed(0))

    def heard(rows):
        found = residual_basis(source, rows, torch.ones(16), torch.Generator().manual_seed(0))
        return torch.stack([*found.fisher_mid, *found.fisher_out])

    usual = heard(tokens)
    tokens[3, 0] = 0
    assert (heard(tokens) - usual).norm() < 0.3 * usual.norm()


def test_basis_finds_a_planted_subspace(save_model, tmp_path):
    save_model(tmp_path, "llama", num_hidden_layers=1)
    source = Source(tmp_path, dtype=torch.float64)
    tokens = torch.randint(0, 200, (8, 16), generator=torch.Generator().manual_seed(0))
    outer = source.outer()
    plane = torch.linalg.qr(torch.randn(32, 6, generator=torch.Generator().manual_seed(1)).double())[0]
    outer["embed.weight"] = outer["embed.weight"] @ plane @ plane.T
    layer = source.layer(0)
    for role in ("o.weight", "down.weight"):
        layer[role] = plane @ plane.T @ layer[role]
    source.outer, source.layer = lambda: outer, lambda _: layer
    found = residual_basis(source, tokens, torch.ones(16), torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.directions.T @ found.directions, torch.eye(32, dtype=torch.float64))
    inside = found.directions[:, :6]
    torch.testing.assert_close(inside @ (inside.T @ plane), plane, atol=1e-4, rtol=0)
    assert float(found.scores[:6].sum()) > 0.999


def test_what_a_slice_keeps_leaves_the_least_heard_error():
    """Against the coordinates in the same directions, random ones, and the sum of the scores that are left."""
    g = torch.Generator().manual_seed(0)
    draw = torch.randn(2, 12, 12, generator=g).double() * torch.logspace(0, -0.7, 12).double()
    present, heard = draw[0] @ draw[0].T, draw[1] @ draw[1].T
    directions, *rest = stream._balance(present, heard)
    basis, scores = Basis(directions, *rest, (), (), 1.0), rest[-1]

    def error(kept):
        told = present @ kept @ torch.linalg.solve(kept.T @ present @ kept, kept.T @ present)
        return float((heard * (present - told)).sum())

    total = float((heard * present).sum())
    states = torch.linalg.cholesky(present)
    for size in (3, 6, 9):
        kept = basis.encoder(size)
        assert error(kept) == pytest.approx(total * float(scores[size:].sum()), rel=0.05)
        others = [directions[:, :size], *torch.randn(20, 12, size, generator=g).double()]
        assert all(error(kept) < error(other) for other in others)
        told = present @ kept @ torch.linalg.inv(kept.T @ present @ kept) @ kept.T @ states  # ŝ
        torch.testing.assert_close((kept.T @ states).norm(dim=0), told.norm(dim=0), rtol=0.01, atol=0)
    torch.testing.assert_close(basis.encoder(12), directions)


def test_predictions_that_are_sure_are_heard_at_a_higher_temperature(save_model, tmp_path):
    save_model(tmp_path, "llama")
    source = Source(tmp_path, dtype=torch.float64)
    states = [torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(0)).double()]
    outer, scored = source.outer(), torch.arange(6) > 2
    assert stream._temperature(source, outer, states, scored) == 1.0
    outer["head.weight"] = outer["head.weight"] * 1e3
    found = stream._temperature(source, outer, states, scored)
    assert found > 4.0
    outer["head.weight"] = outer["head.weight"] * 2
    assert stream._temperature(source, outer, states, scored) == 2 * found


def test_dimensions_go_to_the_best_scores():
    def basis(scores):
        one = torch.eye(len(scores))
        return Basis(one, one, one, torch.tensor(scores), (), (), 1.0)

    assert allot([basis([0.6, 0.3, 0.1]), basis([0.5, 0.5])], 3) == [1, 2]
    sure, unsure = basis([1 - 3e-6, 1e-6, 1e-6, 1e-6]), basis([0.25] * 4)
    assert allot([sure, unsure], 4) == [1, 3]
    assert allot([sure, unsure], 4, even=1.0) == [2, 2]
    assert allot([basis([0.5, 0.5]), unsure], 3, even=1.0) == [1, 2]  # in proportion to their own widths


def test_first_tokens_belong_to_everyone_until_the_prefix_tells():
    tokens = torch.tensor([[1, 7, 3], [1, 7, 4], [1, 8, 3], [2, 8, 3]])
    owned = by_prefix(tokens, torch.tensor([0, 0, 1, 1]), 2)
    assert owned[:, 0, 0].tolist() == [1.0, 0.5]
    assert owned[:, 0, 1].tolist() == [1.0, 0.0]
    assert owned[:, 3, 0].tolist() == [0.0, 1.0]
    assert bool((owned.amax(0) == 1).all())


def test_gate_ownership_follows_the_evidence_and_never_looks_ahead():
    log_probs = torch.log(torch.tensor([[[0.5, 0.9, 0.1]], [[0.5, 0.1, 0.9]]]))
    owned = by_gate(log_probs, alpha=0.0)
    assert owned[:, 0, 0].tolist() == owned[:, 0, 1].tolist() == [1.0, 1.0]
    torch.testing.assert_close(owned[:, 0, 2], torch.tensor([1.0, 1 / 9]))
    torch.testing.assert_close(owned[:, 0, 3], torch.tensor([1.0, 1.0]))


def test_huge_states_count_for_little_and_none_for_more_than_twice_the_usual():
    power = torch.cat([torch.ones(97), torch.tensor([0.0, 1e4, 1e8])])
    weight = heed(power)
    assert float(weight.mean()) == pytest.approx(1.0)
    torch.testing.assert_close(weight[97:] / weight[0], torch.tensor([2.0, 2e-4, 2e-8]), rtol=1e-3, atol=0)
