"""Where the host waits for the device in a training step: for the norm and the loss, which it reads
together while the update runs."""

from collections import Counter
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.simulated.scenarios import LEAN, cached_trainer, make_trainer, simulated

NUMBERS = "xplus_fast/training/reading.py read: an event"
# the host's part of `data.cache_hidden`, a micro-batch behind the device
KEPT = "xplus_fast/training/hidden_cache.py keep: an event"
MEMORY = "xplus_fast/training/hidden_cache.py rows: an event"
GROWN = "xplus_fast/model/host_memory.py __del__: the device"  # for a longer micro-batch


class Steps(TrainerCallback):
    """Waits from the end of one step to the end of the next, after what is logged."""

    def __init__(self, sim: Any) -> None:
        self.sim, self.ends = sim, [Counter[str]()]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(Counter(self.sim.waits))

    def of(self, step: int) -> dict[str, int]:
        return dict(self.ends[step] - self.ends[step - 1])


@pytest.mark.parametrize("memory", [{}, LEAN], ids=["all on the device", "lean"])
def test_a_step(memory, model_folder, tmp_path):
    """Two batches, each of several micro-batches."""
    with simulated() as sim:
        steps = Steps(sim)
        options = dict(memory={**memory, "micro_batch_tokens": 32}, max_steps=5)
        trainer = make_trainer(model_folder, tmp_path, callbacks=[steps], **options)
        trainer.train()
        del trainer
    for step in (4, 5):  # the first ones make and measure things
        assert steps.of(step) == {NUMBERS: 1}


def test_a_step_that_keeps_hidden_states_or_finds_them(model_folder, tmp_path):
    """In the first epoch, of two steps, and in the second."""
    with simulated() as sim:
        steps = Steps(sim)
        trainer = cached_trainer(model_folder, tmp_path, {}, callbacks=[steps])
        trainer.train()
        del trainer
    step = {NUMBERS: 1}
    for number, more in ((2, {KEPT: 2, MEMORY: 2}), (4, {MEMORY: 2})):
        found = steps.of(number)
        assert found.pop(GROWN, 0) <= 1
        assert found == {**step, **more}
