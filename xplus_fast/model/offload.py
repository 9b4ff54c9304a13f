"""Block inputs that wait for the backward on the host.

Each leaves on a side stream while its block computes, and is back before the backward comes to
it: a backward that takes one sends for the one below it. On a CPU nothing has to move.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


class Offloaded:
    """One tensor on the host."""

    def __init__(self, x: Tensor, stream: torch.cuda.Stream | None, below: Offloaded | None):
        self._below = None if below is None else weakref.ref(below)
        self._stream, self._device = stream, x.device
        self._back: Tensor | None = None
        self._event: torch.cuda.Event | None = None
        if stream is None:
            self._host = x.detach()
            return
        self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self._host.copy_(x, non_blocking=True)
        x.record_stream(stream)  # its memory is taken again only after the copy

    def take(self) -> Tensor:
        """The tensor on its device, once; the one below it sets out."""
        if self._stream is None:
            return self._host
        self._fetch()
        below = None if self._below is None else self._below()
        if below is not None:
            below._fetch()
        current = torch.cuda.current_stream(self._device)
        assert self._back is not None and self._event is not None
        current.wait_event(self._event)
        back, self._back = self._back, None
        back.record_stream(current)
        return back

    def _fetch(self) -> None:
        if self._back is not None:
            return
        assert self._stream is not None
        with torch.cuda.stream(self._stream):  # after its own departure: they share the stream
            self._back = self._host.to(self._device, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(self._stream)


class Offload:
    """Sends tensors to the host, in the order of the forward."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last: weakref.ref[Offloaded] | None = None

    def put(self, x: Tensor) -> Offloaded:
        below = None if self._last is None else self._last()
        sent = Offloaded(x, self._stream, below)
        self._last = weakref.ref(sent)
        return sent
