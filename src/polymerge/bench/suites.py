"""The suites by name: their cases, what makes the experts of one, and what this machine lacks for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from polymerge.bench.methods import Bed, Case
from polymerge.errors import PolymergeError

SUITES = ("modular", "text")
PROFILES = ("quick", "medium", "full", "large")
Make = Callable[[Case, int, str, Path, Path, Callable[[str], None]], Bed]
"""(case, seed, device, own scratch folder, folder shared with other processes, listener) -> bed."""


@dataclass(frozen=True)
class Suite:
    """A suite's cases, what makes the bed of one, what one lacks here (empty: nothing), and what a GPU does first.

    `prepare`: (cases, seeds, device, listener).
    """

    cases: list[Case]
    make: Make
    lack: Callable[[Case], str] = lambda _: ""
    prepare: Callable[[Sequence[Case], int, str, Callable[[str], None]], None] = lambda *_: None


def left_out(suite: str, profile: str, texts: Path | str | None = None) -> list[str]:
    """A line for each reason for which cases of a run cannot be done here: "18 cases of text cannot: needs …"."""
    lines = []
    for name in named(suite):
        its = find(name, profile, texts)
        lacks = [its.lack(case) for case in its.cases]
        lines += [f"{lacks.count(why)} cases of {name} cannot: {why}" for why in sorted(set(lacks)) if why]
    return lines


def named(suite: str) -> tuple[str, ...]:
    """The suites that a user's word stands for."""
    return SUITES if suite == "all" else (suite,)


def find(name: str, profile: str, texts: Path | str | None) -> Suite:
    """A suite of a profile; `texts`: folder of real texts, for the text suite. Raises PolymergeError: no profile."""
    return _modular(profile) if name == "modular" else _text(profile, texts)


def _modular(profile: str) -> Suite:
    from polymerge.bench import modular
    from polymerge.bench.modular_bed import ModularBed

    if profile not in modular.PROFILES:
        raise PolymergeError(f"bench: modular has no profile {profile}; profiles: {', '.join(modular.PROFILES)}")
    settings = modular.PROFILES[profile]

    def bed(case: Case, seed: int, device: str, own: Path, shared: Path, tell: Callable[[str], None]) -> Bed:
        return ModularBed(case, seed, settings, own, shared=shared, device=device, progress=tell)

    def experts(cases: Sequence[Case], seeds: int, device: str, tell: Callable[[str], None]) -> None:
        if device != "cpu":
            orders = modular.orders(cases, settings, seeds, modular.cache_folder())
            modular.train_stacks(orders, device=device, progress=tell)

    return Suite(modular.cases(profile), bed, prepare=experts)


def _text(profile: str, texts: Path | str | None) -> Suite:
    from polymerge.bench import text, text_bed, text_experts

    folder = text_experts.texts_folder(Path(texts) if texts else None)

    def bed(case: Case, seed: int, device: str, own: Path, shared: Path, tell: Callable[[str], None]) -> Bed:
        return text_bed.TextBed(case, seed, own, shared=shared, texts=folder, device=device, progress=tell)

    return Suite(text.cases(profile), bed, lambda case: text.lacking(case, folder))
