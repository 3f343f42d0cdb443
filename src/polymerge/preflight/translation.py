"""What it is expected to cost that an expert is told in another tokenizer's tokens.

Measured on a few rows of its validation text (counts are made on calibration text): what its predictions of the
result's next token, made before that token is seen, cost in bits per byte above its own tokens' predictions. That is
lost where its tokens are shorter than the result's and say only how the next one begins. Where they are longer nothing
is: a prediction inside a token knows that the token goes on, and can even come out ahead, which counts as no cost.
"""

from collections.abc import Mapping
from itertools import product
from typing import Any

from polymerge.align.spans import spans
from polymerge.align.token_bytes import byte_view
from polymerge.calibrate.foreign import BATCH, Foreign
from polymerge.calibrate.speech import Speech
from polymerge.calibrate.texts import Rows, Skill
from polymerge.preflight.report import Finding
from polymerge.readers import FINER

SAMPLES, LETTERS = 4, 2000
SHORTER = 0.95
"""Tokens of this share of others' mean length or less are shorter."""
LITTLE = 0.05
"""Bits per byte that healing makes up for."""


def check_positions(readers: Mapping[str, Any], *texts: Mapping[str, Rows]) -> None:
    """Raises PreflightError where many rows, of any skill, are longer than an expert's positions in its own tokens."""
    foreign = [reader for reader in readers.values() if isinstance(reader, Foreign)]
    for reader, rows in product(foreign, (rows for text in texts for rows in text.values())):
        reader.read(rows.tokens[:BATCH])


def translation_findings(
    speech: Speech,
    readers: Mapping[str, Any],
    rows: Mapping[str, Rows],
    tokenizers: Mapping[str, Any],
    skills: Mapping[str, Skill],
    *,
    union: bool = False,
) -> list[Finding]:
    """What each foreign expert loses in being told, and whose tokenizer would be better for a fold or a `union`.

    rows: validation rows of every skill in the result's tokens; readers: experts, the foreign ones as `Foreign`.
    """
    out: list[Finding] = []
    foreign = {name: reader for name, reader in readers.items() if isinstance(reader, Foreign)}
    for name, reader in foreign.items():
        own, told = reader.told(rows[name].tokens)
        cost = max(0.0, told - own)
        text = (
            f"told in the result's tokens its predictions cost {cost:+.3f} bits per byte on validation text "
            f"({own:.3f} in its own): {_expected(cost)}"
        )
        out.append(Finding("approximate", f"{name}: translation", text))
    if foreign and (text := _whose(speech, tokenizers, skills, union=union)):
        out.append(Finding("warning", "tokenizer: length", text))
    return out


def _whose(speech: Speech, tokenizers: Mapping[str, Any], skills: Mapping[str, Skill], *, union: bool) -> str:
    """Whose tokens would be better than the result's, if anybody's: a union's the shortest, else the longest."""
    lengths = {
        name: _bytes_per_token(t, skills) for name, t in tokenizers.items() if union or byte_view(t).kind != "words"
    }
    mine = _bytes_per_token(speech.tokenizer, skills)
    name = (min if union else max)(lengths, key=lengths.__getitem__)
    shorter, longer = (lengths[name], mine) if union else (mine, lengths[name])
    if shorter >= SHORTER * longer:
        return ""
    of = f"tokens, {lengths[name]:.2f} bytes each on these texts, the result's {mine:.2f}"
    if union:
        return (
            f"{name!r} has the shortest {of}. Longer tokens can be told in shorter ones, not the other way round: "
            f"`tokenizer: {name}` loses less per byte, with rows of more tokens"
        )
    return (
        f"{name!r} has the longest {of}. A row, and a step of healing, is so much more text by `tokenizer: {name}`: "
        "of three pairs that were healed by 400 thousand tokens the worse skill lost 0.14 to 0.48 bits per byte by the "
        "shorter tokens, 0.09 to 0.18 by the longer"
    )


def finer(speech: Speech, tokenizer: Any, name: str, skill: Skill) -> float:
    """How many of the result's tokens one of an expert's own is on its text; from 1 to `readers.FINER`."""
    own, mine = (_bytes_per_token(t, {name: skill}) for t in (tokenizer, speech.tokenizer))
    return min(FINER, max(1.0, own / mine)) if mine else 1.0


def _expected(cost: float) -> str:
    """In words, by pairs that were measured."""
    if cost < LITTLE:
        return "about as a pair with one tokenizer, before healing and after"
    return (
        "expect a fold that is worse by up to a quarter of a bit; healing, which reads the text too, makes up for most"
    )


def _bytes_per_token(tokenizer: Any, skills: Mapping[str, Skill]) -> float:
    view, size, count = byte_view(tokenizer), 0, 0
    for skill in skills.values():
        for text in (d[:LETTERS] for d in skill.calibration[:SAMPLES]):
            found = spans(view, text)
            size, count = size + int(found[-1]), count + len(found) - 1
    return size / max(1, count)
