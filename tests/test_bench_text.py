"""The text suite on very little text: every method gives figures of the right kind."""

import pytest

from polymerge import bench
from polymerge.bench import text
from polymerge.bench.methods import Case

FEW = text.Detail(heal_tokens=4096, lrs=(3e-4,), fold={"tokens": 2048, "refine": 0}, test_rows=8)


@pytest.mark.slow
def test_every_method_of_the_text_suite_gives_bits_per_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "cases", lambda _profile: [Case("prose+code/1.5x", "text", FEW)])
    names = ["union", "fold", "fold_heal", "anchor", "best_expert", "ensemble", "anchor_distill", "scratch_distill"]
    names += ["fuse_distill", "linear"]
    more = ["shrink", "placebo", "mergekit_ties"]
    rows = {r.method: r for r in bench.run("text", "quick", tmp_path, [*names, *more], device="cpu")}
    assert set(rows) == {*names, *more}
    done = {name: row for name, row in rows.items() if row.status == "ok"}
    assert set(names) <= set(done)
    assert all(set(row.scores) == {"prose", "code"} and min(row.scores.values()) > 0 for row in done.values())
    owners = rows["fold"].owners
    assert all(rows["union"].scores[skill] < owner + 0.05 for skill, owner in owners.items())
    assert rows["anchor"].scores["prose"] == owners["prose"]
    assert rows["fold_heal"].worst < rows["fold"].worst < rows["placebo"].worst
    assert rows["fold"].parameters == rows["scratch_distill"].parameters == rows["placebo"].parameters
    assert rows["anchor_distill"].parameters <= rows["fold"].parameters
    assert "code translated from gpt_neox" in rows["linear"].notes
    assert "common base model" in rows["mergekit_ties"].reason
