"""Ctrl-C, SIGTERM and SIGUSR1 finish the step, save, and end with a line; then all is as before."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from xplus_fast import signals
from xplus_fast.cli import main
from xplus_fast.training import peers
from xplus_fast.training.place import Place

ROOT = Path(__file__).parents[2]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path) -> Path:
    pairs = [{"prompt": f"say {i}", "completion": f"number {i} it is"} for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    tree = {
        "model": str(tiny_model_dir), "output": str(tmp_path / "run"),
        "data": {
            "sources": [{"path": str(tmp_path / "pairs.jsonl")}], "pack_tokens": 96,
            "cache": str(tmp_path / "cache"),
        },
        "stages": [{"layers": "top:1", "steps": 5}, {"layers": "bottom:1", "steps": 3}],
        "training": {"tokens_per_step": 200, "save_steps": 100},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "recipe.yaml"


def send_after(monkeypatch: pytest.MonkeyPatch, step: int, signum: int, times: int = 1) -> None:
    """Let the process send itself a signal while a step is under way."""
    from xplus_fast.training.planned import PlannedTrainer

    real, left = PlannedTrainer.training_step, [times]

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            while left[0]:
                left[0] -= 1
                os.kill(os.getpid(), signum)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(PlannedTrainer, "training_step", training_step)


def result(run: Path) -> tuple[Any, ...]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    stages = [load_file(f) for f in sorted(run.glob("stage-*/final/trained.safetensors"))]
    return [(x["stage"], x["step"], x["loss"]) for x in lines], stages


@pytest.mark.parametrize("signum", CODES, ids=lambda s: s.name)
def test_the_first_one_finishes_the_step_and_saves(
    signum: signal.Signals, recipe: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = recipe.parent / "whole", recipe.parent / "run"
    assert main(["train", str(recipe), f"output={whole}"]) == 0
    handlers = [signal.getsignal(s) for s in CODES]
    with monkeypatch.context() as patch:
        send_after(patch, 3, signum)
        assert main(["train", str(recipe)]) == CODES[signum]
    said = capfd.readouterr().err
    assert (
        f"{signum.name}: stage stage-1 finishes its step and saves; once more ends at once" in said
    )
    assert said.strip().splitlines()[-1] == (
        "xplus-fast: stopped after step 3 of stage-1, which is saved;"
        " start the same command again to go on"
    )
    assert [p.name for p in (run / "stage-1").iterdir()] == ["checkpoint-3"]
    assert [signal.getsignal(s) for s in CODES] == handlers
    assert main(["train", str(recipe)]) == 0
    (a, x), (b, y) = result(whole), result(run)
    assert a == b and len(x) == len(y) == 2
    for one, other in zip(x, y, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_the_second_one_ends_at_once(
    recipe: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_after(monkeypatch, 3, signal.SIGINT, times=2)
    assert main(["train", str(recipe)]) == 130
    assert "stopped at once; start the same command again" in capfd.readouterr().err
    assert not list((recipe.parent / "run" / "stage-1").iterdir())


def test_after_the_last_step_the_stage_is_not_trained_again(
    recipe: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        send_after(patch, 5, signal.SIGTERM)
        assert main(["train", str(recipe)]) == 143
    assert main(["train", str(recipe)]) == 0
    steps = [step for stage, step, _ in result(recipe.parent / "run")[0] if stage == "stage-1"]
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("signum", CODES, ids=lambda s: s.name)
def test_other_commands_end_at_once_with_a_line(
    signum: signal.Signals, capsys: Any, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path
) -> None:
    def wait(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signum)
        time.sleep(5)

    monkeypatch.setattr("xplus_fast.training.export.verify", wait)
    assert main(["verify", str(tiny_model_dir), str(tiny_model_dir)]) == CODES[signum]
    assert capsys.readouterr().err == "\nxplus-fast: stopped\n"


def test_in_another_thread_nothing_is_handled() -> None:
    before, seen = [signal.getsignal(s) for s in CODES], []

    def work() -> None:
        with signals.listen(), signals.finish_first("it") as asked:
            seen.append((asked.signum, [signal.getsignal(s) for s in CODES]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(0, before)]


# --- several processes


def launch(recipe: Path, *more: str) -> list[subprocess.Popen]:
    """Two processes of one run, by no launcher that would end the others."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = str(store.port)
    del store
    started = []
    for rank in range(2):
        environment = {
            **os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "OMP_NUM_THREADS": "1",
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        command = [sys.executable, "-m", "xplus_fast.cli", "train", str(recipe), *more]
        started.append(subprocess.Popen(
            command, env=environment, cwd=recipe.parent, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        ))  # fmt: skip
    return started


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_dies_the_other_ends_with_a_line(recipe: Path, victim: int) -> None:
    processes = launch(recipe, "stages.0.steps=100000")
    metrics = recipe.parent / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not metrics.exists() or metrics.stat().st_size == 0:
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.05)
    processes[victim].kill()
    other = processes[1 - victim]
    try:
        _, said = other.communicate(timeout=peers.SILENCE + 60)
    finally:
        other.kill()
    assert other.returncode == 2
    last = said.strip().splitlines()[-1]
    assert last.startswith("xplus-fast: ") and "start the same command again" in last
    assert "Traceback" not in said


def test_a_process_that_only_falls_silent_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """One that hangs keeps its connections: nothing but its silence tells."""
    ended = threading.Event()
    monkeypatch.setattr(peers, "BEAT", 0.02)
    monkeypatch.setattr(peers, "SILENCE", 0.3)
    monkeypatch.setattr(peers, "_end", lambda why: (print(why), ended.set()))
    store = torch.distributed.HashStore()
    place = Place(torch.device("cpu"), torch.float32, 0, 2)
    over = threading.Event()
    watch = threading.Thread(target=peers._watch, args=(store, place, over), daemon=True)
    watch.start()
    for beat in range(20):  # alive for longer than it may be silent
        store.set(peers._key(1), str(beat))
        time.sleep(0.03)
    assert not ended.is_set()
    assert ended.wait(5)
    over.set()
    watch.join(5)
    assert "process 1 of this run has ended without a word" in capsys.readouterr().out


@pytest.mark.parametrize(("sign", "ends"), [("failed", True), ("done", False)])
def test_what_a_process_says_last_counts(
    sign: str, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(peers, "BEAT", 0.02)
    monkeypatch.setattr(peers, "SILENCE", 0.2)
    monkeypatch.setattr(peers, "_end", lambda why: ended.set())
    store = torch.distributed.HashStore()
    store.set(peers._key(1), sign)
    over = threading.Event()
    place = Place(torch.device("cpu"), torch.float32, 0, 2)
    watch = threading.Thread(target=peers._watch, args=(store, place, over), daemon=True)
    watch.start()
    assert ended.wait(1.0) == ends
    over.set()
    watch.join(5)
