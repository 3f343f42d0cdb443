"""Whether the experts read text alike: one tokenizer, compared token by token and then on real text.

Equal sizes say nothing, so every id's bytes are compared (`align/same.py`). How texts are cut may be
described differently to the same effect (an older file of one tokenizer): so both also encode a fixed probe
and a sample of the recipe's own texts, and the ids decide.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from polymerge.align.same import same_vocabulary
from polymerge.align.token_bytes import ByteView, as_view
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
ONE_TOKENIZER = "experts must share one tokenizer"


def vocabulary_findings(
    anchor: str, tokenizers: Mapping[str, Any], specs: Mapping[str, Spec], skills: Mapping[str, Skill]
) -> list[Finding]:
    """Raises PreflightError naming the first token or text on which two experts differ."""
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
        if name != anchor:
            found = _compare(anchor, name, views, skills)
            out += [Finding("warning", f"{name}: tokenizer", text) for text in found]
    if len(specs) > 1 and not any(f.level == "warning" for f in out):
        out.append(Finding("exact", "tokenizer", f"the same for all: {len(views[anchor].pieces):,} tokens"))
    return out


def _compare(anchor: str, name: str, views: Mapping[str, ByteView], skills: Mapping[str, Skill]) -> Iterator[str]:
    """Harmless differences of `name`'s tokenizer from the anchor's."""
    one, other = views[anchor].tokenizer, views[name].tokenizer
    pair = f"tokenizers of {anchor!r} and {name!r} differ"
    differences = same_vocabulary(views[anchor], views[name])
    for difference in differences:
        if difference.what in ("bytes", "size"):
            first = _first_token(views[anchor].pieces, views[name].pieces)
            raise PreflightError(f"{pair}: {first or difference.message}; {ONE_TOKENIZER}, token by token")
    texts = [PROBE, *(d[:LETTERS] for skill in skills.values() for d in skill.calibration[:SAMPLES])]
    for text in texts:
        left, right = _ids(one, text), _ids(other, text)
        if left != right:
            at = next(i for i, (a, b) in enumerate(zip_longest(left, right)) if a != b)
            near = one.decode(left[max(0, at - 3) : at + 3])
            raise PreflightError(
                f"{pair}: the same tokens, but texts are cut in other places (near {near!r}: ids "
                f"{left[at : at + 3]} and {right[at : at + 3]}); {ONE_TOKENIZER}"
            )
    for difference in differences:
        what = "descriptions differ, results on sample texts do not: " if difference.what == "cut" else ""
        yield f"{what}{difference.message} (anchor's first); the result takes the anchor's"
    if adds_bos(one) != adds_bos(other):
        does, does_not = (anchor, name) if adds_bos(one) else (name, anchor)
        begin = views[does].tokenizer.bos_token
        yield f"{does!r} begins every text with {begin!r}, {does_not!r} does not; the anchor's way is used"


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
