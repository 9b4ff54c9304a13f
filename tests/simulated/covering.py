"""Scenarios that together come by every call which orders streams, each with a need of it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import TrainerCallback

from tests.simulated.clocks import DEVICE
from tests.simulated.device import SimulatedDevice
from tests.simulated.scenarios import (
    HOSTED,
    LEAN,
    Result,
    backward,
    cached,
    engine,
    layout,
    load,
    make_trainer,
    on_host,
    real_gemm_rate,
    relaid,
    steps,
    trained,
    trainer,
)
from xplus_fast.model.layout import LayerLayout, Layout
from xplus_fast.model.offload import Offloaded
from xplus_fast.model.sums import summed
from xplus_fast.planning.search import Plan
from xplus_fast.training import planned, throughput
from xplus_fast.training.host_state import HostGradients
from xplus_fast.training.optimizer import AdamW

Scenario = Callable[[SimulatedDevice, Path, Path], Result]


def streamed(sim: SimulatedDevice, model: Path, folder: Path) -> Result:
    return engine(model, layout((2, 3), "host", "offload"), update=HOSTED)


def script(sim: SimulatedDevice, model: Path, folder: Path) -> Result:
    """One that asks for no norm."""
    return engine(model, layout((4, 5)), update=HOSTED, clip=False)


def stages(sim: SimulatedDevice, model: Path, folder: Path) -> Result:
    wanted = (layout(trained, "host", "mixed") for trained in ((0, 1), (4, 5), (2,)))
    return engine(model, *wanted, number=1)


def formats(sim: SimulatedDevice, model: Path, folder: Path) -> Result:
    """Small streamed layers; a large one comes to them; it goes."""
    small = LayerLayout(False, "int8", "host")

    def wanted(lowest: LayerLayout) -> Layout:
        return Layout((lowest, *[small] * 4, LayerLayout(True)))

    top, large = LayerLayout(True), LayerLayout(False, "bf16", "host")
    made, found, sizes = load(model, wanted(top)), [], []
    for lowest in (top, large, top):
        found += steps(relaid(made, model, wanted(lowest)), {}, number=1)
        sizes.append(sum(len(b) for b in made.model.layers[1].frozen.stream.buffers))
    assert sizes[0] < sizes[1]
    return [loss.item() for loss in found] + sizes, on_host(made)


def epochs(sim: SimulatedDevice, model: Path, folder: Path) -> Result:
    return cached(model, folder, {})


class _Reads(TrainerCallback):
    """Looks at what a checkpoint would hold, before anything else waits (for the norm, soon)."""

    trainer: Any

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        for state in self.trainer._optimizer_state()["states"].values():
            state["exp_avg"].numpy()


def checkpoints(sim: SimulatedDevice, model: Path, folder: Path) -> Result:
    reads = _Reads()
    options = dict(max_steps=2, save_strategy="steps", save_steps=1)
    made = make_trainer(model, folder, memory=LEAN, callbacks=[reads], **options)
    reads.trainer = made
    return trained(made)


@contextmanager
def running_out(
    sim: SimulatedDevice, owner: Any, name: str, call: int, allocation: int
) -> Iterator[None]:
    """Of memory, at an allocation after a method is called for the so-many-th time."""
    inner, calls = getattr(owner, name), []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            sim.fail_at = len(sim.allocated) + allocation
        return inner(*args, **options)

    with mock.patch.object(owner, name, counted):
        yield
    assert sim.fail_at is not None and len(sim.allocated) > sim.fail_at


def script_gives_up(sim: SimulatedDevice, model: Path, folder: Path) -> Result:
    """A script whose memory runs out in a backward, which it leaves at that."""
    made = load(model, layout((2, 3), "host", "offload"))
    with running_out(sim, Offloaded, "take", 3, 5):
        try:
            backward(made, seed=99)
            raise AssertionError("memory does not run out")
        except torch.OutOfMemoryError:
            made.zero_grad()
        found = steps(made, {})
    return [loss.item() for loss in found], on_host(made)


def script_tries_again(sim: SimulatedDevice, model: Path, folder: Path) -> Result:
    """A script whose memory runs out while sums of gradients come over, and that goes on."""
    made = load(model, layout((2, 3)))
    optimizer = AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-3, gradients="host")

    def micro_batch(seed: int) -> float:
        with summed(made.model.layers, optimizer.sums):
            return backward(made, seed=seed).item()

    found = [micro_batch(0)]
    with running_out(sim, HostGradients, "bring", 3, 5):
        try:
            micro_batch(1)
            raise AssertionError("memory does not run out")
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
        for p in made.parameters():
            torch.ones_like(p)  # where the sums were to arrive
    found += [micro_batch(2), micro_batch(3)]
    optimizer.step()
    return found, on_host(made)


def halved(plan: Plan) -> Plan:
    return replace(plan, micro_batch_tokens=plan.micro_batch_tokens // 2)


def steps_down(sim: SimulatedDevice, model: Path, folder: Path) -> Result:
    """A step given up while the sums of gradients come over to be added to."""
    with (
        running_out(sim, HostGradients, "bring", 6, 3),
        mock.patch.object(planned, "leaner", halved),
    ):
        return trainer(model, folder, memory=LEAN)


def timing(sim: SimulatedDevice, model: Path, folder: Path) -> Result:
    """Whoever looks at the clock has waited for the device."""
    plain, clock = torch.Generator, time.perf_counter

    def now() -> float:
        assert all(sim.host.follows(s.name, s.clock[s.name]) for s in sim.streams)
        return clock()

    with (
        mock.patch.object(throughput, "gemm_rate", real_gemm_rate),
        mock.patch.object(throughput.time, "perf_counter", now),
        mock.patch.dict(throughput.SIDE, {"cuda": 16}),
        mock.patch.object(torch, "Generator", lambda device: plain()),
    ):
        throughput.gemm_rate(DEVICE, torch.bfloat16)
    return [], {}


SCENARIOS: list[Scenario] = [
    timing, script, streamed, script_gives_up, script_tries_again, stages, formats, epochs,
    checkpoints, steps_down,
]  # fmt: skip
