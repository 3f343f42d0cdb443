"""The page of a benchmark: self-contained, made from rows alone, nothing empty, nothing drawn without rows."""

import json
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_report import Balanced
from typer.testing import CliRunner

from polymerge.bench import axes, board, overview, reach, runner, scarce, seed_table
from polymerge.bench.rows import Row, Store, excess, gather, judged, parse, training_flops
from polymerge.cli import app
from polymerge.errors import OutputError
from polymerge.report import bench, bench_figures, page

COMMITTED = Path(__file__).parents[1] / "examples/results/text-quick.jsonl"
OWNERS, ANCHOR = {"a": 1.0, "b": 0.98}, {"a": 1.0, "b": 0.2}
SCORES = {
    "union": 0.97, "fold": 0.8, "fold_heal": 0.93, "anchor": 0.2, "ensemble": 0.9, "anchor_distill": 0.85,
    "scratch_distill": 0.4, "placebo": 0.01, "ot_fusion": 0.95,
}  # fmt: skip


def distilled(worst: float, steps: int = 60) -> dict:
    curve = [{"step": s, "worst": worst * (0.4 + 0.6 * s / steps)} for s in range(0, steps + 1, 10)]
    return {"curve": curve, "best_step": steps, "lr": 1e-3}


def trained(seed: int) -> dict:
    curve = [
        {
            "step": s, "train_loss": 5 / (1 + s / 50), "train_acc": min(1.0, s / 500), "val_loss": 5 / (1 + s / 90),
            "val_acc": min(1.0, s / (800 + 50 * seed)),
        }
        for s in range(100, 1300, 100)
    ]  # fmt: skip
    final = {"final_train_loss": 0.01, "final_train_acc": 1.0, "final_val_loss": 0.02, "final_val_acc": 1.0}
    return {"curve": curve, "step_val_acc_99": 800 + 50 * seed, **final}


def made() -> list[Row]:
    """Two budgets and two seeds of one pair, an expert from scratch, a rival that cannot."""
    rows = []
    for seed in (0, 1):
        for budget, size in (("sum", 900_000), ("largest", 600_000)):
            case = f"cross/a+b/all/{budget}"
            base = Row(
                "modular", "full", case, seed, "", owners=OWNERS, anchor=ANCHOR, budget=budget, device="2 cores",
                parameters=size, expert_parameters={"a": 400_000, "b": 500_000}, setting={"protocol": "cross"},
                command=f"polymerge bench modular --case {case} --seeds {seed + 1}", seconds=2.0, cpu_seconds=3.0,
            )  # fmt: skip
            for method, score in SCORES.items():
                worst = round(score - 0.02 * seed - (0.1 if budget == "largest" else 0), 4)
                more = {"extra": distilled(worst), "tokens": 92160, "steps": 60, "flops": 10**12}
                more = more if method in ("fold_heal", "anchor_distill", "scratch_distill") else {}
                scored = {"scores": {"a": 0.99, "b": worst}, "worst": worst, "worst_skill": "b", "gap_closed": worst}
                rows.append(replace(base, method=method, **scored, **more))
            rows.append(replace(base, method="zipit", status="cannot", reason="width 3 < 4 & no room"))
        rows.append(
            Row(
                "modular",
                "full",
                "baseline/x_plus_y-2",
                seed,
                "expert",
                scores={"x_plus_y": 1.0},
                worst=1.0,
                parameters=400_000,
                steps=1200,
                tokens=1200 * 512 * 3,
                setting={"protocol": "baseline", "run": 0},
                size={"layers": 2, "width": 128, "heads": 4},
                owners={"x_plus_y": 1.0},
                extra=trained(seed),
                command="polymerge bench modular --case baseline/x_plus_y-2",
            )  # fmt: skip
        )
    return rows


@pytest.fixture(scope="module")
def shown() -> str:
    return bench.page(made())


class Cells(HTMLParser):
    """(text, data-sort) of every cell; tables by body."""

    def __init__(self, text: str):
        super().__init__()
        self.cells: list[list[str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "td":
            self.cells.append(["", dict(attrs).get("data-sort")])
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "td"

    def handle_data(self, data):
        if self.inside:
            self.cells[-1][0] += data


def test_no_cell_is_empty_and_every_one_can_be_sorted_by(shown):
    cells = Cells(shown).cells
    assert len(cells) > 100
    assert all(text.strip() and key is not None for text, key in cells)
    keys = dict(cells)
    assert keys["0.9200 ± 0.0141"] == "0.9200"
    assert keys["600,000"] == "600000"
    assert keys["1.00e12"] == "1.00e12"
    assert keys["–"] == ""
    assert keys["fold + heal"] == "fold + heal"
    assert keys["4 of 4"] == "4"
    told = [
        "over 1,200,000",
        "11 of 11",
        "0.0500 zipit (wins)",
        "diverged",
        "2,048 + written",
        "2x128x4",
        "-0.01 ± 0.2",
    ]
    assert [page._key(cell) for cell in told] == ["1200000", "11", "0.0500", "", "2048", "2x128x4", "-0.01"]
    heads = re.findall(r"<th\b[^>]*>", shown)
    assert all('aria-sort="none"' in head for head in heads)
    assert shown.count('<button type="button">') == len(heads)
    assert shown.count("<script>") == 1


def test_what_cannot_be_done_is_last_with_its_reason(shown):
    for table in re.findall(r"<table.*?</table>", shown):
        assert "zipit" not in table.split('<tbody class="last">')[0]
    last = re.findall(r'<tbody class="last">.*?</tbody>', shown)
    glance, *cases = last
    assert "0 of 4" in glance
    assert len(cases) == 2
    assert all("cannot: width 3 &lt; 4 &amp; no room" in body for body in cases)


def test_where_ours_does_not_win_comes_first(shown):
    assert re.findall(r"<h2>(.*?)</h2>", shown)[0] == board.BEHIND
    assert "cross/a+b/all/sum: ot_fusion 0.9400 (ours 0.9200)" in shown
    assert "fold + heal, modular: any other single model in 2 of 2" in shown
    assert board.BEHIND not in bench.page([r for r in made() if r.method != "ot_fusion"])


def test_a_rival_is_compared_on_the_seeds_that_it_has():
    rows = [r for r in made() if r.case.endswith("/sum")]
    others = [r for r in rows if r.method not in ("ot_fusion", "fold_heal")]
    rows = [*others, *(r for r in rows if r.method == "fold_heal" or (r.method == "ot_fusion" and r.seed == 0))]
    assert board.behind(rows) == ["cross/a+b/all/sum: ot_fusion 0.9500 (ours 0.9300)"]
    better = [replace(r, scores={"a": 0.99, "b": 0.96}) if r.method == "fold_heal" and r.seed == 0 else r for r in rows]
    assert board.behind(better) == []
    counted = [
        "fold, modular: any other single model in 1 of 1",
        "fold + heal, modular: any other single model in {} of 1",
    ]
    assert board.counts(rows) == [line.format(1) for line in counted]
    assert board.counts(better) == [line.format(0) for line in counted]
    more = [*rows, *(replace(r, method="anchor_distill_more") for r in rows if r.method == "anchor_distill")]
    told = "fold + heal, modular: anchor padded + distilled, as many FLOPs, is ahead in 0 of 1 cases, any other single"
    assert told in board.write(more)


def test_at_a_glance_every_method_over_the_cells_that_all_groups_have():
    rows = made()
    [table] = overview.tables(rows)
    assert table.title == "modular cross (full), 4 cells"
    lines = {line[0]: line[2:] for line in (*table.lines, *table.cannot)}
    # Scores less 0.02 (seed 1) and 0.1 (largest): the median of four is 0.06 under the first.
    assert lines["fold + heal"] == ["4 of 4", "0", "0", "0.8700", "0.8100"]
    assert lines["zipit"] == ["0 of 4", "4", "–", "–", "–"]
    assert [line[0] for line in table.lines][:3] == ["union", "ot_fusion", "fold + heal"]
    some = [r for r in rows if r.method != "ot_fusion" or r.seed == 0]
    assert {l[0]: l[2] for l in overview.tables(some)[0].lines}["ot_fusion"] == "2 of 4"
    alone = [r for r in rows if not (r.seed and r.method in ("ot_fusion", "zipit"))]  # no rival: no cell
    assert "2 cells" in overview.tables(alone)[0].title
    assert overview.tables([r for r in rows if r.method == "fold"]) == []
    kept = [of_axis(a, m, 2 + x) for m in ("fold", "linear", "anchor") for a, x in (("seed", 0.04), ("width", 0.06))]
    [table] = overview.tables([*kept, of_axis("all", "linear", 2.0)])
    assert [line[2:] for line in table.lines] == [["2 of 2", "0", "1", "0.0500", "0.0600"]] * 3


def same(case: str, method: str, score: float, **more: object) -> Row:
    """A row of two experts of one task."""
    facts = {"owners": {"x_plus_y": 1.0}, "expert_parameters": {"one": 5, "other": 7}, "worst_skill": "x_plus_y"}
    facts |= {"scores": {"x_plus_y": score}, "worst": score, "setting": {"protocol": "same", "run": 1}, **more}
    return Row("modular", "full", case, 0, method, **facts)


def test_cases_with_a_useless_expert_are_not_in_the_seeds_table_and_say_that_they_are_no_merge():
    plain, late = "same/x_plus_y/layers", "same/x_plus_y/layers/by-heart"
    rows = [same(plain, "fold", 0.5, extra={"balance": [1.0, 1.0]}), same(plain, "linear", 0.2)]
    rows += [same(late, "fold", 1.0, extra={"balance": [1.0]}), same(late, "linear", 0.9)]
    rows.append(same(late, "fold_heal", 1.0, notes="healed", extra={"curve": []}))
    table, *_ = board.sections(rows)[1].tables
    [line] = table.lines
    assert [cell for cell in line if cell.startswith(("0.5", "1.0", "0.2", "0.9"))] == [
        "1.0000",
        "0.5000",
        "0.2000 linear",
    ]
    assert seed_table.same([r for r in rows if r.case == late]).lines == []
    notes = {(t.title, line[0]): line[-2] for t in board._per_case(rows) for line in t.lines}
    said = "made of 1 of the 2 experts: the rest is best at nothing"
    assert notes[late, "fold"] == said
    assert notes[late, "fold + heal"] == f"{said}; healed"
    assert notes[plain, "fold"] == notes[late, "linear"] == "–"


def test_every_cost_and_command_is_there(shown):
    for told in ("ours", "rival", "control", "92,160", "1.00e12", "3.0", "--case cross/a+b/all/sum --seeds 2"):
        assert told in shown
    assert "--seeds 1<" not in shown  # the command of the last seed runs the others as well


def test_the_page_needs_no_network_and_is_well_formed(shown):
    assert not re.findall(r'(?:src|href)="(?!#)([^"]*)"|url\((?!#)[^)]*\)|@import', shown)
    assert set(re.findall(r"https?://[\w./]+", shown)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    parser = Balanced()
    parser.feed(re.sub(r"<script>.*?</script>", "", shown, flags=re.DOTALL))
    assert parser.open == []


def test_the_bytes_depend_on_the_rows_only(tmp_path):
    rows = made()
    random.Random(1).shuffle(rows)
    for row in rows:
        Store(tmp_path).append(row)
    code = f"import polymerge.bench as b; b.report({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "1"}, check=True)
    assert (tmp_path / "report.html").read_text() == bench.page(made())


def test_profiles_are_no_seeds_of_each_other():
    rows = [r for r in made() if r.seed == 0]
    both = [*rows, *(replace(r, profile="quick", worst=0.5) for r in rows if r.method == "fold")]
    text = bench.page(both)
    for title in ("cross/a+b/all/sum (full)", "cross/a+b/all/sum (quick)"):
        assert text.count(f"<h3>{title}</h3>") == 1
    assert "±" not in "".join(cell for cell, _ in Cells(text).cells)


@pytest.mark.parametrize(
    ("keep", "pictures"),
    [
        (lambda r: r.method == "zipit", ["cases by methods"]),
        (lambda r: r.method == "fold", ["cases by methods", "size and skill"]),
        (lambda r: r.method == "fold" and r.budget == "sum", ["cases by methods"]),
        (lambda r: r.method == "fold_heal" and r.budget == "sum", ["cases by methods", "healing"]),
        (lambda r: r.method == "expert", ["training"]),
    ],
)
def test_pictures_without_rows_are_left_out(keep, pictures):
    text = bench.page([r for r in made() if keep(r)])
    assert [label.rpartition(": ")[2] for label in re.findall(r'aria-label="([^"]*)"', text)] == pictures


def lines(figure) -> list[tuple[list[float], list[float]]]:
    """Points of every line that is no mark."""
    found = [line for axes in figure.axes for line in axes.get_lines() if len(line.get_xdata()) > 2]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in found]


def test_curves_are_those_of_the_rows():
    rows = made()
    [healed] = [r for r in rows if r.method == "fold_heal" and r.budget == "sum" and r.seed == 0]
    expected = ([i * 15.36 for i in range(7)], [p["worst"] for p in healed.extra["curve"]])
    [(tokens, worst)] = lines(bench_figures.healing([healed]))
    assert (tokens, worst) == (pytest.approx(expected[0]), expected[1])
    points = [{"step": 0, "tokens": 0, "worst": 2.0}, {"step": 9, "tokens": 7000, "worst": 1.0}]
    text = replace(healed, extra={"curve": points})
    assert bench_figures.healing_curve(text) == ([0.0, 7.0], [2.0, 1.0])
    expert = [r for r in rows if r.method == "expert"]
    drawn = lines(bench_figures.training(expert))
    assert len(drawn) == 2 * 2 * len(expert)
    steps, values = drawn[1]
    assert steps == list(range(100, 1300, 100))
    assert values == [p["val_loss"] for p in expert[0].extra["curve"]]
    cross = [r for r in rows if r.method == "fold"]
    found = bench_figures.points(cross, lambda r: r.budget, lambda r: r.parameters / 1e6)
    assert found["fold"] == ([0.6, 0.9], pytest.approx([0.69, 0.79]))


def test_no_two_methods_that_heal_look_alike_and_their_names_fit():
    names = ["fold_heal", "fold_heal_more", "anchor_distill", "anchor_distill_more", "scratch_distill", "fuse_distill"]
    healed = next(r for r in made() if r.method == "fold_heal")
    figure = bench_figures.healing([replace(healed, method=name) for name in names])
    drawn = {
        (line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines() if len(line.get_xdata()) > 2
    }
    assert len(drawn) == len(names)
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_step_val_acc_99_is_not_marked_where_it_was_not_reached():
    expert = next(r for r in made() if r.method == "expert")
    assert bench_figures.reached(expert) == 800
    failed = {**expert.extra, "step_val_acc_99": expert.steps, "final_val_acc": 0.5}
    assert bench_figures.reached(replace(expert, extra=failed)) is None


def test_shades_compare_within_a_case_in_both_metrics():
    for metric, scores in (("accuracy", (0.2, 0.6, 1.0)), ("bits per byte", (3.0, 2.0, 1.0))):
        named = zip(("anchor", "x", "y"), scores, strict=True)
        rows = [Row("s", "p", "c", 0, method, metric=metric, worst=worst) for method, worst in named]
        shades = {m: shade for m, (_, shade) in bench_figures.shades_of(rows).items()}
        assert shades == pytest.approx({"anchor": 0.0, "x": 0.5, "y": 1.0})
        assert bench_figures.shades_of([replace(r, status="cannot", worst=None) for r in rows]) == {}
        lost = bench_figures.shades_of([*rows, *(replace(r, method="z", worst=None) for r in rows[:2])])
        assert {m: shade for m, (_, shade) in lost.items()} == pytest.approx(shades | {"z": 0.0})


def test_flops_by_hand():
    assert training_flops(10, 100) == 6000
    assert training_flops(10, 100, runs=2, teachers=[(5, 200), (7, 1)]) == 12000 + 2000 + 14


def test_rows_from_before_flops_were_counted_still_show():
    lines = [json.loads(line) for line in COMMITTED.read_bytes().splitlines()]
    old = [parse(json.dumps({k: v for k, v in line.items() if k != "flops"}).encode(), "") for line in lines]
    assert old[0].flops is None
    text = bench.page(old)
    assert "prose+code/1.5x" in text
    assert all(cell.strip() for cell, _ in Cells(text).cells)


def test_the_command_writes_both_and_says_so(tmp_path):
    for row in made():
        Store(tmp_path).append(row)
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for name in ("LEADERBOARD.md", "report.html"):
        assert (tmp_path / name).is_file()
        assert str(tmp_path / name) in done.stdout
    told = CliRunner().invoke(app, ["report", "--help"], terminal_width=200).stdout
    assert "LEADERBOARD.md" in told
    assert "report.html" in told


def test_markdown_of_the_texts():
    assert page.prose("a `b` *c* <\n\n- one\n- two") == (
        "<p>a <code>b</code> <em>c</em> &lt;</p>\n<ul><li>one</li><li>two</li></ul>"
    )


# ---------------------------------------------------------------------- several files, axes


def of_axis(axis: str, method: str, worst: float, **more: object) -> Row:
    """A row of the text suite in which `b` is the skill that lost most."""
    facts = {"metric": "bits per byte", "owners": {"a": 1.0, "b": 2.0}, "worst_skill": "b", "worst": worst}
    facts |= {"scores": {"a": 1.0, "b": worst}, "budget": "sum", "setting": {"axis": axis}, **more}
    return Row("text", "full", f"a+b/{axis}/sum", 0, method, **facts)


def test_bits_per_byte_are_judged_over_the_owners():
    easy = of_axis("seed", "fold", 1.5, worst_skill="a", scores={"a": 1.5, "b": 2.0})
    hard = of_axis("seed", "ot_fusion", 2.2)
    assert (excess(easy), excess(hard)) == (pytest.approx(0.5), pytest.approx(0.2))
    assert "a+b/seed/sum: ot_fusion 0.2000 (ours 0.5000)" in board.write([easy, hard])
    assert judged(Row("modular", "full", "c", 0, "fold", worst=0.9, worst_skill="a", owners={"a": 1.0})) == 0.9


def test_accuracies_are_judged_by_the_lowest():
    near = same("cross/a+b", "fold", 1.0, scores={"a": 0.9944, "b": 1.0}, owners={"a": 0.99, "b": 1.0}, worst_skill="b")
    assert judged(near) == 0.9944
    [table] = board._per_case([near])
    assert dict(zip(table.head, table.lines[0], strict=True))["worst"] == "0.9944"
    assert bench_figures.shades_of([near])["fold"][0] == 0.9944


def test_what_diverged_is_the_worst_and_is_called_so():
    def lost(row: Row) -> Row:
        return replace(row, worst=None, scores={**row.scores, "b": None}, gap_closed=None)

    rows = [of_axis(a, m, 2.2) for m in ("fold", "anchor", "linear", "zipit") for a in ("seed", "width", "heads")]
    rows = [lost(r) if (r.method, r.setting["axis"]) in (("linear", "width"), ("zipit", "seed")) else r for r in rows]
    [glance] = overview.tables(rows)
    lines = {line[0]: line[2:] for line in glance.lines}
    assert lines["linear"] == lines["zipit"] == ["3 of 3", "0", "0", "0.2000", "diverged"]
    assert [line[5] for line in axes.tables(rows)[0].lines] == ["–"] * 3
    assert [line[-1] for line in axes.tables(rows)[0].lines][:2] == ["0.2000 linear", "0.2000 zipit"]
    worse = [r if r.method != "fold" else lost(r) for r in rows if r.setting["axis"] == "seed"]
    assert board.behind(worse) == ["a+b/seed/sum: anchor alone 0.2000 (ours diverged), linear 0.2000 (ours diverged)"]
    [table] = board._per_case([lost(of_axis("seed", "linear", 2.2)), replace(of_axis("seed", "linear", 2.2), seed=1)])
    cells = dict(zip(table.head, table.lines[0], strict=True))
    assert [cells[k] for k in ("b", "worst", "over owner", "gap")] == ["diverged"] * 4
    one = same("same/x_plus_y/layers", "linear", 0.2)
    assert (
        seed_table._best_rival([replace(one, worst=None, scores={"x_plus_y": None})], "x_plus_y") == "diverged linear"
    )
    assert bench_figures.heat(rows) is not None
    assert bench_figures.points(worse, lambda r: r.case, lambda _: 1.0)["fold"] == ([], [])


def test_the_axis_table_says_ours_best_rival_and_best_control():
    rows = [of_axis("width", "fold", 2.3), of_axis("width", "fold_heal", 2.1), of_axis("width", "anchor_distill", 2.25)]
    rows += [of_axis("width", "zipit", 3.0), of_axis("width", "mergekit_linear", 2.05), of_axis("width", "shrink", 4.0)]
    rows += [of_axis("seed", "fold", 2.2), replace(of_axis("width", "linear", 2.0), status="cannot", worst=None)]
    [table] = axes.tables(rows)
    seed, width = (dict(zip(table.head, line, strict=True)) for line in table.lines)
    assert [seed["axis"], seed["fold"], seed["fold + heal"], seed["best rival"]] == ["seed", "0.2000", "–", "–"]
    assert width["anchor padded + distilled"] == "0.2500"
    assert width["best rival"] == "0.0500 mergekit_linear (wins)"
    assert width["best other control"] == "2.0000 shrink-only (anchor folded)"
    assert "One axis of difference at a time (full)" in board.write(rows)
    assert axes.tables(made()) == []


def test_how_long_the_control_takes_to_be_where_ours_is():
    def curve(*worst: float | None) -> dict[str, object]:
        return {"extra": {"curve": [{"step": i, "tokens": 100 * i, "worst": w} for i, w in enumerate(worst)]}}

    rows = [of_axis("", "fold_heal", 2.1, **curve(0.2, 0.3, 0.05)), of_axis("seed", "fold_heal", 2.1, **curve(0.1))]
    rows.append(of_axis("", "anchor_distill_more", 2.2, **curve(0.9, 0.5, 0.25, 0.2, 0.1, 0.15)))
    [table] = reach.tables(rows)
    assert table.lines == [["a+b//sum", "0", "0.2000", "300", "0.0500", "200", "over 500", "0.1000", "500"]]
    assert reach.TITLE in board.write(rows)
    rows[0] = of_axis("", "fold_heal", 2.1, **curve(0.2, None, 0.05))
    rows[2] = of_axis("", "anchor_distill_more", 2.2, **curve(0.9, 0.5, None, 0.2, 0.1, None))
    assert reach.tables(rows)[0].lines == table.lines
    healed = bench_figures.healing_curve(replace(rows[0], steps=2, tokens=200))
    assert healed == ([0.0, 0.1, 0.2], pytest.approx([0.2, math.nan, 0.05], nan_ok=True))


def little(text: int | None, method: str, worst: float, seed: int = 0, written: bool = False) -> Row:
    heal = {"experts": ["a", "b/seed"], "text": text, "written": written}
    row = of_axis("", method, worst, setting={"heal": heal})
    return replace(row, case=f"a+b/text-{text}/sum", seed=seed)


def test_little_text_is_a_table_and_a_figure_of_each_pair():
    rows = [little(n, m, 2.0 + x * n / 2048) for n in (2048, 8192) for m, x in (("fold", 0.5), ("zipit", 0.25))]
    rows += [
        little(2048, "fold", 2.7, seed=1),
        little(None, "fold", 2.1),
        little(2048, "fold", 2.3, written=True),
        replace(little(2048, "union", 2.0), status="cannot", worst=None),
    ]
    [table] = scarce.tables([*rows, of_axis("seed", "fold", 2.4)])
    assert table.title == "Little text: a + b/seed, sum (full)"
    assert table.head == ["method", "group", "2,048", "2,048 + written", "8,192", "all"]
    zipit, fold = ["0.2500", "–", "1.0000", "–"], ["0.6000", "0.3000", "2.0000", "0.1000"]
    assert table.lines == [["zipit", "rival", *zipit], ["fold", "ours", *fold]]
    assert table.cannot == [["union", "ours", "–", "–", "–", "–"]]
    assert scarce.TITLE in board.write(rows)
    drawn = {tuple(line.get_xdata()): list(line.get_ydata()) for line in bench_figures.texts(rows).axes[0].get_lines()}
    assert set(drawn) == {(2048.0, 8192.0)}
    assert bench_figures.texts([of_axis("seed", "fold", 2.4)]) is None
    assert bench_figures.texts([r for r in rows if scarce.text(r) != (8192, False)]) is None  # one point is no curve


def test_many_cases_are_told_on_pages_of_their_own(monkeypatch):
    rows = made()
    assert board.write_cases(rows) == {}
    assert "--case cross/a+b/all/sum --seeds" in board.write(rows)
    monkeypatch.setattr(board, "FEW", 1)
    told, pages = board.write(rows, {"modular": "cases/modular.md"}), board.write_cases(rows)
    assert "[modular](cases/modular.md)" in told
    assert "--case cross/a+b/all/sum --seeds" not in told
    assert all(f"`{r.command}`" in pages["modular"] for r in rows if r.seed and r.method != "expert")


def test_rows_of_several_files_and_folders_are_one_page(tmp_path):
    for name, row in (("x", of_axis("seed", "fold", 2.3)), ("y", of_axis("seed", "union", 2.0))):
        Store(tmp_path / "rows", f"{name}.jsonl").append(row)
    Store(tmp_path / "rows", "z.jsonl").append(of_axis("seed", "fold", 2.4))
    (tmp_path / "rows/other.jsonl").write_text('{"case": "a", "seed": 0}\n')
    assert [(r.method, r.worst) for r in gather([tmp_path / "rows"])] == [("fold", 2.4), ("union", 2.0)]
    assert [r.worst for r in gather([tmp_path / "rows/x.jsonl"])] == [2.3]
    with pytest.raises(OutputError, match="not a row of results"):
        gather([tmp_path / "rows/other.jsonl"])
    with pytest.raises(OutputError, match="does not exist"):
        gather([tmp_path / "nowhere"])
    words = [
        "report",
        str(tmp_path / "rows/y.jsonl"),
        str(tmp_path / "rows/x.jsonl"),
        "--out",
        str(tmp_path / "new/page"),
    ]
    done = CliRunner().invoke(app, [*words, "--leaderboard", str(tmp_path / "BOARD.md")])
    assert done.exit_code == 0, done.output
    assert "0.3000" in (tmp_path / "BOARD.md").read_text()
    assert (tmp_path / "new/page/report.html").is_file()
    with pytest.raises(OutputError, match="cannot be made"):
        runner.report(tmp_path / "rows/y.jsonl", tmp_path / "BOARD.md/page")


def test_the_committed_leaderboard_is_that_of_the_committed_rows():
    root = COMMITTED.parents[2]
    rows = gather([COMMITTED.parent])
    links = {suite: f"examples/results/{suite}.md" for suite in ("modular", "text")}
    assert board.write(rows, links) == (root / "LEADERBOARD.md").read_text(encoding="utf-8")
    for suite, text in board.write_cases(rows).items():
        assert text == (root / links[suite]).read_text(encoding="utf-8")
