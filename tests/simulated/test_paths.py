"""Every path of a run on CUDA: nothing is used too early or too late, and values stay the same.

Those of everything on the device: where things lie changes no bit.
"""

from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from tests.simulated.scenarios import (
    HOSTED,
    LEAN,
    cached,
    engine,
    layout,
    make_trainer,
    on_host,
    same,
    simulated,
    trainer,
)
from tests.training.test_trainer import losses
from xplus_fast.planning.selection import Rotation
from xplus_fast.training.optimizer import AdamW
from xplus_fast.training.rotation import Rotate

UPDATES = [
    {"states": "host"}, HOSTED, {"gradients": "host"},
    {**HOSTED, "bits": 8, "master": False}, {**HOSTED, "sums": 32},
]  # fmt: skip
POLICIES = ("keep", "recompute", "offload", "mixed")
CASES = [
    (trained, ("device", "host")[there], POLICIES[p], UPDATES[(s + p + 2 * there) % len(UPDATES)])
    for (s, trained), p, there in product(
        enumerate([(0, 1), (4, 5), (2,), (0, 5)]), range(len(POLICIES)), range(2)
    )
]


@cache
def plain(folder: Path, trained: tuple[int, ...], form: str = "bf16", **update):
    """Everything on the device."""
    with simulated():
        return engine(folder, layout(trained, form=form), update=update)


@pytest.mark.parametrize(("trained", "placement", "policy", "update"), CASES)
def test_layouts(trained, placement, policy, update, model_folder):
    with simulated() as sim:
        found = engine(model_folder, layout(trained, placement, policy), update=update)
    computed = {k: v for k, v in update.items() if k not in HOSTED}
    assert same(found, plain(model_folder, trained, **computed))
    assert sim.alive == 0 and not sim.pinned


@pytest.mark.parametrize("form", ["int8", "nf4", "fp8"])
def test_streamed_formats(form, model_folder):
    with simulated():
        found = engine(model_folder, layout((2, 3), "host", "offload", form), update=HOSTED)
    assert same(found, plain(model_folder, (2, 3), form))


def test_a_second_stage_takes_over_what_is_under_way(model_folder):
    """Streamed layers become trained ones, and the other way round."""
    stages = ((0, 1), (4, 5), (2,))
    with simulated():
        wanted = engine(model_folder, *(layout(s) for s in stages))
    with simulated() as sim:
        found = engine(model_folder, *(layout(s, "host", "mixed") for s in stages), update=HOSTED)
    assert same(found, wanted) and sim.alive == 0


def test_less_is_on_the_device(model_folder):
    peaks = []
    for wanted, update in ((layout((2,)), {}), (layout((2,), "host", "offload"), HOSTED)):
        with simulated() as sim:
            engine(model_folder, wanted, update=update)
        peaks.append(sim.peak)
    assert peaks[1] < 0.5 * peaks[0]


class Evaluations(TrainerCallback):
    def __init__(self):
        self.losses = []

    def on_evaluate(self, *_, metrics, **__):
        self.losses.append(metrics["eval_loss"])


def test_training_evaluation_checkpoint_and_resumption(model_folder, tmp_path):
    """A run that is cut, under the leanest plan, against a whole one with all on the device."""
    options = dict(max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="steps",
                   eval_steps=1, per_device_eval_batch_size=2)  # fmt: skip
    with simulated():
        wanted = trainer(model_folder, tmp_path / "plain", **options)
    with simulated() as sim:
        whole = trainer(model_folder, tmp_path / "lean", memory=LEAN, **options)
    assert sim.alive == 0 and not sim.pinned
    with simulated():
        resumed = trainer(
            model_folder, tmp_path / "again", memory=LEAN, **options,
            resume=str(tmp_path / "lean/checkpoint-2"),
        )  # fmt: skip
    assert same(whole, wanted) and same(resumed, wanted)


def test_what_is_on_the_device_already_stays_there(model_folder, tmp_path):
    """As a step's count of tokens is that several processes have gathered."""
    with simulated():
        made = make_trainer(model_folder, tmp_path)
        x = torch.ones(3, device="cuda")
        assert made._prepare_input(x).device.type == "cuda"
        assert made._prepare_input({"x": x, "y": torch.ones(2)})["y"].device.type == "cuda"
        del made, x


def test_hidden_states_that_are_kept(model_folder, tmp_path):
    """Two epochs, of which the second computes nothing below."""
    with simulated():
        wanted = cached(model_folder, tmp_path, None)
    for memory in ({}, LEAN):
        with simulated() as sim:
            found = cached(model_folder, tmp_path, memory)
        assert same(found, wanted) and sim.alive == 0 and not sim.pinned


@pytest.mark.parametrize("memory", [{}, LEAN], ids=["device", "lean"])
def test_layers_that_take_turns(memory, model_folder, tmp_path, monkeypatch):
    """States go to rest on the host and come back, as if they had stayed on the device."""
    moved, place = [], AdamW.place

    def counted(optimizer, p):
        before = {k: t.device.type for k, t in optimizer.state.get(p, {}).items()}
        place(optimizer, p)
        after = {k: t.device.type for k, t in optimizer.state.get(p, {}).items()}
        moved.extend((before[k], after[k]) for k in before if before[k] != after[k])

    def run(folder, **options):
        turns = Rotate(Rotation("1 of 2-3", 1), seed=0)
        return trainer(model_folder, folder, callbacks=[turns], max_steps=6, **options)

    monkeypatch.setattr(AdamW, "place", lambda *_: None)  # all stay
    with simulated():
        wanted = run(tmp_path / "plain")
    monkeypatch.setattr(AdamW, "place", counted)
    with simulated() as sim:
        found = run(tmp_path / "turns", memory=memory)
    assert same(found, wanted) and sim.alive == 0 and not sim.pinned
    ways = {("cuda", "cpu"), ("cpu", "cuda")}
    assert set(moved) == (set() if memory else ways)  # lean: they are on the host anyway


class Processes:
    """Gradients that meet those of other processes on a stream of their own, as DDP has it."""

    def __init__(self, model):
        self.stream, self.apart, self.meetings = torch.cuda.Stream(), 0, []
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p, name=name: self.meet(p, name))

    def meet(self, p, name):
        if self.apart:
            return
        self.meetings.append(name)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), torch.no_grad():
            p.grad.mul_(2).div_(2)
        torch.autograd.Variable._execution_engine.queue_callback(
            lambda: torch.cuda.current_stream().wait_stream(self.stream)
        )

    @contextmanager
    def no_sync(self, model):
        self.apart += 1
        yield
        self.apart -= 1


def test_data_parallel_gradients_meet_once_a_step(model_folder, tmp_path, monkeypatch):
    memory = {**LEAN, "gradients": "device", "micro_batch_tokens": 32}
    with simulated():
        made = make_trainer(model_folder, tmp_path, memory=memory)
        for p in made.model.parameters():  # who looks at each gradient sees it added by autograd
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda _: None)
        made.train()
        wanted = losses(made), on_host(made.model)
        del made
    with simulated():
        made = make_trainer(model_folder, tmp_path, memory=memory)
        processes = Processes(made.model)
        monkeypatch.setattr(Accelerator, "no_sync", lambda _, model: processes.no_sync(model))
        made.train()
        found = losses(made), on_host(made.model)
        trained = [n for n, p in made.model.named_parameters() if p.requires_grad]
        del made
    assert same(found, wanted)
    assert sorted(processes.meetings) == sorted(trained * 3)
