"""Training of small language models from scratch: their tokenizer, their stream of tokens, their schedule.

Schedule: linear warm-up, constant, linear decay to zero over the last 40 % (WSD; Hu et al. 2024, MiniCPM). AdamW with
weight decay on matrices only, gradients clipped at norm 1; on a GPU an update is one CUDA graph, and products are in
TF32. A run reads a fixed number of tokens, so it can be repeated.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor

from polymerge.bench.graph import captured, set_rate, tensor_float
from polymerge.calibrate.packing import Rows
from polymerge.errors import PolymergeError
from polymerge.evaluate import bits_per_byte

VOCABULARY = 1024
EOS = "<|endoftext|>"
WARM_UP, DECAY = 0.02, 0.40
"""Shares of a run."""


@dataclass(frozen=True)
class Training:
    """Tokens read in all, rows of `context` tokens in batches of `batch`; `checks`: how often it is validated."""

    tokens: int = 1_600_000
    context: int = 256
    batch: int = 8
    lr: float = 2e-3
    weight_decay: float = 0.1
    checks: int = 12

    @property
    def steps(self) -> int:
        """Updates."""
        return max(1, self.tokens // (self.batch * self.context))


def make_tokenizer(texts: Sequence[str], vocabulary: int = VOCABULARY) -> Any:
    """Byte-level BPE: every byte is in the alphabet, so any text round-trips exactly.

    A line break and the indentation after it are one piece, so they can be one token; the last space stays
    with the word that it precedes, as between words.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    pieces = (  # contractions; letters; digits; signs; line breaks with indentation; other blanks
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n+(?: +(?= ))?|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[EOS], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return fast(tokenizer)


def fast(tokenizer: Any) -> Any:
    """As transformers loads it; EOS begins, ends and pads."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=EOS, model_max_length=512,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def stream(tokenizer: Any, texts: Sequence[str]) -> Int64[Tensor, " token"]:
    """All documents as one row of tokens, each begun by EOS."""
    encoded = tokenizer(list(texts), verbose=False, return_attention_mask=False)["input_ids"]
    return torch.tensor([token for document in encoded for token in [tokenizer.bos_token_id, *document]])


def rate_at(progress: float) -> float:
    """Factor of the learning rate at a progress in 0..1: warm-up, constant, linear decay to zero."""
    return max(0.0, min(1.0, progress / WARM_UP, (1 - progress) / DECAY))


def optimizer_for(model: Any, rate: float, decay: float = 0.1, *, device: str = "cpu") -> torch.optim.AdamW:
    """AdamW that lets only matrices decay; on a GPU one that can be part of a CUDA graph."""
    gpu = device.startswith("cuda")
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    lr = torch.tensor(rate, device=device) if gpu else rate
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True, capturable=gpu)


@tensor_float()
def train(
    model: Any,
    tokens: Int64[Tensor, " token"],
    held_out: Rows,
    settings: Training,
    seed: int,
    *,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Train a model in place to its best state on held-out rows; what it took and its curve, JSON-ready.

    Raises PolymergeError: it never had a finite loss there.
    """
    generator = torch.Generator().manual_seed(seed)
    model.to(device).train()
    optimizer = optimizer_for(model, settings.lr, settings.weight_decay, device=device)
    row = torch.arange(settings.context + 1)
    batch = tokens[row.expand(settings.batch, -1)].to(device)

    def update() -> Tensor:
        """One step on the batch; its loss."""
        logits = model(batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    update_once = captured(update, device, optimizer)
    best, state, curve = math.inf, {}, []
    losses: list[Tensor] = []
    checks = {round(settings.steps * (i + 1) / settings.checks) for i in range(settings.checks)}
    began, began_cpu = time.perf_counter(), time.process_time()
    for step in range(1, settings.steps + 1):
        set_rate(optimizer, settings.lr * rate_at((step - 0.5) / settings.steps))
        starts = torch.randint(len(tokens) - settings.context, (settings.batch,), generator=generator)
        batch.copy_(tokens[starts[:, None] + row])
        losses.append(update_once().clone())
        if step not in checks:
            continue
        score = bits_per_byte(model, held_out)
        model.train()
        if score < best:
            best, state = score, {key: weight.clone() for key, weight in model.state_dict().items()}
        read = step * settings.batch * settings.context
        curve.append({"step": step, "tokens": read, "train_loss": float(torch.stack(losses).mean()), "val_bpb": score})
        losses = []
        progress(f"{read:,} tokens, {score:.3f} bits per byte")
    if not state:
        raise PolymergeError(
            f"training: no finite loss in {settings.steps} steps; expected a rate below {settings.lr:g}"
        )
    model.load_state_dict(state)
    model.eval()
    return {
        "steps": settings.steps, "tokens": settings.steps * settings.batch * settings.context, "best_val_bpb": best,
        "seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - began_cpu, "curve": curve,
    }  # fmt: skip
