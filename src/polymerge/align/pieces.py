"""Cut given bytes into a tokenizer's tokens, as in the middle of a text.

The bytes are written in the tokenizer's own alphabet and cut by its model alone (its merges or its scores),
so that no dummy space is put in front, and bytes that are a part of a character can be cut as well.
"""

import re
from collections.abc import Iterable

from polymerge.align.token_bytes import BYTE_CHARACTER, ByteView

_ESCAPED = re.compile("([\udc80-\udcff]+)")  # what `surrogateescape` makes of bytes that are not UTF-8


def cut(view: ByteView, sequences: Iterable[bytes]) -> list[list[int]]:
    """Token ids of each byte sequence; what the tokenizer has no token for is left out."""
    model = view.tokenizer.backend_tokenizer.model
    single = {b: i for i, b in enumerate(view.surface) if len(b) == 1 and not view.special[i]}
    out: list[list[int]] = []
    for data in sequences:
        ids: list[int] = []
        if view.kind == "byte-level":
            ids = [t.id for t in model.tokenize("".join(BYTE_CHARACTER[b] for b in data))]
        elif view.kind == "words":
            text = data.decode(errors="ignore")
            ids = view.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        else:
            for part in _ESCAPED.split(data.decode(errors="surrogateescape")):
                if _ESCAPED.match(part):
                    raw = part.encode(errors="surrogateescape")
                    ids += [single[bytes([b])] for b in raw if bytes([b]) in single]
                elif part:
                    ids += [t.id for t in model.tokenize(part.replace(" ", view.space))]
        out.append([i for i in ids if not view.special[i]])
    return out
