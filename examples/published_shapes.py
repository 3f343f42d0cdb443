"""Does a merge run at the sizes that people have? Two models in published shapes, merged on this machine.

    python examples/published_shapes.py [--tokens 2k] [--size 1.0x] [--characters 60000] [--layers 2]

SmolLM2-135M (Allal et al. 2025; Llama, 30 layers, width 576, 49,152 tokens) and Qwen2.5-0.5B (Qwen team 2024; Qwen2, 24
layers, width 896, 151,936 tokens) as their configs state them, heads tied, bfloat16, tokenizers that split texts as
theirs do, trained on the texts. Weights are random and taught for a dozen steps, so that each speaks its own text best:
what a merge takes does not depend on how good its experts are; what it keeps is not asked here. One JSON line in
`--out`: what preflight said, what it took, what became of both skills. Texts: `--texts` or POLYMERGE_TEXTS
(docs/benchmark.md).
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from polymerge import merge
from polymerge.bench import text_experts
from polymerge.bench.machine import commit, describe
from polymerge.calibrate.packing import pack

EOS, CHAT = "<|endoftext|>", ["<|im_start|>", "<|im_end|>"]
STEPS, ROWS, LENGTH, RATE, WARM_UP = 12, 2, 128, 1e-3, 5
"""Of teaching: enough that the words of its text are likelier than others."""
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Published:
    """A model's config as published, the domain that it is taught, and its tokenizer's rule."""

    domain: str
    config: dict[str, Any]
    pieces: Any
    normalizer: Any = None


MODELS = {
    "qwen2.5-0.5b": Published(
        "gsm8k",
        {
            "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "rope_theta": 1e6,
            "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6,
        },
        pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]),
        normalizers.NFC(),
    ),
    "smollm2-135m": Published(
        "stories",
        {
            "model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 1e5,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        },
        pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]),
    ),
}  # fmt: skip
"""The first is the anchor."""


def main() -> None:
    """Make both, merge them, add the row."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--tokens", default="2k", help="of calibration text, each")
    arguments.add_argument("--size", default="1.0x", help="of the larger")
    arguments.add_argument("--characters", type=int, default=60_000, help="of each text: measuring takes its tenth")
    arguments.add_argument("--layers", type=int, help="of each model, for a quick look; default as published")
    arguments.add_argument("--texts", type=Path)
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent / "results/published_shapes.jsonl")
    asked = arguments.parse_args()
    workshop = text_experts.Workshop(text_experts.texts_folder(asked.texts), 0)
    corpus = [text for domain in text_experts.DOMAINS for text in workshop.skill(domain).calibration]
    with TemporaryDirectory() as scratch:
        place = Path(scratch)
        experts = {}
        for name, published in MODELS.items():
            texts = workshop.skill(published.domain).calibration
            fewer = {"num_hidden_layers": asked.layers} if asked.layers else {}
            make(published, published.config | fewer, corpus, texts, place / name)
            kept = "\n\n\n".join(reversed(texts))[: asked.characters]
            (place / f"{name}.txt").write_text(kept, encoding="utf-8")
            experts[name] = {"model": name, "text": f"{name}.txt", "write": 0}
        (place / "recipe.yaml").write_text(json.dumps({
            "method": "fold", "anchor": next(iter(MODELS)), "experts": experts, "size": {"params": asked.size},
            "dtype": "bfloat16", "fold": {"tokens": asked.tokens, "refine": 0, "trials": False},
        }), encoding="utf-8")  # fmt: skip
        done = merge(place / "recipe.yaml", place / "out")
    told = done.report.summary()
    row = {
        "commit": commit(), "tokens": asked.tokens, "size": asked.size, "characters": asked.characters,
        "layers": asked.layers,
        "experts": done.expert_parameters, "parameters": done.parameters, "shape": done.shape, "owners": done.owners,
        "told": {key: told[key] for key in ("seconds", "stages", "memory_bytes")}, "seconds": done.seconds,
        "cpu_seconds": done.cpu_seconds, "peak_bytes": done.peak_bytes, "skills": done.skills,
        "threads": torch.get_num_threads(), "device": describe("cuda" if torch.cuda.is_available() else "cpu"),
    }  # fmt: skip
    print(line := json.dumps(row))
    with asked.out.open("a", encoding="utf-8") as lines:
        lines.write(line + "\n")


def make(published: Published, config: dict[str, Any], corpus: list[str], texts: list[str], folder: Path) -> None:
    """A model of the published shape that has read a little of its texts, and its tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = published.pieces, decoders.ByteLevel()
    if published.normalizer is not None:
        tokenizer.normalizer = published.normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=config["vocab_size"], special_tokens=[EOS, *CHAT], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    ends = {"tie_word_embeddings": True, "bos_token_id": fast.eos_token_id, "eos_token_id": fast.eos_token_id}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config, **ends))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    rows = pack(fast, texts, LENGTH, limit=STEPS * ROWS).tokens
    for step, batch in enumerate(rows.split(ROWS)):
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP)
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    main()
