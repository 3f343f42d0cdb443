"""One healing under way: its state, the steps that change it, how it is saved and resumed (see `heal`)."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from polymerge import teachers as learning
from polymerge.calibrate.foreign import TranslatedTeacher
from polymerge.calibrate.texts import Rows
from polymerge.divergence import kl
from polymerge.evaluate import bits_per_byte
from polymerge.features import Features
from polymerge.heal import Heal, HealResult, Point, Progress
from polymerge.heal_state import Folder

_SAVE_SECONDS = 30.0
_FAULTS = 3  # losses that are not finite, until the run is given up
_BACKOFFS = 6  # halvings, after which nothing more is to be had

_KEPT = (
    "best", "drawn", "reference", "losses", "step", "bad", "backoffs", "faults", "peak", "scale", "seconds", "event",
    "stopped",
)  # fmt: skip
"""Attributes of a run that are saved as they are."""


class Run:
    """The state of one healing: everything that `save` writes, and the steps that change it."""

    def __init__(
        self,
        student: Any,
        guides: Mapping[str, Any],
        owners: Mapping[str, Any],
        settings: Heal,
        *,
        rows: Mapping[str, Rows],
        validation: Mapping[str, Rows],
        features: Mapping[str, Features] | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.student, self.guides, self.owners = student.to(self.device).eval(), guides, owners
        self.rows, self.validation, self.settings, self.seed = rows, validation, settings, seed
        taught = {name for name, guide in guides.items() if guide is owners[name] and settings.features}
        self.features = {name: one.to(self.device) for name, one in (features or {}).items() if name in taught}
        self.progress: Progress = lambda _step, _steps, _text: None
        self.half = learning.uses_bfloat16(settings.precision, self.device)
        self.every = settings.interval(sum(r.tokens.numel() for r in validation.values()))
        sizes = {name: len(r.tokens) for name, r in rows.items()}
        self.batches = learning.Batches(sizes, settings.batch_rows, torch.Generator().manual_seed(seed))
        self.parameters = dict(student.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.best = self._copy()
        self.drawn = self.batches.state()  # as of the last whole step: an interrupted one is drawn again
        self.reference: dict[str, float] = {}
        self.curve: list[Point] = []
        self.losses: list[float] = []
        self.step = self.bad = self.backoffs = self.faults = 0
        self.peak, self.scale, self.seconds = 0.0, 1.0, 0.0  # the peak is known once the start is measured
        self.event: str | None = None
        self.stopped: str | None = None

        self.folder: Folder | None = None
        self.whole, self.pause = True, _SAVE_SECONDS
        self.started = self.saved = time.monotonic()

    # ------------------------------------------------------------------ the method

    def train(self) -> None:
        """Measure, step, save, until the tokens are read."""
        steps = self.settings.steps
        while True:
            due = self.step % self.every == 0 or self.step == steps
            if due and (not self.curve or self.curve[-1].step != self.step):
                self.measure()
            if self.step == steps or self.stopped:
                break
            self.learn()
            self.progress(self.step, steps, f"worst skill {self._least():.3f} bits per byte over its owner")
            self.save(due=True)
        self._restore()
        self.save(due=False)

    def learn(self) -> None:
        """One optimiser step."""
        drawn = self.batches.draw()
        parts = [self.rows[name].tokens[index, :-1].to(self.device) for name, index in drawn.items()]
        weight = self.settings.weight(self.step)
        held = self.features if weight else {}
        with self._autocast():
            out = self.student(input_ids=torch.cat(parts), use_cache=False, output_hidden_states=bool(held))
        loss, missed = torch.zeros(2, device=self.device).unbind()
        sizes = [len(p) for p in parts]
        states = zip(*(state.split(sizes) for state in out.hidden_states or ()), strict=True)
        for name, tokens, mine in zip(drawn, parts, out.logits.split(sizes), strict=True):
            share, seen = self.settings.text_share(foreign=self._foreign(name)), next(states, ())
            if share < 1:
                said, lost = self._taught(name, tokens, mine, seen, held.get(name))
                loss, missed = loss + (1 - share) * said, missed + (1 - share) * lost
            if share > 0:
                loss = loss + share * learning.next_token(mine, tokens)
        count = out.logits.shape[:2].numel()
        loss = loss / count
        self.optimizer.zero_grad()
        (loss + weight * missed / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        with self._changing():
            if math.isfinite(loss.item()) and math.isfinite(norm.item()):
                self.optimizer.param_groups[0]["lr"] = self.scale * self.peak * self.settings.rate(self.step)
                self.optimizer.step()
                self.losses.append(loss.item())
            else:
                self._fault()
            self.step, self.drawn = self.step + 1, self.batches.state()

    def _taught(
        self,
        name: str,
        tokens: torch.Tensor,
        student: torch.Tensor,
        states: Sequence[torch.Tensor],
        features: Features | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the student still lacks, summed over positions: of its teacher's predictions, in nats; of its states."""
        guide, known, shown = self.guides[name], None, features is not None
        with self._autocast():
            if self._foreign(name):
                loss, theirs = learning.across(student, guide, tokens, kind=self.settings.across, states=shown)
                known = theirs.known
            else:
                with torch.no_grad():
                    theirs = guide(input_ids=tokens, use_cache=False, output_hidden_states=shown)
                loss = kl(student, theirs.logits).sum()
        if features is None:
            return loss, torch.zeros((), device=self.device)
        return loss, features.missed(states, theirs.hidden_states, known)

    def _foreign(self, name: str) -> bool:
        return isinstance(self.guides[name], TranslatedTeacher)

    def measure(self) -> None:
        """Validate; keep the state if it is the best, go back to the best if it is clearly worse again."""
        found = {name: bits_per_byte(self.student, self.validation[name]) for name in self.rows}
        over = [found[name] - self.reference[name] for name in found]
        worst = max(over) if all(map(math.isfinite, over)) else math.inf
        with self._changing():
            if not self.curve:
                self.peak = self.settings.peak(worst)
            better = not self.curve or worst < self._least()
            if better:
                self.best = self._copy()
            # Noise and the first steps' disorder are no reason to go back.
            self.bad = self.bad + 1 if worst > self._least() + max(0.1, 0.1 * abs(self._least())) else 0
            if self.bad == 2:  # noqa: PLR2004
                self._back_off()
            self.curve.append(
                Point(
                    step=self.step,
                    tokens=self.step * self.settings.batch_rows * self.settings.length,
                    loss=sum(self.losses) / len(self.losses) if self.losses else None,
                    lr=self.scale * self.peak * self.settings.rate(min(self.step, self.settings.steps - 1)),
                    validation=found,
                    worst=worst,
                    seconds=self._elapsed(),
                    best=better,
                    event=self.event,
                )
            )
            self.batches.aim(dict(zip(found, over, strict=True)))
            self.drawn = self.batches.state()
            self.losses, self.event = [], None
        if self.folder is not None:
            self.folder.log([asdict(self.curve[-1])])

    def _least(self) -> float:
        return min((p.worst for p in self.curve), default=math.inf)

    def _back_off(self) -> None:
        self._restore()
        self.scale, self.bad, self.backoffs, self.event = self.scale / 2, 0, self.backoffs + 1, "back-off"
        if self.backoffs == _BACKOFFS:
            rate = self.scale * self.peak
            self.stopped = f"stopped at step {self.step}: it only got worse, down to a learning rate of {rate:.1e}"

    def _fault(self) -> None:
        self._restore()
        self.scale, self.bad, self.faults, self.event = self.scale / 2, 0, self.faults + 1, "loss not finite"
        if self.faults == _FAULTS:
            self.stopped = f"stopped at step {self.step}: the loss was not finite {_FAULTS} times"

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}

    @torch.no_grad()
    def _restore(self) -> None:
        """The best state again. Adam's first moments would lead straight back, so they start anew."""
        for name, p in self.parameters.items():
            p.copy_(self.best[name])
            if "exp_avg" in self.optimizer.state[p]:
                self.optimizer.state[p]["exp_avg"].zero_()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    # ------------------------------------------------------------------ around it

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """Teachers in place and references measured; afterwards the student's attention is as it was."""
        for model in (*self.guides.values(), *self.owners.values()):
            model.to(self.device).eval()
        if not self.reference:
            self.reference = {n: bits_per_byte(self.owners[n], self.validation[n]) for n in self.rows}
        before = self.student.config._attn_implementation  # noqa: SLF001
        if self.half and self.device.type == "cpu":
            # The fused kernel's backward pass is several times slower in bfloat16 than in float32 (2.13).
            self.student.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.student.set_attn_implementation(before)
            self.optimizer.zero_grad()

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """An interruption in here leaves a state that fits no step: it must not be saved."""
        self.whole = False
        yield
        self.whole = True

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def inputs(self) -> dict[str, str]:
        """What the bytes of the result depend on, by the name that a message calls it."""
        found = {f"heal.{key}": str(value) for key, value in asdict(self.settings).items()}
        found |= {"seed": str(self.seed), "device": self.device.type, "bfloat16": str(self.half)}
        found["student"] = learning.digest_model(self.student)
        for name in self.rows:
            found[f"expert {name}"] = learning.digest_model(self.owners[name])
            if self.guides[name] is not self.owners[name]:
                found[f"guide {name}"] = learning.digest_model(self.guides[name])
            found[f"text {name}"] = learning.digest_rows(self.rows[name], self.validation[name])
        found |= {f"features {name}": one.digest() for name, one in self.features.items()}
        return found

    def resume(self, folder: Folder) -> None:
        """Keep state and log in a folder; go on from the state that is there."""
        state = folder.load()
        if state is not None:
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(state["student"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.batches.load(state["drawn"])
            self.curve = [Point(**p) for p in state["curve"]]
            for key in _KEPT:
                setattr(self, key, state[key])
        folder.log([asdict(p) for p in self.curve], afresh=True)
        self.folder = folder

    def save(self, *, due: bool) -> None:
        """Write the state; if `due`, only when it is time again."""
        if self.folder is None or not self.whole or (due and time.monotonic() - self.saved < self.pause):
            return
        began = time.monotonic()
        self.folder.save(
            {
                **{key: getattr(self, key) for key in _KEPT},
                "seconds": self._elapsed(),
                "student": {name: p.detach() for name, p in self.parameters.items()},
                "optimizer": self.optimizer.state_dict(),
                "curve": [asdict(p) for p in self.curve],
            }
        )
        self.saved = time.monotonic()
        self.pause = max(_SAVE_SECONDS, 10 * (self.saved - began))

    def result(self) -> HealResult:
        """The figures of a finished run."""
        best = max((p for p in self.curve if p.best), key=lambda p: p.step)
        return HealResult(
            steps=self.step,
            tokens=self.step * self.settings.batch_rows * self.settings.length,
            seconds=self._elapsed(),
            lr=self.peak,
            best_step=best.step,
            before=self.curve[0].validation,
            after=best.validation,
            reference=self.reference,
            curve=tuple(self.curve),
            stopped_early=self.stopped is not None,
            warning=self.stopped,
        )
