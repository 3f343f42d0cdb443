"""Laws of the rival merge methods, on tiny random experts: what merging with a disguised self must give."""

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from polymerge import families, recipe, record
from polymerge.align.procrustes import pair_block
from polymerge.calibrate.calibration import Calibration
from polymerge.calibrate.ownership import by_prefix
from polymerge.errors import PreflightError
from polymerge.methods import (
    fs_merge,
    git_rebasin,
    linear,
    orthogonal,
    ot_fusion,
    regmean,
    task_vector_transport,
    transport_and_merge,
    zipit,
)
from polymerge.methods._lift import as_rows, lift, rows_of_all
from polymerge.methods._merge import aligned
from polymerge.methods._traces import activations
from polymerge.model import decoder
from polymerge.model.source import Source

EXACT = {
    "linear": linear.Method(),
    "git_rebasin": git_rebasin.Method(),
    "git_rebasin on activations": git_rebasin.Method(match="activations"),
    "ot_fusion, exact plans": ot_fusion.Method(epsilon=0.0),
    "orthogonal": orthogonal.Method(),
    "zipit": zipit.Method(),
    "regmean": regmean.Method(),
    "fs_merge, hardly trained": fs_merge.Method(steps=2, lr=1e-8),
    "transport_and_merge, rescaled, exact plans": transport_and_merge.Method(alpha=0.5, epsilon=0.0, rescale=True),
}
"""Methods whose merge of an expert with itself is the expert."""
MADE: dict = {}
"""Experts on disk, made once."""
PERMUTATION = [name for name in EXACT if name != "linear"]
GAUGE = ["orthogonal", "regmean", "fs_merge, hardly trained"]
FAMILIES = {"llama": {}, "qwen2": {}, "qwen3": {}, "tied llama": {"tie_word_embeddings": True}}


def texts(experts=2, rows=24, time=24, vocab=64):
    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, vocab, (experts * rows, time), generator=g)
    owner = torch.arange(experts).repeat_interleave(rows)
    fit = (torch.arange(len(tokens)) % 6) != 0
    owned = by_prefix(tokens, owner, experts).double()
    return Calibration(tokens, owner, fit, owned, torch.ones(time, dtype=torch.bool), (1.0,) * experts)


def expert(save_model, folder, family="llama", *, trained=True, **changes):
    """A tiny expert; `trained`: with norm weights that are not all one, as training leaves them."""
    key = (family, *sorted(changes.items()))
    if key not in MADE:
        MADE[key] = save_model(
            folder, family, vocab_size=64, eos_token_id=None, **{"initializer_range": 0.15, **changes}
        )
    source = Source(MADE[key], dtype=torch.float64)
    if trained:
        gamma = 0.5 + torch.rand(8, source.spec.width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        rewrite(source, lambda i, w: scaled_norms(w, gamma, 0 if i is None else i + 1))
    return source


def scaled_norms(w, gamma, index):
    return {r: x * gamma[index] if r in ("norm.weight", "norm1.weight", "norm2.weight") else x for r, x in w.items()}


def rewrite(source, change):
    """Change what a source gives: `change(layer or None, weights)`."""
    outer, layer = source.outer, source.layer
    source.outer = lambda: change(None, outer())
    source.layer = lambda i: change(i, layer(i))
    return source


def merged(method, experts, target, anchor=0, data=None):
    """Weights by layer, and logits on the calibration rows."""
    data = data or texts(len(experts))
    weights = defaultdict(dict)
    method.merge(experts, anchor, target, data, lambda i, w: weights[i].update(w), 0)
    x = decoder.embed(target, weights[None], data.tokens)
    for index in range(target.layers):
        x = decoder.layer(target, weights[index], x).out
    return decoder.logits(target, weights[None], x), weights, data


def gap(logits, source, data):
    return float((logits - source.logits(data.tokens)).abs().max())


def rotation(n, g):
    return torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]


def disguised(source, kind, seed=3):
    """The same function in other coordinates.

    "permutation": stream, KV groups, query heads and neurons in another order. "gauge": all that the architecture
    leaves free (no q/k norms): the stream rotated, neurons scaled and flipped, rotary pairs turned and scaled, values
    rotated and scaled.
    """
    spec, g = source.spec, torch.Generator().manual_seed(seed)
    gauge = kind == "gauge"
    eye = torch.eye(spec.width, dtype=torch.float64)
    p = rotation(spec.width, g) if gauge else eye[torch.randperm(spec.width, generator=g)]
    free = [Free.draw(spec, g, gauge) for _ in range(spec.layers)]

    def change(index, w):
        w = absorbed(w) if gauge else {r: x @ p if r.startswith("norm") else x for r, x in w.items()}
        if index is not None:
            return free[index].apply(w, p, spec)
        return w | {r: w[r] @ p for r in ("embed.weight", "head.weight")}

    return rewrite(twin(source), change)


def twin(source):
    copy = Source(source.path, dtype=torch.float64)
    copy.outer, copy.layer = source.outer, source.layer
    return copy


def absorbed(w):
    """γ in the readers, ones in the norms."""
    readers = {"norm": ("head",), "norm1": "qkv", "norm2": ("gate", "up")}
    w = dict(w)
    for norm, roles in readers.items():
        if f"{norm}.weight" in w:
            w |= {f"{r}.weight": w[f"{r}.weight"] * w[f"{norm}.weight"] for r in roles}
            w[f"{norm}.weight"] = torch.ones_like(w[f"{norm}.weight"])
    return w


@dataclass(frozen=True)
class Free:
    """What is drawn freely inside a layer: orders, neuron scales, and blocks (group, hd, hd) of q, k, v."""

    groups: torch.Tensor
    heads: torch.Tensor
    neurons: torch.Tensor
    scale: torch.Tensor
    blocks: dict

    @staticmethod
    def draw(spec, g, gauge):
        size, ratio, n = spec.head_size, spec.heads // spec.kv_heads, spec.kv_heads
        groups, order = torch.randperm(n, generator=g), torch.randperm(ratio, generator=g)
        blocks = {role: torch.eye(size, dtype=torch.float64).repeat(n, 1, 1) for role in "qkv"}
        scale = torch.ones(spec.mlp, dtype=torch.float64)
        if gauge:
            z = [torch.polar(*torch.rand(2, size // 2, generator=g).double().mul(3).add(0.5)) for _ in range(n)]
            blocks = {"q": torch.stack([pair_block(x) for x in z]),
                      "k": torch.stack([pair_block(1 / x.conj()) for x in z]),
                      "v": torch.stack([1.7 * rotation(size, g) for _ in z])}  # fmt: skip
            sign = torch.randint(0, 2, (spec.mlp,), generator=g) * 2 - 1
            scale = (0.5 + torch.rand(spec.mlp, generator=g).double()) * sign
        heads = (groups[:, None] * ratio + order).flatten()
        return Free(groups, heads, torch.randperm(spec.mlp, generator=g), scale, blocks)

    def apply(self, w, p, spec):
        size, ratio = spec.head_size, spec.heads // spec.kv_heads
        out = {r: x for r, x in w.items() if "norm" in r}
        for role, order in (("q", self.heads), ("k", self.groups), ("v", self.groups)):
            block = self.blocks[role].repeat_interleave(ratio if role == "q" else 1, 0)
            moved = block.transpose(1, 2) @ (w[f"{role}.weight"] @ p).unflatten(0, (-1, size))
            out[f"{role}.weight"] = moved[order].flatten(0, 1)
            if f"{role}.bias" in w:
                bias = block.transpose(1, 2) @ w[f"{role}.bias"].view(-1, size, 1)
                out[f"{role}.bias"] = bias[order].flatten()
        back = torch.linalg.inv(self.blocks["v"]).repeat_interleave(ratio, 0)
        out["o.weight"] = p.T @ (back @ w["o.weight"].T.unflatten(0, (-1, size)))[self.heads].flatten(0, 1).T
        out["gate.weight"] = w["gate.weight"][self.neurons] @ p
        out["up.weight"] = (w["up.weight"] * self.scale[:, None])[self.neurons] @ p
        out["down.weight"] = p.T @ (w["down.weight"] / self.scale)[:, self.neurons]
        return out


def test_rows_are_counted_in_tokens():
    """Rows of three tokens, as of modular arithmetic, are not 42 times less text."""
    for time, rows in ((128, 2), (3, 85), (512, 1)):
        assert len(rows_of_all(texts(rows=120, time=time), 4)) == 2 * rows
        assert as_rows(2, torch.zeros(1, time, dtype=torch.long)) == rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", EXACT)
def test_merge_of_an_expert_with_itself_is_the_expert(name, family, save_model, tmp_path):
    source = expert(save_model, tmp_path, family.split()[-1], **FAMILIES[family])
    logits, _, data = merged(EXACT[name], [source, source], source.spec)
    assert gap(logits, source, data) < 1e-6


@pytest.mark.parametrize("kind", ["permutation", "gauge"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_disguise_changes_nothing(family, kind, save_model, tmp_path):
    source = expert(save_model, tmp_path, family)
    data = texts()
    assert gap(disguised(source, kind).logits(data.tokens), source, data) < 1e-9


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("family", ["qwen2", "tied llama"])
@pytest.mark.parametrize("name", EXACT)
def test_merge_with_a_permuted_self(name, family, seed, save_model, tmp_path):
    """Streams, KV groups, heads and neurons permuted: undone by every method that aligns, and by no other."""
    source = expert(save_model, tmp_path, family.split()[-1], **FAMILIES[family])
    logits, _, data = merged(EXACT[name], [source, disguised(source, "permutation", seed)], source.spec)
    if name in PERMUTATION:
        assert gap(logits, source, data) < 1e-6
    else:
        assert gap(logits, source, data) > 0.1


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("family", ["qwen2"])
@pytest.mark.parametrize("name", EXACT)
def test_merge_with_a_rotated_self(name, family, seed, save_model, tmp_path):
    """All that the architecture leaves free: undone by orthogonal alignment, and by nothing that permutes."""
    source = expert(save_model, tmp_path, family)
    logits, _, data = merged(EXACT[name], [source, disguised(source, "gauge", seed)], source.spec)
    if name in GAUGE:
        assert gap(logits, source, data) < 1e-6
    else:
        assert gap(logits, source, data) > 0.1


def larger(spec, **changes):
    return replace(spec, **{"width": 48, "mlp": 64, "heads": 8, "kv_heads": 4, "layers": 3, **changes})


@pytest.mark.parametrize("anchor", [0, 1])
@pytest.mark.parametrize(
    "method",
    [linear.Method(), git_rebasin.Method(), git_rebasin.Method(match="activations"), ot_fusion.Method(),
     orthogonal.Method(), regmean.Method()],
    ids=lambda m: type(m).__module__.split(".")[-1],
)  # fmt: skip
def test_all_the_weight_on_one_expert_gives_that_expert(method, anchor, save_model, tmp_path):
    """Also in a wider, deeper target with more heads, beside a smaller expert; what padding adds computes nothing."""
    pair = [
        expert(save_model, tmp_path / "a"),
        expert(save_model, tmp_path / "b", seed=1, num_hidden_layers=1, hidden_size=24, intermediate_size=40),
    ]
    method = replace(method, weights=(1.0, 0.0) if anchor == 0 else (0.0, 1.0))
    logits, _, data = merged(method, pair, larger(pair[0].spec), anchor)
    assert gap(logits, pair[anchor], data) < 1e-5  # eps is not widened with the stream


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "tied llama"])
def test_merges_of_different_shapes_are_whole_checkpoints(name, family, save_model, tmp_path):
    """Depth, width, heads, KV groups and neurons differ, in float32; transformers and the engine agree."""
    from transformers import AutoModelForCausalLM

    from polymerge import families
    from polymerge.checkpoint.writer import CheckpointWriter
    from polymerge.model.target import hf_config, sink, write_config

    extra = FAMILIES[family]
    a = expert(save_model, tmp_path / "a", family.split()[-1], trained=False, **extra)
    b = expert(save_model, tmp_path / "b", family.split()[-1], trained=False, seed=1, num_hidden_layers=3,
               hidden_size=24, num_attention_heads=3, num_key_value_heads=1, head_dim=8,
               intermediate_size=40, **extra)  # fmt: skip
    pair = [Source(e.path) for e in (a, b)]
    logits, weights, data = merged(EXACT[name], pair, larger(pair[0].spec, head_size=8))
    assert torch.isfinite(logits).all()
    target = larger(pair[0].spec, head_size=8)
    table = families.get(family.split()[-1])
    with CheckpointWriter(tmp_path / "out") as writer:
        emit = sink(table, target, writer)
        for layer, w in weights.items():
            emit(layer, w)
        write_config(writer, hf_config(table, target, pair[0]), torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(data.tokens).logits, logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", EXACT)
def test_the_same_merge_twice_gives_the_same_bytes(name, save_model, tmp_path):
    pair = [expert(save_model, tmp_path / "a"), expert(save_model, tmp_path / "b", seed=1, num_hidden_layers=1)]
    once, again = (merged(EXACT[name], pair, pair[0].spec)[1] for _ in "ab")
    assert all(torch.equal(once[layer][r], again[layer][r]) for layer in once for r in once[layer])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_difference_is_carried_over_from_a_permuted_base(family, save_model, tmp_path, monkeypatch):
    """The anchor's own base in other coordinates, tuned there: added to the anchor, it is as if tuned here."""
    g, base = torch.Generator().manual_seed(7), expert(save_model, tmp_path, family, intermediate_size=32)
    change = {None: {}, 0: {}, 1: {}}
    for index, part in ((None, base.outer()), *((i, base.layer(i)) for i in range(base.spec.layers))):
        change[index] = {r: 0.05 * torch.randn(x.shape, generator=g, dtype=torch.float64) for r, x in part.items()}

    def tuned(source):
        return rewrite(twin(source), lambda i, w: {r: x + change[i][r] for r, x in w.items()})

    far = disguised(base, "permutation")
    table = {Path("near"): base, Path("far"): far}
    monkeypatch.setattr(task_vector_transport, "Source", lambda path, **_: table[path])
    method = task_vector_transport.Method(bases=("near", "far"))
    logits, _, data = merged(method, [base, disguised(tuned(base), "permutation")], base.spec)
    assert gap(logits, tuned(base), data) < 1e-6
    half, _, _ = merged(replace(method, alpha=0.0), [base, tuned(far)], base.spec)
    assert gap(half, base, data) < 1e-9
    with pytest.raises(PreflightError, match="bases: 0 for 2 experts"):
        merged(task_vector_transport.Method(), [base, base], base.spec)


@pytest.mark.parametrize("family", families.names())
def test_what_flows_through_an_expert_is_what_its_family_computes(family, save_model, tmp_path):
    """Layers of one model may differ in window, rotation and scale; what a rival sees of them must, too."""
    more = {"num_hidden_layers": 4, "max_position_embeddings": 128}
    source, tokens = Source(save_model(tmp_path, family, **more), dtype=torch.float64), texts().tokens
    *_, last = activations(source.spec, source.outer(), source.layer, tokens)
    found = decoder.linear(source.outer(), "head", last["norm"])
    if not source.spec.logit_cap:
        torch.testing.assert_close(found, source.logits(tokens), atol=1e-9, rtol=0)
    seen = source.spec.logit_cap
    assert not seen or torch.allclose(seen * torch.tanh(found / seen), source.logits(tokens), atol=1e-9)


def test_a_base_is_part_of_what_a_merge_depends_on(save_model, tmp_path):
    paths = [save_model(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b", "base"))]
    asked = recipe.parse({
        "method": "task_vector_transport", "anchor": "a", "options": {"bases": [str(paths[2])] * 2},
        "experts": {path.name: {"model": str(path), "text": "unused.txt"} for path in paths[:2]},
    })  # fmt: skip
    sources = {path.name: Source(path) for path in paths[:2]}
    before = record.digest(asked, sources, "texts")
    assert record.plain(asked)["options"]["bases"] == ["base", "base"]
    save_model(paths[2], seed=9)
    assert record.digest(asked, sources, "texts") != before


def test_linear_is_the_plain_average_of_equal_shapes(save_model, tmp_path):
    pair = [expert(save_model, tmp_path / "a"), expert(save_model, tmp_path / "b", seed=1)]
    _, weights, _ = merged(linear.Method(weights=(3.0, 1.0)), pair, pair[0].spec)
    for index in range(pair[0].spec.layers):
        a, b = (e.layer(index) for e in pair)
        for role in a:
            torch.testing.assert_close(weights[index][role], 0.75 * a[role] + 0.25 * b[role])
    a, b = (e.outer() for e in pair)
    for role in a:
        torch.testing.assert_close(weights[None][role], 0.75 * a[role] + 0.25 * b[role])


def test_a_unit_that_one_expert_lacks_keeps_what_it_reads(save_model, tmp_path):
    """Zero outgoing weight means that no incoming weight is wrong: the average takes the other's, not half of it."""
    pair = [expert(save_model, tmp_path / "a"), expert(save_model, tmp_path / "b", seed=1, intermediate_size=40)]
    _, weights, _ = merged(linear.Method(), pair, pair[0].spec)
    own, found = pair[0].layer(0), weights[0]
    torch.testing.assert_close(found["gate.weight"][40:], own["gate.weight"][40:])
    torch.testing.assert_close(found["down.weight"][:, 40:], own["down.weight"][:, 40:] / 2)


def widened_by(source, into, folder, save_model, mlp_copies=1):
    """The source in a stream of twice the width: `into` (d, 2d) has orthonormal rows; neurons copied."""
    spec = source.spec
    scale = 2**0.5
    save_model(folder, vocab_size=64, eos_token_id=None, hidden_size=2 * spec.width,
               intermediate_size=mlp_copies * spec.mlp, rms_norm_eps=spec.eps)  # fmt: skip
    wide = Source(folder, dtype=torch.float64)

    def move(w):
        w = absorbed(w)
        out = {}
        for role, x in w.items():
            if role.startswith("norm"):
                out[role] = torch.ones(2 * spec.width, dtype=torch.float64)
            elif role == "embed.weight":
                out[role] = x @ into * scale
            elif role in ("o.weight", "down.weight"):
                copies = mlp_copies if role == "down.weight" else 1
                out[role] = into.T @ x.repeat_interleave(copies, 1) / copies * scale
            else:
                copies = mlp_copies if role in ("gate.weight", "up.weight") else 1
                out[role] = x.repeat_interleave(copies, 0) @ into / scale
        return out

    wide.outer = lambda: move(source.outer())
    wide.layer = lambda i: move(source.layer(i))
    return wide


def test_orthogonal_alignment_undoes_an_embedding_into_a_wider_stream(save_model, tmp_path):
    """Narrow anchor with wide twin, and wide anchor with narrow twin: both give the expert back."""
    narrow = expert(save_model, tmp_path / "a")
    q = rotation(64, torch.Generator().manual_seed(2))[:32]
    wide = widened_by(narrow, q, tmp_path / "b", save_model)
    data = texts()
    assert gap(wide.logits(data.tokens), narrow, data) < 1e-6
    for pair in ([narrow, wide], [wide, narrow]):
        logits, _, _ = merged(orthogonal.Method(), pair, pair[0].spec, data=data)
        assert gap(logits, narrow, data) < 1e-5


def test_transport_undoes_copies_at_unequal_widths(save_model, tmp_path):
    """Every dimension and neuron twice, shuffled: the scaling n P on both sides would be wrong by two."""
    narrow = expert(save_model, tmp_path / "a")
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    copies = torch.eye(32, dtype=torch.float64).repeat_interleave(2, 1)[:, order] / 2**0.5
    wide = widened_by(narrow, copies, tmp_path / "b", save_model, mlp_copies=2)
    data = texts()
    assert gap(wide.logits(data.tokens), narrow, data) < 1e-6
    for pair in ([narrow, wide], [wide, narrow]):
        logits, _, _ = merged(ot_fusion.Method(epsilon=0.0), pair, pair[0].spec, data=data)
        assert gap(logits, narrow, data) < 1e-5


def test_softer_transport_is_further_from_the_expert(save_model, tmp_path):
    source = expert(save_model, tmp_path)
    other = disguised(source, "permutation")
    gaps = []
    for epsilon in (0.001, 0.06, 0.5):
        logits, _, data = merged(ot_fusion.Method(epsilon=epsilon), [source, other], source.spec)
        gaps.append(gap(logits, source, data))
    assert gaps[0] < 1e-3 < gaps[1] < gaps[2]


def test_exact_plans_out_of_reach_are_refused_in_one_line(save_model, tmp_path):
    """97 and 101 neurons share no divisor: the exact plan would be an assignment of 9,797 units."""
    pair = [expert(save_model, tmp_path / str(n), intermediate_size=n) for n in (97, 101)]
    with pytest.raises(PreflightError, match=r"epsilon: 0\.0: the exact plan of 97 and 101 units"):
        merged(ot_fusion.Method(epsilon=0.0), pair[::-1], pair[1].spec)


def test_zipit_holds_experts_side_by_side_where_there_is_room(save_model, tmp_path):
    """Nothing is merged then, and logits are averaged: exact for a rotated twin, which no matching sees."""
    source = expert(save_model, tmp_path)
    spec = source.spec
    target = replace(spec, width=64, mlp=2 * spec.mlp, heads=2 * spec.heads, kv_heads=2 * spec.kv_heads)
    other = disguised(source, "gauge")
    logits, _, data = merged(zipit.Method(), [source, other], target)
    assert gap(logits, source, data) < 1e-6


def test_regmean_beats_the_average_that_it_starts_from(save_model, tmp_path):
    """On its own objective, for real: two different experts, error of the first layer's queries on both texts."""
    pair = [expert(save_model, tmp_path / "a"), expert(save_model, tmp_path / "b", seed=1)]
    data, target = texts(), pair[0].spec
    errors = []
    for method in (orthogonal.Method(), regmean.Method(damping=1.0)):
        alignment = orthogonal.align(lift(pair, target), 0, target, rows_of_all(data, 256))
        parts = aligned(lift(pair, target), alignment, target, 0)
        _, weights, _ = merged(method, pair, target, data=data)
        normed = [decoder.normalise(target, weights[None]["embed.weight"][data.of(k)]) for k in range(2)]
        found = weights[0]["q.weight"]
        errors.append(sum(float((normed[k] @ (found - parts[k]["q.weight"]).T).pow(2).mean()) for k in range(2)))
    assert errors[1] < errors[0]


def test_untrained_fs_merge_is_orthogonal_alignment(save_model, tmp_path):
    pair = [expert(save_model, tmp_path / "a"), expert(save_model, tmp_path / "b", seed=1, num_hidden_layers=1)]
    target = larger(pair[0].spec)
    start, plain = (merged(m, pair, target)[0] for m in (fs_merge.Method(steps=0), orthogonal.Method()))
    torch.testing.assert_close(start, plain)


def test_fs_merge_learns_a_disguise_that_alignment_cannot_undo(save_model, tmp_path):
    """Values in a general linear gauge, not a rotation: the merge of an expert with its twin comes nearer to it."""
    source = expert(save_model, tmp_path)
    spec, g = source.spec, torch.Generator().manual_seed(7)
    ratio = spec.heads // spec.kv_heads
    block = torch.randn(spec.kv_heads, spec.head_size, spec.head_size, generator=g, dtype=torch.float64)

    def change(index, w):
        if index is None:
            return w
        v = block @ w["v.weight"].unflatten(0, (spec.kv_heads, -1))
        back = torch.linalg.inv(block).transpose(1, 2).repeat_interleave(ratio, 0)
        o = back @ w["o.weight"].T.unflatten(0, (spec.heads, -1))
        return w | {"v.weight": v.flatten(0, 1), "o.weight": o.flatten(0, 1).T}

    other, data = rewrite(twin(source), change), texts()
    assert gap(other.logits(data.tokens), source, data) < 1e-9
    held = data.tokens[~data.fit]
    errors = []
    for method in (orthogonal.Method(), fs_merge.Method(steps=60, lr=5e-3, tokens=240)):
        logits, _, _ = merged(method, [source, other], spec, data=data)
        errors.append(float((logits[~data.fit] - source.logits(held)).pow(2).mean()))
    assert errors[1] < 0.5 * errors[0]


def test_fs_merge_matches_the_features_of_two_experts_on_text_that_it_never_read(save_model, tmp_path):
    pair = [expert(save_model, tmp_path / "a"), expert(save_model, tmp_path / "b", seed=1, hidden_size=24)]
    data, target = texts(), pair[0].spec
    errors = []
    for steps in (0, 60):
        logits, _, _ = merged(fs_merge.Method(steps=steps, lr=5e-3, tokens=240), pair, target, data=data)
        mine = [~data.fit & (data.owner == k) for k in range(2)]
        errors.append([float((logits[m] - e.logits(data.tokens[m])).pow(2).mean())
                       for m, e in zip(mine, pair, strict=True)])  # fmt: skip
    assert all(after < before for before, after in zip(*errors, strict=True))


def test_transport_and_merge_as_released_adds_almost_nothing(save_model, tmp_path):
    """Plans of mass one: the attention shrinks by 1 − α, the rest is the anchor. Rescaled, the donor arrives."""
    a, b = expert(save_model, tmp_path / "a"), expert(save_model, tmp_path / "b", "gpt2", trained=False)
    for rescale, low, high in ((False, 0.0, 1e-3), (True, 0.02, 2.0)):
        _, weights, _ = merged(transport_and_merge.Method(alpha=0.25, rescale=rescale), [a, b], a.spec)
        own, found = a.layer(0), weights[0]
        added = (found["v.weight"] - 0.75 * own["v.weight"]).norm() / (0.25 * own["v.weight"].norm())
        assert low <= float(added) < high
        for role in ("up.weight", "gate.weight", "down.weight", "norm1.weight"):
            torch.testing.assert_close(found[role], own[role])
    logits, _, data = merged(transport_and_merge.Method(alpha=0.0), [a, b], a.spec)
    assert gap(logits, a, data) < 1e-9


@pytest.mark.parametrize("family", ["gpt2", "olmo2", "gemma3_text"])
@pytest.mark.parametrize("name", EXACT)
def test_what_is_not_llama_like_is_refused(name, family, save_model, tmp_path):
    a, b = expert(save_model, tmp_path / "a"), expert(save_model, tmp_path / "b", family, trained=False)
    anchor = 1 if name.startswith("transport_and_merge") else 0
    with pytest.raises(PreflightError, match="not llama-like"):
        merged(EXACT[name], [a, b], a.spec, anchor)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        (linear.Method(), {"width": 24}, "width: 32 do not fit into the target's 24"),
        (git_rebasin.Method(), {"mlp": 40}, "MLP neurons: 48 do not fit into the target's 40"),
        (orthogonal.Method(), {"heads": 2, "kv_heads": 1}, "KV groups: 2 do not fit into the target's 1"),
        (zipit.Method(), {"layers": 1}, "2 layers do not fit into the target's 1"),
        (ot_fusion.Method(), {"head_size": 4, "frequencies": (1.0, 0.01)}, "head_size is 4"),
        (regmean.Method(), {"vocab": 65}, "vocab is 65"),
        (linear.Method(weights=(1.0, 1.0, 1.0)), {}, "weights: .* for 2 experts"),
        (ot_fusion.Method(epsilon=-0.1), {}, r"epsilon: -0\.1"),
    ],
)
def test_what_cannot_be_held_is_refused_in_one_line(method, change, message, save_model, tmp_path):
    pair = [expert(save_model, tmp_path), expert(save_model, tmp_path)]
    with pytest.raises(PreflightError, match=message) as caught:
        merged(method, pair, replace(pair[0].spec, **change))
    assert "\n" not in str(caught.value)


def test_three_experts_merge(save_model, tmp_path):
    source = expert(save_model, tmp_path)
    trio = [source, disguised(source, "permutation", 3), disguised(source, "permutation", 4)]
    for name in PERMUTATION:
        logits, _, data = merged(EXACT[name], trio, source.spec)
        assert gap(logits, source, data) < 1e-5, name
