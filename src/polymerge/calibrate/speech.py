"""The tokenizer that the result speaks: the anchor's, another expert's, or one with all vocabularies."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polymerge.align.same import same_vocabulary
from polymerge.align.token_bytes import as_view, byte_view
from polymerge.align.union_vocab import union_tokenizer
from polymerge.errors import PreflightError
from polymerge.model.spec import Spec
from polymerge.recipe import Recipe

UNION = "union"


@dataclass(frozen=True)
class Speech:
    """`tokenizer` with `vocab` embedding rows, those that pad included.

    `owner`: the expert whose tokenizer it is, or whose ids it keeps (`union`): the special tokens are its own.
    """

    tokenizer: Any
    owner: str
    vocab: int
    union: bool = False

    @property
    def name(self) -> str:
        """As messages say it."""
        return "the union of all tokenizers" if self.union else f"the tokenizer of {self.owner!r}"


def resolve(recipe: Recipe, tokenizers: Mapping[str, Any], specs: Mapping[str, Spec]) -> Speech:
    """What the recipe's `tokenizer:` names.

    Raises PreflightError where the vocabularies cannot be joined, or where its tokens do not say which bytes they stand
    for while an expert reads other ones.
    """
    owner = recipe.anchor if recipe.tokenizer in (None, UNION) else str(recipe.tokenizer)
    if recipe.tokenizer == UNION:
        others = {k: t for k, t in tokenizers.items() if k != recipe.anchor}
        found = union_tokenizer(recipe.anchor, tokenizers[recipe.anchor], others)
        if found is not tokenizers[recipe.anchor]:
            return Speech(found, recipe.anchor, len(as_view(found).pieces), union=True)
    mine = byte_view(tokenizers[owner])
    unlike = (k for k, t in tokenizers.items() if k != owner and same_vocabulary(mine, t))
    if mine.kind == "words" and (other := next(unlike, None)) is not None:
        raise PreflightError(
            f"the WordPiece tokenizer of {owner!r} loses spaces and line breaks (and mostly case), so a result that "
            f"speaks it could not write the text of {other!r}; set tokenizer: {other}"
        )
    return Speech(tokenizers[owner], owner, specs[owner].vocab)
