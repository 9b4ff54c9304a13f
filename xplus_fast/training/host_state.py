"""Optimizer state and gradients that live in host memory, and their way through the device.

State: a step takes it through two slots on the device, a piece of at most `CHUNK` elements at a
time: while one piece is updated, the next comes and the one before it goes. Gradients: the
backward hands each to a side stream, which adds it to its sum and takes it to the host.

On a CPU the same code runs with plain copies and no streams.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xplus_fast.model.host_memory import zeros_on_host
from xplus_fast.model.layout import UpdateLayout
from xplus_fast.model.sums import Sums, gradient_dtype
from xplus_fast.training.shortage import twice

CHUNK = 2**24  # elements; whole blocks of 256 for 8-bit states
ALIGN = 512  # bytes


def slot_bytes(largest_numel: int, layout: UpdateLayout, *, width: int = 2) -> int:
    """Bytes on the device of both slots: allocated by each step, and given back at its end.

    largest_numel: of the parameter with most elements. width: bytes of its element; a parameter
    as wide as fp32 has no master.
    """
    n = min(largest_numel, CHUNK)
    sizes = [max(width, layout.sums // 8) * n] if layout.gradients == "host" else []
    if layout.states == "host":
        states = [n, n, 4 * -(-n // 256), 4 * -(-n // 256)] if layout.bits == 8 else [4 * n, 4 * n]
        sizes += states + ([4 * n] if layout.master and width < 4 else [])
    return 2 * sum(map(_aligned, sizes))


class Lane:
    """A CUDA stream; on a CPU, where everything is done at once, nothing."""

    def __init__(self, stream: "torch.cuda.Stream | None") -> None:
        self._stream = stream

    @classmethod
    def new(cls, device: torch.device) -> "Lane":
        return cls(torch.cuda.Stream(device) if device.type == "cuda" else None)

    @classmethod
    def current(cls, device: torch.device) -> "Lane":
        return cls(torch.cuda.current_stream(device) if device.type == "cuda" else None)

    def working(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def mark(self) -> "torch.cuda.Event | None":
        """A point that follows everything given to this lane so far."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, mark: "torch.cuda.Event | None") -> None:
        if self._stream is not None and mark is not None:
            self._stream.wait_event(mark)

    def synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


class Job(NamedTuple):
    """One piece of the update.

    host: its tensors in host memory, flat; update: what is done with copies of them on the
    device, under the same names; back: names of those that are then copied back.
    """

    host: dict[str, Tensor]
    update: Callable[[dict[str, Tensor]], None]
    back: tuple[str, ...]


class Shuttle:
    """Brings what jobs need to the device and back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arriving, self._leaving = Lane.new(device), Lane.new(device)

    def run(self, jobs: Sequence[Job]) -> None:
        """Do the jobs in turn. What follows on the current stream finds their results.

        The host does not: it has to `synchronize` with that stream.
        """
        size = max((sum(_aligned(t.nbytes) for t in job.host.values()) for job in jobs), default=0)
        if size == 0:
            for job in jobs:
                job.update({})
            return
        here, arriving, leaving = Lane.current(self._device), self._arriving, self._leaving
        flat = partial(torch.empty, size, dtype=torch.uint8, device=self._device)
        slots = twice(lambda: [flat(), flat()])
        free = [here.mark()] * 2

        def bring(i: int) -> tuple[dict[str, Tensor], Any]:
            arriving.wait(free[i % 2])
            copies = _carve(slots[i % 2], jobs[i].host)
            with arriving.working():
                for name, tensor in jobs[i].host.items():
                    copies[name].copy_(tensor, non_blocking=True)
            return copies, arriving.mark()

        coming = bring(0)
        for i, job in enumerate(jobs):
            copies, arrived = coming
            if i + 1 < len(jobs):
                coming = bring(i + 1)
            here.wait(arrived)
            job.update(copies)
            leaving.wait(here.mark())
            with leaving.working():
                for name in job.back:
                    job.host[name].copy_(copies[name], non_blocking=True)
            free[i % 2] = leaving.mark()
        here.wait(leaving.mark())  # then the slots' memory may be used again


class _Sum:
    """A parameter's gradient, summed over the backward passes since the last reset."""

    def __init__(self, p: Tensor) -> None:
        self.host = zeros_on_host(p.shape, gradient_dtype(p), p.device)
        self.norm: Tensor | None = None  # [] on the device; None: nothing summed yet


class HostGradients(Sums):
    """Takes every gradient to the host as soon as the backward has made it; `p.grad` stays None.

    The sums are those that `p.grad` would hold, bit for bit: the addition is done on the device
    and in the gradient's dtype. Those of matrices come over when their layer's backward begins, for
    the GEMM to add to; of others, a piece at a time is added to the new gradient. Two gradients of
    the largest's size at most are on their way to the host.
    """

    def __init__(self) -> None:
        self._sums: dict[Tensor, _Sum] = {}
        self._coming: dict[Tensor, tuple[Tensor, Any]] = {}  # with the point when it is there
        self._hooks: list[Any] = []
        self._side: Lane | None = None
        # with the point after which it may be overwritten
        self._leaving: deque[tuple[Any, Tensor]] = deque()
        self._largest = 0  # bytes of a gradient

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Take the gradients of these from now on, as long as this object lives."""
        me = weakref.ref(self)

        def take(p: Tensor) -> None:
            alive = me()
            if alive is not None:
                alive._take(p)

        for p in parameters:
            self._hooks.append(p.register_post_accumulate_grad_hook(take))

    def __del__(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def get(self, p: Tensor) -> Tensor | None:
        """The sum in host memory; None if no gradient came since the last reset."""
        found = self._sums.get(p)
        return None if found is None or found.norm is None else found.host

    def norm(self, p: Tensor) -> Tensor | None:
        """[] on the device: the norm of `get`, after `settle`; its dtype is that of `norms_of`."""
        found = self._sums.get(p)
        return None if found is None else found.norm

    def reset(self) -> None:
        """Forget the sums."""
        for total, there in self._coming.values():  # of a backward that broke off
            Lane.current(total.device).wait(there)
        self._coming.clear()
        for found in self._sums.values():
            found.norm = None

    def settle(self, device: torch.device) -> None:
        """Let the current stream wait for all gradients to have arrived."""
        if self._side is not None:
            Lane.current(device).wait(self._side.mark())
        self._leaving.clear()

    @torch.no_grad()
    def bring(self, parameters: Iterable[Tensor]) -> None:
        """The sums of these set out for the device."""
        for p in parameters:
            kept = self._sums.get(p)
            hooks = len(p._post_accumulate_grad_hooks or ()) + len(p._backward_hooks or ())
            if kept is None or kept.norm is None or hooks > 1:  # others want to see each gradient
                continue
            assert self._side is not None
            # memory of the computing stream; what it did with it comes first
            total = torch.empty(p.shape, dtype=kept.host.dtype, device=p.device)
            self._side.wait(Lane.current(p.device).mark())
            with self._side.working():
                total.copy_(kept.host, non_blocking=True)
            self._coming[p] = total, self._side.mark()

    def so_far(self, p: Tensor) -> Tensor | None:
        if p not in self._coming:
            return None
        total, there = self._coming.pop(p)
        Lane.current(p.device).wait(there)
        return total

    @torch.no_grad()
    def put(self, p: Tensor, total: Tensor) -> None:
        self._send(self._sums[p], total)

    @torch.no_grad()
    def _take(self, p: Tensor) -> None:
        if p.grad is None:
            return
        gradient, p.grad = p.grad.contiguous(), None
        if p not in self._sums:
            self._sums[p] = _Sum(p)
        kept = self._sums[p]
        self._send(kept, gradient, kept.norm is not None)

    def _send(self, kept: _Sum, gradient: Tensor, add: bool = False) -> None:
        """To the host: a sum, or with `add` what is to be added to the one there."""
        here = Lane.current(gradient.device)
        if self._side is None:
            self._side = Lane.new(gradient.device)
        self._side.wait(here.mark())
        with self._side.working():
            flat, host = gradient.view(-1), kept.host.view(-1)
            if add:
                # into the new gradient, as `p.grad` would be added to: nobody else holds it
                for piece, before in zip(flat.split(CHUNK), host.split(CHUNK), strict=True):
                    piece.add_(before.to(piece.device, non_blocking=True))
            (kept.norm,) = norms_of([gradient])
            host.copy_(flat, non_blocking=True)
        self._largest = max(self._largest, gradient.nbytes)
        self._leaving.append((self._side.mark(), gradient))
        while sum(g.nbytes for _, g in self._leaving) > 2 * self._largest:
            # Made on this stream, so its memory is this stream's again: not before it has left.
            here.wait(self._leaving.popleft()[0])


def norms_of(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each, [] fp32, or fp64 for fp64 and on a CPU: a few launches for all of a dtype.

    In bf16 a norm would be right to three digits only.
    """
    found: dict[int, Tensor] = {}
    for dtype in {g.dtype for g in gradients}:
        at = [i for i, g in enumerate(gradients) if g.dtype == dtype]
        wide = torch.promote_types(dtype, torch.float32)
        chosen = [gradients[i] for i in at]
        norms: Sequence[Tensor]
        if chosen[0].is_cuda:
            norms = torch._foreach_norm(chosen, 2, dtype=wide)
        else:
            norms = [_norm_by_rows(g.reshape(-1), wide) for g in chosen]
        found |= dict(zip(at, norms, strict=True))
    return [found[i] for i in range(len(gradients))]


def _norm_by_rows(x: Tensor, wide: torch.dtype) -> Tensor:
    """x [n] -> [] fp64. A CPU sums one row after another: fp32 would lose 1 % at 2^24 elements."""
    row = 1024
    whole = x.numel() // row * row
    rows = torch.linalg.vector_norm(x[:whole].view(-1, row), dim=1, dtype=wide)
    rest = torch.linalg.vector_norm(x[whole:], dtype=wide)
    return torch.linalg.vector_norm(torch.cat([rows, rest.view(1)]).double())


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _carve(slot: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of these dtypes and shapes, one behind the other in a slot's memory."""
    made, at = {}, 0
    for name, tensor in like.items():
        made[name] = slot[at : at + tensor.nbytes].view(tensor.dtype)
        at += _aligned(tensor.nbytes)
    return made
