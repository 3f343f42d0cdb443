"""The experts of one text case, and every method on them (see `text.py` for the suite)."""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from polymerge import plan, preflight, recipe
from polymerge.bench import methods as table
from polymerge.bench import modular, peer, tokens
from polymerge.bench.answers import Weights
from polymerge.bench.flops import Products, Until
from polymerge.bench.fuse import FusedTeacher
from polymerge.bench.machine import children_peak
from polymerge.bench.methods import Case, Outcome, fitting, gathered
from polymerge.bench.shared import Shared, folded
from polymerge.bench.text import Detail, even_mixture, given
from polymerge.bench.text_distil import at_best_rate, operations
from polymerge.calibrate import speech
from polymerge.calibrate.foreign import Foreign
from polymerge.calibrate.texts import HELD_OUT, Skill, first, read_skill
from polymerge.calibrate.tokenizer import load_tokenizer
from polymerge.calibrate.written import with_written
from polymerge.errors import PreflightError
from polymerge.evaluate import bits_per_byte
from polymerge.features import Features
from polymerge.heal import Heal
from polymerge.merge import UNMEASURED, merge
from polymerge.methods import fold as folding
from polymerge.methods._lift import alignable
from polymerge.methods._pad import pad
from polymerge.model.source import Source
from polymerge.model.spec import Spec
from polymerge.model.target import load_student
from polymerge.progress import Quiet
from polymerge.readers import VALIDATION_ROWS, calibrate, load_expert, measure_experts, readers_of, rows_of


class TextBed:
    """See `methods.Bed`."""

    metric = "bits per byte"

    def __init__(
        self,
        case: Case,
        seed: int,
        scratch: Path,
        *,
        shared: Path | None = None,
        texts: Path | None = None,
        device: str = "cpu",
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.detail: Detail = case.detail
        self.seed, self.device, self.progress, self.budget = seed, device, progress, self.detail.budget
        self.tries = self.detail.tries
        self.limit = None if self.detail.written else self.detail.text  # what is written is read as well
        self.place = scratch
        found = given(self.detail, scratch, texts, seed, device, progress)
        self.sources = {name: Source(one.model, device=device) for name, one in found.items()}
        self.bases = tuple(str(one.base) for one in found.values() if one.base)
        self.expert_parameters = {name: s.parameters for name, s in self.sources.items()}
        self.recipe = recipe.parse({
            "method": "fold", "anchor": self.detail.anchor, "experts": {n: one.recipe for n, one in found.items()},
            "size": self.detail.size(sum(self.expert_parameters.values())),
            "fold": self.detail.fold | ({"tokens": self.limit} if self.limit else {}),
            "dtype": "float32", "seed": seed,
        })  # fmt: skip
        tokenizers = {name: load_tokenizer(source.path) for name, source in self.sources.items()}
        spoken = speech.resolve(self.recipe, tokenizers, {name: s.spec for name, s in self.sources.items()})
        self.tokenizer = spoken.tokenizer
        self.texts = {n: self._skill(n, e) for n, e in self.recipe.experts.items()}
        foreign = preflight.foreign_experts(spoken, tokenizers, self.texts)
        self.readers = readers_of(self.recipe, self.sources, tokenizers, self.texts, spoken, foreign)
        self.foreign = tuple(foreign)
        self.test = rows_of(self.texts, "test", self.tokenizer, self.recipe.fold.length, self.detail.test_rows)
        with Products() as products:
            self.table = measure_experts(self.readers, self.test, self.recipe.union.alpha, Quiet())
        self.measuring = products.flops
        self.owners = {skill: row["owner"] for skill, row in self.table.items()}
        self.anchor_scores = {skill: row["experts"][self.detail.anchor] for skill, row in self.table.items()}
        self.setting = {
            "protocol": case.protocol, "axis": self.detail.axis, "anchor": self.detail.anchor,
            "heal": asdict(self.detail), "experts": {name: table.size_of(s.spec) for name, s in self.sources.items()},
            "training": {name: one.record for name, one in found.items() if one.record},
        }  # fmt: skip
        self.shared = Shared(shared or scratch, device)
        self.family = plan.family_of(self.recipe, {name: s.spec for name, s in self.sources.items()})

    def union(self) -> Outcome:
        """The gate, from the experts' own probabilities (the checkpoint gives the same: `tests/test_union.py`).

        But for experts that read other tokens: it loses more at their boundaries, and is slow.
        """
        if self.foreign:
            raise PreflightError(UNMEASURED)
        return Outcome({s: row["union"] for s, row in self.table.items()}, sum(self.expert_parameters.values()))

    def fold(self) -> Outcome:
        """`polymerge merge` without healing."""
        return self._folded()[1]

    def fold_heal(self) -> Outcome:
        """The fold, distilled."""
        folder, fold = self._folded()
        outcome = self._distilled(lambda: load_student(folder), self._target(), features=Features.load(folder))
        outcome.reused, outcome.flops = fold.reused, (outcome.flops or 0) + (fold.flops or 0)
        outcome.peak_bytes = fold.peak_bytes
        return outcome

    def fold_heal_more(self) -> Outcome:
        """A lean fold, and healing for all the operations that are left of what fold and healing took together."""
        fold = self.recipe.fold
        lean = fold.model_copy(update=recipe.LEAN | {"tokens": min(fold.tokens, recipe.LEAN["tokens"])})
        folder = self._new("lean")
        made = self._fold(folder, self.recipe.model_copy(update={"fold": lean}))
        target, features = Source(folder).spec, Features.load(folder)
        tokens = self._tokens(target, self._spent() - (made.flops or 0), features)
        outcome = self._distilled(lambda: load_student(folder), target, tokens=tokens, rates=(None,), features=features)
        outcome.flops = (outcome.flops or 0) + (made.flops or 0)
        outcome.notes = f"fold of {lean.tokens:,} tokens each in closed form, without trials; {outcome.notes}"
        outcome.extra["fold"] = made.scores
        return outcome

    # ------------------------------------------------------------------ controls

    def anchor(self) -> Outcome:
        """The anchor as it is."""
        return self._single(self.detail.anchor)

    def best_expert(self) -> Outcome:
        """By its largest excess over the owners."""
        names = list(self.sources)
        over = {n: max(row["experts"][n] - row["owner"] for row in self.table.values()) for n in names}
        return self._single(min(names, key=lambda n: (over[n], n)))

    def ensemble(self) -> Outcome:
        """Equal weights at every token."""
        scores = {skill: even_mixture(self.readers.values(), rows) for skill, rows in self.test.items()}
        return Outcome(scores, sum(self.expert_parameters.values()))

    def anchor_distill(self) -> Outcome:
        """The anchor in the fold's shape, or in one that holds it."""
        return self._distilled_anchor()

    def anchor_distill_more(self) -> Outcome:
        """The operations of fold and healing in one run, at the rate that short runs nearly always chose."""
        tokens = self._tokens(self._target(), self._spent())
        return self._distilled_anchor(tokens=tokens, rates=(max(self.detail.lrs),))

    def fuse_distill(self) -> Outcome:
        """The same from the experts' fused distributions."""
        return self._distilled_anchor(FusedTeacher([load_expert(reader) for reader in self.readers.values()]))

    def scratch_distill(self) -> Outcome:
        """Weights as transformers draws them."""
        from transformers import AutoModelForCausalLM

        config = load_student(self._folded()[0]).config

        def drawn() -> Any:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                return AutoModelForCausalLM.from_config(config).float()

        return self._distilled(drawn, self._target())

    def shrink(self) -> Outcome:
        """The anchor alone, folded into the same shape."""
        name = self.detail.anchor
        return self._plain_fold({name: self.sources[name]}, {name: self.texts[name]})

    def placebo(self) -> Outcome:
        """All but the anchor shuffled."""
        experts = {
            name: s if name == self.detail.anchor
            else Source(modular.shuffled(s.path, self.place / f"shuffled-{name}", self.seed), device=self.device)
            for name, s in self.sources.items()
        }  # fmt: skip
        return self._plain_fold(experts, self.texts)

    def rival(self, method: Any) -> Outcome:
        """In the fold's shape, on the fold's rows; experts unlike it translated first where the method needs that."""
        note, reused, translating, spec = "", (0.0, 0.0), 0, self._target()  # which folds, if nobody has
        try:
            with Products() as products:
                target, weights, shape = self._merged_by(method, self.sources)
        except PreflightError:
            if all(self._readable(name, spec) for name in self.sources):
                raise
            experts, note, translating, reused = self._translated(self.sources)
            with Products() as products:
                target, weights, shape = self._merged_by(method, experts)
        folder = self._new("rival")
        self._save(folder, target, weights)
        model = load_student(folder)
        outcome = self._measured(model, target)
        outcome.notes, outcome.reused = "; ".join(filter(None, (shape, note))), reused
        outcome.flops, outcome.reused_flops = products.flops, translating
        outcome.extra["validation"] = self._over(model)
        return outcome

    def peer(self, name: str, scale: float = 1.0) -> Outcome:
        """The experts as they are."""
        common = Path(self.bases[0]) if len(set(self.bases)) == 1 else None
        paths = [s.path for s in self.sources.values()]
        speaker = list(self.sources).index(self.detail.anchor) if self.foreign else None
        out = self._new(name).parent / "out"
        folder = peer.merge(name, paths, out, base=common, scale=scale, seed=self.seed, speaker=speaker)
        made, model = Source(folder), load_student(folder)
        outcome = self._measured(model, made.spec)
        outcome.parameters, outcome.extra["validation"] = made.parameters, self._over(model)
        outcome.peak_bytes = children_peak(self.device)
        return outcome

    # ------------------------------------------------------------------ parts

    def _skill(self, name: str, expert: recipe.Expert) -> Skill:
        """An expert's texts; with what it writes, in a case where it does."""
        skill = read_skill(name, expert.text, field=expert.field, seed=self.seed)
        if not self.detail.written:
            return skill
        assert self.detail.text is not None
        self.progress(f"{name} writes")
        source, tokens, few = self.sources[name], self.recipe.fold.tokens - self.detail.text, None
        if self.detail.text:
            few = replace(skill, calibration=first(skill.calibration, self.tokenizer, self.detail.text))
        else:
            tokens = round(tokens / (1 - 2 * HELD_OUT))  # two tenths are held out
        made = with_written(few, name, source, self.tokenizer, tokens, seed=self.seed)
        return replace(made, test=skill.test)

    def _folded(self) -> tuple[Path, Outcome]:
        return self.shared.model("fold", self._fold)

    def _fold(self, folder: Path, asked: recipe.Recipe | None = None) -> Outcome:
        """The merge (None: the case's); of its operations those that only measure do not count."""
        asked = asked or self.recipe
        self.progress("fold")
        if self.detail.written:
            return self._fold_texts(folder, asked)
        with Products() as products:
            listener = Until("test", products)
            result = merge(asked, folder, device=self.device, progress=listener)
        own = {name: one for name, one in result.features.items() if result.owners[name] == name}  # as its teacher is
        Features.save(own, folder)
        extra = {"knobs": result.knobs, "balance": result.balance, "trials": result.knob_trials}
        scores = {skill: row["fold"] for skill, row in result.skills.items()}
        flops = (listener.flops or products.flops) - self.measuring
        return Outcome(scores, result.parameters, dict(result.shape), flops=flops, extra=extra)

    def _fold_texts(self, folder: Path, asked: recipe.Recipe) -> Outcome:
        """The same from the texts as they are here, which no file holds."""
        specs = {name: s.spec for name, s in self.sources.items()}
        shapes = plan.make(asked, specs, self.expert_parameters).shapes
        choice, flops = self._plain(self.sources, self.texts, shapes, folder, asked)
        outcome = self._measured(load_student(folder), choice.target)
        outcome.flops = flops
        outcome.extra = {"knobs": asdict(choice.knobs), "balance": choice.balance, "trials": choice.trials}
        return outcome

    def _reader(self, name: str, source: Source) -> Source | Foreign:
        """An expert's weights, or others in their place, as a reader of the result's tokens."""
        reader = self.readers[name]
        return Foreign(name, source, reader.translator) if isinstance(reader, Foreign) else source

    def _target(self) -> Spec:
        """The shape that the fold chose; the controls are given it for nothing."""
        return Source(self._folded()[0]).spec

    def _merged_by(self, method: Any, experts: Mapping[str, Source]) -> tuple[Spec, Weights, str]:
        """Shape, weights and note of a rival's merge, which reads the result's tokens by every expert."""
        if unread := [name for name in self.foreign if experts[name] is self.sources[name]]:
            raise PreflightError(f"reads other tokens: {', '.join(unread)}")
        rows = calibrate(self.recipe, experts, self.texts, self.tokenizer, judge=False)[0]
        make = table.merged_by(method, list(experts.values()), list(experts).index(self.detail.anchor), rows, self.seed)
        return fitting(make, self._target(), [s.spec for s in experts.values()], self.family)

    def _readable(self, name: str, target: Spec) -> bool:
        """Whether an expert has a counterpart in the result's family, and its tokens."""
        return name not in self.foreign and alignable(self.sources[name].spec, target)

    def _translated(self, names: Iterable[str]) -> tuple[dict[str, Source], str, int, tuple[float, float]]:
        """The experts; of those named, each that is not readable folded alone into the result's family and tokens.

        At its own size, in favour of rivals and controls: none of them could take it as it is. Also what to say of it,
        its operations and seconds.
        """
        experts, said, spent, wall, cpu = dict(self.sources), [], 0, 0.0, 0.0
        target = self._target()
        for name in names:
            if self._readable(name, target):
                continue
            source = self.sources[name]
            folder, outcome = self.shared.model(f"translated-{name}", partial(self._translate, name, target))
            experts[name] = Source(folder, device=self.device)
            tokens = " and its own tokens" * (name in self.foreign)
            said.append(
                f"{name} translated from {source.spec.family}{tokens} by our fold alone first"
                f" ({outcome.scores[name]:.4f})"
            )
            spent, wall, cpu = spent + (outcome.flops or 0), wall + outcome.reused[0], cpu + outcome.reused[1]
        return experts, ", ".join(said), spent, (wall, cpu)

    def _translate(self, name: str, target: Spec, folder: Path) -> Outcome:
        """One expert in the result's family."""
        shape = table.own_size(self.sources[name].spec, target, self.family)
        flops = self._plain({name: self.sources[name]}, {name: self.texts[name]}, [shape], folder)[1]
        return Outcome({name: bits_per_byte(load_student(folder), self.test[name], device=self.device)}, flops=flops)

    def _single(self, name: str) -> Outcome:
        source = self.sources[name]
        scores = {skill: row["experts"][name] for skill, row in self.table.items()}
        return Outcome(scores, source.parameters, table.size_of(source.spec), notes=name)

    def _plain_fold(self, experts: Mapping[str, Source], skills: Mapping[str, Any]) -> Outcome:
        """The fold of these experts into the chosen shape."""
        folder = self._new("plain")
        choice, flops = self._plain(experts, skills, [self._target()], folder)
        outcome = self._measured(load_student(folder), choice.target)
        outcome.extra["knobs"], outcome.flops = asdict(choice.knobs), flops
        return outcome

    def _plain(
        self,
        experts: Mapping[str, Source],
        skills: Mapping[str, Skill],
        shapes: Sequence[Spec],
        folder: Path,
        asked: recipe.Recipe | None = None,
    ) -> tuple[folding.Choice, int]:
        """A fold of these experts into one of the shapes, by `asked` (None: the case's): its choice and operations."""
        asked = asked or self.recipe
        readers = {name: self._reader(name, source) for name, source in experts.items()}
        texts = calibrate(asked, readers, skills, self.tokenizer, judge=False)[0]
        settings = folding.Settings.of(asked.fold)
        done, weights, flops = folded(list(experts.values()), self.family, shapes, texts, settings, self.seed)
        self._save(folder, done.choice.target, weights)
        Features.save({name: one for name, one in zip(experts, done.features, strict=True) if one}, folder)
        return done.choice, flops

    def _distilled_anchor(
        self, guide: Any = None, tokens: int | None = None, rates: Sequence[float | None] | None = None
    ) -> Outcome:
        """The padded anchor, distilled."""
        experts, said, spent, reused = self._translated([self.detail.anchor])
        anchor = experts[self.detail.anchor]

        def padded(target: Spec) -> Weights:
            return gathered(pad(anchor, target, torch.Generator().manual_seed(self.seed)))

        target, weights, note = fitting(padded, self._target(), [anchor.spec], self.family)
        folder = self._new("padded")
        self._save(folder, target, weights)
        outcome = self._distilled(lambda: load_student(folder), target, guide, tokens, rates)
        outcome.notes = "; ".join(filter(None, (outcome.notes, note, said)))
        outcome.reused_flops, outcome.reused = spent, reused
        return outcome

    def _distilled(
        self,
        student: Callable[[], Any],
        target: Spec,
        guide: Any = None,
        tokens: int | None = None,
        rates: Sequence[float | None] | None = None,
        features: Mapping[str, Features] | None = None,
    ) -> Outcome:
        """Heal at each learning rate (None: the case's); measure the best by validation."""
        settings, rates = Heal(tokens=tokens or self.detail.heal_tokens), rates or self.detail.lrs
        limit = self.limit and self.limit // settings.length
        rows = rows_of(self.texts, "calibration", self.tokenizer, settings.length, limit)
        held = rows_of(self.texts, "validation", self.tokenizer, settings.length, VALIDATION_ROWS)
        teachers = {name: load_expert(reader) for name, reader in self.readers.items()}
        best = at_best_rate(
            student, teachers, rows, held, settings, rates,
            guide=guide, features=features, seed=self.seed, device=self.device, progress=self.progress,
        )  # fmt: skip
        outcome = self._measured(best.model, target)
        outcome.tokens, outcome.steps = best.done.tokens, best.done.steps
        outcome.flops = self._training(
            plan.parameters(self.family, target), best.done.tokens, len(rates), features, fused=guide is not None
        )
        outcome.notes, outcome.extra = best.note, best.extra
        return outcome

    def _spent(self) -> int:
        """Operations that fold and healing took together (states apart), all rates."""
        size = plan.parameters(self.family, self._target())
        return (self._folded()[1].flops or 0) + self._training(size, self.detail.heal_tokens, len(self.detail.lrs))

    def _training(
        self,
        parameters: int,
        tokens: int,
        runs: int,
        features: Mapping[str, Features] | None = None,
        *,
        fused: bool = False,
    ) -> int:
        """Operations of so many healings of a model of so many parameters; `fused`: every expert reads every row."""
        teachers = list(self.expert_parameters.values())
        return operations(parameters, tokens, runs, teachers, list((features or {}).values()), fused=fused)

    def _tokens(self, target: Spec, operations: int, features: Mapping[str, Features] | None = None) -> int:
        """Tokens of one healing that takes so many operations; at least the case's."""
        least, size = self.detail.heal_tokens, plan.parameters(self.family, target)
        return max(least, round(least * operations / self._training(size, least, runs=1, features=features)))

    def _new(self, name: str) -> Path:
        """A folder that is not there yet."""
        return Path(tempfile.mkdtemp(dir=self.place, prefix=f"{name}-")) / "model"

    def _save(self, folder: Path, target: Spec, weights: Weights) -> None:
        tokens.save(folder, self.family, target, weights, self.sources[self.detail.anchor])

    def _over(self, model: Any) -> dict[str, float]:
        """Bits per byte over the owner's on validation text, by which a rival's settings are chosen."""
        rows = rows_of(self.texts, "validation", self.tokenizer, self.recipe.fold.length, VALIDATION_ROWS)
        own = measure_experts(self.readers, rows, self.recipe.union.alpha, Quiet())
        return {s: bits_per_byte(model, part, device=self.device) - own[s]["owner"] for s, part in rows.items()}

    def _measured(self, model: Any, target: Spec) -> Outcome:
        scores = {skill: bits_per_byte(model, rows, device=self.device) for skill, rows in self.test.items()}
        return Outcome(scores, plan.parameters(self.family, target), table.size_of(target))
