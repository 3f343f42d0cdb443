"""The experts as readers of the result's tokens, the rows that they read, and how well they predict them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from polymerge.align.token_bytes import as_view, byte_view
from polymerge.align.translate import Translator
from polymerge.calibrate.calibration import Calibration, best_experts, gather
from polymerge.calibrate.foreign import Foreign, TranslatedTeacher
from polymerge.calibrate.speech import Speech
from polymerge.calibrate.texts import Rows, Skill, adds_bos, pack
from polymerge.methods._union_gate import BayesGate
from polymerge.model.source import Source
from polymerge.progress import Progress
from polymerge.recipe import Recipe

HELD_OUT_ROWS, VALIDATION_ROWS, TEST_ROWS = 32, 64, 512
"""Rows a skill, at most: held out of a fold, to heal by, to test on."""
SOME, FINER = 32, 4.0
"""Rows that tell how much finer the result's tokens are than an expert's, and how many times the rows it is worth."""


def readers_of(
    recipe: Recipe,
    sources: Mapping[str, Source],
    tokenizers: Mapping[str, Any],
    skills: Mapping[str, Skill],
    spoken: Speech,
    foreign: Iterable[str],
) -> dict[str, Source | Foreign]:
    """The experts as readers of the result's tokens: those that are `foreign` to them behind a translator."""
    readers: dict[str, Source | Foreign] = dict(sources)
    if not foreign:
        return readers
    limit = max(1, recipe.fold.tokens // recipe.fold.length)
    rows = rows_of(skills, "calibration", spoken.tokenizer, recipe.fold.length, limit)
    mine = as_view(spoken.tokenizer)
    for name in foreign:
        lead = adds_bos(tokenizers[name])
        translator = Translator(mine, byte_view(tokenizers[name]), spoken.vocab, lead=lead)
        translator.fit(torch.cat([r.tokens for r in rows.values()]))
        readers[name] = Foreign(name, sources[name], translator)
    return readers


def calibrate(
    recipe: Recipe,
    sources: Mapping[str, Source | Foreign],
    skills: Mapping[str, Skill],
    tokenizer: Any,
    *,
    judge: bool = True,
) -> tuple[Calibration, dict[str, str]]:
    """The rows of a merge, calibration text to fit and validation text held out; and the expert that owns each skill.

    `judge`: a skill goes to the expert that predicts it best; else to its own.
    """
    fold, names, experts = recipe.fold, list(sources), list(sources.values())
    fitted = list(_fitted(recipe, sources, skills, tokenizer).values())
    held_out = list(rows_of(skills, "validation", tokenizer, fold.length, HELD_OUT_ROWS).values())
    judged = (
        held_out if any(skill.written for skill in skills.values()) else fitted
    )  # nobody reads an expert as it does
    best = best_experts(judged, experts) if judge else list(range(len(names)))
    part = sorted(set(best))
    texts = gather(
        fitted,
        held_out,
        [experts[k] for k in part],
        [part.index(k) for k in best],
        gate=fold.ownership == "gate",
    )
    return texts, {skill: names[k] for skill, k in zip(names, best, strict=True)}


def _fitted(
    recipe: Recipe, experts: Mapping[str, Source | Foreign], skills: Mapping[str, Skill], tokenizer: Any
) -> dict[str, Rows]:
    """Calibration rows of every skill, by which its expert has `fold.tokens` positions to be fitted at.

    One with another tokenizer has none inside its own tokens, so where these are longer it needs more text.
    """
    length = recipe.fold.length
    most = max(1, recipe.fold.tokens // length)
    found = rows_of(skills, "calibration", tokenizer, length, most)
    for name, expert in experts.items():
        if isinstance(expert, Foreign):
            share = float(expert.read(found[name].tokens[:SOME]).exact.float().mean())
            limit = math.ceil(most / max(share, 1 / FINER))
            found |= rows_of({name: skills[name]}, "calibration", tokenizer, length, limit)
    return found


def rows_of(
    skills: Mapping[str, Skill], part: str, tokenizer: Any, length: int, limit: int | None = None
) -> dict[str, Rows]:
    """Packed rows of one part of every skill."""
    bos = adds_bos(tokenizer)
    return {k: pack(tokenizer, getattr(s, part), length, limit=limit, bos=bos) for k, s in skills.items()}


def measure_experts(
    sources: Mapping[str, Source | Foreign], test: Mapping[str, Rows], alpha: float, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Every expert and their mixture on every skill, from one pass of each expert over each test text."""
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


def load_expert(source: Source | Foreign) -> Any:
    """The expert as a transformers model, to teach (in the result's tokens)."""
    from transformers import AutoModelForCausalLM

    if isinstance(source, Foreign):
        return TranslatedTeacher(load_expert(source.source), source)
    return AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).to(source.device).eval()
