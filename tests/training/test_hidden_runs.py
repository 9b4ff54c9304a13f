"""Runs that keep what frozen layers give: the same to the last bit, whatever happens to it."""
# ruff: noqa: F811  (fixtures by their names)

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.training.test_run import losses, workplace, xplus  # noqa: F401  (a fixture)
from xplus_fast.files import PlacedFile
from xplus_fast.locks import working_in
from xplus_fast.model.layer import Block
from xplus_fast.training.hidden_store import CHECKS, STATES
from xplus_fast.training.memory_log import PeakWatch

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "OMP_NUM_THREADS": "1"}
QUICK = [
    "evaluation.translate=0", "data.retention=[]", "data.heldout=0", "data.sources.0.limit=12",
    "training.save_steps=100",
]  # fmt: skip
TOP = ["stages=[{layers: 'top:2', name: high, learning_rate: 1.0e-3, epochs: 3}]", *QUICK]
HIDDEN, LEVEL = 64, 4  # of the tiny model: its width, and the lowest of its top:2


def train(workplace, output, where, *options, code=0):
    run = workplace / output
    given = [f"output={run}", f"data.cache_hidden={where}", *(options or TOP)]
    assert xplus("train", workplace / "recipe.yaml", *given) == code
    return run


def trained(run):
    """Bytes of what every stage gave."""
    files = sorted(run.glob("*/final/trained.safetensors"))
    assert files
    return [file.read_bytes() for file in files]


def exported(run):
    """Bytes of the model that a run gives."""
    assert xplus("export", run, run / "out") == 0
    return [file.read_bytes() for file in sorted((run / "out").glob("*.safetensors"))]


def kept(folder):
    """The one cache of a folder, and how many tokens' states are in it."""
    (found,) = folder.glob("hidden-*")
    return found, int(np.count_nonzero(np.fromfile(found / CHECKS, np.uint32)))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without what takes longer than these runs do: drawing, and measuring this machine."""
    monkeypatch.setattr("xplus_fast.training.throughput.gemm_rate", lambda *_: 1e12)
    for name in ("_draw_loss", "_draw_quality"):
        monkeypatch.setattr(f"xplus_fast.training.report.{name}", lambda *_, **__: True)


@pytest.fixture
def embedded(monkeypatch):
    """How many tokens the lowest layer computed where it is frozen, one figure a call."""
    seen, run = [], Block.run

    def counted(self, x, pack, last=None):
        if self.layer_idx == 0 and not any(p.requires_grad for p in self.parameters()):
            seen.append(len(x))
        return run(self, x, pack, last)

    monkeypatch.setattr(Block, "run", counted)
    return seen


@pytest.mark.parametrize(("micro", "shared"), [(192, "true"), (384, "true"), (192, "false")])
def test_the_same_run_to_the_last_bit(micro, shared, workplace, embedded):
    """Three epochs; in the first, and in it alone, the frozen layers compute."""
    options = [*TOP, f"memory.micro_batch_tokens={micro}", f"data.shared_prompts={shared}"]
    plain = train(workplace, "off", "off", *options)
    computed = sum(embedded)
    for name in ("host", workplace / "kept"):
        embedded.clear()
        run = train(workplace, f"run-{Path(name).name}", name, *options)
        assert losses(run) == losses(plain) and trained(run) == trained(plain)
        assert 3 * sum(embedded) == computed > 0
        assert exported(run) == exported(plain)
    assert kept(workplace / "kept")[1] == computed // 3  # a prefix that is cut has two places


def test_another_run_of_the_same_computes_nothing_below(workplace, embedded, capsys):
    plain = train(workplace, "off", "off", *TOP, "stages.0.learning_rate=2e-3")
    train(workplace, "one", workplace / "kept")
    embedded.clear()
    capsys.readouterr()
    two = train(workplace, "two", workplace / "kept", *TOP, "stages.0.learning_rate=2e-3")
    assert embedded == [] and losses(two) == losses(plain) and trained(two) == trained(plain)
    _, found = kept(workplace / "kept")
    assert f"hidden states: {found:,} tokens' found in " in capsys.readouterr().out


def test_other_micro_batches_find_what_is_there(workplace, embedded):
    """Written in large ones, read in small ones: equal but for the rounding of other shapes."""
    plain = train(workplace, "off", "off", *TOP, "memory.micro_batch_tokens=192")
    whole = "memory.micro_batch_tokens=384"
    train(workplace, "large", workplace / "kept", *TOP, whole, "data.shared_prompts=false")
    embedded.clear()
    small = train(workplace, "small", workplace / "kept", *TOP, "memory.micro_batch_tokens=192")
    assert embedded == []
    found, wanted = ([x for *_, x in losses(run)] for run in (small, plain))
    assert found == pytest.approx(wanted, rel=2e-5)


STAGES = {
    "higher": ("[4, 5]", "[5]", 1, True),
    "same": ("[4, 5]", "[4, 5]", 1, True),
    "with its own between": ("[3]", "[4]", 1, True),
    "lower": ("[4, 5]", "[3, 5]", 2, False),
}


@pytest.mark.parametrize(
    ("case", "where"),
    [("higher", "kept"), ("same", "host"), ("with its own between", "host"), ("lower", "kept")],
)
def test_a_later_stage_uses_what_an_earlier_one_kept(case, where, workplace, embedded):
    first, second, epochs, used = STAGES[case]
    stages = [
        f"stages=[{{layers: {first}, name: a, learning_rate: 1.0e-3}},"
        f" {{layers: {second}, name: b, learning_rate: 1.0e-3, epochs: {epochs}}}]",
        *QUICK,
    ]
    plain = train(workplace, "off", "off", *stages)
    computed = sum(embedded) // (1 + epochs)
    embedded.clear()
    run = train(workplace, "run", "host" if where == "host" else workplace / where, *stages)
    assert losses(run) == losses(plain) and trained(run) == trained(plain)
    assert sum(embedded) == computed * (1 if used else 2)


@pytest.mark.parametrize("where", ["host", "kept"])
def test_a_stage_that_trains_below_makes_what_was_kept_useless(where, workplace, embedded, capsys):
    """Top, bottom, top: the last one's layers below are others, of the same shape."""
    top = "{layers: 'top:2', name: NAME, learning_rate: 1.0e-3, epochs: 2}"
    low = "{layers: [0], name: b, learning_rate: 1.0e-3}"
    stages = f"stages=[{top.replace('NAME', 'a')}, {low}, {top.replace('NAME', 'c')}]"
    plain = train(workplace, "off", "off", stages, *QUICK)
    computed = sum(embedded) // 4
    embedded.clear()
    capsys.readouterr()
    where = "host" if where == "host" else workplace / where
    run = train(workplace, "run", where, stages, *QUICK)
    assert losses(run) == losses(plain) and trained(run) == trained(plain)
    assert sum(embedded) == 2 * computed
    if where != "host":
        assert "are of other weights: they are computed again\n" in capsys.readouterr().out
        assert kept(where)[1] == computed


# --- whatever happens to it

_known = []


@pytest.fixture
def undisturbed(workplace):
    """Losses and tensors of a run that keeps nothing, and how many tokens an epoch computes."""
    if not _known:
        run, counted = train(workplace, "undisturbed", "off"), 0
        for line in (run / "metrics.jsonl").read_text().splitlines():
            counted += json.loads(line)["tokens_computed"]
        _known.append((losses(run), trained(run), counted // 3))
    return _known[0]


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize(("at", "torn"), [(0, True), (1, False), (7, True), (20, False)])
def test_killed_while_it_is_written(at, torn, undisturbed, workplace, monkeypatch):
    """Before an operation or in the middle of it; gone on with, the run is the same."""
    count, write = [0], PlacedFile.write

    def dies(self, offset, data):
        count[0] += 1
        if count[0] > at:
            if torn:
                write(self, offset, data[: len(data) // 2 + 1])
            raise Killed
        write(self, offset, data)

    monkeypatch.setattr(PlacedFile, "write", dies)
    with pytest.raises(Killed):
        train(workplace, "run", workplace / "kept")
    monkeypatch.setattr(PlacedFile, "write", write)
    run = train(workplace, "run", workplace / "kept")
    assert (losses(run), trained(run)) == undisturbed[:2]
    assert kept(workplace / "kept")[1] == undisturbed[2]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fills_up_or_fails(number, undisturbed, workplace, monkeypatch, capsys):
    """One line; training goes on, with what was written before."""
    count, write = [0], PlacedFile.write

    def fails(self, offset, data):
        count[0] += 1
        if count[0] > 9:
            write(self, offset, data[: len(data) // 2])
            raise OSError(number, os.strerror(number))
        write(self, offset, data)

    monkeypatch.setattr(PlacedFile, "write", fails)
    capsys.readouterr()
    run = train(workplace, "run", workplace / "kept")
    assert (losses(run), trained(run)) == undisturbed[:2]
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("hidden states")]
    assert len(said) == 1 and said[0].endswith(
        f"cannot be written ({os.strerror(number)}), no more is kept: what is not there is computed"
    )
    assert 0 < kept(workplace / "kept")[1] < undisturbed[2]
    monkeypatch.setattr(PlacedFile, "write", write)
    run = train(workplace, "more", workplace / "kept")  # there is room again
    assert (losses(run), trained(run)) == undisturbed[:2]
    assert kept(workplace / "kept")[1] == undisturbed[2]


def first(folder):
    """A place with a state: not all have one."""
    return int(np.flatnonzero(np.fromfile(folder / CHECKS, np.uint32))[0])


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


DAMAGED = "damaged, does not match its checksums: what is not there is computed"
DAMAGES = {
    "a bit of a state": (lambda f: flip(f / STATES, HIDDEN * 4 * first(f)), DAMAGED),
    "checksums cut off": (lambda f: os.truncate(f / CHECKS, 100), None),
    "half a description": (lambda f: (f / "about.json").write_text('{"da'), None),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_found_and_computed_again(case, undisturbed, workplace, capsys):
    """How it is found, whatever it is: test_hidden_cache.py."""
    damage, says = DAMAGES[case]
    train(workplace, "run", workplace / "kept")
    damage(kept(workplace / "kept")[0])
    capsys.readouterr()
    run = train(workplace, "again", workplace / "kept")
    assert (losses(run), trained(run)) == undisturbed[:2]
    assert kept(workplace / "kept")[1] == undisturbed[2]
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("hidden states:")]
    said = [x for x in said if "tokens' found in" not in x]
    assert len(said) == bool(says) and (not says or said[0].endswith(says)), said


def test_a_disk_that_cannot_be_read(undisturbed, workplace, monkeypatch, capsys):
    train(workplace, "run", workplace / "kept")
    read = PlacedFile.read

    def fails(self, offset, out):
        if offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(self, offset, out)

    monkeypatch.setattr(PlacedFile, "read", fails)
    capsys.readouterr()
    run = train(workplace, "again", workplace / "kept")
    assert (losses(run), trained(run)) == undisturbed[:2]
    assert "cannot be read (Input/output error): what is not" in capsys.readouterr().out


@pytest.mark.parametrize("then", ["off", "host", "kept", "emptied"])
def test_a_run_goes_on_with_the_cache_or_without(then, undisturbed, workplace, monkeypatch, capsys):
    """Cut off in its second epoch, and gone on with under another value of the option."""
    where = {"off": "off", "host": "host"}.get(then, workplace / then)
    steps = len(undisturbed[0])
    stop = steps // 2 + 1

    def ends(self, args, state, control, **_):
        if state.global_step == stop:
            raise Killed

    saving = [*TOP, "training.save_steps=2"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PeakWatch, "on_step_end", ends)
        train(workplace, "run", workplace / "kept", *saving)
    if then == "emptied":
        shutil.rmtree(workplace / "kept")
        where = workplace / "kept"
    run = train(workplace, "run", where, *saving)
    assert "going on from" in capsys.readouterr().out
    assert (losses(run), trained(run)) == undisturbed[:2]


def test_a_kill_that_nothing_sees(undisturbed, workplace):
    """SIGKILL, while states are written."""
    run, folder = workplace / "run", workplace / "kept"
    command = [sys.executable, "-m", "xplus_fast.cli", "train", str(workplace / "recipe.yaml")]
    command += [*TOP, f"output={run}", f"data.cache_hidden={folder}", "training.save_steps=1"]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not any(
        file.stat().st_size for file in folder.glob(f"*/{STATES}")
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.stderr.read()
    process.stderr.close()
    run = train(workplace, "run", folder, *TOP, "training.save_steps=1")
    assert (losses(run), trained(run)) == undisturbed[:2]
    assert kept(folder)[1] == undisturbed[2]


def test_two_processes_keep_their_shares(workplace):
    """Each writes its own places into the same files; another run of two reads all of them."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    def both(output, where):
        given = [*TOP, f"output={workplace / output}", f"data.cache_hidden={where}"]
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "xplus_fast.cli", "train",
             str(workplace / "recipe.yaml"), *given],
            env=ENVIRONMENT, cwd=workplace, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return workplace / output, done.stdout

    plain, _ = both("off", "off")
    run, _ = both("run", workplace / "kept")
    lines = (plain / "metrics.jsonl").read_text().splitlines()
    assert kept(workplace / "kept")[1] * 3 == sum(json.loads(x)["tokens_computed"] for x in lines)
    again, said = both("again", workplace / "kept")
    assert f"{kept(workplace / 'kept')[1]:,} tokens' found" in said
    for other in (run, again):
        assert losses(other) == losses(plain) and trained(other) == trained(plain)


# --- refused before anything is trained


def test_a_folder_that_cannot_be_used_is_one_line(workplace, capsys, monkeypatch):
    (workplace / "file").write_text("")
    (workplace / "held").mkdir()
    refused = {
        str(workplace / "file"): "file: cannot be written (File exists)",
        str(workplace / "file" / "x"): "cannot be written (Not a directory)",
        "/proc/nothing/here": "not there yet, and the disk has 0.0 MB free",
        str(workplace / "readonly"): "readonly: cannot be written (Read-only file system)",
        str(workplace / "bad"): "bad is the run's own folder",
        str(workplace / "held"): "held: in use by another process of xplus-fast",
        "''": "data.cache_hidden: off, host or a folder is wanted",
        "[x]": "data.cache_hidden: text is wanted",
    }
    opened = os.open

    def refuses(path, *args, **kwargs):
        if str(workplace / "readonly") in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuses)
    with working_in(workplace / "held"):
        for where, says in refused.items():
            train(workplace, "bad", where, code=2)
            error = capsys.readouterr().err
            assert says in error and error.count("\n") == 1, error
            assert not (workplace / "bad").exists()


def test_what_disk_or_host_cannot_hold_is_refused(workplace, capsys, monkeypatch):
    usage = shutil.disk_usage(workplace)
    with monkeypatch.context() as patch:
        patch.setattr(
            "xplus_fast.planning.hidden.shutil.disk_usage", lambda _: usage._replace(free=90_000)
        )
        train(workplace, "bad", workplace / "kept", code=2)
        error = capsys.readouterr().err
        assert re.search(
            r"kept: 0\.\d MB of hidden states are to be kept, 0\.\d MB of them are not there yet,"
            r" and the disk has 0\.1 MB free\n$", error,
        ), error  # fmt: skip
        assert not (workplace / "kept").exists()
    train(workplace, "good", workplace / "kept")
    with monkeypatch.context() as patch:  # nothing more is needed
        patch.setattr(
            "xplus_fast.planning.hidden.shutil.disk_usage", lambda _: usage._replace(free=0)
        )
        train(workplace, "same", workplace / "kept")
    capsys.readouterr()
    train(workplace, "bad", "host", *TOP, "memory.host=10KB", code=2)
    error = capsys.readouterr().err
    assert "MB on the host, which has 0.0 MB to give (memory.host)" in error
    assert not (workplace / "bad").exists()


def test_the_dry_run_says_what_it_takes(undisturbed, workplace, capsys):
    options = [f"data.cache_hidden={workplace / 'kept'}", *TOP]
    assert xplus("train", workplace / "recipe.yaml", *options, "--dry-run") == 0
    said = capsys.readouterr().out
    size = undisturbed[2] * (HIDDEN * 4 + 4)
    assert f"hidden states: 0.2 KiB a token, {size / 1e6:.1f} MB in {workplace / 'kept'}\n" in said
    assert f"what enters layer {LEVEL}; " in said and "where it is there already" in said
    assert not (workplace / "kept").exists()


def test_the_speed_that_is_shown_counts_what_was_computed(workplace):
    """mfu, of a step whose frozen layers were not computed, is that of the others."""
    run = train(workplace, "run", "host")
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    done = [line["mfu"] * line["seconds"] / line["tokens_computed"] for line in lines]
    steps = len(lines) // 3
    assert max(done[steps:]) < 0.9 * min(done[:steps])
