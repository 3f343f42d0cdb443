"""Preflight: what the sources are, what maps exactly, what is approximated and at what cost, what is refused.

What can be known to go wrong stops here, with one line, before a byte is written: output folder, damaged
files, contexts too short, tokenizers, parts without a counterpart, too little text, weights that are not
finite, disk space. Cheap checks come first; the weights are read (once, a tensor at a time) last.
"""

import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import yaml

from polymerge.calibrate.speech import Speech, resolve
from polymerge.calibrate.texts import PARTS, Skill, adds_bos, pack, shared_documents
from polymerge.checkpoint.writer import check_free, require_space
from polymerge.errors import CheckpointError, PreflightError, TextError
from polymerge.model import rope
from polymerge.model.source import Source
from polymerge.plan import Plan
from polymerge.preflight.architecture import fold_findings
from polymerge.preflight.asked import alike, beyond, check_method, check_places, few_rows, unbounded, without_effect
from polymerge.preflight.cost import estimate
from polymerge.preflight.report import Finding, Level, Report
from polymerge.preflight.translation import check_positions, finer, translation_findings
from polymerge.preflight.vocabulary import foreign_experts, loading_findings, vocabulary_findings
from polymerge.readers import HELD_OUT_ROWS, TEST_ROWS
from polymerge.recipe import Recipe

__all__ = [
    "Finding",
    "Level",
    "Report",
    "check",
    "check_folders",
    "check_places",
    "check_positions",
    "finer",
    "foreign_experts",
    "translation_findings",
]

VOCABULARY_FILES = frozenset({"tokenizer.json", "tokenizer.model", "vocab.json"})


def check(
    recipe: Recipe,
    sources: Mapping[str, Source],
    tokenizers: Mapping[str, Any],
    plan: Plan | None,
    out: Path | None,
    texts: Mapping[str, Skill],
    *,
    speech: Speech | None = None,
    foreign: Mapping[str, str] | None = None,
    work: Path | None = None,
) -> Report:
    """The report on a merge, or the first reason why it cannot be done.

    Args:
        recipe: what is asked for.
        sources: experts by name.
        tokenizers: theirs.
        plan: shapes of a fold; None for a union.
        out: folder to be made; None when nothing will be written.
        texts: the experts' skills.
        speech: the result's tokenizer; default as the recipe says.
        foreign: experts with another one, each with the first difference; by default they are looked for.
        work: where the state is kept meanwhile; default the system's folder for temporary files.

    Raises:
        OutputError: `out` exists, cannot be written, or has too little space.
        CheckpointError: a source is incomplete, damaged, not finite, or brings code.
        TextError: a part of a text has less than a row of tokens.
        PreflightError: the sources cannot be merged as asked.
    """
    check_folders(sources, out)
    specs = {name: source.spec for name, source in sources.items()}
    _check_lengths(recipe, sources)
    speech = resolve(recipe, tokenizers, specs) if speech is None else speech
    foreign = foreign_experts(speech, tokenizers, texts) if foreign is None else foreign
    translate = recipe.method in ("fold", "union")
    findings = vocabulary_findings(speech, foreign, tokenizers, specs, texts, translate=translate)
    if foreign and recipe.method == "fold" and recipe.heal is not None and recipe.heal.teacher == "union":
        raise PreflightError(
            f"heal.teacher: a union teaches experts of one tokenizer, {next(iter(foreign))!r} has another than the "
            "result; set heal.teacher: owner"
        )
    if plan is None:
        text = "every expert whole, weights rounded to the result's dtype at most"
        findings += [Finding("exact", f"{name}: union", text) for name in specs]
    else:
        _check_rows(speech, {name: source for name, source in sources.items() if name not in foreign})
        findings += fold_findings(specs, recipe.anchor, plan) if recipe.method == "fold" else _rival(recipe)
        findings += loading_findings(plan.family.model_type, sources[speech.owner], speech, texts)
    check_method(recipe, sources, tokenizers if foreign else {}, plan, speech.owner)
    findings += [*without_effect(recipe), *few_rows(recipe), *alike(sources, texts), *unbounded(recipe, sources, plan)]
    findings += beyond(recipe, plan)
    findings += [*_lean(recipe), *_dtypes(recipe, sources), *_codes(sources)]
    findings += _check_texts(recipe, speech.tokenizer, texts, healed=plan is not None)
    findings += _licences(sources, recipe.anchor)
    for source in sources.values():
        source.checkpoint.check_finite()
    more = {name: finer(speech, tokenizers[name], name, texts[name]) for name in foreign}
    cost = estimate(recipe, sources, plan, _rows(recipe, speech.tokenizer, texts, more))
    if out is not None:
        require_space(out, cost.disk_bytes)
        require_space(work or Path(tempfile.gettempdir()), cost.work_bytes)
    kinds = {name: _describe(source) for name, source in sources.items()}
    return Report(
        tuple(findings), cost.parameters, cost.memory_bytes, cost.disk_bytes, cost.stages, kinds, cost.lean_seconds
    )


def check_folders(sources: Mapping[str, Source], out: Path | None) -> None:
    """What must be right before anything is read: `out` is free, tokenizers are there. Raises as `check` does."""
    if out is not None:
        check_free(out)
    for source in sources.values():
        _check_tokenizer_files(source)


def _describe(source: Source) -> str:
    """One line on a source."""
    s = source.spec
    positions = f"RoPE θ={s.rope_theta:g}" if s.frequencies else "learned positions"
    mlp = f"MLP {s.mlp} ({'gated ' if s.gated else ''}{s.activation})"
    heads = f"{s.heads} heads of {s.head_size}" + (f" ({s.kv_heads} KV)" if s.kv_heads != s.heads else "")
    return (
        f"{s.family}, {source.parameters:,} parameters: {s.layers} layers, width {s.width}, {heads}, {mlp}, "
        f"{positions}, context {s.max_positions:,}, vocabulary {s.vocab:,}"
    )


def _check_tokenizer_files(source: Source) -> None:
    """Without files transformers would make up an empty tokenizer of the family's kind."""
    if not {path.name for path in source.checkpoint.tokenizer_files()} & VOCABULARY_FILES:
        expected = ", ".join(sorted(VOCABULARY_FILES))
        raise CheckpointError(f"{source.path}: no tokenizer; expected one of {expected}: get the missing file")


def _check_lengths(recipe: Recipe, sources: Mapping[str, Source]) -> None:
    """No expert reads rows longer than it has positions for."""
    asked = {"fold.length": recipe.fold.length}
    if recipe.heal is not None and recipe.method != "union":
        asked["heal.length"] = recipe.heal.length
    reach = {n: rope.reach(s.config, s.spec.max_positions) for n, s in sources.items()}
    name, least = min(reach.items(), key=lambda item: item[1])
    for key, length in asked.items():
        if length > least:
            raise PreflightError(
                f"{key}: {length} tokens a row, but {name!r} knows only {least} positions; set {key}: {least}"
            )


def _check_rows(speech: Speech, sources: Mapping[str, Source]) -> None:
    """A fold's head has a row per token of the result: every expert with its tokenizer must have them too."""
    rows = {name: source.spec.vocab for name, source in sources.items()}
    least = min(rows, key=lambda name: rows[name], default=None)
    if least is not None and rows[least] < speech.vocab:
        raise PreflightError(
            f"tokenizer: {speech.owner!r} has {speech.vocab:,} embedding rows (padding included), {least!r} only "
            f"{rows[least]:,}; a fold needs the result's in every expert that reads them: set tokenizer: {least}"
        )


def _rival(recipe: Recipe) -> list[Finding]:
    """What a method of others does to an expert: weights are averaged in the least shape that holds each alone."""
    text = f"its weights are averaged with the others' as {recipe.method} aligns them; not measured"
    return [Finding("approximate", f"{name}: {recipe.method}", text) for name in recipe.experts]


def _lean(recipe: Recipe) -> Iterator[Finding]:
    """What is left out of a fold that long healing follows."""
    fold, heal = recipe.fold, recipe.heal
    if recipe.method == "fold" and heal is not None and not fold.refine and not fold.trials:
        text = f"lean: {fold.tokens:,} tokens of each expert, nothing tried or refined"
        yield Finding("approximate", "fold", f"{text}; {heal.tokens:,} tokens of healing follow (fold: whole for all)")


def _dtypes(recipe: Recipe, sources: Mapping[str, Source]) -> Iterator[Finding]:
    for name, source in sources.items():
        checkpoint = source.checkpoint
        stored = sorted({str(checkpoint.dtype(n)).removeprefix("torch.") for n in checkpoint.names})
        if stored != [recipe.dtype]:
            text = f"{', '.join(stored)} in the expert, {recipe.dtype} in the result"
            yield Finding("approximate", f"{name}: dtype", text)


def _check_texts(recipe: Recipe, tokenizer: Any, texts: Mapping[str, Skill], *, healed: bool) -> Iterator[Finding]:
    """Every part of every text gives at least a row; what is short of what was asked, or leaks, is told."""
    length = recipe.fold.length
    wanted = max(1, recipe.wanted // length)
    longest = max(length, recipe.heal.length) if healed and recipe.heal is not None else length
    bos = adds_bos(tokenizer)
    for name, skill in texts.items():
        for part in PARTS:
            try:
                pack(tokenizer, getattr(skill, part), longest, limit=1, bos=bos)
            except TextError as error:
                raise TextError(f"text of {name!r}, {part} part: {error}, or set fold.length") from None
        if skill.written:
            yield _written(name, skill)
        found = len(pack(tokenizer, skill.calibration, length, limit=wanted, bos=bos).tokens)
        if healed and found < wanted:
            asking = "fold.tokens" if recipe.wanted == recipe.fold.tokens else "healing"
            text = f"{found * length:,} tokens to calibrate on; {asking} asks for {recipe.wanted:,}"
            text += "; the expert will write the rest" if recipe.experts[name].write is None else ""
            yield Finding("warning", f"{name}: text", text)
    for one, other in permutations(texts, 2):
        leaked = shared_documents(texts[one], texts[other])
        if leaked:
            text = (
                f"{leaked} of its {len(texts[one].test)} test documents are calibration or validation text "
                f"of {other!r}: scores on it will look too good"
            )
            yield Finding("warning", f"{one}: text", text)


def _rows(recipe: Recipe, tokenizer: Any, texts: Mapping[str, Skill], more: Mapping[str, float]) -> dict[str, int]:
    """Rows of each part that the merge will read, all skills together; what experts have yet to write among them.

    more: by what the calibration rows of some are multiplied.
    """
    length, bos = recipe.fold.length, adds_bos(tokenizer)
    most = {"calibration": max(1, recipe.fold.tokens // length), "validation": HELD_OUT_ROWS, "test": TEST_ROWS}
    rows = dict.fromkeys(most, 0)
    for name, skill in texts.items():
        for part, usual in most.items():
            limit = math.ceil(usual * more.get(name, 1)) if part == "calibration" else usual
            writes = part == "calibration" and recipe.experts[name].write is None
            documents = getattr(skill, part)
            rows[part] += limit if writes else len(pack(tokenizer, documents, length, limit=limit, bos=bos).tokens)
    return rows


def _written(name: str, skill: Skill) -> Finding:
    """What follows from texts that an expert wrote itself."""
    if skill.files:
        text = f"{skill.written:,} documents that the expert wrote itself are added to calibrate by (write: 0 for none)"
        return Finding("approximate", f"{name}: text", text)
    text = (
        f"{skill.written:,} documents, all written by the expert itself: scores on them say how well the result "
        "follows the expert, not how well it reads what others wrote"
    )
    return Finding("warning", f"{name}: text", text)


def _codes(sources: Mapping[str, Source]) -> Iterator[Finding]:
    """Code that a config names and that is not there: it would have been refused."""
    for name, source in sources.items():
        if source.checkpoint.config.get("auto_map"):
            text = "config.json names Python code (`auto_map`), which is not run: read as transformers'"
            yield Finding("warning", f"{name}: code", f"{text} {source.spec.family}")


def _licences(sources: Mapping[str, Source], anchor: str) -> Iterator[Finding]:
    """The result's licence, where all experts state the same."""
    found = {name: licence(source.path) for name, source in sources.items()}
    stated = ", ".join(f"{name} {value or 'states none'}" for name, value in found.items())
    if len(set(found.values())) > 1 or found[anchor] is None:
        text = f"{stated}; the card will name none: settle it before you publish"
        yield Finding("warning", "licence", text)
    else:
        yield Finding("exact", "licence", f"{found[anchor]}, as all experts state")


def licence(folder: Path) -> str | None:
    """The licence in the front matter of a model's card; None without one."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        front = yaml.safe_load(match[1]) if (match := re.match(r"---\n(.*?)\n---", text, re.DOTALL)) else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    value = front.get("license") if isinstance(front, dict) else None
    return value if isinstance(value, str) else None
