"""Train the demo's experts: two small language models of different family, depth, width and head count.

    python examples/train_experts.py all                  # both shipped experts, in parallel, one thread each
    python examples/train_experts.py prose --minutes 20   # one of them
    python examples/train_experts.py code-gpt2 --out out/experts
    python examples/train_experts.py report               # the table and the figure of train_experts.md

Each reads only its own domain's train part (`polymerge.demo.corpus`) and shares one byte-level BPE tokenizer,
trained on both. The best state is chosen on every 16th document of the train part; the held-out part is read
by `report` alone.

Schedule: linear warm-up, constant, linear decay to zero over the last 40 % (WSD; Hu et al. 2024, MiniCPM).
The position in it is the share of CPU time used, so that a run takes the time it is given. AdamW with weight
decay 0.1 on matrices, gradients clipped at norm 1.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymerge.bench.lm import EOS, VOCABULARY, fast, make_tokenizer, optimizer_for, rate_at, stream

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "src" / "polymerge" / "demo" / "experts"
LOGS = ROOT / "examples" / "logs"
FIGURES = ROOT / "examples" / "figures"

CONTEXT = 256
SNAPSHOT_SECONDS = 240


@dataclass(frozen=True)
class Expert:
    """One expert: what it reads, how it is built, how it is trained."""

    domain: str
    family: str
    shape: dict[str, Any]
    rate: float
    batch: int = 16  # rows of CONTEXT tokens
    dropout: float = 0.0  # on the embedding and on what each sub-layer adds
    autocast: bool = False  # bfloat16 products: measured 1.4 times as fast at width 128, slower at width 96
    shipped: bool = False
    vocabulary: int = VOCABULARY  # 257: bytes alone
    unigram: bool = False  # SentencePiece's way: a unigram model of words that begin with a blank, byte fallback


NEOX = {
    "hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 384,
    "hidden_act": "gelu", "use_parallel_residual": True, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "max_position_embeddings": 512,
}  # fmt: skip
EXPERTS = {
    "prose-llama": Expert("prose", "llama", {
        "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 352, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 512,
    }, rate=2e-3, dropout=0.1, autocast=True, shipped=True),
    "code-neox": Expert("code", "gpt_neox", NEOX, rate=2e-3, shipped=True),
    "code-neox-4k": Expert("code", "gpt_neox", NEOX, rate=2e-3, vocabulary=4096),
    "code-neox-bytes": Expert("code", "gpt_neox", NEOX, rate=2e-3, vocabulary=257),
    "code-neox-unigram": Expert("code", "gpt_neox", NEOX, rate=2e-3, unigram=True),
    "code-gpt2": Expert("code", "gpt2", {
        "n_embd": 96, "n_layer": 6, "n_head": 6, "n_positions": 512,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }, rate=2e-3),
    "code-qwen2": Expert("code", "qwen2", {
        "hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2,
        "intermediate_size": 256, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 512,
    }, rate=2e-3),
}  # fmt: skip
SHORT = {"prose": "prose-llama", "code": "code-neox"}


def make_unigram(texts: list[str], vocabulary: int = VOCABULARY) -> Any:
    """A unigram model over words that begin with ▁, bytes for what it has no piece for, as SentencePiece writes it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    draft = Tokenizer(models.Unigram())
    draft.normalizer = normalizers.Replace(" ", "▁")
    draft.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary - 257,
        unk_token="<unk>",  # noqa: S106
        special_tokens=["<unk>"],
        show_progress=False,
    )
    draft.train_from_iterator(texts, trainer)
    learned = [(piece, score) for piece, score in json.loads(draft.to_str())["model"]["vocab"] if piece != "<unk>"]
    alphabet = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces = [(EOS, 0.0), ("<unk>", 0.0), *alphabet, *learned][:vocabulary]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=1, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    return fast(tokenizer)


def build(expert: Expert) -> Any:
    """Make the expert's model with random weights (seed 0), float32."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = CONFIG_MAPPING[expert.family](vocab_size=expert.vocabulary, **special, **expert.shape)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def bits_per_byte(model: Any, tokenizer: Any, texts: list[str], rows: int | None = None) -> float:
    """Mean code length of texts cut into rows of CONTEXT + 1 tokens; the first token of a row is given.

    rows: about how many rows are taken, evenly over the documents; all by default.
    """
    import torch

    from polymerge.align.token_bytes import byte_view

    tokens = stream(tokenizer, texts)
    tokens = tokens[: len(tokens) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    tokens = tokens[:: max(1, len(tokens) // rows)] if rows else tokens
    lengths = byte_view(tokenizer).lengths.clone()
    lengths[tokenizer.bos_token_id] = 0
    nats = 0.0
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in tokens.split(16):
            logits = model(batch[:, :-1], use_cache=False).logits.float().flatten(0, 1)
            nats += torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").item()
    model.train(training)
    return nats / math.log(2) / lengths[tokens[:, 1:]].sum().item()


def add_dropout(model: Any, share: float) -> None:
    """Dropout by forward hooks, since the Llama family has none in its residual branches; it is not saved."""
    import torch

    def drop(module: Any, _inputs: Any, output: Any) -> Any:
        return torch.nn.functional.dropout(output, share, training=module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(drop)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a bfloat16 Hugging Face folder with its tokenizer."""
    import copy

    import torch

    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for its owner alone
    tokenizer.save_pretrained(folder)


class Journal:
    """The log of one run: a JSON line for every validation, and the best state so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = math.inf
        self.state: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")

    def add(self, model: Any, value: float, **row: float) -> None:
        """Write one line, and keep the model's state when its validation value is the lowest."""
        if value < self.best:
            self.best = value
            self.state = {key: weight.clone() for key, weight in model.state_dict().items()}
        line = json.dumps({**row, "val_bpb": round(value, 4)})
        print(self.path.stem, line, flush=True)
        with self.path.open("a", encoding="utf-8") as lines:
            print(line, file=lines)


def train(name: str, options: argparse.Namespace) -> None:
    """Train one expert for a number of CPU minutes on one thread and save its best state."""
    import torch
    from torch.nn.functional import cross_entropy

    from polymerge.demo.corpus import corpus

    torch.set_num_threads(1)
    expert = EXPERTS[name]
    texts = {domain: corpus(domain, "train") for domain in ("prose", "code")}
    make = make_unigram if expert.unigram else make_tokenizer
    tokenizer = make(texts["prose"] * 4 + texts["code"], expert.vocabulary)  # about as much of each
    validation = texts[expert.domain][::16]
    tokens = stream(tokenizer, [text for i, text in enumerate(texts[expert.domain]) if i % 16])
    model = build(expert)
    if expert.dropout:
        add_dropout(model, expert.dropout)
    print(f"{name}: {sum(w.numel() for w in model.parameters()):,} parameters, {len(tokens):,} tokens to read")
    optimizer = optimizer_for(model, expert.rate)
    generator = torch.Generator().manual_seed(0)
    journal = Journal(options.log or LOGS / f"{name}.jsonl")
    losses: list[float] = []
    step, reported, saved = 0, 0.0, 0.0
    began, budget = time.process_time(), options.minutes * 60
    while True:
        seconds = time.process_time() - began
        rate = (options.rate or expert.rate) * rate_at(seconds / budget)
        if losses and (seconds >= budget or seconds - reported >= max(15.0, budget / 60)):
            journal.add(
                model,
                bits_per_byte(model, tokenizer, validation, rows=96),
                step=step,
                tokens=step * expert.batch * CONTEXT,
                train_loss=round(sum(losses) / len(losses), 4),
                lr=round(rate, 6),
                cpu_seconds=round(seconds, 1),
            )
            losses, reported = [], seconds
            if options.snapshots and seconds - saved >= SNAPSHOT_SECONDS:
                save(model, tokenizer, options.snapshots / name)
                saved = seconds
        if seconds >= budget:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(tokens) - CONTEXT, (expert.batch,), generator=generator)
        batch = tokens[starts[:, None] + torch.arange(CONTEXT + 1)]
        with torch.autocast("cpu", torch.bfloat16, enabled=expert.autocast):
            logits = model(batch[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step += 1
    model.load_state_dict(journal.state)
    folder = (options.out or (SHIPPED if expert.shipped else ROOT / "out" / "experts")) / name
    save(model, tokenizer, folder)
    print(f"{name}: {journal.best:.4f} bits per byte on validation, saved in {folder}")


def report(folders: list[Path]) -> None:
    """Print each expert's bits per byte on each domain's held-out text and draw the training curves."""
    import matplotlib as mpl
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from polymerge.demo.corpus import corpus

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curves, table) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(3, 2), layout="constrained")
    print("| expert | parameters | CPU minutes | tokens read | prose | code |\n|---|---|---|---|---|---|")
    cells = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        # For a Qwen2 model AutoTokenizer cuts words by Qwen2's own rule, whatever tokenizer.json says.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        values = [bits_per_byte(model, tokenizer, corpus(domain, "heldout")) for domain in ("prose", "code")]
        rows = [json.loads(line) for line in (LOGS / f"{folder.name}.jsonl").read_text("utf-8").splitlines()]
        minutes = [row["cpu_seconds"] / 60 for row in rows]
        size = sum(weight.numel() for weight in model.parameters())
        cells.append([f"{value:.3f}" for value in values])
        print(
            f"| {folder.name} | {size:,} | {minutes[-1]:.1f} | {rows[-1]['tokens']:,} | "
            f"{cells[-1][0]} | {cells[-1][1]} |"
        )
        curves.plot(minutes, [row["val_bpb"] for row in rows], label=folder.name)
    curves.set(xlabel="CPU minutes (one thread)", ylabel="bits per byte, validation documents", ylim=(1, 2.5))
    curves.set_title("Training, each on its own domain", fontsize=10)
    curves.grid(alpha=0.3)
    curves.legend(frameon=False)
    table.axis("off")
    table.set_title("Bits per byte on held-out modules", fontsize=10)
    names = [folder.name for folder in folders]
    table.table(cells, rowLabels=names, colLabels=["prose", "code"], bbox=(0.3, 0.4, 0.7, 0.4))
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURES / "train_experts.png", dpi=150, metadata={"Software": None})


def main() -> None:
    """Read the command line and do what it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["all", "report", *SHORT, *EXPERTS])
    parser.add_argument("--minutes", type=float, default=20, help="CPU minutes for each expert")
    parser.add_argument("--out", type=Path, help="folder of the experts; the shipped ones go into the package")
    parser.add_argument("--log", type=Path, help="JSONL file; by default examples/logs/NAME.jsonl")
    parser.add_argument("--rate", type=float, help="peak learning rate")
    parser.add_argument("--snapshots", type=Path, help="save the unfinished model below here every four minutes")
    options = parser.parse_args()
    if options.what == "all":
        rest = [argument for argument in sys.argv[1:] if argument != "all"]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        running = [
            subprocess.Popen([sys.executable, __file__, name, *rest], env=one_thread)  # noqa: S603
            for name in SHORT.values()
        ]
        sys.exit(max(process.wait() for process in running))
    if options.what == "report":
        report([SHIPPED / name for name in SHORT.values()])
    else:
        train(SHORT.get(options.what, options.what), options)


if __name__ == "__main__":
    main()
