"""How kernels are timed, and what the machine itself can do.

A call's time is the GPU's, between two CUDA events, the host being ahead: a pause is enqueued
before every round, so that launches are not what is measured (a call that itself waits for the
device is charged for it). Each round runs every provider once, beginning with another one each
time; each call takes the next of several sets of inputs and the last outputs are kept, so that
between two uses of a set more than twice the L2 cache has gone by.
"""

import ctypes
import math
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
LEAST_ROUNDS, MOST_ROUNDS = 5, 100
MOST_SETS = 24
LEAST_PAUSE, MOST_PAUSE = 2e-4, 2e-2  # seconds
SUSTAINED = 2.0  # seconds


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 20th and 80th percentile of `calls`."""

    median: float
    p20: float
    p80: float
    calls: int


def set_count(bytes_a_set: int, device: torch.device) -> int:
    """Sets of inputs: between two uses of one, the others are at least twice the L2."""
    if device.type != "cuda":
        return 2
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_SETS, 1 + math.ceil(2 * l2 / max(1, bytes_a_set)))


def measure(calls: Mapping[str, Sequence[Call]], seconds: float, device: torch.device) -> dict:
    """name -> a call for each set of inputs; -> name -> Timing, in about `seconds` in all."""
    run = _gpu_rounds if device.type == "cuda" else _cpu_rounds
    return {name: _summary(taken) for name, taken in run(calls, seconds, device).items()}


def _summary(taken: list[float]) -> Timing:
    ordered = sorted(taken)

    def at(share: float) -> float:
        return ordered[round(share * (len(ordered) - 1))]

    return Timing(at(0.5), at(0.2), at(0.8), len(ordered))


def _rounds(estimate: float, seconds: float) -> int:
    return max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / max(estimate, 1e-9))))


def _cpu_rounds(
    calls: Mapping[str, Sequence[Call]], seconds: float, device: torch.device
) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for sets in calls.values():
        sets[0]()
    for i in range(_rounds(time.perf_counter() - start, seconds)):
        for name in _order(list(calls), i):
            begin = time.perf_counter()
            calls[name][i % len(calls[name])]()
            taken[name].append(time.perf_counter() - begin)
    return taken


def _gpu_rounds(
    calls: Mapping[str, Sequence[Call]], seconds: float, device: torch.device
) -> dict[str, list[float]]:
    names = list(calls)
    count = max(len(sets) for sets in calls.values())
    kept: deque[Any] = deque(maxlen=count)
    host = total = 0.0
    for name in names:  # every set once: memory is allocated and the kernels are compiled
        for call in calls[name]:
            kept.append(call())
    torch.cuda.synchronize(device)
    for name in names:  # how long the host takes to launch, and all of it to run
        begin = time.perf_counter()
        kept.append(calls[name][0]())
        host += time.perf_counter() - begin
        torch.cuda.synchronize(device)
        total += time.perf_counter() - begin
    pause = min(MOST_PAUSE, max(LEAST_PAUSE, 1.5 * host))
    cycles = int(pause * 2e9)  # no card of today runs faster than 2 GHz by much
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    used = 0
    for i in range(_rounds(total + pause, seconds)):
        torch.cuda._sleep(cycles)
        for name in _order(names, i):
            call = calls[name][used % len(calls[name])]
            used += 1
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            kept.append(call())
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize(device)
    return {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in events.items()}


def _order(names: list[str], i: int) -> list[str]:
    return names[i % len(names) :] + names[: i % len(names)]


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes that a call allocates at its peak, its outputs among them; None without CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure_limits(device: torch.device, *, tiny: bool = False) -> dict[str, Any]:
    """What a card does at best, a second: copy_bytes, bf16_flops, fp8_flops where it has them.

    A copy of 1 GiB moves 2 GiB; the GEMMs are 8192^3, by cuBLAS and torch._scaled_mm, after a
    pause each; bf16_flops_sustained is what the same GEMM does when nothing else has been done for
    `SUSTAINED` seconds, at the clock that the card's power leaves it.
    """
    elements, n = (2**20, 256) if tiny else (2**30, 8192)
    source = torch.zeros(elements, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    calls: dict[str, Sequence[Call]] = {
        "copy_bytes": [lambda: target.copy_(source)],
        "bf16_flops": [lambda: a @ b.T],
    }
    work = {"copy_bytes": 2 * elements, "bf16_flops": 2 * n**3, "fp8_flops": 2 * n**3}
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        one = torch.ones((), device=device)
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        calls["fp8_flops"] = [
            lambda: torch._scaled_mm(
                a8, b8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
            )
        ]
    limits: dict[str, Any] = {}
    for name, sets in calls.items():  # apart: each at the clocks of its own kind of load
        limits[name] = (
            work[name] / measure({name: sets}, 0.05 if tiny else 0.3, device)[name].median
        )
        if name != "copy_bytes":
            limits[f"clocks_after_{name.removesuffix('_flops')}"] = clocks(device)
    gemm = calls["bf16_flops"][0]
    limits["bf16_flops_sustained"] = work["bf16_flops"] / _sustained(gemm, device, tiny=tiny)
    limits["clocks_sustained"] = clocks(device)
    return limits


def _sustained(call: Call, device: torch.device, *, tiny: bool) -> float:
    """Seconds of a call that is made over and over: the median of the last third of the time."""
    many, taken = 2 if tiny else 20, []
    start = time.perf_counter()
    while time.perf_counter() - start < (0.02 if tiny else SUSTAINED):
        begin = time.perf_counter()
        for _ in range(many):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append((time.perf_counter() - begin) / many)
    return statistics.median(taken[-max(1, len(taken) // 3) :])


def copy_rate(device: torch.device) -> float:
    """Bytes/s from pinned host memory, alone: the best of a few."""
    host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    best = math.inf
    for _ in range(5):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        there.copy_(host, non_blocking=True)
        events[1].record()
        events[1].synchronize()
        best = min(best, events[0].elapsed_time(events[1]) / 1e3)
    return len(host) / best


def clocks(device: torch.device) -> dict[str, str] | None:
    """What nvidia-smi says of clocks and power, or None where it says nothing."""
    if device.type != "cuda":
        return None
    fields = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,driver_version"
    index = str(device.index if device.index is not None else torch.cuda.current_device())
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", index],
            capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [v.strip() for v in done.stdout.strip().split(",")]
    names = fields.split(",")
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else None


def energy(device: torch.device) -> float | None:
    """Joules that the card has used since its driver was loaded, as NVML counts; else None."""
    if device.type != "cuda":
        return None
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
        # NVML knows cards by their bus, whatever CUDA_VISIBLE_DEVICES says
        bus = torch.cuda.get_device_properties(device)
        name = f"{bus.pci_domain_id:08x}:{bus.pci_bus_id:02x}:{bus.pci_device_id:02x}.0"
        calls = (
            nvml.nvmlInit_v2(),
            nvml.nvmlDeviceGetHandleByPciBusId_v2(name.encode(), ctypes.byref(handle)),
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)),
        )
    except (OSError, AttributeError):
        return None
    return millijoules.value / 1e3 if not any(calls) else None
