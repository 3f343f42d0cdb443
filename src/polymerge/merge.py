"""A merge from top to bottom: recipe, sources, preflight, union or fold, heal, measurement, checkpoint.

    result = polymerge.merge("recipe.yaml", "out")

Nothing is written before preflight passes; `out` appears whole or not at all. With a `work` folder a long merge can be
interrupted and called again: a finished fold is not repeated, healing goes on where it stopped.
"""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from polymerge import heal as healing
from polymerge import plan as planning
from polymerge import preflight, record, threads
from polymerge.calibrate.calibration import Calibration, gather
from polymerge.calibrate.texts import Rows, Skill, adds_bos, pack, read_skill
from polymerge.calibrate.tokenizer import load_tokenizer
from polymerge.checkpoint.reader import Checkpoint
from polymerge.checkpoint.writer import CheckpointWriter
from polymerge.clock import Clock, peak_bytes
from polymerge.evaluate import bits_per_byte
from polymerge.methods import fold as folding
from polymerge.methods import union
from polymerge.methods._layers import Emit
from polymerge.model.source import Source
from polymerge.model.spec import Spec
from polymerge.model.target import hf_config, load_student, sink, write_config
from polymerge.progress import Progress, Quiet
from polymerge.recipe import Recipe, read

VALIDATION_ROWS = 64
TEST_ROWS = 512


@dataclass
class MergeResult:
    """What a merge did; all losses in bits per byte on test text. `summary()` is JSON-ready."""

    out: Path | None
    method: str
    report: preflight.Report
    parameters: int
    expert_parameters: dict[str, int]
    shape: dict[str, Any] = field(default_factory=dict)
    skills: dict[str, dict[str, Any]] = field(default_factory=dict)
    knobs: dict[str, float] = field(default_factory=dict)
    balance: dict[str, float] = field(default_factory=dict)
    knob_trials: list[dict[str, Any]] = field(default_factory=list)
    heal_curve: list[dict[str, Any]] = field(default_factory=list)
    heal_reference: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0

    @property
    def worst_skill(self) -> tuple[str, float] | None:
        """The skill that lost most against its owner, and how much."""
        last = "healed" if self.heal_curve else "fold" if self.method == "fold" else "union"
        losses = {name: row[last] - row["owner"] for name, row in self.skills.items()}
        return max(losses.items(), key=lambda item: item[1]) if losses else None

    def summary(self) -> dict[str, Any]:
        """Plain data, as in summary.json."""
        plain = {key: value for key, value in vars(self).items() if key not in ("out", "report")}
        worst = self.worst_skill
        return {
            **plain,
            "seconds": self.seconds.get("total"),
            "stage_seconds": self.seconds,
            "stage_cpu_seconds": self.cpu_seconds,
            "out": str(self.out) if self.out else None,
            "worst_skill": {"name": worst[0], "excess": worst[1]} if worst else None,
            "preflight": self.report.summary(),
        }


def merge(
    recipe: Recipe | Path | str,
    out: Path | str,
    *,
    device: str = "auto",
    dry_run: bool = False,
    work: Path | str | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge the recipe's experts into the folder `out`.

    Args:
        recipe: a file, or a `Recipe`.
        out: folder to make.
        device: "auto", "cpu" or "cuda".
        dry_run: stop after preflight; `out` is not made.
        work: folder for what a later call can go on from; default a temporary one.
        progress: told about stages; default nobody.

    Raises:
        PolymergeError: recipe, source, text, size or output are not fit, with one line that says why.
    """
    clock, progress, out = Clock(), progress or Quiet(), Path(out)
    with clock("total"), ExitStack() as stack:
        recipe, text = (recipe, record.as_yaml(recipe)) if isinstance(recipe, Recipe) else read(recipe)
        progress.stage("preflight")
        sources = {k: Source(e.model, device=pick_device(device)) for k, e in recipe.experts.items()}
        stack.enter_context(threads.fitting(max(s.spec.width for s in sources.values())))
        tokenizers = {k: load_tokenizer(s.path) for k, s in sources.items()}
        skills = {k: read_skill(k, e.text, field=e.field, seed=recipe.seed) for k, e in recipe.experts.items()}
        sizes = {k: s.parameters for k, s in sources.items()}
        shapes = (
            planning.make(recipe, {k: s.spec for k, s in sources.items()}, sizes) if recipe.method == "fold" else None
        )
        report = preflight.check(recipe, sources, tokenizers, shapes, out, skills)
        result = MergeResult(None, recipe.method, report, sum(sizes.values()), sizes)
        if dry_run:
            return result
        tokenizer = tokenizers[recipe.anchor]
        test = rows_of(skills, "test", tokenizer, recipe.fold.length, TEST_ROWS)
        with clock("evaluate"):
            progress.stage("experts", len(sources))
            result.skills = measure_experts(sources, test, recipe.union.alpha, progress)
        with TemporaryDirectory(prefix="polymerge-") as scratch, CheckpointWriter(out) as writer:
            calibration = ""
            if recipe.method == "union":
                merge_union(recipe, sources, writer)
            else:
                assert shapes is not None
                folder = Path(work) if work is not None else Path(scratch)
                calibration = merge_fold(
                    recipe, sources, shapes, skills, tokenizer, test, folder, writer, result, clock, progress
                )
            record.finish(writer, recipe, text, sources, skills, calibration, result)
        result.out = out
    result.seconds, result.cpu_seconds, result.peak_bytes = clock.seconds, clock.cpu_seconds, peak_bytes()
    result.seconds["total"], result.cpu_seconds["total"] = (
        sum(clock.seconds.values()),
        sum(clock.cpu_seconds.values()),
    )
    return result


def merge_union(recipe: Recipe, sources: Mapping[str, Source], writer: CheckpointWriter) -> None:
    """All experts whole, mixed by the Bayesian gate."""
    experts, dtype = {k: s.checkpoint for k, s in sources.items()}, getattr(torch, recipe.dtype)
    config = union.union_config(experts, anchor=recipe.anchor, dtype=dtype, **recipe.union.model_dump())
    union.build_union(experts, writer, config, dtype)


def merge_fold(
    recipe: Recipe,
    sources: Mapping[str, Source],
    shapes: planning.Plan,
    skills: Mapping[str, Skill],
    tokenizer: Any,
    test: Mapping[str, Rows],
    work: Path,
    writer: CheckpointWriter,
    result: MergeResult,
    clock: Clock,
    progress: Progress,
) -> str:
    """Fold into one decoder, heal it if asked, write it in the recipe's dtype; returns the calibration's hash."""
    folder, family, anchor = work / "fold", shapes.family, sources[recipe.anchor]
    texts = calibrate(recipe, sources, skills, tokenizer)
    key = record.digest(recipe, sources, texts.digest())
    done = record.load_fold(folder, key)
    if done is None:
        progress.stage("choose")

        def begin(target: Spec) -> Emit:
            progress.stage("fold", target.layers + 1)
            return sink(family, target, temporary)

        with CheckpointWriter(folder) as temporary:
            done = folding.fold(
                list(sources.values()),
                family,
                shapes.shapes,
                texts,
                recipe.fold,
                emit=begin,
                seed=recipe.seed,
                clock=clock,
                progress=progress.advance,
            )
            write_config(temporary, hf_config(family, done.choice.target, anchor), torch.float32)
            record.save_fold(temporary, done, key)
    chosen = done.choice
    result.parameters, result.shape = planning.parameters(family, chosen.target), record.shape(chosen.target)
    result.knobs, result.knob_trials = asdict(chosen.knobs), chosen.trials
    result.balance = dict(zip(sources, chosen.balance, strict=True))
    student, device, dtype = load_student(folder), anchor.device, getattr(torch, recipe.dtype)
    with clock("evaluate"):
        progress.stage("test", len(test))
        measure(student, test, result, "fold", device, progress)
    if recipe.heal is not None:
        progress.stage("heal", recipe.heal.steps)
        with clock("heal"):
            outcome = healing.heal(
                student,
                {k: load_expert(s) for k, s in sources.items()},
                rows_of(skills, "calibration", tokenizer, recipe.heal.length),
                rows_of(skills, "validation", tokenizer, recipe.heal.length, VALIDATION_ROWS),
                recipe.heal,
                out=work / "heal",
                seed=recipe.seed,
                device=device,
                progress=lambda _step, _steps, note: progress.advance(note),
            )
        result.heal_curve = [asdict(point) for point in outcome.curve]
        result.heal_reference = outcome.reference
    student = student.to(dtype)
    weights = student.state_dict()
    for name in Checkpoint(folder).names:
        writer.add(name, weights[name])
    write_config(writer, student.config, dtype)
    progress.stage("test", len(test))
    with clock("evaluate"):
        measure(student.float(), test, result, "healed" if recipe.heal else "fold", device, progress)
    return texts.digest()


def measure(
    model: Any, test: Mapping[str, Rows], result: MergeResult, column: str, device: str, progress: Progress
) -> None:
    """Bits per byte of the merged model on every skill's test text."""
    for name, rows in test.items():
        progress.advance(name)
        result.skills[name][column] = bits_per_byte(model, rows, device=device)


def calibrate(
    recipe: Recipe, sources: Mapping[str, Source], skills: Mapping[str, Skill], tokenizer: Any
) -> Calibration:
    """The rows of the fold: calibration text to fit, validation text held out."""
    length = recipe.fold.length
    fitted = rows_of(skills, "calibration", tokenizer, length, max(1, recipe.fold.tokens // length))
    held_out = rows_of(skills, "validation", tokenizer, length, VALIDATION_ROWS)
    return gather(
        list(fitted.values()),
        list(held_out.values()),
        list(sources.values()),
        gate=recipe.fold.ownership == "gate",
    )


def rows_of(
    skills: Mapping[str, Skill], part: str, tokenizer: Any, length: int, limit: int | None = None
) -> dict[str, Rows]:
    """Packed rows of one part of every skill."""
    bos = adds_bos(tokenizer)
    return {k: pack(tokenizer, getattr(s, part), length, limit=limit, bos=bos) for k, s in skills.items()}


def measure_experts(
    sources: Mapping[str, Source], test: Mapping[str, Rows], alpha: float, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Every expert and their mixture on every skill, from one pass of each expert over each test text."""
    from polymerge.methods._union_modeling import BayesGate

    scores: dict[str, dict[str, torch.Tensor]] = {}
    for expert, source in sources.items():
        progress.advance(expert)
        scores[expert] = {skill: source.log_probs(rows.tokens) for skill, rows in test.items()}
    table: dict[str, dict[str, Any]] = {}
    for skill, rows in test.items():
        per_byte = -1 / (math.log(2) * rows.bytes)
        alone = {expert: float(s[skill].double().sum()) * per_byte for expert, s in scores.items()}
        evidence = torch.stack([s[skill] for s in scores.values()], dim=-1).double()
        gate = BayesGate(torch.full((len(sources),), 1 / len(sources), dtype=torch.float64), alpha)
        start = gate.start(len(evidence))
        after = gate.scan(start, evidence, torch.ones(evidence.shape[:2], dtype=torch.bool))
        mixture = (torch.cat([start[:, None], after[:, :-1]], dim=1) + evidence).logsumexp(-1)
        table[skill] = {
            "owner": alone[skill], "union": float(mixture.sum()) * per_byte, "fold": None, "healed": None,
            "experts": alone,
        }  # fmt: skip
    return table


def load_expert(source: Source) -> Any:
    """The expert as a transformers model, to teach."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).to(source.device).eval()


def pick_device(name: str) -> str:
    """Resolve "auto": a CUDA GPU when there is one."""
    from polymerge.errors import PreflightError

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise PreflightError("device: no CUDA GPU is visible to torch; use --device cpu")
    return name
