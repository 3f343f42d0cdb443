"""LEADERBOARD.md, from rows alone: the same rows give the same bytes, whatever order they were written in."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from polymerge.bench.methods import METHODS, known
from polymerge.bench.modular import RUNS, SHAPES
from polymerge.bench.rows import Row

SEED: Mapping[int, Mapping[str, tuple[float, int]]] = {
    0: {
        "x_div_y": (0.99984, 3853),
        "x_minus_y": (0.95931, 4533),
        "x_plus_y": (0.99919, 2877),
        "permutation": (0.65234, 7460),
    },
    1: {"x_div_y": (1.0, 3277), "x_minus_y": (1.0, 3473), "x_plus_y": (1.0, 2320), "permutation": (0.69849, 6290)},
    2: {"x_div_y": (1.0, 2500), "x_minus_y": (0.99772, 3300), "x_plus_y": (0.99984, 1743), "permutation": (1.0, 6190)},
    3: {"x_div_y": (0.99992, 2860), "x_minus_y": (1.0, 3247), "x_plus_y": (1.0, 2060), "permutation": (0.14323, 7500)},
    4: {
        "x_div_y": (0.99967, 2537),
        "x_minus_y": (0.99341, 2530),
        "x_plus_y": (1.0, 2097),
        "permutation": (0.88444, 5210),
    },
}
"""The seed experiment: run (0: baseline) -> task -> (final_val_acc_mean, step_val_acc_99_mean), as it was published."""

NAMES = {
    "expert": "expert, from scratch", "fold_heal": "fold + heal", "best_expert": "best single expert",
    "ensemble": "probability ensemble", "anchor": "anchor alone", "anchor_distill": "anchor padded + distilled",
    "scratch_distill": "same size from scratch, distilled", "shrink": "shrink-only (anchor folded)",
    "placebo": "fold, shuffled donor",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table with what is said above it. `cannot`: lines that stay last; `groups`: rows that have curves, by case."""

    title: str
    about: str
    head: Sequence[str]
    lines: Sequence[Sequence[str]]
    cannot: Sequence[Sequence[str]] = ()
    groups: Sequence[tuple[str, Sequence[Row]]] = ()


@dataclass(frozen=True)
class Section:
    """A part of the benchmark."""

    title: str
    about: str
    tables: Sequence[Table]


def write(rows: Sequence[Row]) -> str:
    """The whole page as Markdown."""
    parts = ["# Leaderboard", preface(rows)]
    if lines := behind(rows):
        parts += [f"## {BEHIND}", "\n".join(f"- {line}" for line in lines)]
    for section in sections(rows):
        parts += [f"## {section.title}", section.about]
        for table in section.tables:
            parts += [text for text in (table.title and f"### {table.title}", table.about) if text]
            parts.append(_markdown(table))
    return "\n\n".join(parts) + "\n"


def sections(rows: Sequence[Row]) -> list[Section]:
    """What there is to show, from any order of the rows."""
    modular = [r for r in rows if r.suite == "modular"]
    same = [r for r in modular if r.setting.get("protocol") in ("baseline", "same")]
    cross = [r for r in modular if r.setting.get("protocol") == "cross"]
    made = []
    if same:
        tables = [*map(_same, _profiles(same)), _scratch([r for r in same if r.method == "expert"])]
        tables += _per_case([r for r in same if r.setting.get("protocol") == "same"])
        made.append(Section("Modular arithmetic: one task, experts of different architecture", SAME, tables))
    if cross:
        made.append(Section("Modular arithmetic: several tasks in one model", CROSS, _per_case(cross)))
    if text := [r for r in rows if r.suite == "text"]:
        made.append(Section("Text", TEXT, _per_case(text)))
    return [Section(s.title, s.about, [t for t in s.tables if t.lines or t.cannot]) for s in made]


BEHIND = "Where ours does not win (worst skill)"
QUICK = (
    "The quick profile has one seed, one pair of tasks of the six, one kind of difference of the four, one size of"
    " three, no permutations, and less healing than the full profile: a smoke test of the claims, no proof."
)
FAVOUR = (
    "Controls and rivals take the fold's shape. Where they cannot, they get the least shape that holds the experts,"
    " with more parameters if need be: in their favour, and said in their notes."
)
SAME = (
    "Test accuracy, and updates until validation accuracy is over 0.99 (`step_val_acc_99`; 0: before any training)."
    " The seed experiment's figures are validation accuracies of its last state; its merged models were trained from"
    " scratch for thousands of updates."
)
CROSS = (
    "Test accuracy of each task. *Worst* is the skill that lost most against its owner; *gap* is the share of the"
    " distance from the anchor to the owner that is closed."
)
TEXT = "Bits per byte of each skill on its test text; less is better."


def preface(rows: Sequence[Row]) -> str:
    """What made the rows, and what they are not, as Markdown."""
    seen = {
        key: sorted({str(getattr(r, key)) for r in rows if getattr(r, key) != ""})
        for key in ("profile", "device", "commit")
    }
    lines = [f"- {key}: {', '.join(values)}" for key, values in seen.items() if values]
    versions = sorted({f"{k} {v}" for r in rows for k, v in r.versions.items()})
    parts = ["Made from the rows by `polymerge report`; edit nothing here."]
    parts += [FAVOUR]
    parts += [QUICK] if any(r.profile == "quick" for r in rows) else []
    return "\n\n".join([*parts, "\n".join([*lines, f"- versions: {', '.join(versions)}", f"- rows: {len(rows)}"])])


def behind(rows: Sequence[Row]) -> list[str]:
    """A line for each case in which another single model beats ours; it is said first."""
    lines = []
    for case, group in cases(rows):
        scored = [
            (m, mean(w)) for m, some in by(group, "method") if (w := [r.worst for r in some if r.worst is not None])
        ]
        up = 1 if group[0].metric == "accuracy" else -1
        ours = [score for name, score in scored if name in ("fold", "fold_heal")]
        if not ours:
            continue
        best = max(up * s for s in ours)
        single = {"union", "ensemble"}  # several models, not one
        ahead = [
            (n, s)
            for n, s in scored
            if up * s > best + 1e-9 and n not in single and METHODS.get(n, ("rival",))[0] != "ours"
        ]
        said = ", ".join(f"{name_of(n)} {s:.4f}" for n, s in sorted(ahead, key=lambda item: -up * item[1]))
        if said:
            lines.append(f"{case}: {said} (ours {up * best:.4f})")
    return lines


def _same(rows: Sequence[Row]) -> Table:
    """The seed's table beside ours: a line for each task and run."""
    head = ["task", "run", "seed: accuracy", "seed: steps", "expert alone: accuracy", "expert alone: steps"]
    lines, shapes = [], {0: SHAPES["base"]} | {run: SHAPES[kind] for kind, run in RUNS.items()}
    for task in dict.fromkeys(t for numbers in SEED.values() for t in numbers):
        for run in SEED:
            here = [r for r in rows if task in r.scores and r.setting.get("run") == run]
            alone = [r for r in rows if r.method == "expert" and task in r.scores and _shape(r) == shapes[run]]
            if not (here or alone):
                continue
            accuracy, steps = SEED[run][task]
            line = [task, str(run), f"{accuracy:.4f}", str(steps), _scores(alone, task), _steps(alone)]
            for method in ("fold", "fold_heal", "scratch_distill"):
                some = [r for r in here if r.method == method]
                line += [_scores(some, task), _steps(some)]
            lines.append(line)
    for method in ("fold", "fold_heal", "scratch_distill"):
        head += [f"{name_of(method)}: accuracy", f"{name_of(method)}: steps"]
    return Table("", f"Profile: {rows[0].profile}.", head, lines)


def _scratch(rows: Sequence[Row]) -> Table:
    """The baseline: every architecture from scratch on its task, with the seed experiment's figures."""
    finals = ("final_train_loss", "final_train_acc", "final_val_loss", "final_val_acc")
    head = ["expert", "test accuracy", *finals, "step_val_acc_99", *_COST, "again"]
    lines = []
    for case, some in cases(rows):
        done = [r for r in some if r.status == "ok"]
        found = [_figure([r.extra.get(key) for r in done]) for key in finals]
        scores = _figure([r.worst for r in done])
        lines.append([case.removeprefix("baseline/"), scores, *found, _steps(done), *_cost(done), some[-1].command])
    return Table("From scratch", "The experts' own training; losses in nats.", head, lines, groups=cases(rows))


def _shape(row: Row) -> tuple[int, int, int]:
    return tuple(row.size.get(key, 0) for key in ("layers", "width", "heads"))


def _steps(rows: Sequence[Row]) -> str:
    steps = [r.extra.get("step_val_acc_99") for r in rows]
    if not steps:
        return "–"
    known = [s for s in steps if s is not None]
    return f"{mean(known):.0f}" if len(known) == len(steps) else "not reached"


def _per_case(rows: Sequence[Row]) -> list[Table]:
    """A table for each case: methods by worst skill, best first; those that cannot do it last, with the reason."""
    return [_case(case, group) for case, group in cases(rows)]


def _about(row: Row) -> str:
    experts = ", ".join(f"{name} ({n:,})" for name, n in row.expert_parameters.items())
    owners = ", ".join(f"{skill} {score:.4f}" for skill, score in sorted(row.owners.items()))
    return f"Experts (parameters): {experts}. Owners: {owners}. Budget: {row.budget}."


_COST = ("parameters", "training tokens", "FLOPs", "CPU s", "wall s", "peak GB")


def _cost(done: Sequence[Row]) -> list[str]:
    """What a method took: means over seeds, the peak of all."""
    if not done:
        return ["–"] * len(_COST)
    counts = [_average([getattr(r, key) for r in done]) for key in ("parameters", "tokens", "flops")]
    cells = ["–" if n is None else f"{n:,.0f}" for n in counts[:2]]
    cells.append("–" if counts[2] is None else f"{counts[2]:.2e}".replace("e+", "e"))
    cells += [f"{mean(r.cpu_seconds for r in done):.1f}", f"{mean(r.seconds for r in done):.1f}"]
    return [*cells, f"{max(r.peak_bytes for r in done) / 1e9:.2f}"]


def _case(case: str, rows: Sequence[Row]) -> Table:
    skills = sorted({skill for r in rows for skill in r.owners})
    up = 1 if rows[0].metric == "accuracy" else -1
    head = ["method", "group", *skills, "worst", "gap", *_COST, "notes", "again"]
    good, bad, groups = [], [], known()
    for name, some in by(rows, "method"):
        done = [r for r in some if r.status == "ok"]
        first, command = [name_of(name), groups.get(name, ("rival",))[0]], some[-1].command or "–"
        if not done:
            bad.append([*first, *["–"] * (len(head) - 4), f"cannot: {some[0].reason}", command])
            continue
        line = [*first, *(_scores(done, s) for s in skills), _figure([r.worst for r in done])]
        line += [_figure([r.gap_closed for r in done], 2), *_cost(done), _notes(some), command]
        good.append((-up * (_average([r.worst for r in done]) or 0.0), name, line))
    lines = [line for _, _, line in sorted(good, key=lambda item: item[:2])]
    return Table(case, _about(rows[0]), head, lines, bad, [(case, rows)])


def _notes(rows: Sequence[Row]) -> str:
    """What is noted, by seed where seeds differ."""
    said = {r.seed: r.notes if r.status == "ok" else f"cannot: {r.reason}" for r in rows}
    if len(set(said.values())) == 1:
        return rows[0].notes or "–"
    return "; ".join(f"seed {seed}: {note}" for seed, note in said.items() if note)


def _scores(rows: Sequence[Row], skill: str) -> str:
    return _figure([r.scores.get(skill) for r in rows])


def _figure(values: Iterable[int | float | None], digits: int = 4) -> str:
    """The mean, ± the spread where there is more than one seed."""
    some = [v for v in values if v is not None]
    if not some:
        return "–"
    return f"{mean(some):.{digits}f}" + (f" ± {stdev(some):.{digits}f}" if len(some) > 1 else "")


def _average(values: Sequence[int | float | None]) -> float | None:
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
    found = [(f"{case} ({p[0].profile})", p) for case, group in by(rows, "case") for p in _profiles(group)]
    return found if len(_profiles(rows)) > 1 else [(group[0].case, group) for _, group in found]


def _profiles(rows: Sequence[Row]) -> list[list[Row]]:
    return [group for _, group in by(rows, "profile")]


def _markdown(table: Table) -> str:
    """The table, its commands as code where the last column holds them."""
    lines = [*table.lines, *table.cannot]
    if table.head[-1] == "again":
        lines = [[*line[:-1], f"`{line[-1]}`" if line[-1] != "–" else "–"] for line in lines]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in (table.head, *lines)]
    made = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([made[0], "|" + "---|" * len(table.head), *made[1:]])
