"""The CUDA path on tensors without memory: shapes, dtypes, launches and bytes at real sizes.

Kernels are counted instead of launched; PyTorch's own rules for what its kernels take (such as
those of `_scaled_mm`) are asked at every size.
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import xplus_kernels as ops
from benchmarks.models import make_config
from tests.model.hollow import META, Kept, frozen, make
from xplus_fast.model import packing
from xplus_fast.model.block import KEEP, WEIGHTS, BlockFunction, BlockSpec
from xplus_fast.model.families import shape_of
from xplus_fast.model.frozen import MATRICES
from xplus_fast.model.head import LossFunction
from xplus_fast.model.sums import Sums
from xplus_kernels.backend import triton

pytestmark = pytest.mark.skipif(triton is None, reason="needs Triton")
ROOT = Path(__file__).parents[2]
SHAPES = {name: shape_of(make_config(name)) for name in ("8B", "14B")}
TOKENS = (1, 7, 130, 4096, 65_536)
NO_KERNEL = {  # views, and what only makes room
    "empty", "empty_like", "empty_strided", "new_empty", "view", "_unsafe_view", "t", "transpose",
    "permute", "expand", "slice", "select", "split", "split_with_sizes", "unbind", "as_strided",
    "detach", "alias", "unsqueeze", "squeeze", "reshape", "flatten", "narrow", "_reshape_alias",
}  # fmt: skip


class Counted(TorchDispatchMode):
    """Launches by name, and the bytes of the tensors that each is given and makes."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.launches, self.bytes = Counter(), 0
        counted = self

        def run(kernel, *args, grid, warmup, **options):
            assert all(n > 0 for n in grid)
            counted.add(kernel.__name__, [a for a in args if torch.is_tensor(a)])

        monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)

    def add(self, name, tensors):
        self.launches[name] += 1
        self.bytes += sum(t.numel() * t.element_size() for t in tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in NO_KERNEL:
            given = {k: v for k, v in (kwargs or {}).items() if k != "out"}  # that is what is made
            self.add(name, [t for t in tree_leaves((args, given, made)) if torch.is_tensor(t)])
        return made


@pytest.fixture
def counted(monkeypatch):
    """As on a card: each module's question whether Triton launches is answered with yes."""
    for name, module in list(sys.modules.items()):
        if name.startswith("xplus_kernels.") and hasattr(module, "use_triton"):
            monkeypatch.setattr(module, "use_triton", lambda x: True)
    monkeypatch.setattr(ops, "wants_sees", lambda device, length: True)
    monkeypatch.setattr(sys.modules["xplus_kernels.frozen_linear"], "_fp8_path", lambda d: "gemm")
    monkeypatch.setattr(packing, "send", lambda x, d: torch.empty(x.shape, dtype=x.dtype, device=d))
    return Counted(monkeypatch)


def pack_of(t):
    """Two sequences that share a prefix, and one that shares nothing, as far as t tokens go."""
    cut = [t] if t < 100 else [10, (t - 10) // 3, (t - 10) // 3]
    cut += [] if t < 100 else [t - sum(cut)]
    predicts = np.ones(t, bool)
    predicts[: cut[0] if len(cut) > 1 else 0] = False
    layout = packing.PackLayout(
        np.array(cut), np.array([2] if len(cut) > 1 else [], np.int64), predicts
    )
    pack = packing.make_pack(
        (1, t), META, attention_mask=None, position_ids=make(1, t, dtype=torch.int64),
        cu_seq_lens=make(len(cut) + 1, dtype=torch.int32), max_length=None,
        inv_freq=make(64, dtype=torch.float32), scaling=1.0, layout=layout,
    )  # fmt: skip
    return pack


def block(shape, t, *, form=None, policy="keep", pack=None, sums=None):
    """x -> y of one layer; form: of a frozen one; sums: its gradients are there already."""
    pack = pack or pack_of(t)
    shapes = shape.packed_shapes()
    weights = [
        make(*shapes[name], grad=form is None)
        if name in shapes and (form is None or name not in MATRICES)
        else None
        for name in WEIGHTS
    ]
    store = None if form is None else Kept(form, shape)
    scratch = make(2 * max(np.prod(shapes[name]) for name in MATRICES), dtype=torch.uint8)
    for w in weights if sums is not None else ():
        if w is not None:
            w.grad_dtype = sums
            w.grad = make(*w.shape, dtype=sums)
    spec = BlockSpec(shape, policy, store, scratch, sums=None if sums is None else Sums())
    x = make(t, shape.hidden, grad=True)
    return x, BlockFunction.apply(x, spec, pack, None, *weights), weights


@pytest.mark.parametrize("form", [None, "bf16", "fp8", "int8", "nf4"])
@pytest.mark.parametrize("t", TOKENS)
@pytest.mark.parametrize("size", SHAPES)
def test_every_layer_at_every_size(size, t, form, counted):
    shape = SHAPES[size]
    with counted:
        x, y, weights = block(shape, t, form=form)
        y.backward(torch.empty_like(y))
    assert y.shape == x.shape == x.grad.shape and y.dtype == x.grad.dtype == torch.bfloat16
    for w in weights:
        assert w is None or form or (w.grad.shape == w.shape and w.grad.dtype == w.dtype)


@pytest.mark.parametrize("t", TOKENS)
@pytest.mark.parametrize("fp8", [False, True])
def test_the_head_at_every_size(t, fp8, counted):
    shape = SHAPES["8B"]
    head = make(shape.vocabulary, shape.hidden, grad=not fp8)
    if fp8:
        head = frozen("fp8", (shape.vocabulary, shape.hidden)).rows
    x, rows = make(t, shape.hidden, grad=True), make(-(-t // 2), dtype=torch.int64)
    with counted:
        loss = LossFunction.apply(
            x, make(shape.hidden, grad=True), head, rows, make(len(rows), dtype=torch.int64), 3.0,
            1e-6, None,
        )  # fmt: skip
        loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32 and x.grad.shape == x.shape


def adds_to_wide(monkeypatch):
    """As torch 2.15's GEMM does, by whose launches the document goes."""
    a, to = torch.empty(8, 8, dtype=torch.bfloat16, device="meta"), torch.float32
    try:
        torch.addmm(a.float(), a, a, out_dtype=to)
    except (TypeError, RuntimeError):
        pytest.skip(f"torch {torch.__version__} has no rule for it on meta tensors")
    monkeypatch.setattr(sys.modules["xplus_kernels.weight_gradient"], "_adds_to_wide", lambda: True)


@pytest.mark.parametrize(
    "name, form, sums, most",
    [
        ("frozen, bf16", "bf16", None, (9, 15)),
        ("frozen, fp8", "fp8", None, (12, 20)),
        ("trained", None, None, (9, 30)),
        ("trained, added to what is there", None, torch.bfloat16, (9, 32)),
        ("the same, summed in fp32", None, torch.float32, (9, 36)),
    ],
)
def test_launches_and_bytes_of_a_layer_are_those_of_the_document(
    name, form, sums, most, counted, monkeypatch
):
    """docs/performance.md: of 8B and a step's 16,384 tokens."""
    if sums == torch.float32:
        adds_to_wide(monkeypatch)
    pack = pack_of(16_384)
    cells = []
    # once before: constants are made by the first that wants them, and kept
    y = block(SHAPES["8B"], 64, form=form, pack=pack_of(64))[1]
    y.backward(torch.empty_like(y))
    counted.launches.clear()
    counted.bytes = 0
    with counted:
        _, y, _ = block(SHAPES["8B"], 16_384, form=form, pack=pack, sums=sums)
        cells.append((counted.launches.total(), counted.bytes))
        counted.launches.clear()
        y.backward(torch.empty_like(y))
        cells.append((counted.launches.total(), counted.bytes - cells[0][1]))
    assert all(n <= limit for (n, _), limit in zip(cells, most, strict=True)), counted.launches
    said = " | ".join(f"{n}, {size / 1e9:.1f} GB" for n, size in cells)
    assert f"| {name} | {said} |" in (ROOT / "docs/performance.md").read_text(), said


@pytest.mark.parametrize("form, most", [("bf16", 32), ("fp8", 180)])
def test_launches_and_bytes_of_the_head_are_those_of_the_document(form, most, counted, monkeypatch):
    """docs/performance.md: 8192 rows of 8B."""
    if form == "fp8":
        adds_to_wide(monkeypatch)
    shape = SHAPES["8B"]
    head = frozen(form, (shape.vocabulary, shape.hidden))
    head = head.data if form == "bf16" else head.rows
    x, targets = make(8192, shape.hidden), make(8192, dtype=torch.int64)
    with counted:
        ops.linear_cross_entropy(x, head, targets, divisor=3.0)
    said = f"{counted.launches.total()} | {counted.bytes / 1e9:.1f} GB"
    assert counted.launches.total() <= most, counted.launches
    assert f"| head, {form} | {said} |" in (ROOT / "docs/performance.md").read_text(), said


@pytest.mark.parametrize("policy", [p for p in KEEP if p != "offload"])
def test_what_is_kept_is_enough_at_real_sizes(policy, counted):
    with counted:
        x, y, _ = block(SHAPES["8B"], 130, policy=policy)
        y.backward(torch.empty_like(y))
    assert x.grad.shape == x.shape
