"""The plan's arithmetic against the engine's own tensors."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from tests.planning.accounting import Away, tracked
from tests.planning.test_flops import shared_batch, work
from tests.tiny import packed_batch, tiny_model
from xplus_fast.model.checkpoint_files import CheckpointFiles
from xplus_fast.model.families import Shape, shape_of
from xplus_fast.model.layout import FORMATS, LayerLayout, Layout, UpdateLayout
from xplus_fast.model.load import Weights, load_model
from xplus_fast.model.prepare import prepare_model
from xplus_fast.model.sums import Sums, summed
from xplus_fast.planning.memory import (
    account,
    layer_bytes,
    peak_moment,
    scratch_bytes,
    update_buffers,
)
from xplus_fast.planning.replay import Batch, kept_bytes

MID = dict(hidden_size=256, intermediate_size=768, num_attention_heads=8, head_dim=32)
SELECTIONS = {"bottom": [0, 1], "middle": [2, 3], "top": [4, 5], "joint": [0, 4, 5]}
LENGTHS = [200, 112, 130, 70]  # 512 tokens


def counted(batch, steps=1) -> Batch:
    layout, w = batch.get("layout"), work(batch)
    prefixes = suffixes = 0
    if layout is not None:
        prefixes, suffixes = layout.prefix_tokens, int(layout.group_tokens.sum())
    return Batch(
        w.tokens, w.supervised, w.queries, element=4, steps=steps, inside=False,
        prefixes=prefixes, suffixes=suffixes,
    )  # fmt: skip


@pytest.mark.parametrize("policy", ["keep", "recompute_mlp", "recompute"])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("sizes", [{}, MID], ids=["tiny", "mid"])
@pytest.mark.parametrize(("steps", "shared"), [(1, False), (2, False), (1, True)])
def test_the_peak_is_the_engines(monkeypatch, policy, selection, sizes, steps, shared):
    layers = SELECTIONS[selection]
    model = prepare_model(tiny_model(**sizes), layers, activations=policy)
    batch = shared_batch(60, (90, 112, 130, 70)) if shared else packed_batch(LENGTHS)
    shape = shape_of(model.config)
    layout = Layout(
        tuple(LayerLayout(i in layers, activations=policy) for i in range(shape.layers))
    )
    b = counted(batch, steps=steps)
    expected = peak_moment(shape, layout, UpdateLayout(master=False), b)
    if steps == 2:  # gradients are there before the second micro-batch
        model(**batch).loss.backward()
    with tracked(monkeypatch) as tracker, summed(model.model.layers, Sums()):
        if steps == 2:
            tracker.see([p.grad for p in model.parameters() if p.grad is not None])
        tracker.see([v for v in batch.values() if torch.is_tensor(v)])
        loss = model(**batch).loss
        held = tracker.now
        loss.backward()
    assert tracker.peak == pytest.approx(expected.total, rel=0.02)

    # what waits for the backward: the layers' own, the head's dx, and each row's places
    kept = kept_bytes(shape, b, policy) * (shape.layers - min(layers) - 1)
    kept += kept_bytes(shape, b, policy, last=True)
    small = b.tokens * (4 * shape.head_dim + 24) + b.supervised * (4 * shape.hidden + 24)
    grads = expected.gradients if steps == 2 else 0
    assert held - grads == pytest.approx(kept + small, rel=0.02)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("policy", ["keep", "recompute_mlp", "recompute", "offload"])
@pytest.mark.parametrize("selection", ["top", "joint"])
def test_the_peak_is_the_engines_in_every_format(monkeypatch, tmp_path, form, policy, selection):
    """Laid out as a plan says; what offloaded inputs take on the host is counted apart."""
    if form == "nf4":
        pytest.importorskip("bitsandbytes", reason="makes the NF4 codes")
    layers = SELECTIONS[selection]
    layout = Layout(
        tuple(LayerLayout(i in layers, form, activations=policy) for i in range(6)),
    )
    tiny_model(**MID).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    weights = Weights(CheckpointFiles.open(tmp_path))
    model = load_model(weights, config, layout, dtype=torch.float32, device=torch.device("cpu"))
    batch, shape = packed_batch(LENGTHS), shape_of(config)
    b = counted(batch)
    expected = peak_moment(shape, layout, UpdateLayout(master=False), b)
    with tracked(monkeypatch) as tracker:
        tracker.see(list(batch.values()))
        away = Away(tracker)
        for block in model.model.layers:
            block.offload = away if block.offload is not None else None
        model(**batch).loss.backward()
    scratch = scratch_bytes(shape, layout, b)
    if form == "fp8":  # on a GPU a transposed copy; the CPU's reference reads any layout
        passes = any(i not in layers for i in range(min(layers), 6))
        assert scratch == 2 * shape.ffn * shape.hidden * passes
        scratch = 0
    assert tracker.peak == pytest.approx(expected.total + scratch, rel=0.02)


QWEN3_8B = Shape("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, 1e-6, False)


@pytest.mark.parametrize(
    ("policy", "kib"), [("keep", 84), ("recompute_mlp", 36), ("recompute", 8), ("offload", 0)]
)
def test_kept_bytes_of_8b_are_those_of_the_table(policy, kib):
    lse = 4 * 32 if policy.startswith(("keep", "recompute_mlp")) else 0
    assert kept_bytes(QWEN3_8B, Batch(3, 3, 3), policy) == 3 * (kib * 1024 + lse)


def test_formats_by_hand():
    """192.9 M weights in 4 matrices of 6144 + 4096 + 24576 + 4096 rows."""
    n, rows = 192_937_984, 6144 + 4096 + 24576 + 4096
    assert layer_bytes(QWEN3_8B, "bf16") == 2 * n
    assert layer_bytes(QWEN3_8B, "fp8") == n + 4 * rows
    assert layer_bytes(QWEN3_8B, "int8") == n + n // 64 * 4
    assert layer_bytes(QWEN3_8B, "nf4") == n // 2 + n // 64 * 4


def test_frozen_bytes_are_those_of_the_stored_tensors():
    bnb = pytest.importorskip("bitsandbytes", reason="makes the NF4 codes")
    assert bnb
    from xplus_fast.model.frozen import freeze, tensors_of

    shape = Shape("qwen3", 1, 128, 4, 2, 32, 192, 64, 1e-6, False)
    for form in FORMATS:
        stored = 0
        for size in shape.packed_shapes().values():
            if len(size) == 2:
                weight = torch.randn(size, dtype=torch.bfloat16)
                parts = tensors_of(freeze(weight, form))
                stored += sum(t.numel() * t.element_size() for t in parts)
        assert layer_bytes(shape, form) == stored, form


def test_purposes_by_hand():
    """8B, stage 2, all on the device in bf16: 2 bytes a weight and gradient, 12 of state."""
    layout = Layout(tuple(LayerLayout(i >= 21) for i in range(36)))
    device, host = account(QWEN3_8B, layout, UpdateLayout(), Batch(4096, 4096, 4096, steps=4))
    block = 192_937_984 + 2 * 4096 + 2 * 128
    assert device["trained layers"] == device["gradients"] == 2 * 15 * block
    assert device["optimizer"] == 12 * 15 * block
    assert device["frozen layers"] == 2 * 21 * block
    assert device["embedding and head"] == 2 * 2 * 151936 * 4096 + 2 * 4096
    assert device["scratch"] == device["stream buffers"] == sum(host.values()) == 0

    away = UpdateLayout("host", "host", bits=8, master=False)
    wide = account(QWEN3_8B, layout, UpdateLayout(sums=32), Batch(4096, 4096, 4096, steps=4))
    assert wide[0]["gradients"] == 2 * device["gradients"]
    assert wide[0]["optimizer"] == device["optimizer"]

    device, host = account(QWEN3_8B, layout, away, Batch(4096, 4096, 4096, steps=4))
    assert device["optimizer"] == device["gradients"] == 0
    assert host["gradients"] == 2 * 15 * block
    wide = account(QWEN3_8B, layout, replace(away, sums=32), Batch(4096, 4096, 4096, steps=4))
    assert wide[1]["gradients"] == 2 * host["gradients"]
    assert host["optimizer"] == int((2 + 8 / 256) * 15 * block)


@pytest.mark.parametrize(
    ("form", "fp8_gemm", "lowest", "expected"),
    [
        ("fp8", True, 0, 24576 * 4096),  # a transposed copy, where a gradient passes
        ("fp8", True, 21, 0),
        ("fp8", False, 21, 2 * 24576 * 4096),
        ("int8", True, 21, 2 * 24576 * 4096),
        ("nf4", True, 21, 2 * 24576 * 4096),
        ("bf16", True, 0, 0),
    ],
)
def test_scratch(form, fp8_gemm, lowest, expected):
    layers = tuple(
        LayerLayout(True) if lowest <= i < lowest + 15 else LayerLayout(False, form, "host")
        for i in range(36)
    )
    b = Batch(4096, 4096, 4096, fp8_gemm=fp8_gemm)
    device, host = account(QWEN3_8B, Layout(layers, embedding="host"), UpdateLayout(), b)
    assert device["scratch"] == expected
    assert device["stream buffers"] == 2 * layer_bytes(QWEN3_8B, form)
    assert host["frozen layers"] == 21 * layer_bytes(QWEN3_8B, form)
    assert host["embedding"] == 2 * 151936 * 4096


@pytest.mark.parametrize("update", [UpdateLayout("host", "host"), UpdateLayout("host", "host", 8)])
def test_the_updates_buffers_are_the_engines_slots(update):
    from xplus_fast.training.host_state import slot_bytes

    slots = slot_bytes(2 * 12288 * 4096, update)
    assert update_buffers(QWEN3_8B, (), update, 2) == pytest.approx(slots, rel=0.001)


def test_constants_are_the_kernels_own():
    """They are copied, for a plan needs no torch."""
    from importlib import import_module

    from xplus_fast.planning import memory, replay
    from xplus_fast.training import host_state

    head = import_module("xplus_kernels.linear_cross_entropy")
    for name in ("LOGITS_BYTES", "FP8_LOGITS_BYTES", "LEAST_ROWS", "HEAD_TILES"):
        assert getattr(replay, name) == getattr(head, name)
    assert memory.UPDATE_CHUNK == host_state.CHUNK
    for name in ("int8", "nf4"):
        assert import_module(f"xplus_kernels.{name}").BLOCK == 64  # of `layer_bytes`


def test_the_heads_gradient_is_there_while_the_layers_are_made():
    """One micro-batch a step: nothing was there before, and the loss's backward comes first."""
    layout = Layout(tuple(LayerLayout(i >= 21, activations="recompute") for i in range(36)))
    b, table = Batch(4096, 4096, 4096, steps=1), 2 * 151936 * 4096
    plain = peak_moment(QWEN3_8B, layout, UpdateLayout(), b)
    both = peak_moment(QWEN3_8B, replace(layout, also=("head", "final_norm")), UpdateLayout(), b)
    assert both.total - plain.total >= table + 2 * 4096
    assert both.gradients >= table
