"""The text suite's experts: small language models, each trained on one domain of a user's folder of texts.

They are build products, kept in the cache under a hash of all that they depend on: plan, texts, split, tokenizer, seed
and training. A byte-level BPE is trained on about as much of each domain and shared by their experts: 1,024 tokens for
the six small domains, as many for three that no default was chosen by, 8,192 for the two large ones, whose experts have
up to 100 million parameters. An expert and the
tokenizer read the calibration part of the split alone (`calibrate.texts.read_skill` with the case's seed), the very
split of the merge: nobody has read the validation and test parts. One expert has a tokenizer of its own, of its own
domain alone.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from polymerge.bench import lm
from polymerge.bench.locks import held
from polymerge.bench.modular import cache_folder
from polymerge.calibrate.texts import Skill, pack, read_skill
from polymerge.calibrate.tokenizer import load_tokenizer
from polymerge.errors import OutputError, PreflightError
from polymerge.model.target import load_student

VARIABLE = "POLYMERGE_TEXTS"
RECIPE_VERSION = 1
"""Part of the cache's key: raise it when training changes in a way that the settings don't show."""
TUNING = lm.Training(tokens=800_000, lr=1e-3)
"""Of experts that start from a base: half the tokens at half the rate."""
TRAININGS = {
    size: lm.Training(tokens=8_000_000, batch=32, lr=lr) for size, lr in (("5m", 2e-3), ("27m", 1e-3), ("100m", 5e-4))
}
"""Of experts of the large domains, which have about two million tokens each: the larger, the slower."""
TOKENIZER_CHARACTERS = 400_000
"""Of each domain, for the tokenizer."""
HELD_BACK, HELD_ROWS = 16, 48
"""Every 16th calibration document is kept back to choose the best state: at most so many rows."""


@dataclass(frozen=True)
class Domain:
    """Files of the texts' folder; `field`: the key of their records, if they have records."""

    files: tuple[str, ...]
    field: str = "text"


DOMAINS = {
    "shakespeare": Domain(("shakespeare.txt",)),
    "python": Domain(("code-python.txt",)),
    "gsm8k": Domain(("gsm8k-train.jsonl",), "answer"),
    "stories": Domain(("tinystories.jsonl",)),
    "rust": Domain(("code-rust.txt",)),
    "wiki": Domain(("wikitext2-valid.txt",)),
    "books": Domain(("darwin.txt", "sherlock.txt")),
    "programs": Domain(("code-java.txt", "code-python.txt", "code-rust.txt")),
    "sherlock": Domain(("sherlock.txt",)),
    "java": Domain(("code-java.txt",)),
    "scan": Domain(("scan-train.txt",)),
}


@dataclass(frozen=True)
class SharedTokenizer:
    """The tokenizer that the experts of some domains share."""

    domains: tuple[str, ...]
    vocabulary: int


TOKENIZERS = {
    "text-tokenizer": SharedTokenizer(("shakespeare", "python", "gsm8k", "stories", "rust", "wiki"), lm.VOCABULARY),
    "large-text-tokenizer": SharedTokenizer(("books", "programs"), 8 * lm.VOCABULARY),
    "unseen-text-tokenizer": SharedTokenizer(("sherlock", "java", "scan"), lm.VOCABULARY),
    "python-tokenizer": SharedTokenizer(("python",), 2 * lm.VOCABULARY),
}
"""A domain's experts speak the first that has it, but for plans that name another."""


def tokenizer_of(domain: str) -> tuple[str, SharedTokenizer]:
    """The tokenizer of a domain's experts, and its name."""
    return next((name, shared) for name, shared in TOKENIZERS.items() if domain in shared.domains)


@dataclass(frozen=True)
class ExpertPlan:
    """An expert to train: its domain and its architecture. Head sizes are kept to 12, 24 and 24's multiples, or to 64.

    `base`: the plan, in `PLANS`, of the model that it is tuned from; none: random weights. `size`: its training, in
    `TRAININGS`; none: the usual one. `speaks`: its tokenizer, in `TOKENIZERS`; none: its domain's.
    """

    domain: str
    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    base: str = ""
    size: str = ""
    speaks: str = ""

    @property
    def name(self) -> str:
        """Such as python-llama-4x96x4."""
        more = "-tuned" * bool(self.base) + f"-{self.speaks}" * bool(self.speaks)
        return f"{self.domain}-{self.family}-{self.layers}x{self.width}x{self.heads}{more}"

    @property
    def tokenizer(self) -> tuple[str, SharedTokenizer]:
        """Its tokenizer, and that one's name."""
        return (self.speaks, TOKENIZERS[self.speaks]) if self.speaks else tokenizer_of(self.domain)


PLANS = {
    "shakespeare": ExpertPlan("shakespeare", "llama", 4, 96, 4, 4, 256),
    # One axis each away from shakespeare's architecture, then all of them.
    "python/seed": ExpertPlan("python", "llama", 4, 96, 4, 4, 256),
    "python/depth": ExpertPlan("python", "llama", 6, 96, 4, 4, 256),
    "python/width": ExpertPlan("python", "llama", 4, 144, 6, 6, 384),
    "python/heads": ExpertPlan("python", "llama", 4, 96, 8, 2, 256),
    "python/family": ExpertPlan("python", "gpt2", 4, 96, 4, 4, 384),
    "python/tokenizer": ExpertPlan("python", "llama", 4, 96, 4, 4, 256, speaks="python-tokenizer"),
    "python/all": ExpertPlan("python", "gpt_neox", 6, 120, 10, 10, 480),
    "gsm8k": ExpertPlan("gsm8k", "qwen2", 3, 144, 6, 2, 384),
    "stories": ExpertPlan("stories", "qwen3", 6, 72, 6, 3, 216),
    "rust": ExpertPlan("rust", "mistral", 2, 192, 8, 2, 512),
    "wiki": ExpertPlan("wiki", "qwen2", 5, 120, 5, 1, 320),
    # Of texts and shapes that no default was ever chosen by.
    "sherlock": ExpertPlan("sherlock", "gpt_neox", 3, 168, 7, 7, 672),
    "java": ExpertPlan("java", "llama", 5, 96, 8, 4, 256),
    "scan": ExpertPlan("scan", "qwen3", 4, 108, 9, 3, 288),
    # Tuned from a common base, or from bases of two widths: the home ground of task vectors.
    "wiki/base": ExpertPlan("wiki", "llama", 4, 96, 4, 4, 256),
    "wiki/wide-base": ExpertPlan("wiki", "llama", 4, 144, 6, 6, 384),
    "shakespeare/tuned": ExpertPlan("shakespeare", "llama", 4, 96, 4, 4, 256, "wiki/base"),
    "python/tuned": ExpertPlan("python", "llama", 4, 96, 4, 4, 256, "wiki/base"),
    "python/wide-tuned": ExpertPlan("python", "llama", 4, 144, 6, 6, 384, "wiki/wide-base"),
    # Two families at three sizes, heads of 64 as models of these sizes have.
    "books/5m": ExpertPlan("books", "llama", 4, 192, 3, 3, 512, size="5m"),
    "books/27m": ExpertPlan("books", "llama", 8, 448, 7, 7, 1216, size="27m"),
    "books/100m": ExpertPlan("books", "llama", 12, 768, 12, 12, 2048, size="100m"),
    "programs/5m": ExpertPlan("programs", "qwen3", 6, 192, 3, 1, 448, size="5m"),
    "programs/27m": ExpertPlan("programs", "qwen3", 12, 384, 6, 2, 1024, size="27m"),
    "programs/100m": ExpertPlan("programs", "qwen3", 16, 640, 10, 5, 1920, size="100m"),
}
"""Every expert that a case can name. Width grows by heads of one size, as it does in families of models."""
AXES = ("seed", "depth", "width", "heads", "family", "tokenizer", "all")
"""What python's expert differs in from shakespeare's; seed: in nothing but its initialisation and its texts; all: in
everything but its tokenizer."""


def texts_folder(asked: Path | None = None) -> Path | None:
    """The folder of texts: as asked, or POLYMERGE_TEXTS."""
    named = os.environ.get(VARIABLE)
    return asked or (Path(named) if named else None)


def lacking(texts: Path | None, shared: SharedTokenizer) -> str:
    """What is missing for experts of a tokenizer to be trained, in one line; empty if nothing is."""
    names = [file for domain in shared.domains for file in DOMAINS[domain].files]
    if texts is None:
        return f"needs a folder with {', '.join(names)}: name it in {VARIABLE} or by --texts"
    missing = [name for name in names if not (texts / name).is_file()]
    return f"needs {', '.join(missing)} in {texts}" if missing else ""


@dataclass(frozen=True)
class Expert:
    """A trained expert: its checkpoint, its skill's texts, and the record of its training."""

    folder: Path
    texts: tuple[Path, ...]
    field: str
    record: Mapping[str, Any]


class Workshop:
    """Trains what the cache lacks, for one folder of texts and one seed."""

    def __init__(
        self,
        texts: Path | None,
        seed: int,
        *,
        training: lm.Training | None = None,
        cache: Path | None = None,
        device: str = "cpu",
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.texts, self.seed, self.device, self.progress = texts, seed, device, progress
        self.training, self.cache = training or lm.Training(), cache or cache_folder()
        self.skills: dict[str, Skill] = {}

    def skill(self, domain: str) -> Skill:
        """A domain's texts, split as every merge with this seed splits them. Raises PreflightError: they lack."""
        if domain not in self.skills:
            if why := lacking(self.texts, tokenizer_of(domain)[1]):
                raise PreflightError(why)
            self.skills[domain] = read_skill(domain, self._files(domain), field=DOMAINS[domain].field, seed=self.seed)
        return self.skills[domain]

    def tokenizer(self, name: str, shared: SharedTokenizer) -> Path:
        """The folder of a tokenizer."""
        digests = {each: self.skill(each).digest() for each in shared.domains}
        depends = {"version": RECIPE_VERSION, "vocabulary": shared.vocabulary, "skills": digests}

        def make(folder: Path) -> None:
            some: list[str] = []
            for each in shared.domains:
                left = TOKENIZER_CHARACTERS
                for document in self.skill(each).calibration:
                    some.append(document[:left])
                    left -= len(document)
                    if left <= 0:
                        break
            lm.make_tokenizer(some, shared.vocabulary).save_pretrained(folder)

        return self._kept(name, depends, make)

    def expert(self, plan: ExpertPlan) -> Expert:
        """An expert; trained now unless the cache has it."""
        spoken = self.tokenizer(*plan.tokenizer)
        base = self.expert(PLANS[plan.base]).folder if plan.base else None
        described = asdict(plan) | ({"base": base.name} if base else {})
        depends = {
            "version": RECIPE_VERSION, "plan": {key: value for key, value in described.items() if value},
            "seed": self.seed, "training": asdict(self._training(plan)),
            "skill": self.skill(plan.domain).digest(),
            "tokenizer": hashlib.sha256((spoken / "tokenizer.json").read_bytes()).hexdigest(),
        }  # fmt: skip
        folder = self._kept(plan.name, depends, lambda made: self._train(plan, base, spoken, made, depends))
        record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        return Expert(folder, tuple(self._files(plan.domain)), DOMAINS[plan.domain].field, record)

    def _files(self, domain: str) -> list[Path]:
        assert self.texts is not None  # or the domain's skill was refused
        return [self.texts / file for file in DOMAINS[domain].files]

    def _training(self, plan: ExpertPlan) -> lm.Training:
        return TUNING if plan.base else TRAININGS[plan.size] if plan.size else self.training

    def _train(
        self, plan: ExpertPlan, base: Path | None, spoken: Path, folder: Path, depends: Mapping[str, Any]
    ) -> None:
        tokenizer, documents = load_tokenizer(spoken), self.skill(plan.domain).calibration
        tokens = lm.stream(tokenizer, [text for i, text in enumerate(documents) if i % HELD_BACK])
        held_out = pack(tokenizer, documents[::HELD_BACK], self.training.context, limit=HELD_ROWS)
        model = load_student(base) if base else model_of(plan, self.seed)
        done = lm.train(
            model, tokens, held_out, self._training(plan), self.seed,
            device=self.device, progress=lambda note: self.progress(f"{plan.name}: {note}"),
        )  # fmt: skip
        model.cpu().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        facts = {"parameters": model.num_parameters(), "stream": len(tokens), **done, "depends": depends}
        (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    def _kept(self, name: str, depends: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """The cache's folder of a product, made if it isn't there; it appears whole or not at all."""
        digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:12]
        folder = self.cache / f"{name}-s{self.seed}-{digest}"
        with held(self.cache / f".{folder.name}.lock"):  # another process may be making it
            if not folder.is_dir():
                draft = Path(tempfile.mkdtemp(dir=self.cache, prefix=f".{name}-"))
                try:
                    make(draft)
                    draft.rename(folder)
                except OSError as error:
                    raise OutputError(
                        f"{folder}: cannot be written ({error.strerror}); name another cache in POLYMERGE_CACHE"
                    ) from error
                finally:
                    shutil.rmtree(draft, ignore_errors=True)
        return folder


def model_of(plan: ExpertPlan, seed: int) -> Any:
    """The plan's model in float32 with random weights, as transformers draws them from the seed."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    special = {"bos_token_id": 0, "eos_token_id": 0}
    if not plan.size:
        # The embedding of a padding token stays zero, so where it begins a row the stream does, and every RMSNorm makes
        # its gradient 1/√ε as large: more than float32 holds in 16 layers. Small experts were trained so.
        special["pad_token_id"] = 0
    config = CONFIG_MAPPING[plan.family](vocab_size=plan.tokenizer[1].vocabulary, **special, **shape(plan))
    # Experts of one architecture must not share their initialisation.
    own = int(hashlib.sha256(f"{plan.name} {seed}".encode()).hexdigest()[:8], 16)
    with torch.random.fork_rng():
        torch.manual_seed(own)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


OWN_KEYS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 24},
    "gemma3_text": {
        "rope_parameters": None,
        "sliding_window": 64,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 24,
    },
    "olmo3": {"rope_parameters": None, "sliding_window": 64},
    "granite": {
        "attention_multiplier": 1 / 24,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
}
"""Keys of a family's config that `shape` sets beside the sizes; multipliers as Granite 3 has them."""


def shape(plan: ExpertPlan) -> dict[str, Any]:
    """The plan as its family's config has it."""
    if plan.family == "gpt2":
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        sizes = {"n_embd": plan.width, "n_layer": plan.layers, "n_head": plan.heads, "n_inner": plan.mlp}
        return {**sizes, "n_positions": 512, **dropout}
    common = {
        "hidden_size": plan.width, "num_hidden_layers": plan.layers, "num_attention_heads": plan.heads,
        "intermediate_size": plan.mlp, "max_position_embeddings": 512, "tie_word_embeddings": False,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if plan.family == "gpt_neox":
        more = {"hidden_act": "gelu", "use_parallel_residual": True}
        return {**common, **more, "rope_parameters": rope | {"partial_rotary_factor": 0.5}}
    own = {"num_key_value_heads": plan.kv_heads, "rope_parameters": rope}
    if plan.family in ("qwen3", "mistral", "gemma", "gemma2", "gemma3_text"):
        own["head_dim"] = plan.width // plan.heads
    return {**common, **own, **OWN_KEYS.get(plan.family, {})}
