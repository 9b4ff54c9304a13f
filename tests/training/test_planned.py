"""Runs under a plan: when memory runs out, a leaner plan, the same step, the same result."""

import itertools
from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from tests.tiny import LAYERS, difference, tiny_model
from tests.training.test_trainer import arguments, losses, sentences
from xplus_fast.config import MemoryConfig
from xplus_fast.data.collate import PackCollator, split_batch
from xplus_fast.errors import UserError
from xplus_fast.model.block import BlockFunction
from xplus_fast.model.families import shape_of
from xplus_fast.model.load import set_activations
from xplus_fast.model.prepare import prepare_model, trained_tensors
from xplus_fast.planning.plan import plan_stage
from xplus_fast.training import memory_log
from xplus_fast.training.planned import PlannedTrainer, frozen_formats
from xplus_fast.training.trainer import XPlusTrainer

TRAINED = [2, 3]
CPU = torch.device("cpu")


def plan(model, *, rows=4, pack_tokens=32, **memory):
    options = MemoryConfig(micro_batch_tokens=rows * pack_tokens, **memory)
    return plan_stage(
        shape_of(model.config), TRAINED, (), options, card=None, dtype_bytes=4,
        pack_tokens=pack_tokens, tokens_per_step=2 * rows * pack_tokens,
    )  # fmt: skip


def run(folder, cls=PlannedTrainer, fail=None, monkeypatch=None, callbacks=(), **memory):
    """Five steps; -> trained tensors, losses, what was said, the trainer."""
    model, said = prepare_model(tiny_model(), TRAINED), []
    options = {}
    if cls is PlannedTrainer:
        made = plan(model, **memory)
        set_activations(model, made.layout)
        options = dict(plan=made, say=said.append)
    if fail is not None:
        for name in ("forward", "backward"):
            inner = getattr(BlockFunction, name)
            wrapped = staticmethod(lambda ctx, x, *a, f=inner, n=name: f(ctx, fail(ctx, x, n), *a))
            monkeypatch.setattr(BlockFunction, name, wrapped)
    trainer = cls(
        model, arguments(folder, max_steps=5), train_dataset=sentences(),
        data_collator=PackCollator(), callbacks=list(callbacks), **options,
    )  # fmt: skip
    trainer.train()
    return trained_tensors(model), losses(trainer), said, trainer


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB. GPU 0 has ...")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain"), cls=XPlusTrainer)


def test_a_plan_alone_changes_nothing(undisturbed, tmp_path):
    tensors, curve, said, trainer = run(tmp_path)
    assert said == [] and curve == undisturbed[1]
    assert all(torch.equal(t, undisturbed[0][n]) for n, t in tensors.items())
    assert trainer.memory == {}  # a CPU tells nothing


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_runs_out_is_repeated_leaner(where, undisturbed, tmp_path, monkeypatch):
    """In the second micro-batch of the third step, when gradients of the first are there."""
    calls = []
    layers = LAYERS if where == "forward" else LAYERS - TRAINED[0]  # that come by

    def fail(ctx, x, name):
        if name == where:
            calls.append(len(x))
            if len(calls) == 6 * layers - 1:  # two micro-batches a step
                out_of_memory()
        return x

    tensors, curve, said, trainer = run(tmp_path, fail=fail, monkeypatch=monkeypatch)
    assert len(said) == 1 and "CUDA out of memory. Going on with a leaner plan: " in said[0]
    assert "the step is repeated, its batch is the same" in said[0]
    assert trainer.plan.device_total < plan(trainer.model).device_total
    assert curve == pytest.approx(undisturbed[1], rel=1e-5)
    assert trainer.meter.seen == undisturbed[3].meter.seen
    for name, t in tensors.items():
        assert difference(t, undisturbed[0][name]) < 1e-4


def test_a_leaner_policy_changes_no_bit(undisturbed, tmp_path, monkeypatch):
    """As long as "keep" is used there is no room."""

    def fail(ctx, x, name):
        if name == "backward" and ctx.spec.activations == "keep":
            out_of_memory()
        return x

    tensors, curve, said, trainer = run(tmp_path, fail=fail, monkeypatch=monkeypatch)
    policies = {layer.activations for layer in trainer.plan.layout.layers[2:]}
    assert "keep" not in policies and 1 <= len(said) <= 4
    if trainer.plan.micro_batch_tokens == 128:
        assert curve == undisturbed[1]
        assert all(torch.equal(t, undisturbed[0][n]) for n, t in tensors.items())
    assert curve == pytest.approx(undisturbed[1], rel=1e-5)


def test_where_nothing_is_leaner_it_says_so(tmp_path, monkeypatch):
    def fail(ctx, x, name):
        out_of_memory()

    with pytest.raises(UserError, match="step 1: CUDA out of memory; the leanest plan is in use"):
        run(tmp_path, fail=fail, monkeypatch=monkeypatch)


WORDS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


@pytest.mark.parametrize("words", [WORDS, "CUDA error: out of memory\nCUDA kernel errors ..."])
def test_others_than_the_allocator_run_out_too(words, undisturbed, tmp_path, monkeypatch):
    calls = []

    def fail(ctx, x, name):
        calls.append(name)
        if len(calls) == 3:
            raise RuntimeError(words)
        return x

    _, curve, said, _ = run(tmp_path, fail=fail, monkeypatch=monkeypatch)
    assert len(said) == 1 and said[0].startswith("step 1: CUDA error: ") and "\n" not in said[0]
    assert curve == pytest.approx(undisturbed[1], rel=1e-5)


def test_an_error_of_another_kind_is_no_lack_of_memory(tmp_path, monkeypatch):
    def fail(ctx, x, name):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        run(tmp_path, fail=fail, monkeypatch=monkeypatch)


def test_the_peak_is_that_of_the_second_step_and_of_the_plan_in_use(tmp_path, monkeypatch):
    """Whatever was allocated before, and anew where the plan becomes a leaner one."""
    happened, calls = [], []

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            happened.append(f"step {state.global_step + 1}")

    def fail(ctx, x, name):
        calls.append(name)
        if len(calls) == 2 * (2 * LAYERS - TRAINED[0]) * 2 + 1:  # the third step's first layer
            out_of_memory()
        return x

    monkeypatch.setattr(memory_log, "reset", lambda device: happened.append("reset"))
    monkeypatch.setattr(
        memory_log, "measure", lambda *_: happened.append("measured") or {"weights": 1}
    )
    _, _, said, trainer = run(tmp_path, fail=fail, monkeypatch=monkeypatch, callbacks=[Steps()])
    assert happened == [
        "step 1", "step 2", "reset", "measured", "step 3", "step 4", "reset", "measured", "step 5",
    ]  # fmt: skip
    first, leaner, last = said
    before, after = (
        f"{p.device_total / 1e9:.2f} planned" for p in (plan(trainer.model), trainer.plan)
    )
    assert before in first and after in last and "leaner" in leaner


def contents(batch):
    """Ids and labels of each sequence."""
    columns = [batch[k][0].split(batch["layout"].lengths.tolist()) for k in ("input_ids", "labels")]
    return [(i.tolist(), y.tolist()) for i, y in zip(*columns, strict=True)]


@pytest.mark.parametrize("tokens", [1, 10, 17, 40, 1000])
def test_a_batch_is_split_between_sequences(tokens):
    rows = sentences(7)
    batch = PackCollator()(rows)
    parts = split_batch(batch, tokens)
    assert (len(parts) == 1) == (tokens == 1000)
    assert sorted(s for p in parts for s in contents(p)) == sorted(contents(batch))
    for part in parts:
        edges, n = part["cu_seq_lens_q"], part["input_ids"].shape[1]
        assert n <= tokens or len(edges) == 2
        assert edges[0] == 0 and edges[-1] == n
        assert part["max_length_q"] == (edges[1:] - edges[:-1]).max()
    supervised = sum(len(p["supervised_rows"]) for p in parts)
    assert supervised == len(batch["supervised_rows"])


def test_gradients_of_several_processes_meet_once_a_step(undisturbed, tmp_path, monkeypatch):
    """In the last part of the last batch; processes may have more or fewer parts."""
    apart, steps = [0], []
    inner = PlannedTrainer._forward_backward

    class Steps(TrainerCallback):
        def on_step_begin(self, *_, **__):
            steps.append([])

    @contextmanager
    def no_sync(accelerator, model):
        apart[0] += 1
        yield
        apart[0] -= 1

    def part(self, *args, **kwargs):
        steps[-1].append("apart" if apart[0] else "meet")
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(Accelerator, "no_sync", no_sync)
    monkeypatch.setattr(PlannedTrainer, "_forward_backward", part)
    _, curve, _, _ = run(tmp_path, rows=1, callbacks=[Steps()])
    assert curve == pytest.approx(undisturbed[1], rel=1e-5)
    assert len(steps) == 5
    for parts in steps:
        assert len(parts) > 2 and parts == [*["apart"] * (len(parts) - 1), "meet"]


@pytest.mark.parametrize("tokens", [9, 17, 25, 40, 60])
def test_micro_batches_are_few_and_alike(tokens):
    """Against every way to cut them in their order."""
    batch = PackCollator()(sentences(7))
    edges = batch["cu_seq_lens_q"].tolist()
    ways = []
    for n in range(len(edges) - 1):
        for inner in itertools.combinations(range(1, len(edges) - 1), n):
            ends = [0, *inner, len(edges) - 1]
            sizes = [edges[b] - edges[a] for a, b in itertools.pairwise(ends)]
            alone = [b - a == 1 for a, b in itertools.pairwise(ends)]
            if all(size <= tokens or one for size, one in zip(sizes, alone, strict=True)):
                ways.append((len(sizes), max(sizes)))
    parts = [part["input_ids"].shape[1] for part in split_batch(batch, tokens)]
    assert len(parts) < min(ways)[0] or (len(parts), max(parts)) <= min(ways)


def test_the_formats_of_a_plan_by_layers():
    made = plan(tiny_model(), frozen={"0-1": "fp8", "4-5": "nf4"})
    assert frozen_formats(made) == {"fp8": "0-1", "nf4": "4-5", "head": "bf16"}
