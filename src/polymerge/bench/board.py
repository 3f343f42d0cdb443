"""LEADERBOARD.md and the pages of its cases, from rows alone: the same rows, in any order, give the same bytes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from polymerge.bench.methods import METHODS, PUBLIC, known
from polymerge.bench.rows import Row, judged

NAMES = {
    "expert": "expert, from scratch", "fold_heal": "fold + heal",
    "fold_heal_more": "lean fold + long heal, as many FLOPs", "best_expert": "best single expert",
    "ensemble": "probability ensemble", "anchor": "anchor alone", "anchor_distill": "anchor padded + distilled",
    "anchor_distill_more": "anchor padded + distilled, as many FLOPs",
    "scratch_distill": "same size from scratch, distilled", "shrink": "shrink-only (anchor folded)",
    "placebo": "fold, shuffled donor",
}  # fmt: skip


FOLDS = ("fold", "fold_heal", "fold_heal_more")
"""Ours that are one model."""
CONTROL = "anchor_distill_more"
"""Spends what fold and healing take together."""
CLOSE = 1e-9
"""Scores nearer than this are the same."""
SEVERAL = ("union", "ensemble")
"""Several models, not one."""


@dataclass(frozen=True)
class Table:
    """A table with what is said above it.

    `cannot`: lines that stay last; `groups`: rows that have curves, by case; `one`: of one case, every row's command
    with it: on a page of its own suite where there are many.
    """

    title: str
    about: str
    head: Sequence[str]
    lines: Sequence[Sequence[str]]
    cannot: Sequence[Sequence[str]] = ()
    groups: Sequence[tuple[str, Sequence[Row]]] = ()
    one: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the benchmark."""

    title: str
    about: str
    tables: Sequence[Table]


def write(rows: Sequence[Row], pages: Mapping[str, str] | None = None) -> str:
    """The leaderboard as Markdown; `pages`: where each suite's cases are, one by one, if they are not in it."""
    parts = ["# Leaderboard", preface(rows)]
    if pages:
        where = " and ".join(f"[{suite}]({page})" for suite, page in pages.items())
        parts.append(f"Every row, with the command that makes it again, is in the pages of the suites: {where}.")
    if lines := behind(rows):
        parts += [f"## {BEHIND}", OURS, "\n".join(f"- {line}" for line in (*counts(rows), *lines))]
    for section in sections(rows):
        parts += _written(section, [table for table in section.tables if not (pages and table.one)])
    return "\n\n".join(parts) + "\n"


def write_cases(rows: Sequence[Row]) -> dict[str, str]:
    """The cases of each suite, one by one, every row with its command, as Markdown; none where the leaderboard can.

    Few of them are told there: it shall be no longer than what people read and sites show.
    """
    made: dict[str, str] = {}
    if len(cases(rows)) <= FEW:
        return made
    for suite, some in by(rows, "suite"):
        parts = [f"# Cases of {suite}", "Made from the rows by `polymerge report`; edit nothing here."]
        for section in sections(some):
            parts += _written(section, [table for table in section.tables if table.one])
        made[suite] = "\n\n".join(parts) + "\n"
    return made


def _written(section: Section, tables: Sequence[Table]) -> list[str]:
    """A section's paragraphs with some of its tables; none without tables."""
    parts = [f"## {section.title}", section.about] if tables else []
    for table in tables:
        parts += [text for text in (table.title and f"### {table.title}", table.about) if text]
        parts.append(_markdown(table))
    return parts


def sections(rows: Sequence[Row]) -> list[Section]:
    """What there is to show, from any order of the rows."""
    modular = [r for r in rows if r.suite == "modular"]
    same = [r for r in modular if r.setting.get("protocol") in ("baseline", "same")]
    cross = [r for r in modular if r.setting.get("protocol") == "cross"]
    from polymerge.bench import overview  # it is made of this module's tables, as `axes` is

    made = [Section("At a glance", GLANCE, overview.tables(rows))]
    if same:
        from polymerge.bench import seed_table

        tables = [*map(seed_table.same, profiles(same)), seed_table.scratch([r for r in same if r.method == "expert"])]
        tables += _per_case([r for r in same if r.setting.get("protocol") == "same"])
        made.append(Section("Modular arithmetic: one task, experts of different architecture", SAME, tables))
    if cross:
        made.append(Section("Modular arithmetic: several tasks in one model", CROSS, _per_case(cross)))
    if text := [r for r in rows if r.suite == "text"]:
        from polymerge.bench import axes, reach, scarce

        some = [*reach.tables(text), *axes.tables(text), *scarce.tables(text)]
        made.append(Section("Text", TEXT, [*some, *_per_case(text)]))
    return [Section(s.title, s.about, [t for t in s.tables if t.lines or t.cannot]) for s in made]


FEW = 12
"""Cases that a leaderboard tells one by one."""
BEHIND = "Where ours does not win (worst skill; bits per byte over its owner)"
OURS = (
    f"*Ours* is the best of three for each case: fold, {NAMES['fold_heal']} and {NAMES['fold_heal_more']}; each is"
    " compared on the seeds that it shares with the other. The first lines count cases for each of the three alone."
)
QUICK = (
    "The quick profile has one seed, one pair of tasks of the six, one kind of difference of the four, one size of"
    " three, no permutations, no expert that only knows its pairs by heart, one pair of texts at one size,"
    " folded with a quarter of the full profile's text and refinement and healed with an eighth of its tokens,"
    " and there two of FS-Merge's three settings: a smoke test of the claims, no proof."
)
MEDIUM = "The medium profile has full's text cases at one size, with less healing: a quarter of the tokens."
FAVOUR = (
    "Controls and rivals take the fold's shape. Where they cannot, they get the least shape that holds the experts,"
    " with more parameters if need be: in their favour, and said in their notes."
)
GLANCE = (
    "Every method over the cells (case and seed) in which ours, controls and rivals all have rows, best median first."
    " The union and the ensemble are several models at once."
)
SAME = (
    "Test accuracy, and updates until validation accuracy is over 0.99 (`step_val_acc_99`; 0: before any training)."
    " The seed experiment's figures are validation accuracies of its last state; its merged models were trained from"
    " scratch for thousands of updates. Cases whose second expert only knows its pairs by heart are not in that table;"
    " each has its own."
)
CROSS = (
    "Test accuracy of each task. *Worst* is the lowest of them; *gap* is the share of the"
    " distance from the anchor to the owner that is closed."
)
TEXT = (
    "Bits per byte of each skill on its test text; less is better. *Over owner* is what the skill that lost most lost"
    " against its own expert: methods are ranked by it. prose+code are the experts that come with polymerge; those of"
    " other cases were trained on the calibration part of a user's texts, and their commands want the folder of these"
    " texts in `POLYMERGE_TEXTS` or by `--texts`."
)


def preface(rows: Sequence[Row]) -> str:
    """What made the rows, and what they are not, as Markdown."""
    seen = {
        key: sorted({str(getattr(r, key)) for r in rows if getattr(r, key) != ""})
        for key in ("profile", "device", "commit")
    }
    lines = [f"- {key}: {', '.join(values)}" for key, values in seen.items() if values]
    versions = sorted({f"{k} {v}" for r in rows for k, v in r.versions.items()})
    parts = ["Made from the rows by `polymerge report`; edit nothing here."]
    checked = "; ".join(f"{name_of(name)} ({code}: {what})" for name, (code, what) in sorted(PUBLIC.items()))
    parts += [FAVOUR, f"Rivals checked beside public code (`tests/test_public_code.py`): {checked}."]
    parts += [QUICK] if any(r.profile == "quick" for r in rows) else []
    parts += [MEDIUM] if any(r.profile == "medium" for r in rows) else []
    return "\n\n".join([*parts, "\n".join([*lines, f"- versions: {', '.join(versions)}", f"- rows: {len(rows)}"])])


def behind(rows: Sequence[Row]) -> list[str]:
    """A line for each case in which another single model beats ours; it is said first."""
    lines = []
    for case, group in cases(rows):
        up = 1 if group[0].metric == "accuracy" else -1
        scored = {name: _by_seed(some) for name, some in by(group, "method")}
        ours = [scored[name] for name in FOLDS if scored.get(name)]
        ahead = []
        for name, found in scored.items():
            if name in SEVERAL or METHODS.get(name, ("rival",))[0] == "ours":
                continue
            pairs = [pair for its in ours if (pair := _compared(its, found, up))]
            best, other = min(pairs, key=lambda pair: pair[1] - pair[0], default=(0.0, 0.0))
            if other > best + CLOSE:
                ahead.append((other, name, best))
        said = [
            f"{name_of(n)} {number(up * s)} (ours {number(up * o)})" for s, n, o in sorted(ahead, key=lambda a: -a[0])
        ]
        if said:
            lines.append(f"{case}: {', '.join(said)}")
    return lines


def counts(rows: Sequence[Row]) -> list[str]:
    """For each of ours: in how many cases the control that spends as much, and any other single model, is ahead."""
    found: dict[tuple[str, str], list[tuple[bool | None, bool]]] = {}
    for _, group in cases(rows):
        up = 1 if group[0].metric == "accuracy" else -1
        scored = {name: _by_seed(some) for name, some in by(group, "method")}
        others = [n for n in scored if n not in SEVERAL and METHODS.get(n, ("rival",))[0] != "ours"]
        for name in FOLDS:
            pairs = {n: pair for n in others if (pair := _compared(scored.get(name, {}), scored[n], up))}
            wins = {n: other > own + CLOSE for n, (own, other) in pairs.items()}
            if wins:
                found.setdefault((name, group[0].suite), []).append((wins.get(CONTROL), any(wins.values())))
    lines = []
    for (name, suite), some in sorted(found.items()):
        control = [win for win, _ in some if win is not None]
        said = f"{name_of(CONTROL)}, is ahead in {sum(control)} of {len(control)} cases, " if control else ""
        lines.append(
            f"{name_of(name)}, {suite}: {said}any other single model in {sum(w for _, w in some)} of {len(some)}"
        )
    return lines


def _compared(ours: Mapping[int, float], other: Mapping[int, float], up: int) -> tuple[float, float] | None:
    """Means of both over the seeds that both have, more is better; seeds are no repetitions of each other's experts."""
    seeds = sorted(ours.keys() & other.keys())
    return (mean(up * ours[s] for s in seeds), mean(up * other[s] for s in seeds)) if seeds else None


def _by_seed(rows: Sequence[Row]) -> dict[int, float]:
    """What each seed's row is judged by, where it is known."""
    return {r.seed: score for r in rows if (score := judged(r)) is not None}


def _per_case(rows: Sequence[Row]) -> list[Table]:
    """A table for each case: methods by worst skill, best first; those that cannot do it last, with the reason."""
    return [_case(case, group) for case, group in cases(rows)]


def _about(row: Row) -> str:
    built = row.setting.get("experts", {})
    experts = ", ".join(f"{name} ({_built(built, name)}{n:,})" for name, n in row.expert_parameters.items())
    owners = ", ".join(f"{skill} {score:.4f}" for skill, score in sorted(row.owners.items()))
    return f"Experts (parameters): {experts}. Owners: {owners}. Budget: {row.budget}."


def _built(experts: object, name: str) -> str:
    """An expert's architecture in words, where the row has it."""
    size = experts.get(name) if isinstance(experts, Mapping) else None
    if not isinstance(size, Mapping) or "family" not in size:
        return ""
    heads = f"{size['heads']} heads" + (f" on {kv}" if (kv := size.get("kv_heads")) != size["heads"] else "")
    return f"{size['family']}, {size['layers']} layers, width {size['width']}, {heads}; "


DIVERGED = "diverged"
COST = ("parameters", "training tokens", "FLOPs", "CPU s", "wall s", "peak GB")


def cost(done: Sequence[Row]) -> list[str]:
    """What a method took: means over seeds, the peak of all."""
    if not done:
        return ["–"] * len(COST)
    counts = [_average([getattr(r, key) for r in done]) for key in ("parameters", "tokens", "flops")]
    cells = ["–" if n is None else f"{n:,.0f}" for n in counts[:2]]
    cells.append("–" if counts[2] is None else f"{counts[2]:.2e}".replace("e+", "e"))
    cells += [f"{mean(r.cpu_seconds for r in done):.1f}", f"{mean(r.seconds for r in done):.1f}"]
    return [*cells, f"{max(r.peak_bytes for r in done) / 1e9:.2f}"]


def _case(case: str, rows: Sequence[Row]) -> Table:
    skills = sorted({skill for r in rows for skill in r.owners})
    up = 1 if rows[0].metric == "accuracy" else -1
    over = ["over owner"] if up < 0 else []  # accuracies are near 1 of an owner: there the score says it
    head = ["method", "group", *skills, "worst", *over, "gap", *COST, "notes", "again"]
    good, bad, groups = [], [], known()
    without = {r.seed: _left_out(r) for r in rows if r.method == "fold"}
    for name, some in by(rows, "method"):
        done = [r for r in some if r.status == "ok"]
        first, command = [name_of(name), groups.get(name, ("rival",))[0]], some[-1].command or "–"
        if not done:
            bad.append([*first, *["–"] * (len(head) - 4), f"cannot: {some[0].reason}", command])
            continue
        score = mean(s for r in done if (s := judged(r)) is not None)
        worst = [math.inf if r.worst is None else r.worst for r in done] if over else map(judged, done)
        line = [*first, *(scores(done, s) for s in skills), figure(worst)]
        line += [figure(map(judged, done))] if over else []
        line += [figure([-math.inf if r.worst is None else r.gap_closed for r in done], 2), *cost(done)]
        line += [_notes(some, without if name in FOLDS else {}), command]
        good.append((-up * score, name, line))
    lines = [line for _, _, line in sorted(good, key=lambda item: item[:2])]
    return Table(case, _about(rows[0]), head, lines, bad, [(case, rows)], one=True)


def _left_out(fold: Row) -> str:
    """That a fold is no merge of all experts, where it kept only those that are good at something."""
    kept, given = len(fold.extra.get("balance") or fold.expert_parameters), len(fold.expert_parameters)
    return f"made of {kept} of the {given} experts: the rest is best at nothing" if kept < given else ""


def _notes(rows: Sequence[Row], more: Mapping[int, str]) -> str:
    """What is noted, by seed where seeds differ; `more`: by seed, said first of what could be done."""
    said = {
        r.seed: "; ".join(filter(None, (more.get(r.seed), r.notes))) if r.status == "ok" else f"cannot: {r.reason}"
        for r in rows
    }
    if len(set(said.values())) == 1:
        return said[rows[0].seed] or "–"
    return "; ".join(f"seed {seed}: {note}" for seed, note in said.items() if note)


def scores(rows: Sequence[Row], skill: str) -> str:
    """A skill's score."""
    found = [r.scores[skill] for r in rows if skill in r.scores]
    return figure([math.inf if score is None else score for score in found])


def figure(values: Iterable[int | float | None], digits: int = 4) -> str:
    """The mean, ± the spread where there is more than one seed."""
    some = [v for v in values if v is not None]
    shown = number(mean(some) if some else None, digits)
    return f"{shown} ± {stdev(some):.{digits}f}" if len(some) > 1 and shown != DIVERGED else shown


def number(value: float | None, digits: int = 4) -> str:
    """A score; a dash where it is not known, a word where a run that it is made of diverged."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if math.isfinite(value) else DIVERGED


def _average(values: Iterable[int | float | None]) -> float | None:
    """The mean of what is known."""
    some = [v for v in values if v is not None]
    return float(mean(some)) if some else None


def name_of(method: str) -> str:
    """A method's name for people."""
    return NAMES.get(method, method)


def by(rows: Sequence[Row], key: str) -> list[tuple[str, list[Row]]]:
    """Groups in sorted order."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: r.key):
        found.setdefault(getattr(row, key), []).append(row)
    return sorted(found.items())


def cases(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by case, sorted; rows of several profiles, which are no repetitions of each other, under several names."""
    found = [(f"{case} ({p[0].profile})", p) for case, group in by(rows, "case") for p in profiles(group)]
    return found if len(profiles(rows)) > 1 else [(group[0].case, group) for _, group in found]


def profiles(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows by profile, sorted."""
    return [group for _, group in by(rows, "profile")]


def _markdown(table: Table) -> str:
    """The table, its commands as code where the last column holds them."""
    lines = [*table.lines, *table.cannot]
    if table.head[-1] == "again":
        lines = [[*line[:-1], f"`{line[-1]}`" if line[-1] != "–" else "–"] for line in lines]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in (table.head, *lines)]
    made = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([made[0], "|" + "---|" * len(table.head), *made[1:]])
