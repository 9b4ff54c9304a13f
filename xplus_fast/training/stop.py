"""A signal came while a stage trains: its step is finished, a checkpoint saved, then it ends."""

from typing import Any

import torch
from transformers import TrainerCallback

from xplus_fast.signals import Asked, Stopped
from xplus_fast.training.place import Place


class StopWhenAsked(TrainerCallback):
    """Ends training after the step in which a signal came to any process of the run."""

    def __init__(self, asked: Asked, place: Place) -> None:
        self.asked, self.place = asked, place
        self.signum, self.step = 0, 0  # what all processes agreed on, and after which step

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.signum, self.step = self.asked.signum, state.global_step
        if self.place.processes > 1:  # all of them at the same step
            shared = torch.tensor(self.signum, device=self.place.device)
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
            self.signum = int(shared)
        if self.signum:
            control.should_save = control.should_training_stop = True

    def check(self, stage: str) -> None:
        """Raises `Stopped` if that was why training ended."""
        if signum := self.signum or self.asked.signum:
            raise Stopped(signum, f"after step {self.step} of {stage}, which is saved")
