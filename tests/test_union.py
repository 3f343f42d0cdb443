"""Laws of the union: what must hold for any experts, checked on tiny random models of every family."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from polymerge.checkpoint.reader import Checkpoint
from polymerge.checkpoint.writer import CheckpointWriter
from polymerge.errors import CheckpointError, RecipeError
from polymerge.methods._union_cache import UnionCache
from polymerge.methods._union_config import UnionConfig
from polymerge.methods._union_donors import CACHE
from polymerge.methods._union_gate import BayesGate
from polymerge.methods._union_modeling import UnionForCausalLM
from polymerge.methods.union import MODELING_FILE, build_union, stored_names, union_config

pytestmark = pytest.mark.usefixtures("remote_code_cache")

V = 40
LLAMA = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {
    "vocab_size": V, "n_embd": 12, "n_layer": 3, "n_head": 3, "n_positions": 128, "bos_token_id": 1,
    "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**LLAMA),
    "llama-tied": LlamaConfig(**{**LLAMA, "tie_word_embeddings": True}),
    "mistral": MistralConfig(**{**LLAMA, "sliding_window": 4}),
    "qwen2": Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**LLAMA, head_dim=8),
    "gpt2": GPT2Config(**GPT2),
    "gpt_neox": GPTNeoXConfig(**{**LLAMA, "hidden_size": 20}, tie_word_embeddings=False),
    "gemma": GemmaConfig(**LLAMA, head_dim=8),
    "granite": GraniteConfig(**LLAMA, attention_multiplier=0.5, embedding_multiplier=3.0, residual_multiplier=0.7),
    "phi3": Phi3Config(**LLAMA),
    "gemma2": Gemma2Config(**LLAMA, head_dim=8, sliding_window=4),
    "gemma3_text": Gemma3TextConfig(**LLAMA, head_dim=8, sliding_window=4, sliding_window_pattern=2),
    "olmo2": Olmo2Config(**LLAMA),
    "olmo3": Olmo3Config(**LLAMA, sliding_window=4),
    "smollm3": SmolLM3Config(**LLAMA, no_rope_layer_interval=2),
    "stablelm": StableLmConfig(**LLAMA),
    "starcoder2": Starcoder2Config(**LLAMA),
}


def expert(family, seed=0, dtype=torch.float64, scale=4.0, **changes):
    """A random model whose predictions are far from even (logits of std ~2), so that experts differ."""
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[family])
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
            elif "bias" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(seed))
        head = model.get_output_embeddings().weight
        head.mul_(2 / (head.std() * head.shape[1] ** 0.5))
    return model


def tokens(rows=3, length=20, seed=0):
    return torch.randint(2, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(rows=3, length=12):
    ids, mask = tokens(rows, length), torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        mask[row, : 3 * row] = 0
    return ids.masked_fill(mask == 0, 0), mask


def nll(model, ids):
    """Total nats per row of tokens 1.. given those before."""
    with torch.no_grad():
        log_probs = model(ids, use_cache=False).logits.log_softmax(-1)
    return -log_probs[:, :-1].gather(-1, ids[:, 1:, None]).sum((1, 2))


def sampled(model, rows=2, length=24, seed=0):
    """Text of this expert's own domain."""
    torch.manual_seed(seed)
    start = tokens(rows, 1, seed)
    return model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        min_new_tokens=length,
        max_new_tokens=length,
    )


def trio():
    return [expert("llama", 1), expert("gpt2", 2), expert("gpt_neox", 3)]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# ------------------------------------------------------------ the mixture


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("alpha", [0.0, 0.01])
def test_union_of_one_is_that_expert(family, alpha):
    model = expert(family, dtype=torch.float32)
    union = UnionForCausalLM.from_experts([model], alpha=alpha)
    expected = model(tokens()).logits.softmax(-1)
    torch.testing.assert_close(union(tokens()).logits.exp(), expected, atol=1e-5, rtol=1e-5)


def test_bayes_bound_on_every_text():
    """α = 0: at most ln K nats worse than the best expert, for every row, and not vacuously."""
    models = trio()
    union = UnionForCausalLM.from_experts(models, alpha=0.0)
    ids = torch.cat([tokens(4, 24), *(sampled(m, 3, 23, s) for s, m in enumerate(models))])
    best = torch.stack([nll(m, ids) for m in models]).amin(0)
    total = nll(union, ids)
    assert (total <= best + math.log(3) + 1e-9).all()
    assert (total > best + math.log(3) - 0.01).any()


def test_alpha_zero_is_exact_bayes():
    """p(text) = Σ prior_k p_k(text)."""
    models, ids, prior = trio(), tokens(), [0.5, 0.2, 0.3]
    union = UnionForCausalLM.from_experts(models, prior=prior, alpha=0.0)
    log_joint = torch.stack([math.log(p) - nll(m, ids) for p, m in zip(prior, models, strict=True)])
    torch.testing.assert_close(nll(union, ids), -log_joint.logsumexp(0), atol=1e-9, rtol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.02])
def test_gate_follows_the_formula(alpha):
    """The vectorised gate against the definition, one token at a time in probability space."""
    models, ids = trio(), tokens(2, 15)
    union = UnionForCausalLM.from_experts(models, prior=[0.6, 0.3, 0.1], alpha=alpha)
    p = torch.stack([m(ids).logits.softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0] for m in models], -1)
    w = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).expand(2, 3)
    rows = [w]
    for t in range(14):
        w = w * p[:, t] / (w * p[:, t]).sum(-1, keepdim=True)
        w = (1 - alpha) * w + alpha / 3
        rows.append(w)
    torch.testing.assert_close(union.gate_weights(ids), torch.stack(rows, 1), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.05])
def test_outputs_are_distributions(alpha):
    union = UnionForCausalLM.from_experts(trio(), alpha=alpha)
    weights = union.gate_weights(tokens(3, 30))
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 30, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (weights >= alpha / 3 - 1e-12).all()
    total = union(tokens(), use_cache=False).logits.exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-12, rtol=0)


def test_fixed_share_follows_a_switch():
    first, second = expert("llama", 1), expert("gpt2", 2)
    ids = torch.cat([sampled(first, 4, 24), sampled(second, 4, 24, seed=1)], 1)
    share = UnionForCausalLM.from_experts([first, second], alpha=0.01).gate_weights(ids)
    bayes = UnionForCausalLM.from_experts([first, second], alpha=0.0).gate_weights(ids)
    assert (share[:, 20, 0] > 0.9).all()
    assert (share[:, -1, 1] > 0.9).all()
    # 8 tokens into the second domain plain Bayes is still held back by the evidence of the first.
    assert (share[:, 33, 1] > bayes[:, 33, 1] - 1e-12).all()
    assert (bayes[:, 28, 1] < 0.5).any()


def test_permuting_experts_permutes_weights():
    models, order = trio(), [2, 0, 1]
    a = UnionForCausalLM.from_experts(models, alpha=0.01)
    b = UnionForCausalLM.from_experts([models[i] for i in order], alpha=0.01)
    torch.testing.assert_close(b.gate_weights(tokens()), a.gate_weights(tokens())[..., order])
    torch.testing.assert_close(b(tokens()).logits, a(tokens()).logits)


def test_loss_and_gradient():
    union, ids = UnionForCausalLM.from_experts(trio(), alpha=0.01), tokens()
    labels = ids.masked_fill(ids == ids[0, 3], -100)
    with torch.enable_grad():
        output = union(ids, labels=labels)
        output.loss.backward()
    kept = labels[:, 1:] != -100
    expected = -output.logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][kept].mean()
    torch.testing.assert_close(output.loss, expected)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in union.parameters())


def test_vocabularies_that_differ_by_padding_rows():
    small, large = expert("llama", 1), expert("gpt2", 2, vocab_size=48)
    union = UnionForCausalLM.from_experts([small, large], alpha=0.0)
    logits = union(tokens()).logits
    assert logits.shape[-1] == V
    cut = large(tokens()).logits[..., :V].log_softmax(-1)
    alone = UnionForCausalLM.from_experts([small, large], prior=[0.0, 1.0], alpha=0.0)
    torch.testing.assert_close(alone(tokens()).logits, cut)


# ------------------------------------------------------------ padding, caches


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    union = UnionForCausalLM.from_experts(trio(), alpha=0.02)
    ids = tokens(1, 9)
    pad = torch.zeros(1, 4, dtype=torch.long)
    pair, keep = ([pad, ids], slice(4, None)) if side == "left" else ([ids, pad], slice(0, 9))
    mask = (torch.cat(pair, 1) != 0).long()
    output = union(torch.cat(pair, 1), mask)
    torch.testing.assert_close(output.logits[:, keep], union(ids).logits)
    torch.testing.assert_close(output.gate_weights[:, keep], union(ids).gate_weights)


def test_cached_forward_in_pieces_is_the_whole():
    union = UnionForCausalLM.from_experts([*trio(), expert("mistral", 4)], alpha=0.02)
    ids, mask = padded(3, 12)
    whole, cache, parts, weights = union(ids, mask), None, [], []
    for start, stop in [(0, 5), (5, 6), (6, 7), (7, 12)]:
        output = union(ids[:, start:stop], mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
        weights.append(output.gate_weights)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole.logits[real])
    torch.testing.assert_close(torch.cat(weights, 1), whole.gate_weights)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}, {"do_sample": True, "num_beams": 2}])
@pytest.mark.parametrize("alpha", [0.0, 0.02])
def test_cached_and_uncached_generation_are_identical(options, alpha):
    union = UnionForCausalLM.from_experts([*trio(), expert("mistral", 4)], alpha=alpha)
    ids, mask = padded(3, 10)
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        runs.append(union.generate(ids, attention_mask=mask, max_new_tokens=12, use_cache=use_cache, **options))
    assert torch.equal(*runs)
    assert runs[0].shape == (3, 22)


def test_generation_of_a_padded_row_is_that_of_the_row_alone():
    union = UnionForCausalLM.from_experts(trio(), alpha=0.02)
    ids, mask = padded(3, 10)
    batch = union.generate(ids, attention_mask=mask, max_new_tokens=8)
    for row in range(3):
        alone = ids[row : row + 1, 3 * row :]
        out = union.generate(alone, attention_mask=torch.ones_like(alone), max_new_tokens=8)
        assert torch.equal(out[0, -8:], batch[row, -8:])


def test_prefill_in_chunks():
    union = UnionForCausalLM.from_experts(trio(), alpha=0.02)
    ids, mask = padded(3, 10)
    out = [union.generate(ids, attention_mask=mask, max_new_tokens=8, prefill_chunk_size=size) for size in (None, 4)]
    assert torch.equal(*out)


def test_generation_goes_on_from_a_returned_cache():
    union = UnionForCausalLM.from_experts(trio(), alpha=0.02)
    ids = tokens(2, 6)
    kwargs = {"return_dict_in_generate": True}
    first = union.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, **kwargs)
    assert isinstance(first.past_key_values, UnionCache)
    again = torch.cat([first.sequences, tokens(2, 3, seed=9)], 1)
    mask = torch.ones_like(again)
    fresh = union.generate(again, attention_mask=mask, max_new_tokens=4)
    went_on = union.generate(again, attention_mask=mask, max_new_tokens=4, **{CACHE: first.past_key_values})
    assert torch.equal(fresh, went_on)


def test_foreign_caches_and_wrong_masks_are_refused():
    union = UnionForCausalLM.from_experts(trio())
    filled = union.experts[0](tokens(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="expected the UnionCache"):
        union(tokens(), past_key_values=filled)
    with pytest.raises(ValueError, match=r"attention_mask is \(3, 4\), expected \(3, 20\)"):
        union(tokens(), torch.ones(3, 4))
    with pytest.raises(ValueError, match="output_hidden_states"):
        union(tokens(), output_hidden_states=True)
    with pytest.raises(ValueError, match="inputs_embeds"):
        union(inputs_embeds=torch.zeros(1, 2, 8))


# ------------------------------------------------------------ skipping


def decode(union, ids, prompt=4, mask=None):
    """Teacher-forced decoding with a cache, one token at a time -> logits (B, T - prompt + 1, V), cache."""
    mask = torch.ones_like(ids) if mask is None else mask
    output = union(ids[:, :prompt], mask[:, :prompt], use_cache=True)
    parts = [output.logits[:, -1:]]
    for t in range(prompt, ids.shape[1]):
        seen = mask[:, : t + 1]
        output = union(ids[:, t : t + 1], seen, past_key_values=output.past_key_values, use_cache=True)
        parts.append(output.logits)
    return torch.cat(parts, 1), output.past_key_values


@pytest.mark.parametrize(("alpha", "skip_below"), [(0.0, 1e-3), (0.01, 0.08)])
def test_skipping_costs_at_most_the_sleepers_weight(alpha, skip_below):
    """Total variation from the full mixture <= the weight that the sleeper would have had."""
    models = [expert("llama", 1), expert("gpt2", 2)]
    ids = sampled(models[0], 2, 40, seed=3)
    union = UnionForCausalLM.from_experts(models, alpha=alpha, skip_below=skip_below)
    exact = UnionForCausalLM.from_experts(models, alpha=alpha)(ids)
    logits, _ = decode(union, ids, prompt=1)
    distance = (logits.exp() - exact.logits.exp()).abs().sum(-1) / 2
    assert (distance <= exact.gate_weights[..., 1] + 1e-9).all()
    assert distance.max() > 0
    assert distance.mean() < skip_below


@pytest.mark.parametrize(("alpha", "skip_below"), [(0.0, 1e-3), (0.01, 0.1)])
def test_skipping_saves_forward_passes(alpha, skip_below):
    models = trio()
    ids = sampled(models[0], 2, 60, seed=3)
    union = UnionForCausalLM.from_experts(models, alpha=alpha, skip_below=skip_below)
    _, cache = decode(union, ids)
    assert union.expert_calls[0] == len(ids[0]) - 3
    assert max(union.expert_calls[1:]) < union.expert_calls[0] / 2
    # What an expert has read and what it has yet to read is the whole text.
    assert [n + lag for n, lag in zip(union.expert_tokens, cache.lag, strict=True)] == [len(ids[0])] * 3


def test_a_sleeper_that_is_needed_again_catches_up_exactly():
    """The text changes domain while the other expert sleeps: after waking, weights are exact again."""
    first, second = expert("llama", 1), expert("mistral", 2)
    left = sampled(first, 3, 20)
    ids = torch.cat([left, sampled(second, 3, 30, seed=1)], 1)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    union = UnionForCausalLM.from_experts([first, second], alpha=0.01, skip_below=0.05)
    exact = UnionForCausalLM.from_experts([first, second], alpha=0.01)
    expected, state, slept = exact(ids, mask), None, 0
    for t in range(ids.shape[1]):
        output = union(ids[:, t : t + 1], mask[:, : t + 1], past_key_values=state, use_cache=True)
        asleep = state is not None and any(output.past_key_values.lag)
        state, slept = output.past_key_values, slept + asleep
        if not asleep:
            torch.testing.assert_close(output.gate_weights[:, 0], expected.gate_weights[:, t])
            real = mask[:, t].bool()
            torch.testing.assert_close(output.logits[real, 0], expected.logits[real, t])
    assert slept > 10
    assert union.expert_calls[1] < ids.shape[1]


def test_several_tokens_at_once_wake_everybody():
    models = [expert("llama", 1), expert("gpt2", 2)]
    ids = sampled(models[0], 2, 30)
    more = tokens(2, 5)
    union = UnionForCausalLM.from_experts(models, alpha=0.0, skip_below=1e-3)
    _, cache = decode(union, ids)
    assert cache.lag[0] == 0
    assert cache.lag[1] > 10
    output = union(more, past_key_values=cache, use_cache=True)
    whole = UnionForCausalLM.from_experts(models, alpha=0.0)(torch.cat([ids, more], 1))
    torch.testing.assert_close(output.logits, whole.logits[:, -5:])
    torch.testing.assert_close(output.gate_weights, whole.gate_weights[:, -5:])
    assert output.past_key_values.lag == [0, 0]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_generation_with_skipping(options):
    """Sleepers' weight is far below what would change a choice here."""
    models = trio()
    ids = sampled(models[0], 2, 20)
    out = []
    for skip_below in (0.0, 1e-6):
        union = UnionForCausalLM.from_experts(models, alpha=0.0, skip_below=skip_below)
        union.reset_counts()
        out.append(union.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, **options))
    assert torch.equal(*out)
    assert min(union.expert_calls) < max(union.expert_calls) == 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alpha", "skip_below", "share"),
    [(0.0, 1e-3, 0.02), (0.01, 0.05, 0.2), (0.01, 0.1, 0.1), (0.001, 0.01, 0.1)],
)
def test_saving_on_real_text(assets, alpha, skip_below, share):
    """Two trained models on stories: the worse one runs in at most this share of the decoding steps."""
    folders = [assets / "models" / name for name in ("llama-stories260K", "llama-xs279K")]
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in folders]
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    lines = (assets / "text/tinystories.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    rows = [tokenizer(json.loads(line)["text"]).input_ids[:256] for line in lines]
    losses = []
    for threshold in (skip_below, 0.0):
        union = UnionForCausalLM.from_experts(models, alpha=alpha, skip_below=threshold)
        total = torch.zeros(2)
        loss = 0.0
        for row in [row for row in rows if len(row) == 256][:4]:
            union.reset_counts()
            ids = torch.tensor([row])
            logits, _ = decode(union, ids, prompt=32)
            loss -= logits[:, :-1].gather(-1, ids[:, 32:, None]).mean().item() / 4
            total += torch.tensor(union.expert_calls)
        losses.append(loss)
        assert total[0] == 4 * 225
        assert total[1] <= total[0] * (share if threshold else 1)
    assert losses[0] < losses[1] + 0.005


def test_rows_of_a_cache_with_sleepers_can_be_picked():
    models = [expert("llama", 1), expert("gpt2", 2)]
    ids = sampled(models[0], 3, 30)
    union = UnionForCausalLM.from_experts(models, alpha=0.01, skip_below=0.1)
    order = torch.tensor([2, 0, 0])
    for change in ("reorder_cache", "batch_select_indices"):
        _, cache = decode(union, ids)
        assert max(cache.lag) > 0
        getattr(cache, change)(order)
        picked = union(tokens(3, 2), past_key_values=cache, use_cache=True).logits
        whole = UnionForCausalLM.from_experts(models, alpha=0.01)(torch.cat([ids[order], tokens(3, 2)], 1)).logits
        torch.testing.assert_close(picked, whole[:, -2:])


# ------------------------------------------------------------ the gate, the config


def test_abstaining_leaves_a_weight_alone():
    gate = BayesGate(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 0.0)
    start, awake = gate.start(1), torch.tensor([True, True, False])
    evidence = torch.tensor([[-1.0, -9.0, torch.nan]], dtype=torch.float64)
    filled = gate.abstain(start, evidence, awake)
    after = gate.scan(start, filled[:, None], torch.tensor([[True]])).exp()[0, 0]
    assert after[2].item() == pytest.approx(0.2, abs=1e-12)
    assert after.sum().item() == pytest.approx(1, abs=1e-12)
    assert after[0] > 0.79


def test_impossible_text_does_not_break_the_gate():
    gate = BayesGate(torch.tensor([0.5, 0.5], dtype=torch.float64), 0.0)
    evidence = torch.full((1, 3, 2), -torch.inf, dtype=torch.float64)
    assert gate.scan(gate.start(1), evidence, torch.ones(1, 3, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.0}, "alpha is 1.0"),
        ({"alpha": 0.01, "skip_below": 0.001}, "between alpha/K = 0.005"),
        ({"skip_below": 0.5}, "skip_below is 0.5"),
        ({"prior": [0.5, 0.6]}, "prior is"),
        ({"prior": [1.0]}, "expected 2 weights"),
        ({"vocab_size": 999}, "vocab_size is 999"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    experts = [CONFIGS["llama"].to_dict(), CONFIGS["gpt2"].to_dict()]
    with pytest.raises(ValueError, match=message):
        UnionConfig(experts, **changes)


# ------------------------------------------------------------ checkpoints


def saved(folder: Path, family: str, **options) -> Path:
    expert(family, seed=len(family), dtype=torch.float32, **options).save_pretrained(folder / family)
    return folder / family


def load(folder, **options):
    options = {"dtype": torch.float32, **options}
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def built(folder, out, families, **settings):
    experts = {family: Checkpoint(folder / family) for family in families}
    dtype = settings.pop("dtype", None)
    with CheckpointWriter(out) as writer:
        build_union(experts, writer, union_config(experts, dtype=dtype, **settings), dtype)
    return out


def test_built_checkpoint_holds_every_family_exactly(tmp_path):
    for family in CONFIGS:
        saved(tmp_path, family)
    union = load(built(tmp_path, tmp_path / "out", list(CONFIGS), alpha=0.0))
    assert type(union).__name__ == "UnionForCausalLM"
    assert type(union) is not UnionForCausalLM, "the code in the folder is used, not the installed package"
    for family, inside in zip(CONFIGS, union.experts, strict=True):
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.float32).eval()
        assert torch.equal(inside(tokens()).logits, alone(tokens()).logits), family
    assert (tmp_path / "out" / MODELING_FILE).is_file()
    assert union.config.expert_names == list(CONFIGS)
    generated = union.generate(tokens(2, 4), attention_mask=torch.ones(2, 4), max_new_tokens=3)
    assert generated.shape == (2, 7)


def test_save_and_reload_again(tmp_path):
    """What transformers itself writes, tied heads and renamed tensors included."""
    families = ["gpt_neox", "llama-tied", "gpt2"]
    for family in families:
        saved(tmp_path, family)
    union = load(built(tmp_path, tmp_path / "out", families, alpha=0.02, prior=dict.fromkeys(families, 1 / 3)))
    union.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(again(tokens()).logits, union(tokens()).logits)
    for model in (union, again):
        tied = model.experts[1]
        assert tied.lm_head.weight is tied.model.embed_tokens.weight
    first, second = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "again")
    assert first.names == second.names
    assert "experts.0.embed_out.weight" in first.names
    assert "experts.1.lm_head.weight" not in first.names


def test_union_from_memory_saves_and_reloads(tmp_path):
    union = UnionForCausalLM.from_experts([expert("gpt_neox", 1), expert("qwen2", 2)], alpha=0.03)
    union.save_pretrained(tmp_path / "out")
    again = load(tmp_path / "out", dtype="auto")
    assert again.dtype == torch.float64
    assert again.config.alpha == 0.03
    assert torch.equal(again(tokens()).logits, union(tokens()).logits)


def test_from_experts_leaves_them_as_they_are():
    model = expert("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    union = UnionForCausalLM.from_experts([model])
    assert union.experts[0] is model
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_conversion_and_names_of_old_files(tmp_path):
    """GPT-2 files from before the base prefix, with masks and a head stored although tied."""
    model = expert("gpt2", dtype=torch.float32)
    model.config.save_pretrained(tmp_path / "gpt2")
    state = {k.removeprefix("transformer."): v.contiguous() for k, v in model.state_dict().items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    state["lm_head.weight"] = state["wte.weight"].clone()
    with CheckpointWriter(tmp_path / "weights") as writer:
        for name, tensor in state.items():
            writer.add(name, tensor)
        writer.copy(tmp_path / "gpt2" / "config.json")
    names = dict(stored_names(Checkpoint(tmp_path / "weights")))
    assert names["wte.weight"] == "transformer.wte.weight"
    assert "h.0.attn.bias" not in names
    assert "lm_head.weight" not in names
    union = load(built(tmp_path, tmp_path / "out", ["weights"], dtype=torch.bfloat16))
    stored = Checkpoint(tmp_path / "out")
    assert {stored.dtype(name) for name in stored.names} == {torch.bfloat16}
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "weights", dtype=torch.bfloat16).float().eval()
    assert torch.equal(union.experts[0](tokens()).logits, expected(tokens()).logits)


def test_builder_refuses(tmp_path):
    experts = {"a": Checkpoint(saved(tmp_path, "llama")), "b": Checkpoint(saved(tmp_path, "gpt2"))}
    with pytest.raises(RecipeError, match="anchor is 'c'"):
        union_config(experts, anchor="c")
    with pytest.raises(RecipeError, match="expected one of the experts: none given"):
        union_config({})
    with pytest.raises(RecipeError, match="prior names"):
        union_config(experts, prior={"a": 1.0})
    with pytest.raises(RecipeError, match="alpha/K"):
        union_config(experts, alpha=0.1, skip_below=0.01)
    config = tmp_path / "llama" / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "no-such"'))
    with pytest.raises((CheckpointError, RecipeError)):
        dict(stored_names(Checkpoint(tmp_path / "llama")))
