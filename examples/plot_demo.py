"""Put a finished demo into the README: its figure, and its table with the commit it was made at.

make demo
.venv/bin/python examples/plot_demo.py      # reads out/demo/summary.json
"""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polymerge import report
from polymerge.report import figures, html
from polymerge.report.terminal import bits, duration, size

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: examples/plot_demo.py -->", "<!-- end of results -->"


def main() -> None:
    """Read the summary named on the command line, or the demo's; write the picture and the table."""
    summary = html.read(sys.argv[1] if len(sys.argv) > 1 else ROOT / "out/demo/summary.json")
    picture = ROOT / "examples/figures/demo.png"
    picture.write_bytes(figures.png(figures.story(summary)))
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{table(summary)}\n{END}{after}", encoding="utf-8")
    print(picture, readme, sep="\n")


def table(summary: Mapping[str, Any]) -> str:
    """The demo's figures as Markdown."""
    skills = summary["skills"]
    columns = [
        *(f"{name} alone" for name in next(iter(skills.values()))["experts"]),
        *report.STAGES,
        "over owner",
    ]
    lines = [f"| skill | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name, row in skills.items():
        cells = [bits(v) for v in row["experts"].values()] + [bits(row[s]) for s in report.STAGES]
        cells.append(bits(report.excess(row), "+.3f"))
        bold = "**" if name == report.worst(skills) else ""
        lines.append("| " + " | ".join(f"{bold}{c}{bold}" for c in (name, *cells)) + " |")
    experts, parameters = summary["expert_parameters"], summary["parameters"]
    shape = summary["shape"]
    before = " and ".join(f"{n:,}" for n in experts.values())
    lines.append(
        f"\nExperts of {before} parameters became one {shape['family']} of {parameters:,} "
        f"({shape['layers']} layers, width {shape['width']}), "
        f"{parameters / max(experts.values()):.2f} times the larger, in {duration(summary['seconds'])} "
        f"with {size(summary['peak_bytes'])} of memory at most. "
        f"Commit {commit()}, `make demo`."
    )
    return "\n".join(lines)


def commit() -> str:
    """The commit of the working tree, marked where files differ from it."""
    head, changed = (_git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain", "src"))
    return f"{head} and later changes" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True)  # noqa: S603, S607
    return done.stdout.strip()


if __name__ == "__main__":
    main()
