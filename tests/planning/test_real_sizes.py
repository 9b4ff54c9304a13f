"""The planner's peak against the engine's tensors at the sizes of 8B and 14B, without memory."""

import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.fx.experimental import _config as fx_config
from transformers import AutoModelForCausalLM

import xplus_kernels as ops
from benchmarks.models import make_config
from tests.planning.accounting import Tracker
from xplus_fast.model import packing
from xplus_fast.model.families import shape_of
from xplus_fast.model.layout import LayerLayout, Layout, UpdateLayout
from xplus_fast.model.prepare import prepare_model
from xplus_fast.model.sums import summed
from xplus_fast.planning.memory import peak_moment
from xplus_fast.planning.replay import Batch
from xplus_fast.planning.selection import resolve_layers
from xplus_fast.training.optimizer import AdamW
from xplus_kernels.backend import triton

pytestmark = pytest.mark.skipif(triton is None, reason="needs Triton")
META = torch.device("meta")


@pytest.fixture
def on_a_card(monkeypatch):
    """Tensors that are nowhere, and kernels that are not run."""
    for name, module in list(sys.modules.items()):
        if name.startswith("xplus_kernels.") and hasattr(module, "use_triton"):
            monkeypatch.setattr(module, "use_triton", lambda x: True)
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", lambda *_, **__: None)
    monkeypatch.setattr(ops, "wants_sees", lambda device, length: True)
    monkeypatch.setattr(
        packing, "send", lambda x, _: torch.empty(x.shape, dtype=x.dtype, device=META)
    )
    monkeypatch.setattr("xplus_fast.model.stock._check_tensor", lambda *_: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    with fx_config.patch(meta_nonzero_assume_all_nonzero=True):
        yield


def batch_of(t):
    """One sequence, all of it supervised."""
    ids = torch.empty(1, t, dtype=torch.int64, device=META)
    return dict(
        input_ids=ids, labels=torch.empty_like(ids), position_ids=torch.empty_like(ids),
        cu_seq_lens_q=torch.empty(2, dtype=torch.int32, device=META), max_length_q=t,
        layout=packing.PackLayout(np.array([t]), np.array([], np.int64), np.ones(t, bool)),
        num_items_in_batch=torch.empty((), device=META),
    )  # fmt: skip


CASES = [  # size, what trains, policies from the lowest of these up, tokens, micro-batches, sums
    ("8B", "bottom:4", ("keep",), 16_384, 1, 16),
    ("8B", "bottom:4", ("recompute_mlp",), 4096, 2, 16),
    ("8B", "top:15", ("recompute", "keep"), 4096, 2, 16),
    ("8B", "top:15", ("recompute", "keep"), 4096, 2, 32),
    ("14B", "bottom:4", ("recompute",), 2048, 2, 32),
    ("14B", "top:15", ("recompute",), 8192, 1, 16),
    ("14B", "top:15", ("recompute_mlp", "keep"), 1024, 2, 16),
]


@pytest.mark.parametrize("size, trained, policies, t, steps, sums", CASES)
def test_the_peak_is_the_engines(size, trained, policies, t, steps, sums, on_a_card):
    """Of a step's last micro-batch, to 2 %."""
    config = make_config(size)
    shape = shape_of(config)
    ids = resolve_layers(trained, shape.layers)
    # the lower half takes the first of the policies
    cut = (min(ids) + shape.layers) // 2
    given = [policies[0] if i < cut else policies[-1] for i in range(shape.layers)]
    with META:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    prepare_model(model, ids).train()
    for block, policy in zip(model.model.layers, given, strict=True):
        block.activations = policy
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], sums=sums)
    batch, tracker = batch_of(t), Tracker()

    def micro_batch():
        with summed(model.model.layers, optimizer.sums):
            model(**batch).loss.backward()

    for _ in range(steps - 1):
        micro_batch()
    with tracker:
        tracker.see([p.grad for p in model.parameters() if p.grad is not None])
        tracker.see([v for v in batch.values() if torch.is_tensor(v)])
        micro_batch()
    layout = Layout(
        tuple(LayerLayout(i in ids, activations=given[i]) for i in range(shape.layers))  # type: ignore
    )
    update = UpdateLayout(sums=sums)
    planned = peak_moment(shape, layout, update, Batch(t, t, t, steps=steps, inside=False))
    assert tracker.peak == pytest.approx(planned.total, rel=0.02)
