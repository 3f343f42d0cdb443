"""Texts that an expert writes itself, for a skill with little text or none.

A fold needs to know what an expert's layers see and say, and no labels: the expert's own writing shows it that
(data-free quantization does the same: Liu et al. 2023, LLM-QAT). It is drawn from the expert's distribution as it is,
temperature one and nothing cut off. Where the skill has texts, draws go on from windows of them; where it has none,
from the ends of earlier draws, so that not all are beginnings.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from polymerge.calibrate.texts import Skill, adds_bos, skill_of
from polymerge.errors import TextError
from polymerge.model.source import Source

LENGTH, BATCH, PROMPT = 256, 32, 32
"""Tokens of a draw, draws at once, tokens that a draw goes on from."""
FRUITLESS = 8
"""Batches in a row without a new word after which an expert is taken to have nothing more to say."""


def with_written(
    skill: Skill | None, name: str, expert: Source, tokenizer: Any, tokens: int, *, seed: int = 0
) -> Skill:
    """A skill whose calibration part goes on with what the expert wrote; with no skill, one of such texts alone."""
    documents = written(expert, tokenizer, tokens, seed=seed, texts=skill.calibration if skill else ())
    if skill is None:
        return skill_of(name, documents, seed=seed, written=len(documents))
    return replace(skill, calibration=[*skill.calibration, *documents], written=len(documents))


def lacking(skill: Skill, tokenizer: Any, tokens: int) -> int:
    """How many of so many calibration tokens the texts do not have."""
    found = 0
    for document in skill.calibration:
        found += len(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
        if found >= tokens:
            return 0
    return tokens - found


@torch.no_grad()
def written(expert: Source, tokenizer: Any, tokens: int, *, seed: int = 0, texts: Sequence[str] = ()) -> list[str]:
    """Distinct documents with about `tokens` tokens in all, the same for the same seed; `texts`: to go on from.

    Raises TextError: the expert writes nothing.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(expert.path, dtype=torch.float32).to(expert.device).eval()
    end = tokenizer.eos_token_id
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_length=min(LENGTH, expert.spec.max_positions),
        eos_token_id=end, pad_token_id=0 if end is None else end,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    joined = torch.tensor([token for ids in encoded for token in ids], dtype=torch.long)
    found: dict[str, int] = {}
    fruitless, rows = 0, torch.empty(0, 0, dtype=torch.long)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while sum(found.values()) < tokens and fruitless < FRUITLESS:
            begun = _windows(joined, settings, generator) if texts else _ends(rows, tokenizer, settings, generator)
            begun = _led(begun, tokenizer).to(expert.device)
            rows = model.generate(begun, attention_mask=torch.ones_like(begun), generation_config=settings).cpu()
            before = len(found)
            for row in rows.tolist():
                text = tokenizer.decode(row, skip_special_tokens=True)
                if text.strip():
                    found[text] = sum(token != end for token in row)
            fruitless = 0 if len(found) > before else fruitless + 1
    if not found:
        raise TextError(f"{expert.path}: the expert writes nothing; give the skill a text")
    return list(found)


def _windows(joined: Int64[Tensor, " token"], settings: Any, generator: torch.Generator) -> Int64[Tensor, "draw begun"]:
    """Tokens from anywhere in the texts, which are put one behind the other."""
    starts = torch.randint(max(1, len(joined) - PROMPT), (BATCH,), generator=generator)
    return joined[starts[:, None] + torch.arange(min(_prompt(settings), len(joined)))]


def _led(begun: Int64[Tensor, "draw begun"], tokenizer: Any) -> Int64[Tensor, "draw led"]:
    """With the token that begins every text, where the tokenizer has one: an expert may be lost without it."""
    if not adds_bos(tokenizer) or bool((begun[:, 0] == tokenizer.bos_token_id).all()):
        return begun
    return torch.cat([torch.full_like(begun[:, :1], tokenizer.bos_token_id), begun], dim=1)


def _prompt(settings: Any) -> int:
    """How many tokens a draw goes on from: of a short model at most half of what it can read."""
    return min(PROMPT, int(settings.max_length) // 2)


def _ends(
    rows: Int64[Tensor, "earlier time"], tokenizer: Any, settings: Any, generator: torch.Generator
) -> Int64[Tensor, "draw begun"]:
    """The last tokens of draws that had not come to an end; new beginnings, where fewer than half of them are left.

    A text begins with what marks its beginning, or its end; where nothing does, with any token.
    """
    end = -1 if settings.eos_token_id is None else settings.eos_token_id  # which may mark beginnings as well
    going = rows[(rows[:, 1:] != end).all(1)] if rows.shape[1] == settings.max_length else rows[:0]
    if len(going) >= BATCH // 2:
        return going[:, -_prompt(settings) :]
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        return torch.randint(len(tokenizer), (BATCH, 1), generator=generator)
    return torch.full((BATCH, 1), first)
