"""The command line as a user meets it: help, output, exit codes. The merge itself is a stub here."""

import importlib
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from test_report import FULL as SUMMARY
from typer.testing import CliRunner

import polymerge
from polymerge.cli import app
from polymerge.errors import PolymergeError, RecipeError
from polymerge.preflight.report import Finding, Report

REPORT = Report(
    findings=(
        Finding("exact", "tokenizer", "the same for all"),
        Finding("warning", "licence", "settle it before you publish"),
    ),
    parameters=1_500_000,
    memory_bytes=900_000_000,
    disk_bytes=3_000_000,
    stages={"fold": 50.0, "evaluate": 10.0},
    sources={"prose": "llama, 4 layers"},
)


@dataclass(frozen=True)
class Result:
    out: Path | None
    report: Report = REPORT
    data: dict[str, Any] = field(default_factory=lambda: SUMMARY)

    seconds: dict[str, float] = field(default_factory=lambda: {"fold": 61.0, "total": 61.0})
    cpu_seconds: dict[str, float] = field(default_factory=lambda: {"fold": 61.0, "total": 61.0})

    def summary(self) -> dict[str, Any]:
        return self.data


@pytest.fixture
def call():
    """`call("merge", …)` -> exit code, stdout, stderr."""

    def run(*arguments: object):
        return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="polymerge", terminal_width=120)

    return run


@pytest.fixture
def stub(monkeypatch):
    """A merge that does nothing but report and record what it was asked."""
    asked: dict[str, Any] = {}

    def merge(recipe, out, **options):
        asked.update(options, recipe=recipe, out=out)
        options["progress"].stage("fold", 2)
        options["progress"].advance("layer 0")
        return Result(None if options["dry_run"] else Path(out))

    monkeypatch.setitem(vars(polymerge), "merge", merge)
    return asked


def fails(monkeypatch, error):
    def merge(*_args, **_options):
        raise error

    monkeypatch.setitem(vars(polymerge), "merge", merge)


def test_help_imports_nothing_heavy():
    code = (
        "import sys, polymerge, polymerge.cli\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy', 'scipy', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported: {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "polymerge", "--version"], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"polymerge {polymerge.__version__}"


def test_help_lists_every_command(call):
    done = call("--help")
    assert done.exit_code == 0
    for command in ("merge", "inspect", "eval", "methods", "families", "demo", "report"):
        assert command in done.stdout


@pytest.mark.parametrize("command", ["merge", "inspect", "eval", "demo"])
def test_help_of_a_command_has_an_example(call, command):
    assert f"polymerge {command}" in call(command, "--help").stdout


def test_version(call):
    assert call("--version").stdout.strip() == f"polymerge {polymerge.__version__}"


def test_merge_prints_the_table_and_how_to_load(call, stub):
    done = call("merge", "recipe.yaml", "out", "--device", "cpu", "--work", "state")
    assert done.exit_code == 0, done.output
    assert stub["recipe"] == Path("recipe.yaml")
    assert (stub["device"], stub["dry_run"], stub["work"]) == ("cpu", False, Path("state"))
    for shown in ("1.750", "1.800", "+0.250", "1,500,000 parameters", "1.50x", "1 min 1 s", "900 MB"):
        assert shown in done.stdout
    assert 'AutoModelForCausalLM.from_pretrained("out")' in done.stdout
    assert 'AutoTokenizer.from_pretrained("out")' in done.stdout
    assert done.stderr == ""


@pytest.mark.usefixtures("stub")
def test_merge_json_is_json_and_nothing_else(call):
    done = call("merge", "recipe.yaml", "out", "--json")
    assert json.loads(done.stdout) == SUMMARY
    assert done.stderr == ""


def test_dry_run_prints_the_report(call, stub):
    done = call("merge", "recipe.yaml", "out", "--dry-run")
    assert done.exit_code == 0
    assert stub["dry_run"] is True
    for shown in ("llama, 4 layers", "the same for all", "1,500,000", "900 MB", "1 min 0 s"):
        assert shown in done.stdout
    assert done.stdout.index("settle it") < done.stdout.index("the same for all")
    assert "nothing was written" in done.stdout


def test_our_errors_are_one_line(call, monkeypatch):
    fails(monkeypatch, RecipeError("recipe.yaml: size:\n  too small"))
    done = call("merge", "recipe.yaml", "out")
    assert done.exit_code == 2
    assert done.stderr == "error: recipe.yaml: size: too small\n"
    assert done.stdout == ""


def test_interruption(call, monkeypatch, tmp_path):
    fails(monkeypatch, KeyboardInterrupt())
    done = call("merge", "recipe.yaml", "out")
    assert done.exit_code == 130
    assert done.stderr == "interrupted; nothing was written\n"
    state = tmp_path / "state"
    assert call("merge", "recipe.yaml", "out", "--work", state).stderr == "interrupted; nothing was written\n"
    (state / "fold").mkdir(parents=True)
    done = call("merge", "recipe.yaml", "out", "--work", state)
    assert done.exit_code == 130
    assert f"goes on from {state}" in done.stderr


def test_unexpected_errors_keep_their_traceback(call, monkeypatch):
    fails(monkeypatch, ZeroDivisionError("a defect"))
    done = call("merge", "recipe.yaml", "out")
    assert isinstance(done.exception, ZeroDivisionError)


def test_usage_error(call):
    done = call("merge", "recipe.yaml")
    assert done.exit_code == 2
    assert "OUT" in done.stderr


def test_inspect(call, tmp_path, save_model):
    one = save_model(tmp_path / "one", "llama")
    two = save_model(tmp_path / "two", "gpt_neox", num_hidden_layers=3)
    done = call("inspect", one, two)
    assert done.exit_code == 0, done.output
    assert "gpt_neox" in done.stdout
    assert "LayerNorm" in done.stdout
    facts = json.loads(call("inspect", one, two, "--json").stdout)
    assert [f["layers"] for f in facts] == [2, 3]
    assert [f["kv_heads"] for f in facts] == [2, 4]
    assert facts[0]["biases"] == []
    assert set(facts[1]["biases"]) == {"q", "k", "v", "o", "up", "down"}
    assert facts[0]["dtype"] == "float32"
    assert facts[0]["bytes"] == 4 * facts[0]["parameters"]


def test_inspect_of_nothing(call, tmp_path):
    done = call("inspect", tmp_path / "absent")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert "absent" in done.stderr


def test_inspect_shows_the_others_where_one_is_refused(call, tmp_path, save_model):
    one = save_model(tmp_path / "one")
    done = call("inspect", one, tmp_path / "absent")
    assert done.exit_code == 2
    assert "llama" in done.stdout
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert len(json.loads(call("inspect", tmp_path / "absent", one, "--json").stdout)) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_stdout_is_one_line():
    with open("/dev/full", "w") as full:  # noqa: PTH123  a device
        done = subprocess.run(
            [sys.executable, "-m", "polymerge", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.stderr == "error: stdout: not written: No space left on device; send it elsewhere\n"
    assert done.returncode == 2


def test_eval(call, tmp_path, save_model):
    model = save_model(tmp_path / "model", "llama")
    (tmp_path / "a.txt").write_text("".join(f"line {i} of a text\n" for i in range(600)))
    (tmp_path / "b.txt").write_text("".join(f"another line, number {i}\n" for i in range(600)))
    texts = ("--text", f"a={tmp_path / 'a.txt'}", "--text", f"b={tmp_path / 'b.txt'}")
    done = call("eval", model, *texts, "--length", 64, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert list(found) == ["a", "b"]
    assert 6 < found["a"]["bits_per_byte"] < 10  # a random model knows nothing: about 8
    every = json.loads(call("eval", model, *texts, "--length", 64, "--split", "all", "--json").stdout)
    assert every["a"]["tokens"] > 5 * found["a"]["tokens"]
    assert {row["length"] for row in found.values()} == {64}
    shown = call("eval", model, *texts, "--length", 64).stdout
    assert "bits per byte" in shown
    assert "tokens a row" in shown


def test_eval_wants_a_name(call, tmp_path):
    done = call("eval", tmp_path, "--text", "file.txt")
    assert done.exit_code == 2
    assert "NAME=FILE" in done.stderr


def test_methods_and_families_are_the_folders(call):
    from polymerge import families, methods

    found = json.loads(call("methods", "--json").stdout)
    assert tuple(m["name"] for m in found) == methods.names()
    options = {m["name"]: m["options"] for m in found}
    assert options["fold"] == {}
    assert options["zipit"] == {"alpha": 1.0, "rows": 256}
    assert "rows: 256" in call("methods").stdout
    assert all(m["about"] for m in found)
    rows = json.loads(call("families", "--json").stdout)
    assert tuple(f["name"] for f in rows) == families.names()
    assert {f["name"]: f["can be"] for f in rows}["gpt_neox"] == "expert"
    assert {f["name"]: f["can be"] for f in rows}["llama"] == "expert, result"
    assert "qwen3" in call("families").stdout


def test_report_from_a_summary(call, tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    done = call("report", tmp_path / "summary.json", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    assert "<svg" in (tmp_path / "page.html").read_text()
    (tmp_path / "summary.json").write_text("{}")
    assert call("report", tmp_path / "summary.json", tmp_path / "page.html").exit_code == 2


def test_demo_refuses_a_folder_that_is_not_its_own(call, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = call("demo", tmp_path)
    assert done.exit_code == 2
    assert "not made by the demo" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_demo_replaces_its_own_folder(monkeypatch, tmp_path):
    from polymerge.demo import run as demo

    def merge(recipe, out, **_options):
        parsed = polymerge.read_recipe(recipe)
        assert all(e.model.is_dir() and e.text[0].is_file() for e in parsed.experts.values())
        assert not out.exists()
        out.mkdir()
        return Result(out)

    monkeypatch.setitem(vars(polymerge), "merge", merge)
    monkeypatch.setattr(demo, "write_samples", lambda *_: {"prose": {"prompt": "a", "text": "<b>"}})
    for _ in range(2):
        done = demo.run(tmp_path / "demo")
        (tmp_path / "demo/model/old").touch()
    saved = json.loads((tmp_path / "demo/summary.json").read_text())
    assert saved["skills"] == SUMMARY["skills"]
    assert saved["seconds"] == 61.0
    assert "&lt;b&gt;" in done.report.read_text()


def test_public_names():
    assert sorted(polymerge.__all__) == [
        "MergeResult", "PolymergeError", "__version__", "evaluate", "inspect", "merge", "read_recipe",
    ]  # fmt: skip
    assert set(polymerge.__all__) <= set(dir(polymerge))
    for name in polymerge.__all__:
        assert getattr(polymerge, name) is not None
    assert polymerge.PolymergeError is PolymergeError
    with pytest.raises(AttributeError, match="public names"):
        _ = polymerge.mrege


@pytest.mark.parametrize("name", ["evaluate", "inspect", "merge"])
def test_a_function_is_bound_where_its_module_has_the_same_name(name):
    module = importlib.import_module(f"polymerge.{name}")
    setattr(polymerge, name, module)  # what Python's import does
    assert getattr(polymerge, name) is getattr(module, name)


def test_the_readme_names_every_file():
    root = Path(__file__).parent.parent
    readme = (root / "README.md").read_text(encoding="utf-8")
    files = [p for p in sorted((root / "src/polymerge").rglob("*.py")) if not p.name.startswith("__")]
    missing = [p.name for p in files if p.name not in readme and p.parent.name != "families"]
    assert not missing, f"add a line to the README's tree for {missing}"
