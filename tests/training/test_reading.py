"""The loss that is logged where it was read beside the update, and where that cannot be."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.distributed import HashStore
from transformers import TrainerCallback, TrainingArguments
from transformers.training_args import ParallelMode

from tests.training.alike import assert_alike, trained
from xplus_fast import XPlusTrainer


class _StopWithin(TrainerCallback):
    """Ends the training after a part of its third step."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 2


@pytest.mark.parametrize("every", ["epoch", "steps"])
def test_what_a_step_has_of_its_loss_when_training_stops_within_it(
    every: str, tmp_path: Path
) -> None:
    """transformers counts it, in the epoch's loss and in that of the whole training."""
    arguments = {"gradient_accumulation_steps": 2, "max_steps": 5, "logging_strategy": every}
    assert_alike(tmp_path, arguments, callbacks=[_StopWithin()])


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of this process alone, as torchrun makes it for one GPU."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(TrainingArguments, "parallel_mode", ParallelMode.DISTRIBUTED)
    yield
    torch.distributed.destroy_process_group()


def test_a_group_of_one_process_gathers_the_loss_on_the_device(
    group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL cannot gather what lies on the host."""
    gathered, real = [], transformers.trainer.nested_gather

    def gather(loss: Tensor, *rest: Any) -> Any:
        gathered.append(loss)
        return real(loss, *rest)

    monkeypatch.setattr(transformers.trainer, "nested_gather", gather)
    trainer = trained(XPlusTrainer, tmp_path, {})
    assert [loss is trainer._tr_loss for loss in gathered] == [True] * 3
    assert min(line["loss"] for line in trainer.state.log_history if "loss" in line) > 1
