"""The command line: `polymerge merge recipe.yaml out`, and what one wants to know before and after.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 2 something that the user can put
right (one line says what), 130 interrupted. Everything heavy is imported inside the commands: `--help` must
be instant.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from polymerge import progress as bars
from polymerge._shell import NOTHING, Commands, interruptible, no_loading_bars, print_json, tell
from polymerge.errors import PolymergeError


class Device(StrEnum):
    """Where tensors live."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Split(StrEnum):
    """Which part of a text is measured."""

    test = "test"
    all = "all"


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=("[bold]Try it[/]:  [cyan]polymerge demo out/demo[/]  merges two small models that come with it."),
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
OnDevice = Annotated[Device, typer.Option(help="auto takes a CUDA GPU where there is one.")]


def _version(show: bool) -> bool:
    if show:
        import polymerge

        typer.echo(f"polymerge {polymerge.__version__}")
        raise typer.Exit
    return show


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Merge LLMs of different architectures into one plain Hugging Face checkpoint that keeps every skill."""


@app.command(
    epilog=(
        "[bold]Examples[/]\n\n"
        "[cyan]polymerge merge recipe.yaml out --dry-run[/]  what would happen, and what it would cost\n\n"
        "[cyan]polymerge merge recipe.yaml out --device cuda[/]"
    )
)
def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; its paths are relative to itself.")],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Folder of the result: absent or empty; appears whole or not at all."),
    ],
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")
    ] = False,
    device: OnDevice = Device.auto,
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the state here; the same command goes on from it."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge the models of a recipe."""
    import polymerge

    no_loading_bars()

    def kept() -> str:
        begun = work is not None and any(work.glob("*"))
        return f"nothing was written to {out}; the same command goes on from {work}" if begun else NOTHING

    with interruptible(kept), bars.choose(quiet=quiet or as_json) as listener:
        result = polymerge.merge(recipe, out, device=device.value, dry_run=dry_run, work=work, progress=listener)
    if as_json:
        print_json(result.summary())
        return
    from polymerge.report import terminal

    if result.out is None:
        terminal.show(terminal.preflight(result.report.summary()))
        typer.echo("dry run: nothing was written")
    else:
        terminal.show(terminal.merged(result.summary(), str(result.out)))


@app.command(epilog="[bold]Example[/]\n\n[cyan]polymerge inspect models/prose-llama models/code-neox[/]")
def inspect(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Checkpoint folders, or hf:ORG/NAME.")],
    *,
    as_json: Json = False,
) -> None:
    """Show what checkpoints are, side by side; no weight is read."""
    from dataclasses import asdict

    import polymerge

    facts = []
    for path in models:
        try:
            facts.append(asdict(polymerge.inspect(path)))
        except PolymergeError as error:
            tell(error)
    if as_json:
        print_json(facts)
    elif facts:
        from polymerge.report import terminal

        terminal.show(terminal.models(facts))
    if len(facts) < len(models):
        raise typer.Exit(2)


@app.command(
    "eval",
    epilog=(
        "[bold]Examples[/]\n\n"
        "[cyan]polymerge eval out --text prose=text/prose.txt --text code=src/[/]\n\n"
        "[cyan]polymerge eval out --text sums=sums.jsonl --split all[/]  "
        'lines of {"prompt": …, "answer": …} give exact match too; {"messages": […]} are written by its chat template'
    ),
)
def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Checkpoint folder, or hf:ORG/NAME.")],
    *,
    text: Annotated[
        list[str],
        typer.Option(metavar="NAME=FILE", help="A text (file, folder, JSONL) under a name; repeatable."),
    ],
    split: Annotated[
        Split, typer.Option(help="test: the tenth that a merge never sees; all: everything.")
    ] = Split.test,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens a row; default the merge's that made the model, else 256.")
    ] = None,
    field: Annotated[str, typer.Option(help="The key of a JSON record that holds its text.")] = "text",
    seed: Annotated[
        int | None, typer.Option(min=0, help="It decides the split; default the merge's that made the model, else 0.")
    ] = None,
    device: OnDevice = Device.auto,
    as_json: Json = False,
) -> None:
    """Measure bits per byte, and exact match where a text has prompts with answers."""
    texts: dict[str, list[Path]] = {}
    for item in text:
        name, equals, file = item.partition("=")
        if not (name and equals and file):
            raise typer.BadParameter(f"{item!r}: expected NAME=FILE, such as code=text/code.txt", param_hint="--text")
        texts.setdefault(name, []).append(Path(file))
    import polymerge
    from polymerge.merge import pick_device

    no_loading_bars()
    found = polymerge.evaluate(
        model, texts, split=split.value, length=length, field=field, seed=seed, device=pick_device(device.value)
    )
    if as_json:
        print_json(found)
        return
    from polymerge.report import terminal

    terminal.show(terminal.measured(found))


@app.command()
def methods(*, as_json: Json = False) -> None:
    """List the merge methods, and a rival's options with their defaults."""
    from polymerge import methods as package

    rows = []
    for name in package.names():
        options = package.options(name)
        shown = ", ".join(f"{key}: {json.dumps(value)}" for key, value in options.items())
        rows.append({"name": name, "about": _about(package, name), "options": options if as_json else shown})
    _list(rows, as_json=as_json)


@app.command()
def families(*, as_json: Json = False) -> None:
    """List the model families, and which of them a result can have."""
    from polymerge import families as package

    rows = []
    for name in package.names():
        result = package.get(name).write is not None
        role = "expert, result" if result else "expert"
        rows.append({"name": name, "can be": role, "about": _about(package, name)})
    _list(rows, as_json=as_json)


@app.command(epilog="[bold]Example[/]\n\n[cyan]polymerge demo out/demo[/]")
def demo(
    out: Annotated[Path, typer.Argument(metavar="[OUT]", help="Folder for texts, recipe, model and report.")] = Path(
        "out/demo"
    ),
    *,
    device: OnDevice = Device.auto,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge two small models that come with polymerge: English prose (Llama) and Python code (GPT-NeoX)."""
    from polymerge.demo.run import run

    no_loading_bars()
    with interruptible(lambda: "no model was written"), bars.choose(quiet=quiet or as_json) as listener:
        done = run(out, device=device.value, progress=listener)
    if as_json:
        print_json(done.summary)
        return
    from polymerge.report import terminal

    terminal.show(terminal.merged(done.summary, str(done.model)))
    terminal.show(terminal.samples(done.samples))
    typer.echo(f"report: {done.report}")


@app.command(
    epilog=(
        "[bold]Examples[/]\n\n"
        "[cyan]polymerge bench text --profile quick --out out/bench[/]  every method on the demo's experts\n\n"
        "[cyan]polymerge bench modular --methods fold,union --seeds 3[/]  the arithmetic experiment, two methods\n\n"
        "[cyan]polymerge bench text --profile medium --texts TEXTS[/]  experts trained on your own texts first\n\n"
        "Kill it anywhere and run it again: finished rows are neither lost nor repeated."
    )
)
def bench(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="modular, text or all.")],
    *,
    profile: Annotated[str, typer.Option(help="quick, medium (text alone), full or large (text alone).")] = "quick",
    methods: Annotated[str | None, typer.Option(help="Names, separated by commas; default all.")] = None,
    cases: Annotated[str | None, typer.Option("--case", help="Names, separated by commas; default all.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from 0 on.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of rows.jsonl, LEADERBOARD.md and report.html.")] = Path(
        "out/bench"
    ),
    device: OnDevice = Device.auto,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that share the work; default one for each core, at most four; 1 on a GPU."),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="Folder of texts for the experts of text; default what POLYMERGE_TEXTS names."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Benchmark every method on the same experts, texts and tokens."""
    from polymerge import bench as package

    no_loading_bars()
    with interruptible(lambda: "finished rows are kept; run it again to go on"), bars.choose(quiet=quiet) as listener:
        package.run(
            suite,
            profile,
            out,
            methods.split(",") if methods else None,
            seeds,
            device.value,
            listener,
            cases=cases.split(",") if cases else None,
            workers=workers or package.workers(device.value),
            texts=texts,
        )
    for line in [] if cases else package.left_out(suite, profile, texts):
        typer.echo(line, err=True)
    typer.echo(f"leaderboard: {out / 'LEADERBOARD.md'}\nreport: {out / 'report.html'}")


@app.command(
    epilog=(
        "[bold]Examples[/]\n\n"
        "[cyan]polymerge report out/demo/summary.json page.html[/]  the page of a merge\n\n"
        "[cyan]polymerge report out/bench[/]  writes LEADERBOARD.md, pages of cases and report.html there\n\n"
        "[cyan]polymerge report a.jsonl b.jsonl --out out[/]  the rows of several benchmarks on one page"
    )
)
def report(
    places: Annotated[
        list[Path],
        typer.Argument(
            metavar="SUMMARY [PAGE] | ROWS...",
            help="A merge's summary.json and its page (report.html); or folders and *.jsonl files of benchmarks.",
        ),
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of a benchmark's report.html and pages of cases; default that of the first rows."),
    ] = None,
    leaderboard: Annotated[
        Path | None, typer.Option(help="Where a benchmark's leaderboard goes; default LEADERBOARD.md there.")
    ] = None,
) -> None:
    """Draw the page of a finished merge, or the leaderboard, its pages of cases and report.html of benchmarks' rows."""
    if places[0].suffix != ".json":
        from polymerge import bench as package

        board, page = package.report(places, out, leaderboard)
        typer.echo(f"leaderboard: {board}\nreport: {page}")
        return
    from polymerge.report import html

    if len(places) > 2:  # noqa: PLR2004  a summary and its page
        raise PolymergeError(f"report: {places[2]}: expected one summary.json and one page")
    page = places[1] if len(places) > 1 else Path("report.html")
    html.write(page, html.read(places[0]))
    typer.echo(f"report: {page}")


def _about(package: ModuleType, name: str) -> str:
    """The first sentence of a module's docstring, read without importing it."""
    [folder] = package.__path__
    doc = ast.get_docstring(ast.parse((Path(folder) / f"{name}.py").read_text(encoding="utf-8"))) or ""
    return " ".join(doc.split("\n\n")[0].split())


def _list(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    from polymerge.report import terminal

    terminal.show(terminal.listing(rows))


def main() -> None:
    """Entry point of the `polymerge` command."""
    app(prog_name="polymerge")
