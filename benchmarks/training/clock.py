"""Where the time of a training step goes, for ours and for its peers alike."""

import time
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.timing import energy
from xplus_fast.model.layer import Block

BETWEEN = "between steps"
PARTS = (BETWEEN, "frozen forward", "trained forward", "head", "backward", "optimizer", "streams")


class Clock(TrainerCallback):
    """Seconds of each optimizer step, from the end of the one before, and where in it they went.

    On CUDA by events that the host does not wait for until the end. Forward hooks also run when a
    checkpointed layer is recomputed: that is backward. "streams" is what the computing stream
    waited for others, which bring weights, activations and optimizer states; no other part has it.
    """

    def __init__(self, trainer: Any, device: torch.device, *, warm: int) -> None:
        self.cuda, self.warm = device.type == "cuda", warm
        self.marks: list[list[tuple[str, Any]]] = []  # of each step
        # of each step: begin and end, and the mark that ends the part it lies in
        self.waits: list[list[tuple[Any, Any, int]]] = []
        self.computed: list[int] = []  # tokens of each step, padding among them
        self._forward = False
        self.joules: float | None = None
        whole = trainer.model
        inner = whole
        while not hasattr(inner, "layers"):
            inner = inner.model
        layers = list(inner.layers)
        kinds = [
            "trained forward" if any(p.requires_grad for p in x.parameters()) else "frozen forward"
            for x in layers
        ]
        self._undo = ExitStack()
        self._hook(
            whole.register_forward_pre_hook(
                lambda _, args, named: self._begin(named["input_ids"]), with_kwargs=True
            )
        )
        for i, layer in enumerate(layers):
            changes = i > 0 and kinds[i] != kinds[i - 1]
            after = kinds[i] if i + 1 == len(layers) else None
            self._around(layer, kinds[i - 1] if changes else None, after)
        self._hook(whole.register_forward_hook(lambda *_: self._end()))
        self.device = device
        self._wait_event = torch.cuda.Stream.wait_event
        if self.cuda:
            mine = torch.cuda.current_stream(device).cuda_stream
            torch.cuda.Stream.wait_event = lambda stream, event: self._wait(stream, event, mine)

    def _hook(self, handle: Any) -> None:
        self._undo.callback(handle.remove)

    def _around(self, layer: Any, before: str | None, after: str | None) -> None:
        """Marks where a layer begins and ends. Ours calls `run`, which no hook sees."""
        if not isinstance(layer, Block):
            if before:
                self._hook(layer.register_forward_pre_hook(lambda *_: self._mark(before)))
            if after:
                self._hook(layer.register_forward_hook(lambda *_: self._mark(after)))
            return
        inner = layer.run

        def run(*arguments: Any) -> Any:
            if before:
                self._mark(before)
            x = inner(*arguments)
            if after:
                self._mark(after)
            return x

        layer.run = run  # type: ignore[method-assign]
        self._undo.callback(delattr, layer, "run")

    def _wait(self, stream: Any, event: Any, mine: int) -> None:
        if not self.marks or stream.cuda_stream != mine:
            self._wait_event(stream, event)
            return
        begin = self._now()
        self._wait_event(stream, event)
        self.waits[-1].append((begin, self._now(), len(self.marks[-1])))

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self, ids: Tensor) -> None:
        self._forward = True
        self.computed[-1] += ids.numel()
        if len(self.marks[-1]) > 1:  # what came before was the last micro-batch's backward
            self.marks[-1].append(("backward", self._now()))

    def _mark(self, name: str) -> None:
        if self._forward:
            self.marks[-1].append((name, self._now()))

    def _end(self) -> None:
        self._mark("head")
        self._forward = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.cuda and state.global_step == self.warm:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.joules = energy(self.device)
        self.computed.append(0)
        self.waits.append([])
        self.marks.append([("begin", self._now())])

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.marks[-1].append(("backward", self._now()))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.marks[-1].append(("optimizer", self._now()))

    def close(self) -> None:
        self._undo.close()
        torch.cuda.Stream.wait_event = self._wait_event
        if self.cuda:
            torch.cuda.synchronize()
            now = energy(self.device)
            self.joules = None if now is None or self.joules is None else now - self.joules

    def _between(self, a: Any, b: Any) -> float:
        return a.elapsed_time(b) / 1e3 if self.cuda else b - a

    @property
    def seconds(self) -> list[float]:
        return [self._between(self._start(i), step[-1][1]) for i, step in enumerate(self.marks)]

    def _start(self, i: int) -> Any:
        """Where a step's time begins: a batch is made before the library says that it does."""
        return self.marks[i - 1][-1][1] if i else self.marks[0][0][1]

    def split(self, warm: int) -> dict[str, float]:
        """Seconds of the median step by part; clipping counts to the backward, as it ends it."""
        seconds = self.seconds
        order = sorted(range(warm, len(seconds)), key=lambda i: seconds[i])
        middle = order[len(order) // 2]
        step, part = self.marks[middle], dict.fromkeys(PARTS, 0.0)
        part[BETWEEN] = self._between(self._start(middle), step[0][1])
        for (_, a), (name, b) in zip(step, step[1:], strict=False):
            part[name] += self._between(a, b)
        for begin, end, at in self.waits[middle]:
            if at < len(step):  # else after the step
                waited = self._between(begin, end)
                part["streams"] += waited
                part[step[at][0]] -= waited
        return part

    def peak(self) -> dict[str, int] | None:
        if not self.cuda:
            return None
        return {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
        }
