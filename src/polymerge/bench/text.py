"""Suite `text`: language models of different families merged, measured in bits per byte on each one's test text.

`quick`: the two experts that come with polymerge, prose (Llama) and Python code (GPT-NeoX), one tokenizer, by a fold of
a quarter of the default's text and an eighth of its steps. `full`: these at four sizes, and experts trained on the
user's own texts (`text_experts.py`): Shakespeare and Python that differ in one axis at a time, or were tuned from a
common base or from bases of two widths; pairs over other domains, two of them of domains that no default was chosen by;
two pairs with little text to merge by; three and four experts at once. The fold is `polymerge.merge` itself; every
distilled method heals on the same tokens with the same grid of learning rates, the rate chosen by the worst skill on
validation text. `medium`: full's cases at the sum of sizes, and the one with a common base, with a quarter of its
healing, for one CPU. `large`: one pair of domains at three sizes, up to 100 million parameters an expert, for a GPU.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from polymerge.bench import text_experts
from polymerge.bench.methods import Case, known
from polymerge.calibrate.foreign import Foreign
from polymerge.calibrate.packing import Rows
from polymerge.demo.corpus import write_heldout
from polymerge.demo.run import EXPERTS
from polymerge.model.source import Source
from polymerge.readers import TEST_ROWS


@dataclass(frozen=True)
class Detail:
    """What a case merges, and how long it heals.

    Attributes:
        experts: names in `text_experts.PLANS`; none: the pair that comes with polymerge.
        anchor: the skill whose expert gives tokenizer and family.
        budget: "sum" of the experts' parameters, a multiple of the largest such as "1.0x", or "union".
        axis: the one thing in which the experts differ, in cases that are about one.
        heal_tokens: that every distilled method reads at each of the learning rates `lrs`.
        fold: as in a recipe.
        text: different tokens of each skill that a method may read; None: all that there are. What is chosen on
            validation text stays chosen on all of it, by every method alike.
        written: each expert goes on to write as much as a recipe's `write` adds by default, for every method alike;
            with no text (0) that is all there is, to choose by as well.
        tries: how many of a rival's settings are tried, by its name; of others all.
        test_rows: most rows a skill is tested on.
    """

    experts: tuple[str, ...] = ()
    anchor: str = "prose"
    budget: str = "1.5x"
    axis: str = ""
    heal_tokens: int = 400_000
    lrs: tuple[float, ...] = (1e-3, 4e-3)
    fold: dict[str, Any] = field(default_factory=dict)
    text: int | None = None
    written: bool = False
    tries: Mapping[str, int] = field(default_factory=dict)
    test_rows: int = TEST_ROWS

    def size(self, parameters: int) -> Any:
        """The recipe's size for experts of so many parameters together."""
        if self.budget == "union":
            return "union"
        return {"params": parameters if self.budget == "sum" else self.budget}


MEDIUM: dict[str, Any] = {"heal_tokens": 100_000, "lrs": (2.5e-4, 1e-3, 4e-3)}
QUICK: dict[str, Any] = {
    "heal_tokens": 50_000, "lrs": (1e-3, 4e-3), "fold": {"tokens": 32_000, "refine": 60, "refine_lr": 2e-3},
    "tries": {"fs_merge": 2},
}  # fmt: skip
"""FS-Merge's third setting, four times its steps, takes two thirds of its time."""
FULL: dict[str, Any] = {"heal_tokens": 400_000, "lrs": (1e-3, 2e-3, 4e-3), "fold": {"refine": 240}}
"""Half of the default's steps: what the rows there are were made by."""
PAIRS = (("gsm8k", "stories"), ("rust", "wiki"))
UNSEEN = (("sherlock", "java"), ("java", "scan"))
"""Domains, shapes and an anchor's family (GPT-NeoX) that no default was chosen by: folded by the default as it is."""
SCARCE = ((0, True), (2_048, False), (2_048, True), (8_192, False), (32_768, False))
"""Tokens of real text, and whether the experts write more."""
ABOUT_WEIGHTS = ("placebo", "shrink")
"""Controls that say what the other experts' weights are worth: nothing that depends on how much text there is."""
LARGE: dict[str, Any] = {"heal_tokens": 800_000, "lrs": (2.5e-4, 5e-4, 1e-3)}
"""Larger models want more tokens and lower rates."""
SIZES = ("5m", "27m", "100m")
MORE = (
    ("shakespeare", "python/all", "gsm8k"),
    ("stories", "rust", "wiki"),
    ("shakespeare", "python/all", "gsm8k", "stories"),
)


def cases(profile: str) -> list[Case]:
    """In `quick` one pair at one size; in `full` it at four sizes, the axes, other pairs, three and four experts."""
    if profile == "quick":
        return [Case("prose+code/1.5x", "text", Detail(**QUICK))]
    if profile == "large":
        sizes = [(size, budget) for budget in ("sum", "1.0x") for size in SIZES]
        found = [_trained((f"books/{size}", f"programs/{size}"), budget, size) for size, budget in sizes]
        return [replace(case, detail=replace(case.detail, axis="", **LARGE)) for case in found]
    found = [Case(f"prose+code/{b}", "text", Detail(budget=b, **FULL)) for b in ("1.0x", "sum", "1.5x", "union")]
    found += [_trained(("shakespeare", f"python/{axis}"), "sum", axis) for axis in text_experts.AXES]
    found += [_trained(("shakespeare", f"python/{axis}"), "1.0x", axis) for axis in ("seed", "all")]
    found += [_trained(names, budget) for names in (*PAIRS, *MORE) for budget in ("sum", "1.0x")]
    found += [_trained(("shakespeare/tuned", "python/tuned"), "1.0x", "base")]
    found += [_trained(("shakespeare/tuned", "python/wide-tuned"), "sum", "bases")]
    found += [_scarce(names, *few) for names in (("shakespeare", "python/seed"), ("rust", "wiki")) for few in SCARCE]
    unseen = [_trained(names, "sum") for names in UNSEEN]
    found += [replace(case, detail=replace(case.detail, fold={})) for case in unseen]
    if profile == "full":
        return found
    chosen = [case for case in found if case.detail.budget == "sum" or case.detail.axis == "base"]
    return [replace(case, detail=replace(case.detail, **MEDIUM)) for case in chosen]


def _trained(names: tuple[str, ...], budget: str, axis: str = "") -> Case:
    """A case of trained experts, named by their domains; the first is the anchor."""
    domains = [text_experts.PLANS[name].domain for name in names]
    title = "/".join(filter(None, ("+".join(domains), axis, budget)))
    return Case(title, "text", Detail(names, domains[0], budget, axis, **FULL))


def _scarce(names: tuple[str, ...], text: int, written: bool) -> Case:
    """A case of trained experts with so little text of each skill."""
    case = _trained(names, "sum", f"text-{text // 1024}k{'-written' * written}")
    methods = tuple(name for name in known() if name not in ("expert", *ABOUT_WEIGHTS))
    detail = replace(case.detail, axis="", text=text, written=written)
    return replace(case, protocol="scarce", detail=detail, methods=methods)


def lacking(case: Case, texts: Path | None) -> str:
    """What a case needs and has not, in one line; empty where nothing is missing."""
    if not case.detail.experts:
        return ""
    domain = text_experts.PLANS[case.detail.experts[0]].domain  # its tokenizer is that of the others
    return text_experts.lacking(texts, text_experts.tokenizer_of(domain)[1])


@dataclass(frozen=True)
class Given:
    """An expert's model and texts (`key`: of their records), what its training took, and what it was tuned from."""

    model: Path
    texts: tuple[Path, ...]
    key: str = "text"
    record: Mapping[str, Any] = field(default_factory=dict)
    base: Path | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe's entry."""
        return {"model": str(self.model), "text": list(map(str, self.texts)), "field": self.key}


def given(
    detail: Detail, place: Path, texts: Path | None, seed: int, device: str, progress: Callable[[str], None]
) -> dict[str, Given]:
    """Skill -> expert of a case; trained now where the cache has none. Raises PreflightError without the texts."""
    if not detail.experts:
        write_heldout(place / "text")
        return {name: Given(path, (place / "text" / f"{name}.txt",)) for name, path in EXPERTS.items()}
    workshop, found = text_experts.Workshop(texts, seed, device=device, progress=progress), {}
    for name in detail.experts:
        plan = text_experts.PLANS[name]
        expert = workshop.expert(plan)
        record = {key: expert.record[key] for key in ("tokens", "stream", "best_val_bpb", "cpu_seconds")}
        base = workshop.expert(text_experts.PLANS[plan.base]).folder if plan.base else None
        found[plan.domain] = Given(expert.folder, expert.texts, expert.field, record, base)
    return found


def even_mixture(experts: Iterable[Source | Foreign], rows: Rows) -> float:
    """Bits per byte of the mean of the experts' probabilities of each token."""
    logs = torch.stack([expert.log_probs(rows.tokens) for expert in experts]).double()
    return float((math.log(len(logs)) - logs.logsumexp(0)).sum()) / (math.log(2) * rows.bytes)
