"""Whether the experts read text alike: tokenizers are compared token by token and then on real text.

Equal sizes say nothing, so every id's bytes are compared (`align/same.py`). How texts are cut may be
described differently to the same effect (an older file of one tokenizer): so both also encode a fixed probe
and a sample of the recipe's own texts, and the ids decide.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from polymerge.align.same import same_vocabulary
from polymerge.align.spans import common_boundaries, spans
from polymerge.align.token_bytes import ByteView, as_view
from polymerge.align.vocab import shared
from polymerge.calibrate.texts import Skill, adds_bos
from polymerge.errors import PreflightError
from polymerge.model.spec import Spec
from polymerge.preflight.report import Finding

PROBE = (
    "The quick brown fox's 12,345.67 (3.0e-8)  jumped\n\n\tdef f(x): return x ** 2  # naïve café, Ünïcödé ﬁ "
    "½ 东京 🦊 don't DON'T   \r\n<|endoftext|></s>"
)
SAMPLES, LETTERS = 4, 2000
"""Documents per skill, and characters of each, that both tokenizers encode."""
EXPECTED = "expect some tenths of a bit per byte on its skill before healing, little after"


def foreign_experts(anchor: str, tokenizers: Mapping[str, Any], skills: Mapping[str, Skill]) -> dict[str, str]:
    """Experts whose tokenizer is not the anchor's, each with the first difference."""
    views = {name: as_view(t, words=True) for name, t in tokenizers.items()}
    found = {name: _difference(anchor, name, views, skills) for name in views if name != anchor}
    return {name: reason for name, reason in found.items() if reason}


def vocabulary_findings(
    anchor: str,
    tokenizers: Mapping[str, Any],
    specs: Mapping[str, Spec],
    skills: Mapping[str, Skill],
    *,
    translate: bool = False,
) -> list[Finding]:
    """What is the same, and what becomes of experts with another tokenizer.

    Raises PreflightError naming the first token or text on which two experts differ, unless the method can `translate`;
    then for a tokenizer whose tokens have no exact bytes.
    """
    out: list[Finding] = []
    views = {name: as_view(tokenizers[name], words=True) for name in specs}
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
    for name in specs:
        if name == anchor:
            continue
        if reason := _difference(anchor, name, views, skills):
            if not translate:
                raise PreflightError(f"{reason}; this method needs one tokenizer: use method: fold or union")
            out.append(Finding("approximate", f"{name}: tokenizer", _translated(anchor, name, tokenizers, skills)))
        else:
            found = _harmless(anchor, name, views)
            out += [Finding("warning", f"{name}: tokenizer", text) for text in found]
    if len(specs) > 1 and not any(f.subject.endswith(": tokenizer") for f in out):
        out.append(Finding("exact", "tokenizer", f"the same for all: {len(views[anchor].pieces):,} tokens"))
    return out


def _difference(anchor: str, name: str, views: Mapping[str, ByteView], skills: Mapping[str, Skill]) -> str | None:
    """The first token, or the first text, on which two tokenizers differ; None where they are one."""
    one, other = views[anchor].tokenizer, views[name].tokenizer
    pair = f"tokenizers of {anchor!r} and {name!r} differ"
    for difference in same_vocabulary(views[anchor], views[name]):
        if difference.what in ("bytes", "size"):
            return f"{pair}: {_first_token(views[anchor].pieces, views[name].pieces) or difference.message}"
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


def _harmless(anchor: str, name: str, views: Mapping[str, ByteView]) -> Iterator[str]:
    """Differences of `name`'s tokenizer from the anchor's that change no text's tokens."""
    one, other = views[anchor].tokenizer, views[name].tokenizer
    for difference in same_vocabulary(views[anchor], views[name]):
        what = "descriptions differ, results on sample texts do not: " if difference.what == "cut" else ""
        yield f"{what}{difference.message} (anchor's first); the result takes the anchor's"
    if adds_bos(one) != adds_bos(other):
        does, does_not = (anchor, name) if adds_bos(one) else (name, anchor)
        begin = views[does].tokenizer.bos_token
        yield f"{does!r} begins every text with {begin!r}, {does_not!r} does not; the anchor's way is used"


def _translated(anchor: str, name: str, tokenizers: Mapping[str, Any], skills: Mapping[str, Skill]) -> str:
    """How far two tokenizers are from each other on the text of the expert. Raises PreflightError (no exact bytes)."""
    one, other = as_view(tokenizers[anchor]), as_view(tokenizers[name])
    ends = shared_ends = theirs = 0
    for text in (d[:LETTERS] for d in skills[name].calibration[:SAMPLES]):
        mine, foreign = spans(one, text), spans(other, text)
        ends, theirs = ends + len(mine) - 1, theirs + len(foreign) - 1
        shared_ends += len(common_boundaries(mine, foreign)[0]) - 1
    same = len(shared(one, other)[0])
    return (
        f"another tokenizer ({len(other.pieces):,} tokens, {same:,} of the anchor's {len(one.pieces):,} among them): "
        f"it reads {theirs / max(1, ends):.2f} tokens for each of the anchor's, {shared_ends / max(1, ends):.0%} of "
        f"which end where one of its own does; {EXPECTED}"
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
