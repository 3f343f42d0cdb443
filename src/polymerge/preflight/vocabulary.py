"""Whether the experts read text alike: tokenizers are compared token by token and then on real text.

Equal sizes say nothing, so every id's bytes are compared (`align/same.py`). How texts are cut may be
described differently to the same effect (an older file of one tokenizer): so both also encode a fixed probe
and a sample of the recipe's own texts, and the ids decide.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from polymerge.align.same import same_vocabulary
from polymerge.align.spans import common_boundaries, spans
from polymerge.align.token_bytes import ByteView, byte_view
from polymerge.align.vocab import shared
from polymerge.calibrate.speech import Speech
from polymerge.calibrate.texts import Skill, adds_bos
from polymerge.errors import PreflightError
from polymerge.model.source import Source
from polymerge.model.spec import Spec
from polymerge.preflight.report import Finding

PROBE = (
    "The quick brown fox's 12,345.67 (3.0e-8)  jumped\n\n\tdef f(x): return x ** 2  # naïve café, Ünïcödé ﬁ "
    "½ 东京 🦊 don't DON'T   \r\n<|endoftext|></s>"
)
SAMPLES, LETTERS = 4, 2000
"""Documents per skill, and characters of each, that both tokenizers encode."""


def foreign_experts(speech: Speech, tokenizers: Mapping[str, Any], skills: Mapping[str, Skill]) -> dict[str, str]:
    """Experts whose tokenizer is not the result's, each with the first difference."""
    mine = byte_view(speech.tokenizer)
    found = {
        name: _difference(speech, name, mine, byte_view(tokenizer), skills)
        for name, tokenizer in tokenizers.items()
        if tokenizer is not speech.tokenizer
    }
    return {name: reason for name, reason in found.items() if reason}


def vocabulary_findings(
    speech: Speech,
    foreign: Mapping[str, str],
    tokenizers: Mapping[str, Any],
    specs: Mapping[str, Spec],
    skills: Mapping[str, Skill],
    *,
    translate: bool = False,
) -> list[Finding]:
    """What is the same, and what becomes of experts with another tokenizer than the result's.

    Raises PreflightError naming the first token or text on which two experts differ, unless the method can `translate`.
    """
    out: list[Finding] = []
    views = {name: byte_view(tokenizers[name]) for name in specs}
    mine = byte_view(speech.tokenizer)
    for name, spec in specs.items():
        largest = len(views[name].pieces)
        if largest > spec.vocab:
            raise PreflightError(
                f"{name}: the tokenizer has {largest:,} tokens, the embedding {spec.vocab:,} rows; tokenizer "
                "and weights do not belong together: get both from one place"
            )
        if largest < spec.vocab:
            text = f"{spec.vocab - largest:,} of {spec.vocab:,} embedding rows are padding, used by no token"
            out.append(Finding("exact", f"{name}: vocabulary", text))
    if speech.union:
        own = len(views[speech.owner].pieces)
        text = f"{len(mine.pieces):,} tokens: the anchor's {own:,}, and what the others have beside them"
        out.append(Finding("exact", "tokenizer", text))
    for name in specs:
        if tokenizers[name] is speech.tokenizer:
            continue
        out += _other_template(name, tokenizers[name], speech.tokenizer)
        if name in foreign:
            if not translate:
                raise PreflightError(f"{foreign[name]}; this method needs one tokenizer: use method: fold or union")
            text = _translated(mine, views[name], skills[name])
            out.append(Finding("approximate", f"{name}: tokenizer", text))
        else:
            found = _harmless(speech.owner, name, mine, views[name])
            out += [Finding("warning", f"{name}: tokenizer", text) for text in found]
    if len(specs) > 1 and not any(f.subject == "tokenizer" or f.subject.endswith(": tokenizer") for f in out):
        out.append(Finding("exact", "tokenizer", f"the same for all: {len(mine.pieces):,} tokens"))
    return out


def loading_findings(family: str, owner: Source, speech: Speech, skills: Mapping[str, Skill]) -> Iterator[Finding]:
    """Whether AutoTokenizer will cut texts as the result's tokenizer does; `owner`: the expert that this is of.

    For some model types and classes (transformers 5: qwen2) it splits texts by their own rule, whatever tokenizer.json
    says. Raises PreflightError for that, or only tells it where the owner has it already.
    """
    from transformers import AutoTokenizer

    texts = [PROBE, *(d[:LETTERS] for skill in skills.values() for d in skill.calibration[:SAMPLES])]

    def cuts_alike(loaded: Any) -> bool:
        return all(_ids(loaded, text) == _ids(speech.tokenizer, text) for text in texts)

    with tempfile.TemporaryDirectory(prefix="polymerge-") as place:
        if speech.union:
            speech.tokenizer.save_pretrained(place)
        for file in () if speech.union else owner.checkpoint.tokenizer_files():
            shutil.copy(file, place)
        (Path(place) / "config.json").write_text(json.dumps({"model_type": family}), encoding="utf-8")
        loaded = AutoTokenizer.from_pretrained(place)
    if len(loaded) > speech.vocab:
        text = f"AutoTokenizer adds tokens of its own: {len(loaded):,}, the embedding has {speech.vocab:,} rows"
        yield Finding("warning", "tokenizer: loading", f"{text}; load it with PreTrainedTokenizerFast")
    if cuts_alike(loaded):
        return
    problem = (
        f"AutoTokenizer splits texts of a {family} by the rule of {type(loaded).__name__}, not as {speech.name} does"
    )
    if speech.union or cuts_alike(AutoTokenizer.from_pretrained(owner.path)):
        raise PreflightError(f"family: {problem}, so it would feed the result wrong tokens; set family: llama")
    yield Finding("warning", "tokenizer: loading", f"{problem}; load it with PreTrainedTokenizerFast")


def _difference(speech: Speech, name: str, mine: ByteView, theirs: ByteView, skills: Mapping[str, Skill]) -> str | None:
    """The first token, or the first text, on which two tokenizers differ; None where they are one."""
    one, other = mine.tokenizer, theirs.tokenizer
    what = f"{speech.name} and that of {name!r}"
    pair = f"{what} differ" if speech.union else f"tokenizers of {speech.owner!r} and {name!r} differ"
    for difference in same_vocabulary(mine, theirs):
        if difference.what in ("bytes", "size"):
            return f"{pair}: {_first_token(mine.pieces, theirs.pieces) or difference.message}"
    texts = [PROBE, *(d[:LETTERS] for skill in skills.values() for d in skill.calibration[:SAMPLES])]
    for text in texts:
        left, right = _ids(one, text), _ids(other, text)
        if left != right:
            at = next(i for i, (a, b) in enumerate(zip_longest(left, right)) if a != b)
            near = one.decode(left[max(0, at - 3) : at + 3])
            return (
                f"{pair}: the same tokens, but texts are cut in other places (near {near!r}: ids "
                f"{left[at : at + 3]} and {right[at : at + 3]})"
            )
    return None


def _harmless(owner: str, name: str, mine: ByteView, theirs: ByteView) -> Iterator[str]:
    """Differences of `name`'s tokenizer from the result's, which is the owner's, that change no text's tokens."""
    for difference in same_vocabulary(mine, theirs):
        what = "descriptions differ, results on sample texts do not: " if difference.what == "cut" else ""
        yield f"{what}{difference.message} ({owner!r}'s first); the result takes that"
    if adds_bos(mine.tokenizer) != adds_bos(theirs.tokenizer):
        does, does_not = (owner, name) if adds_bos(mine.tokenizer) else (name, owner)
        begin = (mine if does == owner else theirs).tokenizer.bos_token
        yield f"{does!r} begins every text with {begin!r}, {does_not!r} does not; the way of {owner!r} is used"


def _other_template(name: str, theirs: Any, mine: Any) -> Iterator[Finding]:
    """What becomes of conversations that are written in another way than the result's tokenizer would."""
    if theirs.chat_template not in (None, mine.chat_template):
        text = "not the result's: its `messages` are written by its own, and so the result will know them"
        yield Finding("warning", f"{name}: chat template", text)


def _translated(mine: ByteView, theirs: ByteView, skill: Skill) -> str:
    """How far an expert's tokenizer is from the result's on the expert's text."""
    ends = shared_ends = read = 0
    for text in (d[:LETTERS] for d in skill.calibration[:SAMPLES]):
        ours, foreign = spans(mine, text), spans(theirs, text)
        ends, read = ends + len(ours) - 1, read + len(foreign) - 1
        shared_ends += len(common_boundaries(ours, foreign)[0]) - 1
    same = len(shared(mine, theirs)[0])
    loss = "; it sees no spaces, line breaks or case, whose probability is not known" if theirs.kind == "words" else ""
    return (
        f"another tokenizer ({len(theirs.pieces):,} tokens, {same:,} of the result's {len(mine.pieces):,} among them): "
        f"it reads {read / max(1, ends):.2f} tokens for each of the result's, {shared_ends / max(1, ends):.0%} of "
        f"which end where one of its own does{loss}"
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _first_token(one: Sequence[str], other: Sequence[str]) -> str | None:
    """The first id that stands for another token, or that only one has."""
    for i, (a, b) in enumerate(zip_longest(one, other)):
        if a != b:
            return f"id {i} is {_shown(a)} and {_shown(b)} (sizes {len(one):,} and {len(other):,})"
    return None


def _shown(token: str | None) -> str:
    return "missing" if token is None else repr(token)
