"""Results as tables for a terminal (rich)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from polymerge import report


def table(*columns: str, numbers: Iterable[str] = ()) -> Table:
    """An empty table in the house style; `numbers` are the right-aligned columns."""
    right = set(numbers)
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left")
    return made


def skills(rows: Mapping[str, Mapping[str, Any]], length: int | None = None) -> Table:
    """Bits per byte by skill and stage, in rows of so many tokens; the skill that lost most is bold."""
    stages = [s for s in report.STAGES if any(row.get(s) is not None for row in rows.values())]
    columns = ["owner", *stages, "over owner"]
    made = table("skill", *columns, numbers=columns)
    loser = report.worst(rows)
    for name, row in rows.items():
        cells = [
            bits(row.get("owner")),
            *(bits(row.get(s)) for s in stages),
            bits(report.excess(row), "+.3f"),
        ]
        made.add_row(name, *cells, style="bold" if name == loser else "")
    made.caption = Text(f"bits per byte on test text{report.in_rows(length)}, lower is better", style="dim")
    made.caption_justify = "left"
    return made


def merged(summary: Mapping[str, Any], out: str | None) -> RenderableType:
    """What a finished merge prints: the table, size and cost, where the model is and how to load it."""
    experts = summary.get("expert_parameters") or {}
    largest = f", {summary['parameters'] / max(experts.values()):.2f}x the largest expert" if experts else ""
    facts = [f"{summary['parameters']:,} parameters{largest}"]
    total = report.total_seconds(summary)
    if total is not None:
        facts.append(duration(total))
    if summary.get("peak_bytes"):
        facts.append(f"peak memory {size(summary['peak_bytes'])}")
    lines: list[RenderableType] = [skills(summary["skills"], summary.get("length")), "", " · ".join(facts)]
    if left_out := summary.get("left_out"):
        lines.append(f"without {', '.join(left_out)}: others predict its text better")
    if out is not None:
        remote = ", trust_remote_code=True" if summary.get("method") == "union" else ""
        lines += [
            Text.assemble("written to ", (out, "bold")),
            "",
            Text("from transformers import AutoModelForCausalLM, AutoTokenizer", style="cyan"),
            *(
                Text(f'{name} = {kind}.from_pretrained("{out}"{remote})', style="cyan", no_wrap=True, overflow="ignore")
                for name, kind in (("model", "AutoModelForCausalLM"), ("tokenizer", "AutoTokenizer"))
            ),
        ]
    return Group(*lines)


def measured(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """What `evaluate` found, a row for each text."""
    numbers = ("bits per byte", "exact match", "tokens", "bytes", "tokens a row")
    made = table("text", *numbers, numbers=numbers)
    for name, row in found.items():
        match = "–" if row["exact_match"] is None else f"{row['exact_match']:.1%}"
        counts = (f"{row[key]:,}" for key in ("tokens", "bytes", "length"))
        made.add_row(name, bits(row["bits_per_byte"]), match, *counts)
    return made


def listing(rows: Sequence[Mapping[str, str]]) -> Table:
    """Rows of the same keys, which are the columns."""
    made = table(*rows[0])
    for row in rows:
        made.add_row(*row.values())
    return made


def preflight(found: Mapping[str, Any]) -> RenderableType:
    """The report before a merge: sources, findings by kind with the warnings first, and what it will need."""
    from polymerge.preflight.report import LEVELS, needs

    groups = [("sources", list(found["sources"].items()))]
    for level, title in LEVELS:
        groups.append((title, [(f["subject"], f["text"]) for f in found["findings"] if f["level"] == level]))
    groups = [(title, rows) for title, rows in [*groups, ("needs (estimates)", list(needs(found).items()))] if rows]
    width = max(len(subject) for _, rows in groups for subject, _ in rows)
    parts: list[RenderableType] = []
    for title, rows in groups:
        made = Table.grid(padding=(0, 2))
        made.add_column(min_width=width)
        for subject, text in rows:
            made.add_row(Text(subject, style="cyan"), Text(text))
        parts += [Text(title, style="bold"), Padding(made, (0, 0, 1, 2))]
    return Group(*parts)


def samples(found: Mapping[str, Mapping[str, str]]) -> RenderableType:
    """What the merged model writes: the prompt faint, its own text plain."""
    parts: list[RenderableType] = [Text("\nWhat the merged model writes (the prompt is dim)\n", style="bold")]
    for name, sample in found.items():
        parts += [Text(name, style="underline"), Text.assemble((sample["prompt"], "dim"), sample["text"]), ""]
    return Group(*parts)


def models(facts: Iterable[Mapping[str, Any]]) -> Table:
    """Checkpoints side by side, a column each; rows that differ between them are bold."""
    columns = [_model_rows(f) for f in facts]
    names = [str(f["path"]).rstrip("/").rpartition("/")[2] or str(f["path"]) for f in facts]
    made = table("", *names)
    for key in columns[0]:
        values = [column[key] for column in columns]
        differ = len(set(values)) > 1
        made.add_row(key, *values, style="bold" if differ else "")
    return made


def show(item: RenderableType, *, console: Console | None = None) -> None:
    """Print on stdout; a pipe gets the whole width that the item needs."""
    target = console or Console()
    if not target.is_terminal:
        target.width = max(target.width, 160)
    target.print(item, highlight=False, soft_wrap=False, crop=False)  # a path is copied whole


def bits(value: float | None, form: str = ".3f") -> str:
    """Bits per byte, or a dash where not measured."""
    return "–" if value is None else format(value, form)


def size(count: int) -> str:
    """Bytes for people: 812 MB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds for people: 41 s, 2 min 5 s, 3 h 10 min."""
    whole = round(seconds)
    if whole < 60:  # noqa: PLR2004
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"  # noqa: PLR2004
    minutes, rest = divmod(whole, 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s"


def _model_rows(facts: Mapping[str, Any]) -> dict[str, str]:
    gated = "gated " if facts["gated"] else ""
    rows = {
        "family": facts["family"],
        "layers": str(facts["layers"]) + (", attention and MLP in parallel" if facts["parallel"] else ""),
        "width": f"{facts['width']:,}",
        "heads": f"{facts['heads']} of size {facts['head_size']}",
        "KV heads": str(facts["kv_heads"]),
        "MLP": f"{facts['mlp']:,}, {gated}{facts['activation']}",
        "norm": facts["norm"] + (", q and k normed" if facts["qk_norm"] else ""),
        "positions": facts["positions"],
        "biases": ", ".join(facts["biases"]) or "none",
        "vocabulary": f"{facts['vocab']:,}" + (", tied" if facts["tied"] else ""),
        "context": f"{facts['context']:,} tokens",
        "parameters": f"{facts['parameters']:,}",
        "stored": f"{facts['dtype']}, {size(facts['bytes'])}",
    }
    return {key: str(value) for key, value in rows.items()}
