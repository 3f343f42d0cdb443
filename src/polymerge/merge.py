"""A merge from top to bottom: recipe, sources, preflight, union or fold, heal, measurement, checkpoint.

    result = polymerge.merge("recipe.yaml", "out")

Nothing is written before preflight passes; `out` appears whole or not at all. With a `work` folder a long merge can be
interrupted and called again: a finished fold is not repeated, healing goes on where it stopped.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from polymerge import heal as healing
from polymerge import methods, preflight, record, threads
from polymerge import plan as planning
from polymerge.calibrate import speech
from polymerge.calibrate.calibration import Calibration
from polymerge.calibrate.foreign import Foreign
from polymerge.calibrate.speech import Speech
from polymerge.calibrate.texts import Rows, Skill, read_skill
from polymerge.calibrate.tokenizer import chat_of, load_tokenizer
from polymerge.calibrate.written import lacking, with_written
from polymerge.checkpoint.reader import Checkpoint
from polymerge.checkpoint.writer import CheckpointWriter
from polymerge.clock import Clock, peak_bytes
from polymerge.errors import PreflightError
from polymerge.evaluate import bits_per_byte
from polymerge.methods import fold as folding
from polymerge.methods import union
from polymerge.methods._layers import Emit, Knobs
from polymerge.model.source import Source
from polymerge.model.spec import Spec
from polymerge.model.target import hf_config, load_student, sink, write_config
from polymerge.progress import Progress, Quiet
from polymerge.readers import (
    SOME,
    TEST_ROWS,
    VALIDATION_ROWS,
    calibrate,
    load_expert,
    measure_experts,
    readers_of,
    rows_of,
)
from polymerge.recipe import Recipe, parse, read_with_text
from polymerge.result import MergeResult

UNMEASURED = (
    "not measured here: its model finds an expert's next token among the result's piece by piece, which is slow, and "
    "loses some tenths of a bit per byte at the boundaries; `polymerge eval` measures it on texts of your choice"
)
TOLD_ROWS = 16
"""Validation rows a skill by which preflight measures what a translation costs."""


def merge(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    out: Path | str,
    *,
    device: str = "auto",
    dry_run: bool = False,
    work: Path | str | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge the recipe's experts into the folder `out`.

    Args:
        recipe: a file, a `Recipe`, or the keys of one.
        out: folder to make.
        device: "auto", "cpu" or "cuda".
        dry_run: stop after preflight; `out` is not made.
        work: folder for what a later call can go on from; default a temporary one.
        progress: told about stages; default nobody.

    Raises:
        PolymergeError: recipe, source, text, size or output are not fit, with one line that says why.
    """
    clock, out, work = Clock(), Path(out), None if work is None else Path(work)
    with clock("other"), ExitStack() as stack:
        job = prepare(recipe, out, device, clock, progress or Quiet(), work=work, dry=dry_run)
        if dry_run:
            return job.result
        stack.enter_context(threads.fitting(max(s.spec.width for s in job.sources.values())))
        job.measure_experts()
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="polymerge-")))
        with CheckpointWriter(out) as writer:
            if job.recipe.method == "union":
                job.write_union(writer)
            else:
                student = job.build(work or scratch)
                job.heal(student)
                job.write(student, writer)
            record.finish(
                writer, job.recipe, job.text, job.sources, job.skills, job.calibration, job.speech, job.result
            )
    return job.finished(out)


def prepare(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    out: Path,
    device: str,
    clock: Clock,
    progress: Progress,
    *,
    work: Path | None = None,
    dry: bool = False,
) -> "Job":
    """Open everything, plan, and check it all: nothing is written yet. Raises PolymergeError."""
    if isinstance(recipe, Mapping):
        recipe = parse(dict(recipe))
    recipe, text = (recipe, record.as_yaml(recipe)) if isinstance(recipe, Recipe) else read_with_text(recipe)
    place = pick_device(device)
    preflight.check_places(recipe, out, work)
    progress.stage("preflight")
    sources = {}
    for name, expert in recipe.experts.items():
        progress.advance(f"opens {expert.model}", 0)  # of the hub it may have to be fetched
        sources[name] = Source(expert.model, device=place)
    preflight.check_folders(sources, out)
    tokenizers = {k: load_tokenizer(s.path) for k, s in sources.items()}
    sizes = {k: s.parameters for k, s in sources.items()}
    specs = {k: s.spec for k, s in sources.items()}
    spoken = speech.resolve(recipe, tokenizers, specs)
    shapes = None if recipe.method == "union" else planning.make(recipe, specs, sizes, vocab=spoken.vocab)
    skills = {k: _skill(recipe, k, source, tokenizers[k], progress, dry=dry) for k, source in sources.items()}
    foreign = preflight.foreign_experts(spoken, tokenizers, skills)
    report = preflight.check(
        recipe, sources, tokenizers, shapes, out, skills, speech=spoken, foreign=foreign, work=work
    )
    size = report.parameters or sum(sizes.values())
    result = MergeResult(None, recipe.method, report, size, sizes, recipe.fold.length)
    test = rows_of(skills, "test", spoken.tokenizer, recipe.fold.length, TEST_ROWS)
    readers = readers_of(recipe, sources, tokenizers, skills, spoken, foreign)
    if foreign:
        fitted = rows_of(skills, "calibration", spoken.tokenizer, recipe.fold.length, SOME)
        preflight.check_positions(readers, fitted, test)
        some = rows_of(skills, "validation", spoken.tokenizer, recipe.fold.length, TOLD_ROWS)
        union_asked = recipe.method == "union"
        told = preflight.translation_findings(spoken, readers, some, tokenizers, skills, union=union_asked)
        if union_asked:
            told.append(preflight.Finding("warning", "union", UNMEASURED))
        result.report = replace(report, findings=(*report.findings, *told))
    return Job(recipe, text, sources, readers, skills, tokenizers, spoken, shapes, test, result, clock, progress)


def _skill(recipe: Recipe, name: str, source: Source, tokenizer: Any, progress: Progress, *, dry: bool) -> Skill:
    """An expert's texts: those that are given, and those that it writes (in a dry run where there are no others)."""
    asked, skill, tokens = recipe.experts[name], None, recipe.experts[name].write
    if asked.text:
        skill = read_skill(name, asked.text, field=asked.field, chat=chat_of(tokenizer), seed=recipe.seed)
        if tokens is None and recipe.method != "union":
            tokens = lacking(skill, tokenizer, recipe.wanted)
        if dry or not tokens:
            return skill
    assert tokens  # the recipe sees to it
    source.checkpoint.check_finite()
    progress.advance(f"{name} writes {tokens:,} tokens", 0)
    with threads.fitting(source.spec.width):
        return with_written(skill, name, source, tokenizer, tokens, seed=recipe.seed)


@dataclass
class Job:
    """A merge under way: what was opened and checked, and the steps that fill in its result."""

    recipe: Recipe
    text: str
    sources: Mapping[str, Source]
    readers: Mapping[str, Source | Foreign]
    skills: Mapping[str, Skill]
    tokenizers: Mapping[str, Any]
    speech: Speech
    shapes: planning.Plan | None
    test: Mapping[str, Rows]
    result: MergeResult
    clock: Clock
    progress: Progress
    work: Path = Path()
    calibration: str = ""
    owners: dict[str, str] = field(default_factory=dict)
    part: list[str] = field(default_factory=list)

    @property
    def tokenizer(self) -> Any:
        """The result's."""
        return self.speech.tokenizer

    @property
    def foreign(self) -> bool:
        """Whether an expert reads other tokens than the result."""
        return any(isinstance(reader, Foreign) for reader in self.readers.values())

    @property
    def anchor(self) -> Source:
        """The expert whose family the result takes."""
        return self.sources[self.recipe.anchor]

    @property
    def lead(self) -> Source:
        """The anchor, or the first expert with a part in the merge: what the result takes from one alone is its."""
        return self.anchor if self.recipe.anchor in self.part else self.sources[self.part[0]]

    def measure_experts(self) -> None:
        """Every expert and their mixture on every skill's test text."""
        self.progress.stage("experts", len(self.sources))
        with self.clock("evaluate"):
            self.result.skills = measure_experts(self.readers, self.test, self.recipe.union.alpha, self.progress)
        if self.recipe.method == "union" and self.foreign:  # its model loses more, at the boundaries of tokens
            for row in self.result.skills.values():
                row["union"] = None

    def write_union(self, writer: CheckpointWriter) -> None:
        """All experts whole, mixed by the Bayesian gate."""
        experts, dtype = {k: s.checkpoint for k, s in self.sources.items()}, getattr(torch, self.recipe.dtype)
        settings = self.recipe.union.model_dump()
        spoken, anchor = self.tokenizers if self.foreign else None, self.speech.owner
        config = union.union_config(experts, anchor=anchor, dtype=dtype, tokenizers=spoken, **settings)
        union.build_union(experts, writer, config, dtype, spoken, anchor)

    def build(self, work: Path) -> Any:
        """Fold the experts (or merge them by a rival) in the work folder, if that isn't done; the model in float32."""
        assert self.shapes is not None
        self.work, folder, family = work, work / "fold", self.shapes.family
        texts = self._calibrate()
        self.calibration = texts.digest()
        key = record.digest(self.recipe, self.sources, self.calibration)
        done = record.load_fold(folder, key)
        if done is None:
            with CheckpointWriter(folder) as writer:
                done = self._merge(texts, writer)
                speaker = self.sources[self.speech.owner]
                write_config(writer, hf_config(family, done.choice.target, self.lead, speaker), torch.float32)
                record.save_fold(writer, done, key)
        chosen, result = done.choice, self.result
        result.parameters, result.shape = planning.parameters(family, chosen.target), record.shape(chosen.target)
        result.knobs, result.knob_trials = asdict(chosen.knobs), chosen.trials
        result.balance = dict(zip(self.part, chosen.balance, strict=True))
        result.owners = self.owners
        known = {name: one for name, one in zip(self.part, done.features, strict=False) if one}
        result.features = {skill: known[owner] for skill, owner in self.owners.items() if owner in known}
        student = load_student(folder)
        self._measure(student, "fold")
        return student

    def _calibrate(self) -> Calibration:
        """The rows of the merge; experts that own no skill have no part in it (`MergeResult.left_out`)."""
        texts, self.owners = calibrate(
            self.recipe, self.readers, self.skills, self.tokenizer, judge=self.recipe.method == "fold"
        )
        self.part = [k for k in self.sources if k in self.owners.values()]
        for skill, owner in self.owners.items():  # what the result is compared with, and learns from
            row = self.result.skills[skill]
            row["owner"] = row["experts"][owner]
        if len(self.part) < len(self.sources):
            specs = {k: s.spec for k, s in self.sources.items()}
            self.shapes = planning.make(
                self.recipe, specs, self.result.expert_parameters, self.part, vocab=self.speech.vocab
            )
        return texts

    def _merge(self, texts: Calibration, writer: CheckpointWriter) -> folding.Folded:
        assert self.shapes is not None
        experts, family, seed = [self.sources[k] for k in self.part], self.shapes.family, self.recipe.seed

        def begin(target: Spec) -> Emit:
            self.progress.stage(self.recipe.method, target.layers + 1)
            return sink(family, target, writer)

        if self.recipe.method != "fold":
            (target,) = self.shapes.shapes
            rival = methods.rival(self.recipe.method)(**self.recipe.options)
            with self.clock(self.recipe.method):
                rival.merge(experts, self.part.index(self.recipe.anchor), target, texts, begin(target), seed)
            return folding.Folded(folding.Choice(target, Knobs(), (1.0,) * len(experts)), [])
        self.progress.stage("choose")
        return folding.fold(
            experts,
            family,
            self.shapes.shapes,
            texts,
            folding.Settings.of(self.recipe.fold),
            emit=begin,
            seed=seed,
            clock=self.clock,
            progress=self.progress.advance,
        )

    def heal(self, student: Any) -> None:
        """Distil the student in place, if the recipe asks for it."""
        settings = self.recipe.heal
        if settings is None:
            return
        self.progress.stage("heal", settings.steps)
        with self.clock("heal"):
            loaded = {owner: load_expert(self.readers[owner]) for owner in dict.fromkeys(self.owners.values())}
            outcome = healing.heal(
                student,
                {skill: loaded[owner] for skill, owner in self.owners.items()},
                rows_of(self.skills, "calibration", self.tokenizer, settings.length),
                rows_of(self.skills, "validation", self.tokenizer, settings.length, VALIDATION_ROWS),
                settings,
                features=self.result.features,
                out=self.work / "heal",
                seed=self.recipe.seed,
                device=self.anchor.device,
                progress=lambda _step, _steps, note: self.progress.advance(note),
            )
        self.result.heal_curve = [asdict(point) for point in outcome.curve]
        self.result.heal_reference = outcome.reference

    def write(self, student: Any, writer: CheckpointWriter) -> None:
        """The weights in the recipe's dtype, and what they are worth in it."""
        dtype = getattr(torch, self.recipe.dtype)
        weights = {name: tensor.to(dtype) for name, tensor in student.state_dict().items()}
        for name in Checkpoint(self.work / "fold").names:
            writer.add(name, weights[name])
        write_config(writer, student.config, dtype)
        student.load_state_dict(weights)  # rounded as the file is; buffers, which it does not hold, are not
        self._measure(student, "healed" if self.recipe.heal else "fold")

    def _measure(self, model: Any, column: str) -> None:
        self.progress.stage("test", len(self.test))
        with self.clock("evaluate"):
            for name, rows in self.test.items():
                self.progress.advance(name)
                self.result.skills[name][column] = bits_per_byte(model, rows, device=self.anchor.device)

    def finished(self, out: Path) -> MergeResult:
        """The result, with where it is and what it took."""
        result, clock = self.result, self.clock
        result.out, result.peak_bytes = out, peak_bytes()
        for mine, taken in ((result.seconds, clock.seconds), (result.cpu_seconds, clock.cpu_seconds)):
            mine.update(taken, total=sum(taken.values()))
        return result


def pick_device(name: str) -> str:
    """Resolve "auto": a CUDA GPU when there is one. Raises PreflightError for what there is not, or is not known."""
    if name not in ("auto", "cpu") and not name.startswith("cuda"):
        raise PreflightError(f"device: {name!r}; expected auto, cpu or cuda")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise PreflightError("device: no CUDA GPU is visible to torch; use --device cpu")
    return name
