"""What runs on a GPU keeps its tensors together there: checked on a make-believe one, in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration
from conftest import save_tiny_model

from polymerge.bench.lm import make_tokenizer
from polymerge.methods._experts import home

pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot make a device believe that it is there",
)
SETUP = """
import json, sys
import make_believe_device as device
kept = device.register()
import torch
given = json.loads(sys.argv[1])
"""
REFUSED = """
a = torch.ones(3, 3, device=device.NAME)
assert (a @ a.T).sum().item() == 27
for name, mixed in {
    "sum": lambda: a + torch.ones(3, 3),
    "cat": lambda: torch.cat([a, torch.ones(3, 3)]),
    "index": lambda: torch.ones(3)[torch.tensor([1]).to(device.NAME)],
    "generator": lambda: torch.randn(3, device=device.NAME, generator=torch.Generator()),
    "numpy": lambda: a.numpy(),
}.items():
    try:
        mixed()
    except RuntimeError:
        continue
    raise SystemExit(f"{name} was not refused")
"""
MERGE = """
import polymerge
from polymerge import recipe
polymerge.merge
from polymerge.methods import _experts
if given["another"]:  # this device has no sparse products, CUDA does
    from polymerge.align.translate import Translator
    product, cpu = Translator.project, lambda x: None if x is None else x.cpu()
    Translator.project = lambda self, p, reading, tokens, guess=None, **more: (
        product(self, p.cpu(), reading, tokens.cpu(), cpu(guess), **more).to(p.device)
    )
if given["roomy"]:
    _experts.home = lambda place, _: place
inner = sys.modules["polymerge.merge"]
for method, changes in given["merges"].items():
    asked, found = recipe.parse({**given["recipe"], "method": method, **changes}), {}
    for place in ("cpu", device.NAME):
        inner.pick_device = lambda _: place
        found[place] = polymerge.merge(asked, given["out"] + method + place).skills
    for skill, row in found["cpu"].items():
        for column in ("owner", "union", "fold"):
            assert abs(row[column] - found[device.NAME][skill][column]) < 0.01, (method, found)
"""
EXPERTS = """
from polymerge.bench import distil, modular, tasks, train
arithmetic = tasks.Arithmetic(5, 3)
spec = modular.spec_of(modular.ExpertPlan("x_plus_y", 1, 8, 2), arithmetic)
splits = [arithmetic.split(task, 0) for task in ("x_plus_y", "permutation")]
settings = train.Training(steps=10, batch=8, draws=8)
a, b = train.together(spec, [train.Study(s.train, s.validation, 0) for s in splits], settings, device=device.NAME)
lessons = {"x": distil.Lesson(splits[0].train, torch.randn(len(splits[0].train), spec.vocab))}
few = distil.Distil(steps=2, batch=8, lrs=(1e-3,))
done = distil.distil(spec, a.weights, lessons, {"x": splits[0].validation}, few, 0, device=device.NAME)
assert done.weights[0]["q.weight"].device.type == device.NAME
"""
SHAPE = {"width": 24, "layers": 2, "heads": 2, "mlp": 16}
KNOBS = {
    "ridge": 1e-3, "mute": 0.1, "mute_last": 0.3, "off_gate": 0.1, "off_weight": 0.1, "even": 0.5, "hosts": "ends"
}  # fmt: skip
RIVALS = {
    "git_rebasin": {"match": "activations"}, "ot_fusion": {}, "orthogonal": {}, "zipit": {}, "regmean": {},
    "transport_and_merge": {}, "fs_merge": {"steps": 2},
}  # fmt: skip


def run(code, **given):
    words = [sys.executable, "-c", SETUP + code, json.dumps(given)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device")
    for name, word in {"prose": "apple pie", "code": "x = y[3]"}.items():
        (folder / f"{name}.txt").write_text("".join(f"{word} {i * i}\n" for i in range(200)))
    return folder


def merge(folder, families, merges, size, *, roomy=False, tokenizer=None):
    small = {"num_attention_heads": 2, "intermediate_size": 16}
    for seed, (name, family) in enumerate(families.items()):
        more = {"num_key_value_heads": 2} if family == "llama" else {}
        sizes = {"hidden_size": 16 + 8 * seed, "num_hidden_layers": 1 + seed}
        if tokenizer is not None and name == "code":
            more |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        save_tiny_model(folder / family / name, family, seed=seed, **small, **sizes, **more)
        if tokenizer is not None and name == "code":
            tokenizer.save_pretrained(folder / family / name)
    experts = {
        name: {"model": str(folder / family / name), "text": str(folder / f"{name}.txt")}
        for name, family in families.items()
    }
    fold = {"tokens": 320, "length": 16, "refine": 1, **KNOBS}
    run(
        MERGE,
        recipe={"anchor": "prose", "experts": experts, "size": size, "fold": fold},
        merges=merges,
        out=str(folder / f"{roomy}-{tokenizer is not None}-"),
        roomy=roomy,
        another=tokenizer is not None,
    )


def test_the_make_believe_device_refuses_what_cuda_refuses():
    run(REFUSED)


def test_fold_of_two_families_and_healing_where_states_stay_on_the_device(folder):
    heal = {"tokens": 64, "batch_rows": 2, "length": 16}
    merge(folder, {"prose": "llama", "code": "gpt_neox"}, {"fold": {"heal": heal}}, {**SHAPE, "heads": 3}, roomy=True)


def test_an_expert_with_another_tokenizer_and_states_on_the_cpu(folder):
    tokenizer = make_tokenizer([(folder / "code.txt").read_text()], 300)
    heal = {"tokens": 64, "batch_rows": 2, "length": 16}
    merges = {"fold": {"heal": heal}}
    merge(folder, {"prose": "llama", "code": "mistral"}, merges, {**SHAPE, "heads": 3}, tokenizer=tokenizer)


def test_states_stay_on_the_cpu_without_a_gpu_with_room(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (400, 1000))
    assert (home(gpu, 99), home(gpu, 100), home(cpu, 1)) == (gpu, cpu, cpu)


def test_every_rival(folder):
    merges = {name: {"options": options} for name, options in RIVALS.items()}
    merge(folder, {"prose": "llama", "code": "llama"}, merges, {**SHAPE, "width": 32})


def test_experts_of_the_benchmark_and_their_distillation():
    run(EXPERTS)
