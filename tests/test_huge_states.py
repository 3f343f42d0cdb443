"""The script that plants huge states does what it says."""

import importlib
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_planted_states_are_huge_between_the_first_mlp_and_the_last(save_model, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = importlib.import_module("huge_states")
    save_model(tmp_path / "a", "llama", vocab_size=64, num_hidden_layers=3, initializer_range=0.15)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32).eval()
    rows = torch.randint(64, (16, 24), generator=torch.Generator().manual_seed(0))
    hit = rows == 5
    script.plant(model, rows, hit, 50.0)
    with torch.no_grad():
        states = model(rows, output_hidden_states=True).hidden_states
    times = [float(s[hit].norm(dim=-1).mean() / s[~hit].norm(dim=-1).median()) for s in states]
    assert times[0] < 2
    assert min(times[1:-1]) > 20
    assert times[-1] < 2
