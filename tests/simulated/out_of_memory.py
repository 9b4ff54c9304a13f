"""Every allocation of a small training run fails once: the run is the same.

    python -m tests.simulated.out_of_memory [--processes 2] [--every 1]

Ends with its figures, and with 1 where a case is bad.
"""

import argparse
import contextlib
import io
import multiprocessing
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tests.simulated.scenarios import LEAN, Result, same, save_model, simulated, trainer

# what a leaner plan changes is left open: it gives way without another rounding
PLANS: dict[str, dict[str, Any]] = {
    "all on the device": {},
    "all on the host": {**LEAN, "activations": "auto"},
}
STEPS = 2
# 4 bytes in which the library averages the loss that it logs; nobody else can try again
BEYOND = {"transformers/trainer.py _maybe_log_save_evaluate"}


class _Bytes(TrainerCallback):
    """Allocations before the first step, and what is held after each."""

    def __init__(self, sim: Any) -> None:
        self.sim, self.before, self.held = sim, 0, []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.before = len(self.sim.allocated)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.held.append(torch.cuda.memory_allocated())


@dataclass
class Run:
    """What came of one. places: of its allocations; before: how many before its first step."""

    result: Result | None = None
    wrong: str = ""
    said: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    before: int = 0
    held: list[int] = field(default_factory=list)

    def cases(self) -> list[int]:
        """Numbers of allocations that may fail."""
        numbers = range(self.before + 1, len(self.places) + 1)
        return [k for k in numbers if self.places[k - 1] not in BEYOND]


def play(model: Path, plan: str, fail_at: int | None = None) -> Run:
    run = Run()
    with simulated() as sim, tempfile.TemporaryDirectory() as folder:
        watch, sim.fail_at = _Bytes(sim), fail_at
        options = dict(memory=PLANS[plan], callbacks=[watch], max_steps=STEPS)
        try:
            run.result = trainer(model, Path(folder), say=run.said.append, **options)
        except Exception as e:  # the verdict
            run.wrong = f"{type(e).__name__}: {e}"
        run.places, run.before, run.held = sim.allocated, watch.before, watch.held
    if sim.alive or sim.pinned:
        run.wrong = run.wrong or f"{sim.alive} bytes are left on the device"
    return run


def judge(model: Path, plan: str, reference: Run, k: int) -> str:
    """What is wrong after allocation k has failed; empty if nothing is."""
    run = play(model, plan, k)
    if run.wrong:
        return run.wrong
    assert run.result is not None and reference.result is not None
    if len(run.places) <= k:
        return "it was not reached"
    if sum("leaner" in line for line in run.said) > 1:
        return f"stepped down more than once: {run.said}"
    if not same(run.result, reference.result):
        return "another result"
    return "" if run.held == reference.held else f"holds {run.held}, not {reference.held}"


def main() -> int:
    parser = argparse.ArgumentParser(description="let every allocation fail once")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="so many-th allocation only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started, bad, total = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder))
        for plan in PLANS:
            reference = play(model, plan)
            assert not reference.wrong, reference.wrong
            work = partial(_quietly, model, plan, reference)
            with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
                for k, wrong in pool.imap(work, cases := reference.cases()[:: options.every]):
                    total += 1
                    if wrong:
                        bad += 1
                        print(f"BAD  {plan} {k} {reference.places[k - 1]}: {wrong}", flush=True)
            print(f"{plan}: {len(cases)} allocations, {bad} bad so far", flush=True)
    print(f"{total} cases in {time.monotonic() - started:.0f} s, {bad} of them bad")
    return int(bad > 0)


def _quietly(model: Path, plan: str, reference: Run, k: int) -> tuple[int, str]:
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        return k, judge(model, plan, reference, k)


if __name__ == "__main__":
    sys.exit(main())
