"""Checkpoints named on the hub, from a cache as huggingface_hub keeps it; no network is asked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import polymerge
from polymerge.checkpoint import hub
from polymerge.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, save_model, monkeypatch):
    """me/tiny on its main branch, in a cache of its own; offline."""
    repository = tmp_path / "hub/models--me--tiny"
    save_model(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub._fetched.cache_clear()
    yield tmp_path / "hub"
    hub._fetched.cache_clear()


def test_a_path_is_never_asked_of_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    assert hub.local("me/tiny") == Path("me/tiny")
    with pytest.raises(CheckpointError, match=r"me/tiny: does not exist.* hf:ORG/NAME"):
        polymerge.inspect("me/tiny")


@pytest.mark.parametrize("name", ["hf:me/tiny", "hf:me/tiny@main", f"hf:me/tiny@{COMMIT}"])
def test_a_name_is_the_folder_in_the_cache(name, cache):
    folder = cache / "models--me--tiny/snapshots" / COMMIT
    assert hub.local(name) == folder
    assert hub.title(folder) == "me/tiny"
    assert polymerge.inspect(name).parameters == polymerge.inspect(folder).parameters


@pytest.mark.parametrize("name", ["hf:me/other", "hf:me/tiny@nobranch", "hf:", "hf:a/b/c"])
@pytest.mark.usefixtures("cache")
def test_what_is_not_there_is_one_line(name):
    with pytest.raises(CheckpointError, match=rf"^{name}: the hub does not give it \(.+\); expected hf:") as said:
        polymerge.inspect(name)
    assert "\n" not in str(said.value)


@pytest.mark.usefixtures("cache")
def test_a_recipe_may_name_it_and_the_card_and_the_lock_do(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"A line about {k} and no more.\n\n" for k in range(900)))
    recipe = {
        "method": "fold", "anchor": "one", "size": "union", "fold": {"tokens": "1k", "length": 32, "refine": 0},
        "experts": {"one": {"model": "hf:me/tiny", "text": "text.txt", "write": 0}},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    polymerge.merge(tmp_path / "recipe.yaml", tmp_path / "out")
    assert "base_model:\n- me/tiny\n" in (tmp_path / "out/README.md").read_text()
    lock = json.loads((tmp_path / "out/polymerge-lock.json").read_text())
    assert lock["recipe"]["experts"]["one"]["model"] == "hf:me/tiny"


def test_the_command_line_takes_a_name(cache):
    done = subprocess.run(
        [sys.executable, "-m", "polymerge", "inspect", "hf:me/tiny"],
        env={**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "llama" in done.stdout
