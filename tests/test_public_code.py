"""The rivals beside public code, run from clones of it: the same numbers where the method is the same.

`POLYMERGE_PEERS` names a folder with clones of the repositories in `PUBLIC` (none is part of polymerge); two of them
want `pip install jax POT`. Only the functions named here are run, not what their files import.
"""

import ast
import importlib
import os
import warnings
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_rivals import expert, rewrite, texts
from transformers import AutoModelForCausalLM

from polymerge.align import matching, transport
from polymerge.align.procrustes import orthogonal as procrustes
from polymerge.bench.fuse import fused
from polymerge.bench.methods import PUBLIC
from polymerge.divergence import kl
from polymerge.methods import (
    fs_merge,
    git_rebasin,
    orthogonal,
    regmean,
    task_vector_transport,
    transport_and_merge,
    zipit,
)
from polymerge.methods._lift import lift, rows_of_all
from polymerge.model.source import Source

PEERS = Path(os.environ.get("POLYMERGE_PEERS", ""))
REPOSITORIES = {code.split("@")[0].split("/")[1]: code for code, _ in PUBLIC.values()}


def public(file, *names, **given):
    """Functions and classes of a file in the clones, without what else it imports; `given`: the names they use."""
    path = PEERS / file
    if "POLYMERGE_PEERS" not in os.environ or not path.exists():
        pytest.skip(f"no public code: clone {REPOSITORIES[file.split('/')[0]]} into a folder named by POLYMERGE_PEERS")
    with warnings.catch_warnings(action="ignore"):  # of escapes in their strings
        tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    for node in ast.walk(tree):  # annotations name what is not there
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            for argument in (*node.args.args, *node.args.kwonlyargs):
                argument.annotation = None
    scope = {"torch": torch, "F": F, **given}
    exec(compile(tree, str(path), "exec"), scope)
    found = [scope[name] for name in names]
    return found[0] if len(found) == 1 else found


def needs(module):
    return pytest.importorskip(module, reason=f"the public code needs {module}")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------ aligners


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("models", [2, 3])
def test_zipit_joins_the_same_units(models, alpha):
    match, _ = public(
        "ZipIt/matching_functions.py", "match_tensors_zipit", "remove_col",
        np=needs("numpy"), compute_correlation=lambda x: x.clone(),
    )  # fmt: skip
    units, keep = 8 * models, 8
    x = drawn(200, units) @ (torch.eye(units, dtype=torch.float64) + 0.4 * drawn(units, units, seed=1))
    correlation = torch.corrcoef(x.T)
    # A budget of merges inside one model that is never used up: the paper's β = 1.
    _, unmerge = match({"covariance": correlation.clone()}, r=1 - keep / units, a=alpha, b=1e6)
    theirs = sorted(torch.nonzero(column).flatten().tolist() for column in unmerge.T)
    assert sorted(matching.clusters(correlation, keep, alpha)) == theirs
    assert zipit.Method().alpha == 1.0


@pytest.mark.parametrize("shape", [(6, 6), (6, 9)])
def test_plans_are_those_of_pot(shape):
    ot, n, m = needs("ot"), *shape
    cost = drawn(n, m).abs()
    uniform = torch.full((n,), 1 / n, dtype=torch.float64), torch.full((m,), 1 / m, dtype=torch.float64)
    torch.testing.assert_close(
        transport.exact(cost), torch.as_tensor(ot.emd(*(u.numpy() for u in uniform), cost.numpy()))
    )
    theirs = ot.bregman.sinkhorn(*uniform, cost, 0.1, stopThr=1e-12, numItermax=10_000)
    torch.testing.assert_close(transport.sinkhorn(cost, 0.1), theirs, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("solver", ["emd", "sinkhorn"])
def test_ot_fusion_fuses_two_linear_maps_alike(solver):
    ot, np = needs("ot"), needs("numpy")
    # Their version of POT took a tensor for the cost.
    solvers = SimpleNamespace(
        emd=lambda a, b, cost: ot.emd(a, b, cost.numpy()),
        bregman=SimpleNamespace(sinkhorn=lambda a, b, cost, reg: ot.bregman.sinkhorn(a, b, cost.numpy(), reg)),
    )
    quiet = SimpleNamespace(info=lambda *_: None, debug=lambda *_: None)
    metric, _ = public("transformer-fusion/otfusion/ground_metric.py", "GroundMetric", "isnan", log=quiet)
    fuse = public(
        "transformer-fusion/otfusion/otfusion_lib.py", "fc_fusion", ot=solvers, np=np, GroundMetric=metric,
        dict_get=lambda keys, x: x[keys[0]], matrix_stats=lambda *_: "",
    )  # fmt: skip
    arguments = {
        "model": {"dataset": "", "type": ""},
        "fusion": {
            "type": "acts", "fuse_bias": False, "ot_solver": solver, "sinkhorn_reg": 0.2, "wts": {"norm": False},
            "acts": {"norm": False, "num_samples": 0},
            "gnd_metric": dict.fromkeys(("squared", "mem_eff", "clip_max", "clip_min", "clip", "reg"), False)
                          | {"type": "cosine", "norm": "none"},
        },
    }  # fmt: skip
    units, inputs, tokens = 7, 5, 60
    other, anchor = drawn(units, inputs), drawn(units, inputs, seed=1)
    x = drawn(tokens, units, seed=2)
    x = x - x.mean(0)
    y = x[:, torch.randperm(units, generator=generator())] + 0.5 * drawn(tokens, units, seed=3)
    y = y - y.mean(0)  # centred, so that their cosines are correlations
    keys = {"weights": ["weight"], "bias": ["bias"]}
    merged, plan = fuse(
        arguments, keys, None, {"weight": other.float()}, {"weight": anchor.float()}, x, y, "cpu", quiet
    )
    cost = 1 - torch.corrcoef(torch.cat([x, y], dim=1).T)[:units, units:]
    ours = transport.plan(cost, 0.2 if solver == "sinkhorn" else 0.0)
    torch.testing.assert_close(transport.mean_map(ours), plan.double(), atol=1e-6, rtol=1e-5)
    mixed = 0.5 * anchor + 0.5 * transport.mean_map(ours).T @ other
    torch.testing.assert_close(mixed, merged["weight"].double(), atol=1e-5, rtol=1e-4)


def test_git_rebasin_finds_the_same_permutations(save_model, tmp_path):
    jax = needs("jax")
    numpy = needs("jax.numpy")
    needs("scipy")
    spec_of, matching_, _ = public(
        "git-re-basin/src/weight_matching.py", "permutation_spec_from_axes_to_perm", "weight_matching",
        "get_permuted_param", jnp=numpy, random=jax.random, defaultdict=defaultdict,
        PermutationSpec=lambda perm_to_axes, axes_to_perm: SimpleNamespace(
            perm_to_axes=perm_to_axes, axes_to_perm=axes_to_perm),
        linear_sum_assignment=importlib.import_module("scipy.optimize").linear_sum_assignment,
        rngmix=jax.random.fold_in,
    )  # fmt: skip
    one_head = {"num_attention_heads": 1, "num_key_value_heads": 1}
    source = expert(save_model, tmp_path / "a", **one_head)
    anchor, spec = expert(save_model, tmp_path / "a", **one_head), source.spec
    stream = torch.randperm(spec.width, generator=generator(1))
    neurons = [torch.randperm(spec.mlp, generator=generator(2 + i)) for i in range(spec.layers)]

    def change(index, w):
        noisy = {r: x + 0.05 * drawn(*x.shape, seed=hash_of(index, r)) for r, x in w.items()}
        out = {r: x[stream] if r.startswith(("norm", "o.", "down")) else x[:, stream] for r, x in noisy.items()}
        if index is not None:
            for role in ("gate.weight", "up.weight"):
                out[role] = out[role][neurons[index]]
            out["down.weight"] = out["down.weight"][:, neurons[index]]
        return out

    donor = rewrite(source, change)
    a, b = lift([anchor, donor], spec)
    axes, both = {}, ({}, {})
    for side, model in zip(both, (a, b), strict=True):
        parts = {"outer": model.outer()} | {f"{i}": model.layer(i) for i in range(spec.layers)}
        for place, weights in parts.items():
            for role, w in weights.items():
                if not role.startswith("norm"):
                    side[f"{place}/{role}"] = numpy.asarray(w.float().numpy())
                    inner = f"mlp {place}" if role.split(".")[0] in ("gate", "up", "down") else None
                    axes[f"{place}/{role}"] = ("stream", inner) if role[0] in "od" else (inner, "stream")
    found = matching_(jax.random.key(0), spec_of(axes), *both, silent=True)
    ours, maps = git_rebasin.by_weights(a, b, spec, 10)
    assert torch.equal(ours.argmax(0), torch.tensor(found["stream"].tolist()))
    assert torch.equal(ours.argmax(0), stream.argsort())
    for i in range(spec.layers):
        assert torch.equal(maps[i].down.argmax(0), torch.tensor(found[f"mlp {i}"].tolist()))


def hash_of(index, role):
    return 1000 * (0 if index is None else index + 1) + sum(map(ord, role))


def test_orthogonal_alignment_is_their_procrustes_and_matches_heads_alike():
    file = "Generalized-LMC-for-Transformers/weight_matching.py"
    rotate, cost, _ = public(file, "compute_optimal_orthogonal_matrix", "get_cost_heads", "otify", ot=needs("ot"))
    x, y = drawn(50, 8), drawn(50, 8, seed=1)
    torch.testing.assert_close(procrustes(y.T @ x), rotate(x, y))
    heads, size, width = 4, 6, 10
    a = {role: drawn(heads * size, width, seed=2 + i) for i, role in enumerate("qkv")}
    a["o"] = drawn(width, heads * size, seed=5)
    order = torch.randperm(heads, generator=generator())
    b = {role: w.view(heads, size, width)[order].flatten(0, 1) for role, w in a.items() if role != "o"}
    b["o"] = a["o"].view(width, heads, size)[:, order].flatten(1)
    b = {role: w + 0.3 * drawn(*w.shape, seed=9) for role, w in b.items()}

    def circuits(w):
        q, k, v = (w[role].view(heads, size, width) for role in "qkv")
        return q.transpose(1, 2) @ k, w["o"].view(width, heads, size).permute(1, 0, 2) @ v

    theirs = sum(cost(x, y, heads) for x, y in zip(circuits(a), circuits(b), strict=True))
    pairs = matching.heads(orthogonal.circuit_similarity(b, a, size, 1), 1, heads)
    needed = torch.from_numpy(importlib.import_module("scipy.optimize").linear_sum_assignment(theirs.numpy())[1])
    assert [pair.source for pair in sorted(pairs, key=lambda p: p.target)] == needed.tolist()
    assert needed.tolist() == order.argsort().tolist()


# ------------------------------------------------------------------------------------------ merges


def test_regmean_solves_the_same_regression():
    file = "RegMean-plusplus/fusion_bench/method/regmean/regmean.py"
    merge, _ = public(file, "merging_with_regmean_weights", "reduce_non_diagonal_elements")
    grams = [x.T @ x / len(x) for x in (drawn(40, 6), drawn(40, 6, seed=1))]
    weights = [drawn(4, 6, seed=2), drawn(4, 6, seed=3)]
    theirs = merge({"up.weight": weights}, [{"up": g} for g in grams], reduce_non_diagonal_ratio=0.9)["up.weight"]
    damped = [0.9 * g + 0.1 * g.diagonal().diag() for g in grams]
    run = SimpleNamespace(method=regmean.Method(ridge=0.0), weights=[0.5, 0.5], like=weights[0])
    torch.testing.assert_close(regmean._Regression.solve(run, damped, dict(enumerate(weights))), theirs)


def test_fs_merge_folds_the_same_maps_into_a_weight():
    file = "fs_merge/src/merges/merge_layers_vit_full.py"
    fold, concatenated, _ = public(
        file, "bmm_folding_M_U_into_weight", "create_concatenated_diagonal_matrices", "custom_block_diag"
    )
    n, rank, experts = 6, 2, 2
    weights = [drawn(n, n, seed=k) for k in range(experts)]
    maps = [
        [fs_merge._Map(drawn(n, seed=10 + 2 * k + side), rank, generator(side)) for side in (0, 1)] for k in range(2)
    ]
    with torch.no_grad():
        for k, pair in enumerate(maps):
            for side, one in enumerate(pair):
                one.b.copy_(drawn(rank, n, seed=20 + 2 * k + side))
        outer, inner = ([pair[side] for pair in maps] for side in (0, 1))
        m = concatenated(torch.cat([o.diagonal for o in outer]), n, experts, 0) + torch.cat([o.a @ o.b for o in outer])
        u = concatenated(torch.cat([i.diagonal for i in inner]), n, experts, 1)
        u = u + torch.cat([(i.a @ i.b).T for i in inner], dim=1)
        ours = sum(o(i(w).T).T for w, (o, i) in zip(weights, maps, strict=True))
        torch.testing.assert_close(ours, fold(torch.stack(weights), m, u))


def test_a_task_vector_is_carried_over_alike():
    file = "merge-and-rebase/src/merge_and_rebase/rebase/methods/theseus.py"
    turn, carry = public(file, "_compute_procrustes_map_from_cov", "_transport_weight")
    x, y = (drawn(200, 6), drawn(200, 5, seed=1)), (drawn(200, 9, seed=2), drawn(200, 8, seed=3))
    change = drawn(5, 6, seed=4)  # of a donor's map from 6 units to 5, into an anchor's from 9 to 8
    t_in, t_out = (turn(a.T @ b) for a, b in zip(x, y, strict=True))
    theirs = carry(change.float(), t_in, t_out, key="up.weight").double()
    turns = {role: procrustes(a.T @ b) for role, a, b in zip(("norm2", "up"), x, y, strict=True)}
    none, like = {"up.weight": torch.zeros_like(change)}, {"up.weight": theirs}
    ours = task_vector_transport._moved(none, {"up.weight": change}, turns, task_vector_transport.SIDES, like)
    torch.testing.assert_close(ours["up.weight"], theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*autocast")
def test_transport_and_merge_is_the_released_merge(save_model, tmp_path):
    place = "Cross-Architecture-Merging-for-Large-Language-Models/core"
    math, typing = importlib.import_module("math"), importlib.import_module("typing")
    plans_of, couple, *_ = public(
        f"{place}/hot_transport.py", "compute_Q_and_layer_costs", "compute_P", "sinkhorn_uniform_streaming",
        "corr_distance_matrix", "_zscore_along_time", "sinkhorn_uniform", math=math,
        **{n: getattr(typing, n) for n in ("List", "Tuple", "Optional", "Dict")},
    )  # fmt: skip
    merge, *_ = public(
        f"{place}/generate_hot_residual.py", "fuse_attention_only_from_hot_dir", "_maybe_language_submodule",
        "_collect_attn_blocks", "BlockHandles", "_find_first_param_device", "_get_dim_lists", "_load_hot_bundle_expand",
        "_find_hot_file", "_load_tensor", "_init_grid", "_assign_q_checked", "_triple_product_chunked", "_chunked_mm",
        "_best_chunk_elems", "sparsify_P_topk", "_row_renorm_keep_sum", nn=torch.nn, os=os, math=math,
        print=lambda *_: None,
        **{n: getattr(typing, n) for n in ("List", "Tuple", "Optional", "Dict", "Any")},
    )  # fmt: skip
    options = {"vocab_size": 64, "eos_token_id": None, "initializer_range": 0.15}
    folders = [
        save_model(tmp_path / "a", "llama", **options),
        save_model(tmp_path / "b", "llama", seed=1, hidden_size=48, num_hidden_layers=3, **options),
    ]
    data = texts(2, rows=16)
    tokens = rows_of_all(data, len(data.tokens))
    models = [AutoModelForCausalLM.from_pretrained(folder).double() for folder in folders]
    names = {"Q": "q_proj", "K": "k_proj", "V": "v_proj", "O": "o_proj"}
    seen = [defaultdict(list) for _ in models]
    for model, states in zip(models, seen, strict=True):
        for layer in model.model.layers:
            for kind, name in names.items():

                def keep(_, given, out, kind=kind, states=states):
                    states[kind].append(out.flatten(0, 1).detach())
                    states[f"{kind}_pre"].append(given[0].flatten(0, 1).detach())

                getattr(layer.self_attn, name).register_forward_hook(keep)
        model(input_ids=tokens, use_cache=False)
    hot = tmp_path / "hot"
    hot.mkdir()
    for kind in seen[0]:
        plans, costs, _ = plans_of(seen[0][kind], seen[1][kind], 0.1, "cpu")
        torch.save(
            {"P": couple(costs, 0.1), "Q_list": plans, "kept_layer_idx_B": list(range(3))}, hot / f"hot_{kind}.pt"
        )
    before = {n: p.detach().clone() for n, p in models[0].named_parameters()}
    merge(*models, str(hot), alpha=0.5, p_topk=0, attn_device="cpu")

    experts = [Source(folder, dtype=torch.float64) for folder in folders]
    ours = defaultdict(dict)
    method = transport_and_merge.Method(alpha=0.5, epsilon=0.1, rescale=False, rows=len(data.tokens))
    method.merge(experts, 0, experts[0].spec, data, lambda i, w: ours[i].update(w), 0)
    for name, after in models[0].state_dict().items():
        if ".self_attn." in name:
            layer, kind = name.split(".")[2::2]
            given = ours[int(layer)][f"{kind[0]}.weight"] - 0.5 * before[name]
            theirs = (after - 0.5 * before[name]).double()
            assert float((given - theirs).norm() / theirs.norm()) < 0.01  # their plans are in half precision
        else:
            assert torch.equal(after, before[name])


def test_fusellm_has_the_same_gradient():
    trainer = public(
        "FuseAI/FuseLLM/src/utils/trainer.py", "DistillTrainer", Seq2SeqTrainer=object, cross_entropy=F.cross_entropy,
        unwrap_model=lambda m: m, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES={},
    )  # fmt: skip
    rows, time, vocab = 2, 6, 9
    tokens = torch.randint(0, vocab, (rows, time), generator=generator())
    logits = drawn(rows, time, vocab).requires_grad_()
    logs = torch.stack([drawn(rows, time, vocab, seed=1 + k) for k in range(2)]).log_softmax(-1)
    following = F.pad(tokens[:, 1:], (0, 1), value=-1)
    modelling = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    of_text = -logs[:, :, :-1].gather(-1, tokens[None, :, 1:, None].expand(2, -1, -1, 1))[..., 0].mean(-1)
    stub = SimpleNamespace(
        label_smoother=None,
        args=SimpleNamespace(past_index=-1, do_distill=True, distill_greater_as_gt=True, distill_loss_type="ce",
                             distill_greater_as_gt_type="hard", lm_loss_weight=0.9),
    )  # fmt: skip
    mask = torch.ones(rows, time)
    mask[:, -1] = 0  # nothing follows there
    inputs = {
        "base_target_dist": logs[0].exp(), "metric_ce": of_text[0].tolist(), "aligned_target_dist_0": logs[1].exp(),
        "metric_ce_aligned_0": of_text[1].tolist(), "attention_mask": mask,
    }  # fmt: skip
    loss = trainer.compute_loss(stub, lambda **_: {"loss": modelling, "logits": logits}, inputs)
    (theirs,) = torch.autograd.grad(loss, logits)
    teacher = fused(logs, following)
    again = logits.detach().clone().requires_grad_()
    kl(again[:, :-1], teacher[:, :-1]).sum().backward()
    torch.testing.assert_close(again.grad / (rows * (time - 1)), theirs, atol=1e-5, rtol=1e-4)
