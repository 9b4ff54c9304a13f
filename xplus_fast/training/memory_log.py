"""What a stage really takes, beside what its plan said. A CPU has nothing to tell."""

import gc
from typing import Any

import torch
from transformers import TrainerCallback

from xplus_fast.model.frozen import Streamed, tensors_of
from xplus_fast.planning.search import Plan


class PeakWatch(TrainerCallback):
    """Measures what a plan takes: over a trainer's second step, whole and alone.

    The first one makes the optimizer's states. What loading, evaluation or a resumption left in
    the allocator is given back before.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.restart()

    def restart(self) -> None:
        """Measure again: another plan is used from here on."""
        self.steps = 0  # whole ones, since

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.steps == 1:
            reset(args.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps += 1
        if self.steps == 2:
            trainer = self.trainer
            optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
            trainer.memory = measure(trainer.model, optimizer, args.device)
            if trainer.memory:
                trainer.say(compare(trainer.plan, trainer.memory))


def reset(device: torch.device) -> None:
    """Forget the peaks so far, and what the allocator holds for nobody."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def measure(model: Any, optimizer: Any, device: torch.device) -> dict[str, int]:
    """Bytes at the peak since `reset`, by purpose.

    Weights, gradients and optimizer are counted tensor by tensor; with them the peaks of PyTorch's
    allocator and what the device has lost to everything else (other processes, too) give the rest.
    """
    if device.type != "cuda":
        return {}
    on_host = getattr(optimizer, "gradients", "device") == "host"
    trained = [p for p in model.parameters() if p.requires_grad]
    states = [t for state in optimizer.state.values() for t in state.values()]
    found = {
        "weights": _bytes(_weights(model), device),
        "gradients": 0 if on_host else _bytes(trained, device),
        "optimizer": _bytes([t for t in states if torch.is_tensor(t)], device),
    }
    peak, reserved = (
        torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    )  # fmt: skip
    free, total = torch.cuda.mem_get_info(device)
    return found | {
        "activations, head and workspace": peak - sum(found.values()),
        "held by the allocator beyond its peak": reserved - peak,
        "outside of the allocator": total - free - torch.cuda.memory_reserved(device),
    }


def compare(plan: Plan, found: dict[str, int]) -> str:
    """One line: the peak, what was planned, and what it was made of."""
    peak = sum(found.values())
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in found.items() if size > 5e6)
    off = peak / plan.device_total - 1
    return (
        f"memory: {peak / 1e9:.2f} GB at the peak, {plan.device_total / 1e9:.2f} planned"
        f" ({off:+.1%}): {parts}"
    )


def _bytes(tensors: list[torch.Tensor], device: torch.device) -> int:
    return sum(t.nbytes for t in tensors if t.device == device)


def _weights(model: Any) -> list[torch.Tensor]:
    tensors = [*model.parameters(), *model.buffers()]
    streams = set()
    for block in model.model.layers:
        if isinstance(block.frozen, Streamed):
            streams.add(block.frozen.stream)
        elif block.frozen is not None:
            tensors += [t for w in block.frozen.weights.values() for t in tensors_of(w)]
    for stream in streams:
        tensors += stream.buffers
    if (scratch := model.model.layers[0].scratch) is not None:
        tensors.append(scratch)
    if (rows := getattr(model.lm_head, "rows", None)) is not None:
        tensors += rows
    return tensors
