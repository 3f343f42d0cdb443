"""Damaged inputs are named, and a failed or interrupted write leaves nothing behind."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polymerge.checkpoint import Checkpoint, CheckpointWriter, place, require_space, shard
from polymerge.errors import CheckpointError, OutputError


@pytest.fixture
def model(tmp_path, save_model):
    return save_model(tmp_path / "m")


@pytest.fixture
def sharded(tmp_path, save_model):
    return save_model(tmp_path / "m", max_shard_size="40KB")


def refuses(folder, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(folder).check()
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_missing_folder(tmp_path):
    refuses(tmp_path / "absent", "does not exist; expected a checkpoint folder")


def test_a_file_for_a_folder(tmp_path):
    (tmp_path / "f").write_text("x")
    refuses(tmp_path / "f", "is not a folder")


def test_missing_config(model):
    (model / "config.json").unlink()
    refuses(model, r"config\.json: missing")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["adapter_config.json"], r"is an adapter .*merge_and_unload\(\)"),
        (["checkpoint-90/config.json", "checkpoint-100/config.json"], r"did you mean .*/checkpoint-100\?"),
        (["model.gguf"], r"holds model\.gguf, a format that is not read"),
    ],
)
def test_what_a_folder_is_instead(tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    refuses(tmp_path, message)


@pytest.mark.parametrize(("content", "message"), [("{", "not readable as JSON"), ("[]", "JSON list")])
def test_bad_config(model, content, message):
    (model / "config.json").write_text(content)
    refuses(model, message)


def test_remote_code(model):
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.X"}
    (model / "config.json").write_text(json.dumps(config))
    Checkpoint(model).check()  # inert without the code
    (model / "modeling_x.py").write_text("raise SystemExit\n")
    refuses(model, "auto_map.*runs Python code of its own.*use a checkpoint")


def test_pickled_weights(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refuses(model, r"pytorch_model\.bin.*convert.*save_pretrained")


def test_no_weights(model):
    (model / "model.safetensors").unlink()
    refuses(model, r"no weights; expected model\.safetensors")


def test_index_not_there_yet(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    refuses(sharded, "neither .* get the index file")


def test_half_downloaded_shards(sharded):
    gone = Checkpoint(sharded).weight_files()[1]
    gone.unlink()
    refuses(sharded, f"names {gone.name}, which is missing .1 of . shards absent.: the download is incomplete")


@pytest.mark.parametrize("keep", [0, 5, 8, 200, -1])
def test_truncated(model, keep):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuses(model, "truncated")


def test_trailing_bytes(model):
    with (model / "model.safetensors").open("ab") as stream:
        stream.write(b"\0\0")
    refuses(model, "bytes after the last tensor")


def test_corrupt_header(model):
    file = model / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[8] = ord("?")
    file.write_bytes(raw)
    refuses(model, "corrupt safetensors header")


def with_header(file, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "'x' spans 4 bytes, but F32"),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "'x' begins at byte 4, expected 0"),
        ({"x": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}, "'x' has dtype Q4; known: F64"),
        ({"x": {"dtype": "F32", "shape": [1]}}, "corrupt header at tensor 'x'"),
        ({"x": 3}, "corrupt"),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}, "corrupt"),
        ({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, "corrupt"),
        ([], "corrupt"),
        (b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":1}', "'x' appears twice"),
    ],
)
def test_header_that_lies(model, header, message):
    with_header(model / "model.safetensors", header, b"\0" * 8)
    refuses(model, message)


def test_lfs_pointer(model):
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refuses(model, "Git LFS pointer.*git lfs pull")


def edit_index(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


def test_index_lists_a_tensor_that_no_shard_holds(sharded):
    shard_name = Checkpoint(sharded).weight_files()[0].name
    edit_index(sharded, lambda index: index["weight_map"].update({"ghost": shard_name}))
    refuses(sharded, f"lists tensor 'ghost' in {shard_name}, which does not hold it")


def test_index_points_to_the_wrong_shard(sharded):
    first, second = (f.name for f in Checkpoint(sharded).weight_files()[:2])
    name = min(load_file(sharded / first))
    edit_index(sharded, lambda index: index["weight_map"].update({name: second}))
    refuses(sharded, f"lists tensor '{name}' in {second}, but it is in {first}")


def test_shard_holds_more_than_the_index_says(sharded):
    held = (sorted(load_file(file)) for file in Checkpoint(sharded).weight_files())
    name = next(names[0] for names in held if len(names) > 1)
    edit_index(sharded, lambda index: index["weight_map"].pop(name))
    refuses(sharded, f"does not list tensor '{name}'")


def test_tensor_in_two_shards(sharded):
    first, second = Checkpoint(sharded).weight_files()[:2]
    content, (name, extra) = load_file(second), next(iter(load_file(first).items()))
    save_file({**content, name: extra}, second)
    refuses(sharded, f"tensor '{name}' is in both")


@pytest.mark.parametrize("broken", [{}, {"weight_map": {}}, {"weight_map": {"x": 1}}, {"weight_map": []}])
def test_index_without_a_map(sharded, broken):
    (sharded / "model.safetensors.index.json").write_text(json.dumps(broken))
    refuses(sharded, "no usable `weight_map`")


def test_index_that_leads_outside(sharded):
    edit_index(sharded, lambda index: index["weight_map"].update({"x": "../y.safetensors"}))
    refuses(sharded, "lies outside the folder")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_not_finite(model, value, dtype):
    content = {k: v.to(dtype) for k, v in load_file(model / "model.safetensors").items()}
    content["model.norm.weight"][3:5] = value
    save_file(content, model / "model.safetensors")
    checkpoint, seen = Checkpoint(model), []
    checkpoint.check()
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' has 2 NaN or infinite values of 32"):
        checkpoint.check_finite(seen.append)
    assert seen == list(checkpoint.names)[: seen.index("model.norm.weight") + 1]


def write(out):
    with CheckpointWriter(out) as writer:
        writer.add("x", torch.ones(1000))
        writer.text("config.json", "{}")


def test_existing_output_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("precious")
    with pytest.raises(OutputError, match="exists and is not empty; choose another folder or delete it"):
        write(tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]


def test_output_that_appears_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="exists and is not empty"), CheckpointWriter(out) as writer:  # noqa: PT012
        writer.add("x", torch.ones(3))
        (tmp_path / "out").mkdir()
        (tmp_path / "out/theirs").write_text("precious")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "theirs"]


@pytest.mark.parametrize("out", ["file", "file/out", "file/a/out"])
def test_a_file_in_the_way(tmp_path, out):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="file"):
        write(tmp_path / out)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_parent(tmp_path):
    (tmp_path / "ro").mkdir(mode=0o555)
    with pytest.raises(OutputError, match="no permission to write"):
        write(tmp_path / "ro/out")


def test_no_permission_as_told_by_the_system(tmp_path, monkeypatch):
    monkeypatch.setattr(place.os, "access", lambda *_: False)
    with pytest.raises(OutputError, match=r"no permission to write in .*choose another folder"):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_space_is_asked_for(tmp_path):
    require_space(tmp_path / "a/b", 1)
    with pytest.raises(OutputError, match=r"needs 1000000\.0 TB, .* free"):
        require_space(tmp_path / "a/b", 10**18)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_full_while_writing(tmp_path, monkeypatch, code):
    def full(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(shard, "_write", full)
    with pytest.raises(OutputError, match=r"no space left on the disk.*free some space"):
        write(tmp_path / "a/b/out")
    assert list(tmp_path.iterdir()) == []


def test_where_else_the_work_can_be(tmp_path, monkeypatch):
    monkeypatch.setattr(place.tempfile, "gettempdir", lambda: str(tmp_path))
    for path in (tmp_path, tmp_path / "polymerge-k2x_9/fold"):
        assert place.elsewhere(path, "disk") == "name a folder by --work, or by TMPDIR"
    assert place.elsewhere(tmp_path / "out", "disk") == "choose another disk"
    with pytest.raises(OutputError, match="free some space or name a folder by --work, or by TMPDIR"):
        require_space(tmp_path, 10**18)
    monkeypatch.setattr(shard, "_write", _too_large)
    with (
        pytest.raises(OutputError, match=r"not written: File too large .*; name a folder by --work"),
        CheckpointWriter(tmp_path / "polymerge-k2x_9/fold") as writer,
    ):
        writer.add("a", torch.zeros(2))


def _too_large(*_):
    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


def test_disk_full_in_the_callers_own_write(tmp_path):
    with pytest.raises(OutputError, match="no space left"), CheckpointWriter(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("mounting is not permitted here")
    try:
        with pytest.raises(OutputError, match="no space left"), CheckpointWriter(disk / "out") as writer:  # noqa: PT012
            for i in range(40):
                writer.add(f"x{i}", torch.ones(25_000))
        assert list(disk.iterdir()) == []
        with pytest.raises(OutputError, match=r"needs 4\.0 MB"):
            require_space(disk / "out", 4_000_000)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_any_exception_removes_everything(tmp_path, error):
    with pytest.raises(error), CheckpointWriter(tmp_path / "a/out", shard_bytes=10) as writer:  # noqa: PT012
        for i in range(3):
            writer.add(f"x{i}", torch.ones(10))
        raise error
    assert list(tmp_path.iterdir()) == []


SLOW_WRITER = """
import sys, time, torch
# A background job of a shell starts with SIGINT ignored; a user's terminal does not.
import signal; signal.signal(signal.SIGINT, signal.default_int_handler)
from polymerge.checkpoint import CheckpointWriter
with CheckpointWriter(sys.argv[1], shard_bytes=1000) as writer:
    for i in range(10**6):
        writer.add(f"x{i}", torch.ones(100))
        if i == 5:
            print("writing", flush=True)
        time.sleep(0.01)
"""


def interrupted(out, number):
    """Start a writer in a process of its own and send it a signal in the middle."""
    package = str(Path(place.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": package}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITER, str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process:
        assert process.stdout.readline() == "writing\n"
        assert any(p.name.startswith(".out.partial") for p in out.parent.iterdir())
        process.send_signal(number)
        process.communicate(timeout=30)
    return process.returncode


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_by_a_signal(tmp_path, number):
    assert interrupted(tmp_path / "out", number) in (-number, 128 + number)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_what_kill_9_left_is_removed_by_the_next_run(tmp_path):
    assert interrupted(tmp_path / "out", signal.SIGKILL) == -signal.SIGKILL
    assert [p.name[:13] for p in tmp_path.iterdir()] == [".out.partial-"]
    write(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_run_that_still_writes_is_left_alone(tmp_path):
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    theirs = tmp_path / f"{place._prefix(tmp_path / 'out')}{sleeper.pid}-00000000"
    own_pid_of_before = tmp_path / f"{place._prefix(tmp_path / 'out')}{os.getpid()}-00000000"
    theirs.mkdir()
    own_pid_of_before.mkdir()
    with sleeper, CheckpointWriter(tmp_path / "out") as outer:
        with pytest.raises(OutputError, match="not empty"), CheckpointWriter(tmp_path / "out"):  # noqa: PT012
            assert outer.folder.is_dir()  # a second writer of this process spares the first's folder
            outer.add("x", torch.ones(1))
            (tmp_path / "out").mkdir()
            (tmp_path / "out/y").touch()
        shutil.rmtree(tmp_path / "out")
        sleeper.communicate(b"\n", timeout=30)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([theirs.name, "out"])


def test_sigterm_handling_is_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with CheckpointWriter(tmp_path / "out") as writer:
        assert signal.getsignal(signal.SIGTERM) != before
        writer.add("x", torch.ones(1))
    assert signal.getsignal(signal.SIGTERM) == before


def test_sources_are_not_touched(model):
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in model.iterdir()}
    time.sleep(0.01)
    with Checkpoint(model) as checkpoint:
        checkpoint.check()
        checkpoint.check_finite()
        checkpoint.digest()
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in model.iterdir()} == before
