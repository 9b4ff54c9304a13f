"""How fast a step was, against the work that its selection made necessary."""

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from functools import cache
from typing import Any

import torch
from torch import Tensor

from xplus_fast.model.families import Shape
from xplus_fast.planning.flops import Work, necessary_flops, work_of

NOTHING = Work(0, 0, 0, 0, 0, 0)
SIDE = {"cuda": 8192, "cpu": 1024}  # of the matrices whose product is timed


class Meter:
    """Adds up the work of a step's batches and turns it into rates.

    Counts that are asked of the device stay there until `read`, so that adding a batch never waits
    for it.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.peak: float | None = None  # FLOP/s of a large GEMM
        self.seen = 0  # tokens so far, all processes
        self.start()

    def measure_peak(self, device: torch.device, dtype: torch.dtype) -> None:
        """Before the first step, when there is room for it."""
        if self.peak is None:
            self.peak = _rate(device, dtype)

    def start(self) -> None:
        """Begin to count and to time."""
        self._known = NOTHING  # of batches that know their work
        self._spared = 0  # FLOPs of it whose results were there
        self._asked: list[Tensor] = []  # of others
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of what is not training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - start

    def add(self, inputs: dict[str, Any]) -> None:
        """Count one batch, packed or padded."""
        if inputs.get("layout") is not None:
            self._known += work_of(inputs["layout"])
        else:
            self._asked.append(count_work(inputs))

    def spare(self, flops: int) -> None:
        """Of what was added, so much was not computed."""
        self._spared += flops

    def read(
        self, device: torch.device, layers: Collection[int], also: Collection[str]
    ) -> dict[str, Any]:
        """Rates since the last read, over all processes: every process calls this.

        layers, also: which trained.
        """
        assert self.peak is not None
        counts = torch.tensor([*astuple(self._known), self._spared])
        if self._asked:
            counts[:-1] += torch.stack(self._asked).sum(0).cpu()
        seconds = time.perf_counter() - self._since
        processes = 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            counts = counts.to(device)
            torch.distributed.all_reduce(counts)
            processes = torch.distributed.get_world_size()
        *known, spared = counts.tolist()
        work = Work(*known)
        flops = necessary_flops(self.shape, layers, also, work).total - spared
        tokens = work.data_tokens
        self.seen += tokens
        self.start()
        return {
            "tokens": tokens,
            "tokens_computed": work.tokens,
            "supervised": work.supervised,
            "tokens_seen": self.seen,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / (self.peak * processes),
            "memory_bytes": memory_bytes(device),
        }


def count_work(inputs: dict[str, Any]) -> Tensor:
    """The fields of a batch's `Work`, int64 [6], without waiting for the device."""
    given = inputs.get("input_ids", inputs.get("inputs_embeds"))
    assert isinstance(given, Tensor)
    rows, columns = given.shape[:2]
    t = torch.arange(rows * columns, device=given.device)
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    valid = torch.ones_like(t, dtype=torch.bool)
    if inputs.get("cu_seq_lens_q") is not None:
        edges = inputs["cu_seq_lens_q"].to(t.device).long()
        start = edges[torch.searchsorted(edges, t, right=True) - 1]
    elif mask is None and positions is not None:
        start = t - positions.expand(rows, columns).flatten()  # a query sees position + 1 keys
    else:
        start = t // columns * columns
        valid = valid if mask is None else mask.flatten() != 0
    seen = torch.nn.functional.pad(valid.cumsum(0), (1, 0))
    keys = (seen[1:] - seen[start.clamp(min=0)]) * valid
    predicts = torch.zeros_like(valid).view(rows, columns)
    predicts[:, :-1] = inputs["labels"][:, 1:] != -100
    asks = (torch.where(predicts.flatten(), t, -1).cummax(0)[0] >= start) & valid
    tokens = valid.sum()
    counts = (tokens, tokens, predicts.sum(), asks.sum(), keys.sum(), (keys * asks).sum())
    return torch.stack(counts)


@cache  # stages of one run are held against the same rate
def _rate(device: torch.device, dtype: torch.dtype) -> float:
    return gemm_rate(device, dtype)


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product here and now: the best of a few."""
    n = SIDE.get(device.type, SIDE["cpu"])
    own = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    a, b = (torch.randn(n, n, device=device, generator=own).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def memory_bytes(device: torch.device) -> int:
    """Peak bytes so far: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
