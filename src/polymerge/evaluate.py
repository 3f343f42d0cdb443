"""How good a model is on a text: bits per byte, and exact match where there are prompts with answers.

    bits per byte = Σ −log p(token) / (ln 2 · bytes)

over the scored tokens and the bytes of text they stand for. Unlike loss per token it compares models whose
tokenizers differ. Exact match: the share of prompts whose greedy continuation is the answer.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from polymerge import families
from polymerge.calibrate.texts import Rows, adds_bos, pack, pairs, read_skill
from polymerge.calibrate.tokenizer import chat_of, load_tokenizer
from polymerge.checkpoint.lock import measured_by
from polymerge.checkpoint.reader import Checkpoint
from polymerge.errors import CheckpointError

LENGTH = 256
"""Tokens a row, of a model that no merge made."""
_METHODS = Path(__file__).parent / "methods"


def bits_per_byte(
    model: Any,
    rows: Rows,
    *,
    batch: int = 16,
    device: str | torch.device | None = None,
) -> float:
    """Bits per byte of a causal LM on packed rows. The model's dtype is used; the sum is float64.

    device: where the model is moved to first; left where it is by default.
    """
    where = _place(model, device)
    nats = torch.zeros((), dtype=torch.float64)
    with _Evaluating(model), torch.no_grad():
        for tokens in torch.split(rows.tokens, batch):
            tokens = tokens.to(where)  # noqa: PLW2901
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
            # Row by row: the float32 copy of a large vocabulary's logits is what fills the memory.
            for scores, targets in zip(logits, tokens[:, 1:], strict=True):
                losses = F.cross_entropy(_wide(scores), targets, reduction="none")
                nats += losses.double().sum().cpu()
    return float(nats) / (math.log(2) * rows.bytes)


def exact_match(
    model: Any,
    tokenizer: Any,
    questions: Sequence[tuple[str, str]],
    max_new_tokens: int | None = None,
    *,
    batch: int = 16,
    bos: bool = False,
) -> float:
    """Share of (prompt, answer) whose greedy continuation is the answer, blanks at both ends ignored.

    Of the continuation as many lines count as the answer has: a model trained on running text goes on to the
    next example and not to an end-of-sequence token. max_new_tokens: default, the longest answer and a few.
    """
    if not questions:
        raise ValueError("no questions to answer")
    lead = [tokenizer.bos_token_id] if bos else []
    first = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if t is not None), 0)
    prompts = [tokenizer(q, add_special_tokens=False)["input_ids"] for q, _ in questions]
    answers = [answer.strip() for _, answer in questions]
    if max_new_tokens is None:
        encoded = tokenizer([answer for _, answer in questions], add_special_tokens=False)["input_ids"]
        max_new_tokens = max(map(len, encoded)) + 4
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if context is not None:  # of a longer prompt its end
        prompts = [ids[-max(1, context - max_new_tokens - len(lead)) :] for ids in prompts]
    prompts = [lead + ids or [first] for ids in prompts]
    pad = next(t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if t is not None)
    # Like lengths together: less padding. The order does not change the share.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    right = 0
    with _Evaluating(model), torch.no_grad():
        for start in range(0, len(order), batch):
            some = order[start : start + batch]
            longest = max(len(prompts[i]) for i in some)
            ids = torch.tensor([[pad] * (longest - len(prompts[i])) + prompts[i] for i in some])
            mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in some])
            written = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
            )
            texts = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
            right += sum(_matches(text, answers[i]) for text, i in zip(texts, some, strict=True))
    return right / len(questions)


def load_for_evaluation(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder. Code in the folder runs only if it is polymerge's own union.

    Raises CheckpointError for one that is damaged, not finite, or lacks weights that transformers would draw at random.
    """
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint(path)
    own = is_own_union(checkpoint)
    if not own:
        checkpoint.check()
    checkpoint.check_finite()
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype=dtype, trust_remote_code=own, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: transformers cannot load it ({str(error).splitlines()[0]})") from error
    if missing := sorted(loaded["missing_keys"]):
        raise CheckpointError(
            f"{path}: {len(missing)} tensors that config.json promises are not there, the first {missing[0]!r}; "
            "copy the folder again, with all its weight files"
        )
    return model.to(device).eval(), load_tokenizer(checkpoint.path)


def is_own_union(checkpoint: Checkpoint) -> bool:
    """Whether the folder's code is, byte for byte, the union model that polymerge ships.

    False without `auto_map`, or where it names code that is not there and the family needs none; CheckpointError when
    its code is anyone else's (or another version's).
    """
    auto_map = checkpoint.config.get("auto_map")
    stock = checkpoint.config.get("model_type") in families.names()
    if not auto_map or (stock and not any(checkpoint.path.glob("*.py"))):
        return False
    shipped = frozenset(hashlib.sha256(p.read_bytes()).hexdigest() for p in _METHODS.glob("*.py"))
    files = sorted(checkpoint.path.glob("*.py"))
    names = auto_map.values() if isinstance(auto_map, dict) else [None]
    local = all(isinstance(n, str) and (checkpoint.path / f"{n.split('.')[0]}.py") in files for n in names)
    foreign = [p for p in files if hashlib.sha256(p.read_bytes()).hexdigest() not in shipped]
    if foreign or not local:
        what = f"{foreign[0].name} is not" if foreign else "`auto_map` names code elsewhere that is not"
        raise CheckpointError(
            f"{checkpoint.path}: {what} the code of this polymerge's union, so it is not run; expected a"
            f" stock transformers model or a union written by this version (merge it again)"
        )
    return True


def evaluate(
    path: str | Path,
    texts: Mapping[str, Path | str | Sequence[Path | str]],
    *,
    split: str = "test",
    field: str = "text",
    seed: int | None = None,
    length: int | None = None,
    limit: int | None = None,
    batch: int = 16,
    bos: bool | None = None,
    max_new_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> dict[str, dict[str, float | int | None]]:
    """Measure a checkpoint folder on named texts: {name: {bits_per_byte, exact_match, tokens, bytes, length}}.

    split: "test" measures the tenth that a merge with the same seed never sees, "all" the whole text.
    seed, length: of the split, and tokens a row, at most the model's context; by default as the merge that made the
    folder had them, so that its table comes out again, else 0 and 256.
    limit: at most so many rows (and prompts) a text; a merge reads `readers.TEST_ROWS` of them.
    bos: begin rows and prompts with the bos token; by default, if the tokenizer does so by itself.
    texts: files or folders of each. exact_match is None where they have no prompt/answer records. They are read before
    the model is.
    """
    if split not in ("test", "all"):
        raise ValueError(f"split is {split!r}; expected 'test' or 'all'")
    folder = Checkpoint(path).path
    merged = measured_by(folder)
    seed = merged.get("seed", 0) if seed is None else seed
    length = merged.get("length", LENGTH) if length is None else length
    chat = chat_of(load_tokenizer(folder))
    documents: dict[str, list[str]] = {}
    questions: dict[str, list[tuple[str, str]]] = {}
    for name, given in texts.items():
        paths = [Path(p) for p in ([given] if isinstance(given, Path | str) else given)]
        skill = read_skill(name, paths, field=field, chat=chat, seed=seed)
        chosen = skill.test + ([] if split == "test" else skill.validation + skill.calibration)
        among = frozenset(chosen)
        documents[name] = chosen
        questions[name] = [(q, a) for q, a in pairs(paths, field=field, chat=chat) if q + a in among][:limit]
    model, tokenizer = load_for_evaluation(path, dtype=dtype, device=device)
    context = getattr(model.config, "max_position_embeddings", None) or length
    length, lead = min(length, context), adds_bos(tokenizer) if bos is None else bos
    results: dict[str, dict[str, float | int | None]] = {}
    for name, chosen in documents.items():
        rows = pack(tokenizer, chosen, length, limit=limit, bos=lead)
        asked = questions[name]
        results[name] = {
            "bits_per_byte": bits_per_byte(model, rows, batch=batch),
            "exact_match": exact_match(model, tokenizer, asked, max_new_tokens, batch=batch, bos=lead)
            if asked
            else None,
            "tokens": rows.tokens[:, 1:].numel(),
            "bytes": rows.bytes,
            "length": length,
        }
    return results


class _Evaluating:
    """Evaluation mode inside, the former mode afterwards."""

    def __init__(self, model: Any) -> None:
        self.model, self.was = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.train(self.was)


def _place(model: Any, device: str | torch.device | None) -> torch.device:
    if device is not None:
        model.to(device)
    place: torch.device = next(model.parameters()).device
    return place


def _wide(scores: torch.Tensor) -> torch.Tensor:
    """Half precision to float32: a log-softmax in bfloat16 is off by hundredths of a nat."""
    return scores if scores.dtype == torch.float64 else scores.float()


def _matches(written: str, answer: str) -> bool:
    lines = written.strip().split("\n")[: answer.count("\n") + 1]
    return "\n".join(lines).strip() == answer
