"""Layers that take turns while a stage trains: which ones depends on seed and step alone."""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from xplus_fast.planning.selection import Rotation
from xplus_fast.training.optimizer import AdamW
from xplus_fast.training.saving import bare_optimizer


class Rotate(TrainerCallback):
    """Gives the flags of a rotation's layers before each step, and places their states by them."""

    def __init__(self, rotation: Rotation, seed: int) -> None:
        self.rotation, self.seed = rotation, seed
        self._now: list[int] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._now = None  # flags are those of a checkpoint, or all
        self.on_step_begin(args, state, control, **kwargs)

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None,
        **_: Any,
    ) -> None:  # fmt: skip
        layers: list[nn.Module] = list(model.model.layers)
        turn = self.rotation.turn(len(layers), self.seed, state.global_step)
        if turn == self._now:
            return
        adamw = bare_optimizer(optimizer)
        assert isinstance(adamw, AdamW)
        ids = self.rotation.read(len(layers))[1]
        # first what goes to rest, so that no more than a turn's states are on the device
        for wanted in (False, True):
            for i in ids:
                if (i in turn) is wanted:
                    for p in layers[i].parameters():
                        moves = p.requires_grad is not wanted
                        p.requires_grad_(wanted)
                        if moves:
                            adamw.place(p)
        self._now = turn


def turn_seed(seed: int, stage: int) -> int:
    """Stages draw each their own turns."""
    return seed + (stage << 32)
