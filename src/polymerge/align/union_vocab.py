"""One byte-level BPE tokenizer with the vocabularies of several: the anchor's first, then what it lacks.

BPE (Sennrich et al. 2016) joins, again and again, the adjacent pair with the lowest rank. The anchor keeps its ids and
the ranks of its merges. A donor's missing tokens follow in the order of its merges, each with the donor's own merge
and, where the union as it stands would cut the token's text otherwise, with the merges that join what it is cut into.
So every token is one piece when it stands alone, and since later ranks only join what earlier ones left, none
that was is lost again. A token that can only be reached through a text that nobody has a token for is left out.

How texts are split before BPE (normalizer, pre-tokenizer) must be the same for all, and all bytes must have a token:
otherwise a donor's merges would be applied to pieces that they were not learned on.
"""

import json
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from polymerge.align.token_bytes import BYTE_CHARACTER, ByteView, byte_view
from polymerge.errors import PreflightError

Merge = tuple[str, str]


def union_tokenizer(name: str, anchor: Any, others: Mapping[str, Any]) -> Any:
    """The anchor's tokenizer with the tokens and merges that it lacks; the anchor's own where it lacks none.

    name, anchor: the anchor's name and fast tokenizer; others: donors by name. Special tokens, chat template and
    post-processing are the anchor's; a donor's special tokens are added unless the anchor has the literal or the role.
    Raises PreflightError where a tokenizer is not byte-level BPE, or splits texts in another way than the anchor's.
    """
    views = {name: byte_view(anchor)} | {k: byte_view(t) for k, t in others.items()}
    _check(name, views)
    description = _description(anchor)
    merged = _Merged(description)
    for donor, tokenizer in others.items():
        merged.add(_description(tokenizer), views[name], views[donor])
    if not merged.grown:
        return anchor
    return _loaded(anchor, merged.description())


class _Merged:
    """A growing BPE model: vocabulary, ranks of merges, added tokens."""

    def __init__(self, description: dict[str, Any]) -> None:
        self._base, model = description, description["model"]
        self.vocabulary: dict[str, int] = dict(model["vocab"])
        self.ranks: dict[Merge, int] = {pair: i for i, pair in enumerate(merges_of(model))}
        self.added: list[dict[str, Any]] = list(description["added_tokens"])
        # Beside the model's tokens their ids would be given out by position, and so move.
        self.vocabulary |= {t["content"]: t["id"] for t in self.added}
        self.start = self.next = 1 + max(self.vocabulary.values(), default=-1)

    @property
    def grown(self) -> bool:
        """Whether anything was added."""
        return self.next > self.start

    def add(self, donor: dict[str, Any], mine: ByteView, theirs: ByteView) -> None:
        """A donor's tokens, merges and added tokens."""
        waiting, before = merges_of(donor["model"]), -1
        while waiting and len(waiting) != before:  # again, while a merge of parts made by later ones gets its parts
            before = len(waiting)
            waiting = [pair for pair in waiting if not self._token(pair)]
        roles = {i for role, i in theirs.roles.items() if role in mine.roles}
        for token in donor["added_tokens"]:
            if token["content"] not in self.vocabulary and token["id"] not in roles:
                self.added.append({**token, "id": self.next})
                self._new(token["content"])

    def _new(self, token: str) -> None:
        self.vocabulary[token] = self.next
        self.next += 1

    def _token(self, pair: Merge) -> bool:
        """Add what a donor's merge makes; False where one of its parts is not there (yet)."""
        if pair[0] not in self.vocabulary or pair[1] not in self.vocabulary:
            return False
        token = "".join(pair)
        if token not in self.vocabulary and (merges := self._reaching(token, pair)) is not None:
            self._new(token)
            for merge in merges:
                self.ranks[merge] = len(self.ranks)
        return True

    def _reaching(self, token: str, pair: Merge) -> list[Merge] | None:
        """Merges to add so that BPE makes one piece of `token`; None where there are none."""
        found = [] if pair in self.ranks else [pair]
        while len(pieces := cut(token, self.ranks, found)) > 1:
            joints = [m for m in pairwise(pieces) if m not in self.ranks and m not in found]
            known = next((m for m in joints if "".join(m) in self.vocabulary or "".join(m) == token), None)
            if known is None:
                return None
            found.append(known)
        return found

    def description(self) -> dict[str, Any]:
        """As tokenizer.json holds it."""
        pairs = [list(pair) for pair in sorted(self.ranks, key=self.ranks.__getitem__)]
        model = {**self._base["model"], "vocab": self.vocabulary, "merges": pairs}
        return {**self._base, "model": model, "added_tokens": self.added}


def cut(text: str, ranks: Mapping[Merge, int], last: list[Merge] | tuple[()] = ()) -> list[str]:
    """BPE's pieces of a text; `last`: merges that rank after all of `ranks`, in this order."""
    later = {pair: len(ranks) + i for i, pair in enumerate(last)}
    pieces, never = list(text), len(ranks) + len(later)
    while len(pieces) > 1:
        rank, at = min((ranks.get(pair, later.get(pair, never)), i) for i, pair in enumerate(pairwise(pieces)))
        if rank == never:
            break
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


def merges_of(model: Mapping[str, Any]) -> list[Merge]:
    """Merges in order; files before tokenizers 0.20 write a pair as one string."""
    pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
    return [(str(a), str(b)) for a, b in pairs]


def _description(tokenizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return found


def _check(anchor: str, views: Mapping[str, ByteView]) -> None:
    for name, view in views.items():
        model = view.description["model"]
        found = model["type"] if view.kind == "byte-level" else f"{view.kind} {model['type']}"
        if found != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            raise PreflightError(
                f"tokenizer: union needs byte-level BPE of all experts, {name!r} has {found}; "
                "set `tokenizer:` to the name of one expert"
            )
        missing = set(BYTE_CHARACTER.values()) - set(view.pieces)
        if missing:
            raise PreflightError(
                f"tokenizer: union needs a token for every byte, {name!r} has none for {len(missing)} of 256; "
                "set `tokenizer:` to the name of another expert"
            )
        for key in ("normalizer", "pre_tokenizer"):
            if view.description[key] != views[anchor].description[key]:
                raise PreflightError(
                    f"tokenizer: union needs one way to split texts, but the {key} of {anchor!r} and of {name!r} "
                    "differ; set `tokenizer:` to the name of one expert"
                )


def _loaded(anchor: Any, description: dict[str, Any]) -> Any:
    """A transformers tokenizer with the anchor's settings and this description."""
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory(prefix="polymerge-") as place:
        anchor.save_pretrained(place)
        file = Path(place) / "tokenizer.json"
        file.write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")
        return PreTrainedTokenizerFast.from_pretrained(place)
