"""Small runs of the engine and the trainer on a simulated device, and what they come to."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from transformers import AutoConfig
from transformers.trainer_callback import PrinterCallback

from tests.simulated.clocks import DEVICE
from tests.simulated.device import SimulatedDevice
from tests.tiny import HIDDEN, LAYERS, packed_batch, tiny_model
from tests.training.test_trainer import arguments, losses, sentences
from xplus_fast.config import MemoryConfig
from xplus_fast.data.collate import PackCollator
from xplus_fast.model.checkpoint_files import CheckpointFiles
from xplus_fast.model.families import shape_of
from xplus_fast.model.layout import LayerLayout, Layout
from xplus_fast.model.load import Weights, arrange, load_model, set_activations
from xplus_fast.model.prepare import trained_tensors
from xplus_fast.model.sums import summed
from xplus_fast.planning.plan import plan_stage
from xplus_fast.planning.search import Plan
from xplus_fast.training import host_state, throughput
from xplus_fast.training.hidden_cache import HiddenCache
from xplus_fast.training.hidden_store import InMemory
from xplus_fast.training.optimizer import AdamW
from xplus_fast.training.place import Place
from xplus_fast.training.planned import PlannedTrainer

real_gemm_rate = throughput.gemm_rate
DTYPE = torch.bfloat16
HOSTED = {"states": "host", "gradients": "host"}
TRAINED = [2, 3]
Result = tuple[list[float], dict[str, torch.Tensor]]  # losses; what was trained, on the host


@contextmanager
def simulated(**options: Any) -> Iterator[SimulatedDevice]:
    """A device, for `Trainer` too, with parameters of several pieces."""
    AcceleratorState._reset_state(reset_partial_state=True)
    device = SimulatedDevice(**options)
    try:
        with (
            device,
            mock.patch.object(throughput, "gemm_rate", lambda *_: 1e12),
            mock.patch.object(host_state, "CHUNK", 16384),
        ):
            yield device
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def save_model(folder: Path) -> Path:
    tiny_model().save_pretrained(folder)
    return folder


def layout(
    trained: Sequence[int], placement: str = "device", activations: str = "keep", form: str = "bf16"
) -> Layout:
    """activations: one policy, or "mixed"."""
    mixed = ("offload", "keep", "recompute")
    made = []
    for i in range(LAYERS):
        policy = mixed[i % 3] if activations == "mixed" else activations
        frozen: Any = {} if i in trained else {"placement": placement, "format": form}
        made.append(LayerLayout(trains=i in trained, activations=policy, **frozen))  # type: ignore
    return Layout(tuple(made), embedding="host" if placement == "host" else "device")


def load(folder: Path, wanted: Layout) -> Any:
    weights, config = Weights(CheckpointFiles.open(folder)), AutoConfig.from_pretrained(folder)
    return load_model(weights, config, wanted, dtype=DTYPE, device=DEVICE).train()


def on_host(model: Any) -> dict[str, torch.Tensor]:
    return {name: t.cpu().clone() for name, t in trained_tensors(model).items()}


# --- the engine alone


def backward(model: Any, *, seed: int, longest: int = 14) -> torch.Tensor:
    batch = packed_batch([5, 9, longest], seed=seed)
    batch = {name: x.to(DEVICE) for name, x in batch.items()}
    loss = model(**batch, num_items_in_batch=torch.tensor(20.0, device=DEVICE)).loss
    loss.backward()
    return loss.detach()


def steps(
    model: Any, update: dict[str, Any], *, number: int = 2, clip: bool = True
) -> list[torch.Tensor]:
    """Optimizer steps of three micro-batches, as a script would make them -> losses."""
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, **update)
    found = []
    torch.cuda.reset_peak_memory_stats()
    for step in range(number):
        for micro in range(3):
            with summed(model.model.layers, optimizer.sums):
                found.append(backward(model, seed=10 * step + micro, longest=14 + micro))
        if clip:
            norm = optimizer.grad_norm()
            optimizer.gradient_scale = (1.0 / (norm + 1e-6)).clamp(max=1.0)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.synchronize()
    if update.get("states") == "host":  # to be read by whoever saves them
        for state in optimizer.state.values():
            state["exp_avg"].numpy()
    return found


def relaid(model: Any, folder: Path, wanted: Layout) -> Any:
    """A stage's model, in the layout of the next one."""
    weights = Weights(CheckpointFiles.open(folder))
    arrange(model, wanted, weights, dtype=DTYPE, device=DEVICE)
    return model


def engine(folder: Path, *layouts: Layout, update: dict[str, Any] | None = None, **options: Any
           ) -> Result:  # fmt: skip
    """A stage for each layout, of one model."""
    model = load(folder, layouts[0])
    found = steps(model, update or {}, **options)
    for wanted in layouts[1:]:
        found += steps(relaid(model, folder, wanted), update or {}, **options)
    return [loss.item() for loss in found], on_host(model)


# --- the trainer


def plan(folder: Path, **memory: Any) -> Plan:
    """Of `TRAINED`, with micro-batches of four sentences or so."""
    config = AutoConfig.from_pretrained(folder)
    options = MemoryConfig(**{"micro_batch_tokens": 128, **memory})
    return plan_stage(
        shape_of(config), TRAINED, (), options, card=None, dtype_bytes=2, pack_tokens=32,
        tokens_per_step=256,
    )  # fmt: skip


def make_trainer(model_folder: Path, folder: Path, *, memory: dict[str, Any] | None = None,
                 say: Callable[[str], None] = print, hidden: Any = None, rows: Any = None,
                 callbacks: Sequence[Any] = (), **changes: Any) -> PlannedTrainer:  # fmt: skip
    """memory: what of `MemoryConfig` is pinned. changes: of the arguments."""
    made = plan(model_folder, **memory or {})
    model = load(model_folder, made.layout)
    set_activations(model, made.layout, made.micro_batch_tokens)
    options = dict(use_cpu=False, max_steps=3, logging_nan_inf_filter=False,
                   remove_unused_columns=False)  # fmt: skip
    rows = sentences() if rows is None else rows
    trainer = PlannedTrainer(
        model, arguments(folder, **{**options, **changes}), plan=made, say=say, hidden=hidden,
        train_dataset=rows, eval_dataset=rows[:6], data_collator=PackCollator(),
        callbacks=list(callbacks),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def trained(made: PlannedTrainer, resume: Any = None) -> Result:
    made.train(resume)
    return losses(made), on_host(made.model)


def trainer(model_folder: Path, folder: Path, *, resume: Any = None, **options: Any) -> Result:
    return trained(make_trainer(model_folder, folder, **options), resume)


def cached(model_folder: Path, folder: Path, memory: dict[str, Any] | None) -> Result:
    return trained(cached_trainer(model_folder, folder, memory))


def cached_trainer(
    model_folder: Path, folder: Path, memory: dict[str, Any] | None, **options: Any
) -> PlannedTrainer:
    """Two epochs that keep what enters the lowest trained layer, or, memory None, nothing."""
    rows, at = sentences(16), 0
    for row in rows:
        row["lengths"], row["places"] = [len(row["input_ids"])], [at]
        at += len(row["input_ids"])
    hidden = None
    if memory is not None:
        width = HIDDEN * DTYPE.itemsize
        place = Place(DEVICE, DTYPE, 0, 1)
        hidden = HiddenCache(min(TRAINED), width, InMemory(at, width), {}, place)
    options = dict(rows=rows, memory=memory, hidden=hidden, max_steps=4) | options
    return make_trainer(model_folder, folder, **options)


LEAN = dict(placement="host", activations="offload", states="host", gradients="host",
            embedding="host")  # fmt: skip


def same(a: Result, b: Result) -> bool:
    """To the last bit."""
    return (
        a[0] == b[0] and a[1].keys() == b[1].keys()
        and all(torch.equal(t, b[1][name]) for name, t in a[1].items())
    )  # fmt: skip
