"""Training checkpoints: bit-exact round trip, damage found, whole after a kill at any moment."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from xplus_fast.errors import UserError
from xplus_fast.training import checkpoints
from xplus_fast.training.checkpoints import (
    clean_leftovers,
    latest_checkpoint,
    read_checkpoint,
    rng_state,
    rotate,
    set_rng_state,
    write_checkpoint,
)


def write(parent: Path, step: int) -> Path:
    folder = parent / f"checkpoint-{step}"
    tensors = {"trained": {"w": torch.full((300, 7), float(step))}}
    write_checkpoint(folder, tensors, {"state": {"step": step}})
    return folder


def check(folder: Path) -> int:
    """Read a checkpoint of `write`, compare every value; return its step."""
    got = read_checkpoint(folder)
    step = got.documents["state"]["step"]
    assert folder.name == f"checkpoint-{step}"
    assert torch.equal(got.tensors["trained"]["w"], torch.full((300, 7), float(step)))
    return step


def names(parent: Path) -> set[str]:
    return {p.name for p in parent.iterdir()}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def odd_tensors() -> dict[str, torch.Tensor]:
    base = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    return {
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "strided_row": base[0, ::3],
        "shared_a": base[:3],
        "shared_b": base[2:],
        "expanded": base[:1].expand(4, 10),
        "bf16": base.bfloat16(),
        "odd_bf16": base[0, :3].bfloat16(),
        "scalar_bf16": torch.tensor(1.5, dtype=torch.bfloat16),
        "scalar_int": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "bool": base > 0,
        "fp8": base.to(torch.float8_e4m3fn),
        "odd_bytes": torch.arange(5, dtype=torch.uint8),
        "specials": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "grad": torch.ones(2, requires_grad=True),
    }


def test_round_trip_is_bit_exact(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "CHUNK", 50)  # several pieces and a rest
    tensors = {"trained": odd_tensors(), "optimizer": {"w.exp_avg": torch.ones(3)}, "none": {}}
    documents = {"state": {"lr": 0.1 + 0.2, "list": [1, None, "sw\u00e1"], "inf": float("inf")}}
    write_checkpoint(tmp_path / "checkpoint-3", tensors, documents)
    got = read_checkpoint(tmp_path / "checkpoint-3")
    assert got.documents == documents
    assert got.tensors.keys() == tensors.keys()
    for stem, group in tensors.items():
        assert got.tensors[stem].keys() == group.keys()
        for name, value in group.items():
            back = got.tensors[stem][name]
            assert back.dtype == value.dtype and back.shape == value.shape, name
            assert bits(back) == bits(value.detach()), name
    assert names(tmp_path) == {"checkpoint-3"}
    assert names(tmp_path / "checkpoint-3") == {
        "trained.safetensors",
        "optimizer.safetensors",
        "none.safetensors",
        "state.json",
        "manifest.json",
    }


def test_file_is_laid_out_as_the_library_does_it(tmp_path):
    tensors = odd_tensors()
    write_checkpoint(tmp_path / "checkpoint-1", {"trained": tensors}, {})
    ours = tmp_path / "checkpoint-1" / "trained.safetensors"
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, tmp_path / "ref")
    assert ours.stat().st_size == 8 + len(header(ours)) + sum(t.nbytes for t in tensors.values())
    assert {k: bits(v) for k, v in load_file(ours).items()} == {
        k: bits(v) for k, v in load_file(tmp_path / "ref").items()
    }
    for name, item in json.loads(header(ours)).items():
        start = 8 + len(header(ours)) + item["data_offsets"][0]
        assert start % tensors[name].itemsize == 0, name  # aligned: it can be mapped as it is


def header(file: Path) -> bytes:
    whole = file.read_bytes()
    return whole[8 : 8 + int.from_bytes(whole[:8], "little")]


# damage


@pytest.mark.parametrize("name", ["trained.safetensors", "state.json"])
@pytest.mark.parametrize("at", [0, -1])
def test_flipped_bit_is_found_and_named(tmp_path, name, at):
    folder = write(tmp_path, 1)
    content = bytearray((folder / name).read_bytes())
    content[at] ^= 1
    (folder / name).write_bytes(content)
    assert latest_checkpoint(tmp_path) == folder  # sizes agree: only reading can tell
    with pytest.raises(UserError) as caught:
        read_checkpoint(folder)
    assert str(caught.value).startswith(f"{folder / name}: damaged") and "\n" not in str(caught)


def test_truncated_or_missing_file(tmp_path):
    first, second = write(tmp_path, 9), write(tmp_path, 10)
    file = second / "trained.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert latest_checkpoint(tmp_path) == first
    with pytest.raises(UserError, match=f"{len(whole) - 1} bytes, not {len(whole)}"):
        read_checkpoint(second)
    file.unlink()
    assert latest_checkpoint(tmp_path) == first
    with pytest.raises(UserError, match="trained.safetensors: cannot be read"):
        read_checkpoint(second)


@pytest.mark.parametrize("text", ["", "{}", '{"files": {"a": 1}}', '{"files": {"a": {}}}', "[1]"])
def test_damaged_or_missing_manifest(tmp_path, text):
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    (second / "manifest.json").write_text(text)
    assert latest_checkpoint(tmp_path) == first
    with pytest.raises(UserError, match="manifest.json"):
        read_checkpoint(second)
    (second / "manifest.json").unlink()
    assert latest_checkpoint(tmp_path) == first
    with pytest.raises(UserError, match="no manifest.json"):
        read_checkpoint(second)


# which checkpoints there are


def test_latest_is_by_number_and_ignores_what_is_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (9, 100, 20):
        write(tmp_path, step)
    (tmp_path / "checkpoint-500").mkdir()  # another trainer's, or cut off
    shutil.copytree(tmp_path / "checkpoint-9", tmp_path / "checkpoint-900-copy")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_rotate_keeps_the_newest_and_what_is_not_ours(tmp_path):
    for step in (5, 30, 100, 20):
        write(tmp_path, step)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model.safetensors").write_text("of another trainer")
    rotate(tmp_path, keep=2)
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-30", "checkpoint-100"}
    rotate(tmp_path, keep=5)
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-30", "checkpoint-100"}
    assert check(tmp_path / "checkpoint-30") == 30
    rotate(tmp_path, keep=1, spare="checkpoint-30")
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-30", "checkpoint-100"}
    rotate(tmp_path, keep=1, spare="checkpoint-7")
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-100"}


def test_replacing_a_checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-4"
    write_checkpoint(folder, {"old": {"w": torch.zeros(2)}}, {"gone": 1})
    write(tmp_path, 4)
    assert check(folder) == 4 and set(read_checkpoint(folder).documents) == {"state"}
    assert names(tmp_path) == {"checkpoint-4"}


def test_clean_leftovers_touches_only_our_leftovers(tmp_path):
    write(tmp_path, 1)
    os.rename(write(tmp_path, 2), tmp_path / ".checkpoint-2.old")  # cut off while replaced
    os.rename(write(tmp_path, 3), tmp_path / ".checkpoint-3.old")
    write(tmp_path, 3)  # replaced: the old one only had to be removed
    os.rename(write(tmp_path, 4), tmp_path / ".checkpoint-4.tmp")  # half removed
    (tmp_path / ".checkpoint-4.tmp" / "manifest.json").unlink()
    (tmp_path / ".checkpoint-5.tmp").mkdir()
    (tmp_path / ".git").mkdir()
    clean_leftovers(tmp_path)
    assert names(tmp_path) == {".git", "checkpoint-1", "checkpoint-2", "checkpoint-3"}
    assert [check(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3)] == [1, 2, 3]


# full disk


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("replaced", [False, True])
def test_full_disk_at_every_call_leaves_all_as_it_was(tmp_path, monkeypatch, call, replaced):
    write(tmp_path, 1)
    new = tmp_path / "checkpoint-2"
    if replaced:
        write(tmp_path, 2)
    before = names(tmp_path)
    real, failed = getattr(os, call), 0
    for nth in range(20):
        calls = iter(range(20))

        def fail(*args, calls=calls, nth=nth):
            if next(calls) == nth:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)

        monkeypatch.setattr(os, call, fail)
        try:
            write_checkpoint(new, {"trained": {"w": torch.ones(300, 7)}}, {"new": True})
        except UserError as e:
            assert f"{new}: cannot be written (No space left on device)" in str(e)
            assert "0.0 MB wanted" in str(e) and "MB free" in str(e) and "\n" not in str(e)
            failed += 1
        else:
            break
        finally:
            monkeypatch.setattr(os, call, real)
        assert names(tmp_path) == before
        assert check(tmp_path / "checkpoint-1") == 1
        assert not replaced or check(new) == 2
    assert failed == {"fsync": 5, "rename": 2 if replaced else 1}[call]
    assert read_checkpoint(new).documents == {"new": True}
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-2"}


def test_write_that_stops_midway(tmp_path):
    """The kernel refuses the bytes past a limit, as it does on a full disk."""
    write(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    was = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(UserError, match=r"cannot be written \(File too large\)"):
            write(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, was)
    assert names(tmp_path) == {"checkpoint-1"} and check(tmp_path / "checkpoint-1") == 1


def test_parent_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_checkpoint(tmp_path / "file" / "checkpoint-1", {}, {})


# kill -9


def run_child(parent: Path, first: int, die_at: int | None = None) -> int:
    """Fork a process that writes, replaces and rotates; with `die_at` it kills itself before that
    call of a function which touches the disk."""
    pid = os.fork()
    if pid:
        return pid
    torch.set_num_threads(1)
    if die_at is not None:
        count = iter(range(10**6))
        for name in ("fsync", "rename", "mkdir", "rmdir", "unlink"):
            real = getattr(os, name)

            def dying(*args, real=real, **kwargs):
                if next(count) == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            setattr(os, name, dying)
    try:
        for step in range(first, first + (3 if die_at is not None else 10**6)):
            write(parent, step)
            write(parent, step)  # replaces
            rotate(parent, keep=1)
    finally:
        os._exit(0)


def test_kill_before_every_call_that_touches_the_disk(tmp_path):
    write(tmp_path, 1)
    before, killed = 1, 0
    for die_at in range(500):
        _, status = os.waitpid(run_child(tmp_path, before + 1, die_at), 0)
        clean_leftovers(tmp_path)
        latest = latest_checkpoint(tmp_path)
        assert latest is not None, f"nothing left after a kill before call {die_at}"
        step = check(latest)
        assert before <= step
        assert all(check(tmp_path / name) <= step for name in names(tmp_path))  # no debris
        before = step
        if not os.WIFSIGNALED(status):
            break
        killed += 1
    else:
        pytest.fail("the child never came to its end")
    assert killed > 50 and step > 20


def test_kill_at_random_moments(tmp_path):
    write(tmp_path, 1)
    before = 1
    random_moment = random.Random(0)
    for _ in range(10):
        pid = run_child(tmp_path, before + 1)
        deadline = time.monotonic() + 60
        while not (tmp_path / f"checkpoint-{before + 2}").exists():  # in the midst of it
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(random_moment.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        clean_leftovers(tmp_path)
        latest = latest_checkpoint(tmp_path)
        assert latest is not None
        step = check(latest)
        assert step > before
        before = step


# random state


def test_rng_state_survives_json():
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    random.gauss(0, 1)  # leaves a second value in store
    np.random.normal()
    torch.randn(5)

    def draw():
        return (
            [random.random(), random.gauss(0, 1), random.gauss(0, 1)],
            [np.random.normal(), np.random.randint(10**9)],
            torch.randn(20).tolist(),
        )

    state = json.loads(json.dumps(rng_state()))
    first, second = draw(), draw()
    assert first != second
    set_rng_state(state)
    assert draw() == first and draw() == second
