"""mergekit beside us: the same averages where both can, its own error where it cannot; no mergekit, no failure."""

import os
import shutil
import sys

import pytest
import torch

from polymerge.bench import methods, peer
from polymerge.calibrate.calibration import Calibration
from polymerge.calibrate.ownership import by_prefix
from polymerge.errors import PreflightError
from polymerge.methods import linear
from polymerge.model.source import Source

needs_mergekit = pytest.mark.skipif(
    not (os.environ.get(peer.VARIABLE) or shutil.which(peer.COMMAND)),
    reason=f"mergekit is not installed: `pip install mergekit`, or name its {peer.COMMAND} in {peer.VARIABLE}",
)


@pytest.fixture
def pair(save_model, tmp_path):
    return [save_model(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2))]


def tensors(folder):
    source = Source(folder)
    found = {None: source.outer()} | {i: source.layer(i) for i in range(source.spec.layers)}
    return {(layer, role): w for layer, part in found.items() for role, w in part.items()}


@needs_mergekit
def test_our_linear_is_mergekits(pair, tmp_path):
    theirs = tensors(peer.merge("mergekit_linear", pair, tmp_path / "out", weights=(0.75, 0.25)))
    experts = [Source(path) for path in pair]
    tokens, owner = torch.zeros(4, 8, dtype=torch.int64), torch.tensor([0, 0, 1, 1])
    texts = Calibration(
        tokens, owner, owner >= 0, by_prefix(tokens, owner, 2), torch.ones(8, dtype=torch.bool), (1.0, 1.0)
    )
    ours = {}
    linear.Method(weights=(0.75, 0.25)).merge(
        experts, 0, experts[0].spec, texts, lambda i, some: ours.update({(i, r): w for r, w in some.items()}), 0
    )
    assert ours.keys() == theirs.keys()
    for key, w in theirs.items():
        torch.testing.assert_close(ours[key], w, atol=1e-6, rtol=1e-6, msg=str(key))


@needs_mergekit
def test_a_path_with_an_at_sign_is_a_path(pair, tmp_path):
    stopped = pair[1].rename(tmp_path / "b@1000")
    made = peer.merge("mergekit_linear", [pair[0], stopped], tmp_path / "out", weights=(0.0, 1.0))
    torch.testing.assert_close(tensors(made), tensors(stopped))


def test_where_tokenizers_differ_mergekit_is_told_whose_to_take(tmp_path):
    experts = [tmp_path / "a", tmp_path / "b"]
    for name in ("mergekit_linear", "mergekit_slerp"):
        assert peer.config(name, experts, tokenizer=experts[1])["tokenizer"] == {"source": str(experts[1])}
        assert "tokenizer" not in peer.config(name, experts)


@needs_mergekit
def test_task_arithmetic_and_slerp_are_what_their_papers_say(pair, save_model, tmp_path):
    base = save_model(tmp_path / "base", seed=3)
    zero, a, b = (tensors(path) for path in (base, *pair))
    summed = tensors(peer.merge("mergekit_task_arithmetic", pair, tmp_path / "sum", base=base))
    turned = tensors(peer.merge("mergekit_slerp", pair, tmp_path / "turn"))
    key = (1, "up.weight")
    torch.testing.assert_close(summed[key], a[key] + b[key] - zero[key], atol=1e-5, rtol=1e-5)
    some = tensors(peer.merge("mergekit_task_arithmetic", pair, tmp_path / "some", base=base, scale=0.25))
    torch.testing.assert_close(some[key], 0.25 * summed[key] + 0.75 * zero[key], atol=1e-5, rtol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(a[key].flatten(), b[key].flatten(), 0)
    half = (a[key] + b[key]) / (2 * (1 + cosine)).sqrt()
    torch.testing.assert_close(turned[key], half, atol=1e-4, rtol=1e-3)


@needs_mergekit
@pytest.mark.parametrize("change", [{"hidden_size": 48}, {"num_hidden_layers": 3}, {"family": "qwen2"}])
def test_other_architectures_give_mergekits_own_last_line(change, pair, save_model, tmp_path):
    other = save_model(tmp_path / "other", **change)
    with pytest.raises(PreflightError, match=r"^mergekit: \S.*\w") as caught:
        peer.merge("mergekit_linear", [pair[0], other], tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_without_mergekit_the_row_says_how_to_get_it(pair, tmp_path, monkeypatch):
    monkeypatch.delenv(peer.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PreflightError, match=r"not installed \(pip install mergekit"):
        peer.merge("mergekit_linear", pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_broken_command_is_reported_in_one_line(pair, tmp_path, monkeypatch):
    broken = tmp_path / "mergekit-yaml"
    broken.write_text(f"#!{sys.executable}\nimport sys\nprint('first')\nsys.exit('ValueError: no such thing')\n")
    monkeypatch.setenv(peer.VARIABLE, str(broken))
    with pytest.raises(PreflightError, match="mergekit-yaml: Permission denied"):
        peer.merge("mergekit_linear", pair, tmp_path / "one")
    broken.chmod(0o755)
    with pytest.raises(PreflightError, match=r"^mergekit: ValueError: no such thing$"):
        peer.merge("mergekit_linear", pair, tmp_path / "two")


def test_what_does_not_fit_the_method_is_said_before_anything_runs(pair):
    for name in peer.TASK_VECTORS:
        with pytest.raises(PreflightError, match="common base model"):
            peer.config(name, pair)
    with pytest.raises(PreflightError, match="between two experts; here are 3"):
        peer.config("mergekit_slerp", [*pair, pair[0]])


def test_every_peer_is_in_the_benchmarks_table():
    assert set(peer.METHODS) <= set(methods.known())
    assert methods.chosen(["mergekit_ties"]) == ["mergekit_ties"]
