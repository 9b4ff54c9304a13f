"""The CUDA path at every capability and at sizes that are hard: what it gives and what it is given.

Of tensors without numbers (`hollow.py`): shapes, dtypes, strides and devices of every result and
gradient, what PyTorch's kernels are handed, and that each launch is one that was compiled.
"""

import random
import sys
from itertools import product

import numpy as np
import pytest
import torch

import xplus_kernels as ops
from benchmarks.models import make_config
from tests.model.hollow import CARD, Kept, Refused, frozen, hollow_card, make
from xplus_fast.model import packing
from xplus_fast.model.block import KEEP, WEIGHTS, BlockFunction, BlockSpec
from xplus_fast.model.families import Shape, shape_of
from xplus_fast.model.frozen import MATRICES
from xplus_fast.model.head import LossFunction
from xplus_fast.model.offload import Offload
from xplus_fast.model.sums import Sums
from xplus_fast.training.optimizer import AdamW
from xplus_kernels.backend import triton

pytestmark = pytest.mark.skipif(triton is None, reason="needs Triton")
FP8 = sys.modules["xplus_kernels.frozen_linear"]  # in the package: the functions
VARLEN = sys.modules["xplus_kernels.varlen_attention"]
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
TOKENS = (1, 15, 16, 17, 127, 128, 129, 4096, 16_384, 65_536)
CASES = list(product(CAPABILITIES, TOKENS))
SHAPES = [
    *(shape_of(make_config(name)) for name in ("8B", "14B")),
    Shape("qwen2", 28, 3584, 28, 4, 128, 18_944, 152_064, 1e-6, False),  # 7B, with biases
    Shape("llama", 30, 576, 9, 3, 64, 1536, 49_152, 1e-5, True),  # SmolLM2-135M
]
PACKS = ("one", "short", "even", "long", "shared", "short, shared")
LAST = (None, "all", "some")  # rows that the last layer is asked for; None: it is not the last
FROZEN = ("bf16", "fp8", "int8", "nf4")
# The dtype of a trained layer's gradients, and whether there are some to add to
TRAINED = (
    (torch.bfloat16, False),
    (torch.bfloat16, True),
    (torch.float32, False),
    (torch.float32, True),
)


def layout_of(kind, t, last):
    """Sequences of t tokens together, of which some begin alike."""
    lengths, members = [t], []
    if kind == "short":
        lengths = [100] * (t // 100) + [t % 100]
    elif kind == "even" and t % 1024 == 0:
        lengths = [1024] * (t // 1024)
    elif kind == "long" and t > 2:
        lengths = [t // 3, t - t // 3]
    elif kind == "shared" and t > 100:
        lengths, members = [t // 5, t // 3, t // 5], [2]
        lengths.append(t - sum(lengths))
    elif kind == "short, shared" and t > 100:
        groups = t // 100
        members = [2] * groups
        lengths = [19] * groups + [31, 50] * groups + [t % 100]
    lengths = np.array([n for n in lengths if n])
    predicts = np.ones(t, bool)
    predicts[: lengths[: len(members)].sum()] = False
    if last == "some" and t > 1:
        predicts[::3] = False
    return packing.PackLayout(lengths, np.array(members, np.int64), predicts)


def pack_of(layout, shape):
    t = int(layout.edges[-1])
    return packing.make_pack(
        (1, t), CARD, attention_mask=None, position_ids=make(1, t, dtype=torch.int64),
        cu_seq_lens=None, max_length=None, scaling=1.0, layout=layout,
        inv_freq=make(shape.head_dim // 2, dtype=torch.float32),
    )  # fmt: skip


def sound(x, shape, dtype=torch.bfloat16):
    return tuple(x.shape) == tuple(shape) and x.dtype == dtype and x.is_contiguous() and x.is_cuda


def layer(
    shape, t, kind, last, policy, *, form=None, sums=torch.bfloat16, there=False, lowest=False
):
    """Forward and backward of one layer, whose result and gradients must be sound."""
    layout = layout_of(kind, t, last)
    pack, rows = pack_of(layout, shape), None
    if last is not None:
        rows = packing.last_rows(pack, make(int(layout.predicts.sum()), dtype=torch.int64), layout)
    shapes = shape.packed_shapes()
    here = [n for n in WEIGHTS if n in shapes and (form is None or n not in MATRICES)]
    weights = {name: make(*shapes[name], grad=form is None) for name in here}
    for w in weights.values() if form is None else ():
        w.grad_dtype, w.grad = sums, make(*w.shape, dtype=sums) if there else None
    before = {name: w.grad for name, w in weights.items()}
    most = max(n * k for n, k in (shapes[name] for name in MATRICES))
    spec = BlockSpec(
        shape, policy, form and Kept(form, shape), make(2 * most, dtype=torch.uint8),
        Offload() if policy == "offload" else None, sums=Sums() if there else None,
    )  # fmt: skip
    x = make(t, shape.hidden, grad=not lowest)
    y = BlockFunction.apply(x, spec, pack, rows, *map(weights.get, WEIGHTS))
    assert sound(y, (t if rows is None else len(rows.rows), shape.hidden))
    y.backward(make(*y.shape))
    assert x.grad is None if lowest else sound(x.grad, x.shape)
    for name, w in weights.items():
        if form is None:
            assert sound(w.grad, w.shape, sums)
        # in place, where there is a sum; a vector's is autograd's
        assert name not in MATRICES or not there or w.grad is before[name]


def drawn(number, *choices):
    """The number-th two of all combinations, in an order of their own."""
    every = list(product(*choices))
    random.Random(0).shuffle(every)
    return [every[(2 * number + i) % len(every)] for i in range(2)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{c} {t}" for c, t in CASES])
def test_a_layer(number):
    """Of every format and sum; over all cases, with every policy, pack and last layer."""
    capability, t = CASES[number]
    shape = SHAPES[(number + number // len(TOKENS)) % len(SHAPES)]
    with hollow_card(capability) as card:
        for form in FROZEN:
            for policy, kind, last in drawn(number, KEEP, PACKS, LAST):
                card.ran.clear()
                layer(shape, t, kind, last, policy, form=form)
                assert bool(card.ran["_scaled_mm"]) == (form == "fp8" and capability >= (8, 9))
        for i, (sums, there) in enumerate(TRAINED):
            choices = drawn(number + 20 * i, KEEP, PACKS, LAST, (False, True))
            for policy, kind, last, lowest in choices:
                layer(shape, t, kind, last, policy, sums=sums, there=there, lowest=lowest)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_whose_attention(capability):
    """Every backend that a capability has is among the packs."""
    flash = "_flash_attention_forward", "_flash_attention_backward"
    cudnn = "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"
    short = "_short_attention_fwd_kernel", "_short_attention_dq_kernel"
    even = cudnn if capability[0] in (9, 10) else flash
    wanted = {"one": even, "even": even, "long": flash, "shared": flash, "short": short}
    for kind, names in wanted.items():
        with hollow_card(capability) as card:
            layer(SHAPES[0], 4096, kind, None, "keep")
            assert all(card.ran[name] == (2 if kind == "shared" else 1) for name in names)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{c} {t}" for c, t in CASES])
def test_the_head(number):
    capability, t = CASES[number]
    shape = SHAPES[(number + number // len(TOKENS)) % len(SHAPES)]
    for form, some in product(("trained", "bf16", "fp8"), (False, True)):
        with hollow_card(capability):
            x, norm = make(t, shape.hidden, grad=True), make(shape.hidden, grad=True)
            head = make(shape.vocabulary, shape.hidden, grad=form == "trained")
            rows = make(-(-t // 2), dtype=torch.int64) if some else None
            targets = make(len(x if rows is None else rows), dtype=torch.int64)
            losses = make(len(targets), dtype=torch.float32) if some else None
            weight = frozen("fp8", tuple(head.shape)).rows if form == "fp8" else head
            loss = LossFunction.apply(x, norm, weight, rows, targets, 3.0, 1e-6, losses)
            assert sound(loss, (), torch.float32)
            loss.backward()
            for w in (x, norm, *[head] * (form == "trained")):
                assert sound(w.grad, w.shape)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("master", [True, False])
@pytest.mark.parametrize("sums", [16, 32])
def test_the_update(capability, bits, master, sums):
    """Of a vector, and of a matrix in pieces of which the last is short; scaled by a norm."""
    for states, gradients in product(("device", "host"), ("device", "host")):
        with hollow_card(capability) as card:
            params = [make(129, grad=True), make(3 * 1367, 4096, grad=True)]
            optimizer = AdamW(
                params, bits=bits, master=master, sums=sums, states=states, gradients=gradients
            )
            for _ in range(2):
                sum((p * 2).sum() for p in params).backward()
            norm = optimizer.grad_norm()
            assert sound(norm, (), norm.dtype) and norm.dtype in (torch.float32, torch.float64)
            optimizer.gradient_scale = (1 / norm).clamp(max=1.0)
            optimizer.step()
            assert card.ran["_adamw_kernel"] == 3
            for p in params:
                made = {k: v for k, v in optimizer.state[p].items() if k != "step"}
                assert {v.is_cuda for v in made.values()} == {states == "device"}
                assert ("master" in made) == master


# What a GPU would not take, or take for something else: planted, and how it is told.


def not_transposed(patch):
    kept = FP8._dx_operand
    patch.setattr(FP8, "_dx_operand", lambda *given: kept(*given).contiguous())
    layer(SHAPES[0], 17, "one", None, "keep", form="fp8")


def without_fp8(patch):
    patch.setattr(FP8, "_fp8_path", lambda device: "gemm")
    fp8_of(17, 32, 32)


def expanded_scales(patch):
    patch.setattr(FP8, "_ones", lambda n, _: make(1, 1, dtype=torch.float32).expand(1, n))
    layer(SHAPES[0], 17, "one", None, "keep", form="fp8")


def fp8_of(t, contracted, wide, row=None):
    data = make(t, row or contracted, dtype=torch.float8_e4m3fn)[:, :contracted]
    a = ops.Fp8Rows(data, make(t, dtype=torch.float32))
    b, scale = make(wide, contracted, dtype=torch.float8_e4m3fn), make(wide, dtype=torch.float32)
    FP8.fp8_matmul(a, b.t(), scale, dtype=torch.bfloat16)


def left_on_the_host(patch):
    patch.setattr(packing, "send", lambda x, device: x)
    layer(SHAPES[0], 4096, "shared", None, "keep")


def launched_on_the_host(patch):
    patch.setattr(sys.modules["xplus_kernels.rms_norm"], "check_like", lambda *_, **__: None)
    ops.rms_norm(make(3, 64), torch.ones(64, dtype=torch.bfloat16), eps=1e-6)


def narrow_lse(patch):
    q, k, lse = make(64, 4, 64), make(64, 2, 64), make(4, 64)
    cu, state = make(3, dtype=torch.int32), make(2, dtype=torch.uint64)
    torch.ops.aten._flash_attention_backward(
        q, q, k, k, q, lse, cu, cu, 64, 64, 0.0, True, state, state, scale=1.0
    )


def misaligned_keys(patch):
    patch.setattr(VARLEN, "_loadable", lambda x: x)
    q, k = make(64, 4, 64), make(64, 2, 65)[..., :64]
    ops.varlen_attention(q, k, k, make(3, dtype=torch.int32), max_seqlen=64, scale=1.0)


def cudnn_elsewhere(patch):
    patch.setattr(sys.modules["xplus_kernels.even_attention"], "CAPABILITIES", (12,))
    layer(SHAPES[0], 4096, "even", None, "keep")


def of_two_dtypes(patch):
    torch.mm(make(3, 4), make(4, 5, dtype=torch.float32))


def not_compiled(patch):
    losses = make(3, dtype=torch.float32)
    targets = make(3, dtype=torch.int32)  # int64 are wanted
    sys.modules["xplus_kernels.linear_cross_entropy"]._softmax_gradient_kernel[(3,)](
        make(3, 64), targets, losses, losses.sum()
    )


def too_many_programs(patch):
    sys.modules["xplus_kernels.swiglu"]._swiglu_fwd_kernel[(1, 70_000)]()


@pytest.mark.parametrize(
    ("plant", "capability", "told"),
    [
        (not_transposed, (9, 0), "mat2 must be col_major"),
        (without_fp8, (8, 6), r"_scaled_mm: on capability \(8, 6\)"),
        (expanded_scales, (9, 0), "must be contiguous for rowwise"),
        (lambda _: fp8_of(17, 24, 32), (9, 0), "divisible by 16"),
        (lambda _: fp8_of(17, 32, 24), (9, 0), "divisible by 16"),
        (lambda _: fp8_of(17, 32, 32, row=40), (9, 0), "_scaled_mm: alignment"),
        (left_on_the_host, (8, 0), "cpu"),
        (launched_on_the_host, (8, 0), "w_ptr on cpu"),
        (narrow_lse, (8, 0), "flash: lse"),
        (misaligned_keys, (8, 0), "flash: layout"),
        (cudnn_elsewhere, (12, 0), "cuDNN: on capability"),
        (of_two_dtypes, (8, 0), "a product into"),
        (not_compiled, (8, 0), "compiled for none"),
        (too_many_programs, (8, 0), "grid"),
    ],
)
def test_what_is_wrong_is_told(plant, capability, told, monkeypatch):
    with hollow_card(capability), pytest.raises((Refused, RuntimeError, ValueError), match=told):
        plant(monkeypatch)


def test_what_waits_is_told():
    """A number is asked of the device."""
    with hollow_card((9, 0)), pytest.raises(RuntimeError, match="meta"):
        make(3).sum().item()
