"""Loading a tokenizer as its own file says, and its chat template."""

from pathlib import Path
from typing import Any

from polymerge.calibrate.files import Chat
from polymerge.calibrate.packing import adds_bos
from polymerge.errors import CheckpointError


def load_tokenizer(path: Path) -> Any:
    """The fast tokenizer of a folder. Raises CheckpointError when there is none that transformers can load.

    `tokenizer.json` is read as it is: for some model types AutoTokenizer puts a pre-tokenizer and a normalizer
    of its own in place of the file's (transformers 5: qwen2), which cuts the same text into other tokens.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    reader = PreTrainedTokenizerFast if (path / "tokenizer.json").exists() else AutoTokenizer
    try:
        return reader.from_pretrained(path)
    except Exception as error:
        raise CheckpointError(
            f"{path}: no tokenizer that transformers can load ({str(error).splitlines()[0]}); expected tokenizer.json"
        ) from error


def chat_of(tokenizer: Any) -> Chat | None:
    """How a tokenizer's own chat template writes a conversation; None where it has none."""
    if not tokenizer.chat_template:
        return None
    lead = tokenizer.bos_token if adds_bos(tokenizer) else ""  # rows and documents begin with it anyway

    def chat(messages: list[Any]) -> str:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
        return text.removeprefix(lead)

    return chat
