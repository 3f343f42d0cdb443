"""A merged llama as one GGUF file for llama.cpp, float32.

    pip install gguf
    python examples/to_gguf.py out/model out/model.gguf

The tokenizer goes in as tokens, types and merges. How texts are split before the merges is a name in GGUF, of a rule
that llama.cpp has compiled in: a byte-level BPE tokenizer whose rule is none of `RULES` cannot be told in a GGUF file
and is refused, for a wrong name would cut texts into other tokens than the model was made for.
"""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from polymerge.align.token_bytes import byte_view
from polymerge.calibrate.tokenizer import load_tokenizer
from polymerge.checkpoint.reader import Checkpoint
from polymerge.errors import CheckpointError

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RULES = {
    ("gpt2", False): "gpt-2",
    (LLAMA3, True): "llama-bpe",
    (LLAMA3, False): "smaug-bpe",
    (LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"), False): "qwen2",
}
"""(regular expression, whether a whole piece that is a token skips the merges) -> llama.cpp's name."""

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def rule(tokenizer: Any) -> str:
    """llama.cpp's name for how a tokenizer splits texts. Raises CheckpointError where it has none."""
    description = byte_view(tokenizer).description
    model, split = description["model"], description["pre_tokenizer"] or {}
    parts = split.get("pretokenizers", [split])
    found = None
    if model["type"] == "BPE" and description["normalizer"] is None and parts[-1].get("type") == "ByteLevel":
        own = parts[-1]["use_regex"]
        if own and len(parts) == 1 and not parts[0]["add_prefix_space"]:
            found = "gpt2"
        elif not own and len(parts) == 2 and parts[0]["type"] == "Split" and parts[0]["behavior"] == "Isolated":  # noqa: PLR2004
            found = parts[0]["pattern"].get("Regex")
    name = RULES.get((str(found), bool(model.get("ignore_merges"))))
    if name is None:
        raise CheckpointError(
            f"tokenizer: llama.cpp has no rule that splits texts as {json.dumps(split)[:120]} does; expected "
            "byte-level BPE that splits as GPT-2, Llama 3 or Qwen2 do: GGUF cannot hold this tokenizer"
        )
    return name


def stored_name(name: str) -> str:
    """GGUF's name of a tensor: model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def interleaved(rows: Any, heads: int) -> Any:
    """Rows of q or k (head half pair, in) -> (head pair half, in): llama.cpp turns neighbours, transformers halves."""
    size = rows.shape[0] // heads
    return rows.reshape(heads, 2, size // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def export(folder: Path, out: Path) -> None:
    """Write the GGUF file. Raises CheckpointError for another family, or a tokenizer that GGUF cannot hold."""
    import gguf
    import torch

    checkpoint, tokenizer = Checkpoint(folder), load_tokenizer(folder)
    config = checkpoint.config
    if config["model_type"] != "llama":
        raise CheckpointError(f"{folder}: is a {config['model_type']}; expected a llama: merge with `family: llama`")
    name = rule(tokenizer)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    add_tokenizer(writer, tokenizer, name, config["vocab_size"])
    for stored in checkpoint.names:
        rows = checkpoint.tensor(stored).to(torch.float32)
        for part, count in (("q_proj", heads), ("k_proj", groups)):
            rows = interleaved(rows, count) if f".{part}." in stored else rows
        writer.add_tensor(stored_name(stored), rows.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: Any, tokenizer: Any, name: str, rows: int) -> None:
    """Tokens, types, merges and roles; rows that pad the embedding become unused tokens."""
    import gguf

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    view = byte_view(tokenizer)
    added = {t["id"] for t in backend["added_tokens"]}
    unused = [f"<unused {i}>" for i in range(len(view.pieces), rows)]
    kinds = gguf.TokenType
    types = [
        kinds.UNUSED if not piece else kinds.CONTROL if special else kinds.USER_DEFINED if i in added else kinds.NORMAL
        for i, (piece, special) in enumerate(zip(view.pieces, view.special, strict=True))
    ] + [kinds.UNUSED] * len(unused)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([piece or f"<unused {i}>" for i, piece in enumerate(view.pieces)] + unused)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in backend["model"]["merges"]])
    writer.add_add_bos_token(False)  # noqa: FBT003
    adders = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "pad": writer.add_pad_token_id}
    for role, add in adders.items():
        if role in view.roles:
            add(view.roles[role])


def main() -> None:
    """Read the command line, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    if find_spec("gguf") is None:
        parser.error("gguf is not installed: pip install gguf")
    export(options.model, options.out)


if __name__ == "__main__":
    main()
