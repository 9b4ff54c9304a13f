"""The matrices of frozen layers in a narrow format, or on the host, or both.

A frozen layer whose matrices are not plain parameters has a store: `fetch` gives its matrices on
the device. Resident ones are there. Streamed ones lie in (pinned) host memory and come, one layer
ahead of the computation, into two device buffers that all of them share: read-only, in order
through the forward and in reverse through the backward, never copied back.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import xplus_kernels as ops
from xplus_fast.errors import UserError
from xplus_fast.model.host_memory import zeros_on_host
from xplus_fast.model.layout import Format
from xplus_kernels import Bf16Weight, Fp8Rows, Fp8Weight, FrozenWeight, Int8Weight, Nf4Weight
from xplus_kernels.weight_blocks import BLOCK

ALIGNMENT = 256  # bytes: every tensor in a buffer begins as an allocation of its own would
PIECE = 1 << 19  # elements quantized at a time
MATRICES = ("qkv", "o", "gate_up", "down")


class Store(Protocol):
    """Where one layer's frozen matrices come from."""

    @property
    def weights(self) -> dict[str, FrozenWeight]:
        """The matrices where they lie."""

    def fetch(self, *, backward: bool) -> dict[str, FrozenWeight]:
        """The matrices on the device, good until the layer's computation is enqueued."""


@dataclass(frozen=True)
class Resident:
    """Matrices that stay on the device."""

    weights: dict[str, FrozenWeight]

    def fetch(self, *, backward: bool) -> dict[str, FrozenWeight]:
        return self.weights


@dataclass(frozen=True)
class Streamed:
    """Matrices that a `Stream` brings in."""

    stream: "Stream"
    index: int

    @property
    def weights(self) -> dict[str, FrozenWeight]:
        return self.stream.on_host(self.index)

    def fetch(self, *, backward: bool) -> dict[str, FrozenWeight]:
        return self.stream.fetch(self.index, backward=backward)


def freeze(weight: Tensor, form: Format) -> FrozenWeight:
    """A matrix [out, in] in a format, where it is. Raises `UserError` where that cannot be."""
    try:
        if form == "fp8":
            return Fp8Weight(quantize_rows(weight))
        if form == "int8":
            return quantize_blocks(weight)
        if form == "nf4":
            return ops.quantize_nf4(weight)
    except (ValueError, ImportError) as e:
        raise UserError(f"frozen format {form}: {e}") from None
    return Bf16Weight(weight)


def quantize_rows(weight: Tensor) -> Fp8Rows:
    """A matrix in FP8, a few rows at a time: on a CPU it takes several fp32 copies of them."""
    data = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(len(weight), device=weight.device)
    rows = max(1, PIECE // weight.shape[1])
    for a in range(0, len(weight), rows):
        data[a : a + rows], scale[a : a + rows] = ops.quantize_fp8(weight[a : a + rows])
    return Fp8Rows(data, scale)


def quantize_blocks(weight: Tensor) -> Int8Weight:
    """A matrix in INT8, a few rows at a time as in `quantize_rows`."""
    rows = max(1, PIECE // weight.shape[1])
    while rows * weight.shape[1] % BLOCK:  # a piece holds whole blocks
        rows += 1
    made = [ops.quantize_int8(weight[a : a + rows]) for a in range(0, len(weight), rows)]
    return Int8Weight(torch.cat([m.codes for m in made]), torch.cat([m.scale for m in made]))


def format_of(weight: FrozenWeight) -> Format:
    formats: dict[type, Format] = {
        Bf16Weight: "bf16", Fp8Weight: "fp8", Int8Weight: "int8", Nf4Weight: "nf4",
    }  # fmt: skip
    return formats[type(weight)]


def tensors_of(weight: FrozenWeight) -> tuple[Tensor, ...]:
    """The tensors that make a frozen weight."""
    if isinstance(weight, Fp8Weight):
        return weight.rows
    if isinstance(weight, Int8Weight):
        return weight.codes, weight.scale
    return (weight.codes, weight.absmax) if isinstance(weight, Nf4Weight) else (weight.data,)


def with_tensors(weight: FrozenWeight, tensors: tuple[Tensor, ...]) -> FrozenWeight:
    """The same weight, made of these tensors."""
    if isinstance(weight, Fp8Weight):
        return Fp8Weight(Fp8Rows(*tensors))
    if isinstance(weight, Int8Weight):
        return Int8Weight(*tensors)
    if isinstance(weight, Nf4Weight):
        codes, absmax = tensors
        return Nf4Weight(codes, absmax, weight.shape)
    return Bf16Weight(*tensors)


def stored_bytes(weights: dict[str, FrozenWeight]) -> int:
    """Bytes of a layer's matrices as one buffer holds them."""
    sizes = [t.nbytes for w in weights.values() for t in tensors_of(w)]
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


class Stream:
    """Layers on the host and the two buffers through which the device sees them.

    lowest: the lowest layer that a backward reaches.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lowest = 0
        self._host: dict[int, tuple[Tensor, dict[str, FrozenWeight]]] = {}
        self._slots: list[_Slot] = []
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def add(self, index: int, weights: dict[str, FrozenWeight]) -> Streamed:
        """Take over a layer's matrices, from wherever they are."""
        flat = zeros_on_host((stored_bytes(weights),), torch.uint8, self.device)
        on_host = _views(flat, weights)
        for name, weight in weights.items():
            for to, value in zip(tensors_of(on_host[name]), tensors_of(weight), strict=True):
                to.copy_(value)
        self._host[index] = (flat, on_host)
        self._drop_slots()
        return Streamed(self, index)

    def on_host(self, index: int) -> dict[str, FrozenWeight]:
        return self._host[index][1]

    @property
    def buffers(self) -> list[Tensor]:
        """The device's, once something has been fetched."""
        return [slot.buffer for slot in self._slots]

    def remove(self, index: int) -> None:
        del self._host[index]
        self._drop_slots()

    def _drop_slots(self) -> None:
        if self._slots and self._side is not None:  # a layer may be on its way into one
            torch.cuda.current_stream(self.device).wait_stream(self._side)
        self._slots = []

    def fetch(self, index: int, *, backward: bool) -> dict[str, FrozenWeight]:
        """Layer `index` on the device; the next one in the direction sets out."""
        if not self._slots:
            size = max(len(flat) for flat, _ in self._host.values())
            buffers = (torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2))
            self._slots = [_Slot(buffer) for buffer in buffers]
        slot = next((s for s in self._slots if s.index == index), None)
        if slot is None:  # the first of all, or a turn nobody foresaw
            slot = self._slots[0]
            self._bring(index, slot)
        if slot.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.arrived)
        after = self._after(index, backward)
        other = self._slots[1 - self._slots.index(slot)]
        if after is not None and other.index != after:
            self._bring(after, other)
        return slot.weights

    def _after(self, index: int, backward: bool) -> int | None:
        layers = sorted(self._host)
        if not backward:  # the backward begins with the two last ones, which are here then
            # none of the last ones is needed before the next micro-batch's first, if all are
            # below what a backward reaches
            after = layers[0] if index < self.lowest else None
            return next((i for i in layers if i > index), after)
        below = [i for i in layers if self.lowest <= i < index]
        return below[-1] if below else layers[0]  # the next micro-batch's first

    def _bring(self, index: int, slot: "_Slot") -> None:
        flat, on_host = self._host[index]
        slot.index = index
        slot.weights = _views(slot.buffer, on_host)
        if self._side is None:
            slot.buffer[: len(flat)].copy_(flat)
            return
        # Whatever has been enqueued may still read what the slot held: all of it comes first.
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            slot.buffer[: len(flat)].copy_(flat, non_blocking=True)
            slot.arrived = torch.cuda.Event()
            slot.arrived.record(self._side)


class _Slot:
    """A device buffer and the layer in it."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.index: int | None = None
        self.weights: dict[str, FrozenWeight] = {}
        self.arrived: torch.cuda.Event | None = None


def _views(flat: Tensor, like: dict[str, FrozenWeight]) -> dict[str, FrozenWeight]:
    """Weights of the same formats and shapes, laid out in a buffer one tensor after the other."""
    made, at = {}, 0
    for name, weight in like.items():
        tensors = []
        for t in tensors_of(weight):
            tensors.append(flat[at : at + t.nbytes].view(t.dtype).view(t.shape))
            at += -(-t.nbytes // ALIGNMENT) * ALIGNMENT
        made[name] = with_tensors(weight, tuple(tensors))
    return made
