"""The shipped pair as the scripts beside this file use it: folds, padded anchors, healing, test figures."""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from polymerge import families, plan, recipe, record
from polymerge import heal as healing
from polymerge.bench.methods import holding
from polymerge.calibrate.texts import first, read_skill
from polymerge.calibrate.tokenizer import load_tokenizer
from polymerge.calibrate.written import with_written
from polymerge.checkpoint.writer import CheckpointWriter
from polymerge.clock import Clock, peak_bytes
from polymerge.demo.corpus import write_heldout
from polymerge.demo.run import EXPERTS
from polymerge.evaluate import bits_per_byte
from polymerge.methods import fold as folding
from polymerge.methods._pad import pad
from polymerge.model.source import Source
from polymerge.model.spec import Family, Spec
from polymerge.model.target import hf_config, load_student, sink, write_config
from polymerge.progress import Quiet
from polymerge.readers import TEST_ROWS, VALIDATION_ROWS, calibrate, load_expert, measure_experts, rows_of

LENGTH = 128


@dataclass(frozen=True)
class Start:
    """A model to heal: its folder, its shape, and facts for the row."""

    folder: Path
    spec: Spec
    facts: dict[str, Any]


class Pair:
    """prose-llama and code-neox in a scratch folder.

    `tokens`: of each calibration text, to fold and to heal by; by default a recipe's to fold, and all of them to heal.
    `write`: tokens that each expert adds to them itself; what is asked for is then made from both.
    """

    def __init__(self, folder: Path, seed: int, tokens: int | None = None, write: int | None = None) -> None:
        self.folder, self.seed, self.tokens = folder, seed, tokens
        texts = write_heldout(folder / "text")
        self.sources = {name: Source(path) for name, path in EXPERTS.items()}
        self.sizes = {name: s.parameters for name, s in self.sources.items()}
        self.skills = {name: read_skill(name, [text], seed=seed) for name, text in texts.items()}
        self.tokenizer = load_tokenizer(EXPERTS["prose"])
        if write:
            for name, source in self.sources.items():
                few = self.skills[name]
                if tokens:
                    few = replace(few, calibration=first(few.calibration, self.tokenizer, tokens))
                self.skills[name] = with_written(few, name, source, self.tokenizer, write, seed=seed)
            self.tokens = None
        self.rows = None if self.tokens is None else self.tokens // LENGTH
        self.test = rows_of(self.skills, "test", self.tokenizer, LENGTH, TEST_ROWS)
        self.owners = measure_experts(self.sources, self.test, 0.01, Quiet())

    def fold(self, size: Any) -> Start:
        """The pair folded at a size as a recipe gives it (its `params` or the whole key)."""
        asked = recipe.parse({
            "method": "fold", "anchor": "prose", "seed": self.seed,
            "fold": {"tokens": self.tokens} if self.tokens else {},
            "experts": {n: {"model": str(EXPERTS[n]), "text": "-"} for n in self.sources},
            "size": size if size == "union" or isinstance(size, dict) else {"params": size},
        })  # fmt: skip
        shapes = plan.make(asked, {n: s.spec for n, s in self.sources.items()}, self.sizes)
        clock, folder = Clock(), Path(tempfile.mkdtemp(dir=self.folder)) / "fold"
        with CheckpointWriter(folder) as writer:
            done = folding.fold(
                list(self.sources.values()), shapes.family, shapes.shapes,
                calibrate(asked, self.sources, self.skills, self.tokenizer)[0], folding.Settings.of(asked.fold),
                emit=lambda target: sink(shapes.family, target, writer), seed=self.seed, clock=clock,
            )  # fmt: skip
            self._finish(writer, shapes.family, done.choice.target)
        facts = {
            "knobs": vars(done.choice.knobs), "balance": done.choice.balance, "fold_cpu_seconds": clock.cpu_seconds,
            **self._facts(shapes.family, done.choice.target),
        }  # fmt: skip
        return Start(folder, done.choice.target, facts)

    def anchor(self, like: Spec) -> Start:
        """The anchor padded without loss to as many parameters as a fold has."""
        family = families.get(like.family)
        spec = holding(family, [self.sources["prose"].spec], like)
        folder = self.folder / f"anchor-{plan.parameters(family, spec)}"
        with CheckpointWriter(folder) as writer:
            emit = sink(family, spec, writer)
            for layer, weights in pad(self.sources["prose"], spec, torch.Generator().manual_seed(self.seed)):
                emit(layer, weights)
            self._finish(writer, family, spec)
        return Start(folder, spec, self._facts(family, spec))

    def excess(self, model: Any) -> dict[str, float]:
        """Bits per byte over each skill's owner, on test text."""
        return {n: bits_per_byte(model, r) - self.owners[n]["owner"] for n, r in self.test.items()}

    def healed(self, start: Start, settings: healing.Heal) -> dict[str, Any]:
        """A row: before and after healing on the first `tokens` of each calibration text, which it may pass again."""
        model = load_student(start.folder)
        before, began = self.excess(model), time.process_time()
        outcome = healing.heal(
            model, {n: load_expert(s) for n, s in self.sources.items()},
            rows_of(self.skills, "calibration", self.tokenizer, LENGTH, self.rows),
            rows_of(self.skills, "validation", self.tokenizer, LENGTH, VALIDATION_ROWS), settings, seed=self.seed,
        )  # fmt: skip
        return {
            "seed": self.seed, "lr": settings.lr, "tokens": settings.tokens, "before": before,
            "after": self.excess(model), "validation_worst": min(p.worst for p in outcome.curve),
            "curve": [(p.tokens, p.worst) for p in outcome.curve],
            "heal_cpu_seconds": time.process_time() - began, **start.facts,
        }  # fmt: skip

    def _facts(self, family: Family, spec: Spec) -> dict[str, Any]:
        return {"parameters": plan.parameters(family, spec), "shape": record.shape(spec), "peak_bytes": peak_bytes()}

    def _finish(self, writer: CheckpointWriter, family: Family, spec: Spec) -> None:
        write_config(writer, hf_config(family, spec, self.sources["prose"]), torch.float32)
