"""How fast a step was, against the work that its selection made necessary."""

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from xplus_fast.model.families import Shape
from xplus_fast.planning.flops import necessary_flops


class Meter:
    """Adds up the work of a step's batches and turns it into rates.

    Counts stay on the device until `read`, so that adding a batch never waits for it.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.peak: float | None = None  # FLOP/s of a large GEMM
        self.seen = 0  # tokens so far, all processes
        self.start()

    def measure_peak(self, device: torch.device, dtype: torch.dtype) -> None:
        """Once, and before the first step, when there is room for it."""
        if self.peak is None:
            self.peak = gemm_rate(device, dtype)

    def start(self) -> None:
        """Begin to count and to time."""
        self._tokens: Tensor | int = 0
        self._supervised: Tensor | int = 0
        self._pairs: Tensor | int = 0
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
        given = inputs.get("input_ids", inputs.get("inputs_embeds"))
        assert isinstance(given, Tensor)
        rows, columns = given.shape[:2]
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        pairs: Tensor | int
        tokens: Tensor | int = rows * columns
        if inputs.get("cu_seq_lens_q") is not None:
            lengths = inputs["cu_seq_lens_q"].diff().long()
            pairs = (lengths * (lengths + 1) // 2).sum()
        elif mask is not None:
            lengths = mask.sum(1)
            tokens, pairs = lengths.sum(), (lengths * (lengths + 1) // 2).sum()
        elif positions is not None:
            pairs = (positions + 1).expand(rows, columns).sum()  # a query sees position + 1 keys
        else:
            pairs = rows * columns * (columns + 1) // 2
        self._tokens = self._tokens + tokens
        self._pairs = self._pairs + pairs
        self._supervised = self._supervised + (inputs["labels"][..., 1:] != -100).sum()

    def read(
        self, device: torch.device, layers: Collection[int], also: Collection[str]
    ) -> dict[str, Any]:
        """Rates since the last read, over all processes: every process calls this.

        layers, also: which trained.
        """
        assert self.peak is not None
        counts = torch.tensor(
            [int(self._tokens), int(self._supervised), int(self._pairs)], device=device
        )
        seconds = time.perf_counter() - self._since
        processes = 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
            processes = torch.distributed.get_world_size()
        tokens, supervised, pairs = counts.tolist()
        flops = necessary_flops(
            self.shape, layers, also, tokens=tokens, supervised=supervised, pairs=pairs
        ).total
        self.seen += tokens
        self.start()
        return {
            "tokens": tokens,
            "supervised": supervised,
            "tokens_seen": self.seen,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / (self.peak * processes),
            "memory_bytes": memory_bytes(device),
        }


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product here and now: the best of a few."""
    n = 8192 if device.type == "cuda" else 1024
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
