"""What the GPU tests share: where they run, at which sizes, and how results are compared.

`XPLUS_REHEARSE=cpu` runs these same tests on the CPU at tiny sizes, where ops run their
references: it proves the tests, not the kernels. With `TRITON_INTERPRET=1` beside it the Triton
code is interpreted, in fp32 and fp16. `XPLUS_REHEARSE=ir` is for `python -m ttsem.sanitize pytest`:
the same sizes on "cuda", where ttsem executes what Triton compiles the kernels to. What needs CUDA
itself is skipped, and says so.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter.common import as_tuple
from tests.tiny import difference
from xplus_kernels import backend

WHERE = os.environ.get("XPLUS_REHEARSE", "")
if WHERE not in ("", "cpu", "ir"):
    raise ValueError(f"XPLUS_REHEARSE is {WHERE!r}; allowed: cpu, ir, or unset")
IR = WHERE == "ir"
if IR and "ttsem" not in sys.modules:
    raise ValueError("XPLUS_REHEARSE=ir wants `python -m ttsem.sanitize pytest`: see README.md")
REHEARSAL = WHERE != ""
DEVICE = "cpu" if WHERE == "cpu" else "cuda"
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not REHEARSAL and not torch.cuda.is_available(), reason="needs an NVIDIA GPU"
    ),
]
GIB, MIB = 2**30, 2**20

# The interpreter's arithmetic in bf16 is wrong.
DTYPES = [torch.float32, torch.float16] + ([] if backend.INTERPRET else [torch.bfloat16])
MAIN_DTYPE = DTYPES[-1]
# Beside 1.1 times what PyTorch errs: an eighth of a rounding for numbers that fall on the other
# side of one; in fp32 a sum in another order, and the hardware's own exp and rsqrt.
LITTLE = {torch.float32: 2e-6, torch.float16: 2**-14, torch.bfloat16: 2**-11}
UNIT = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # of one rounding


class Size(NamedTuple):
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int


SIZES = {
    "0.6B": Size(1024, 16, 8, 128, 3072),
    "8B": Size(4096, 32, 8, 128, 12288),
    "14B": Size(5120, 40, 8, 128, 17408),
}
if REHEARSAL:  # same ratios of heads; the widths still need a REST beside their power of two
    SIZES = {
        "0.6B": Size(64, 4, 2, 16, 96),
        "8B": Size(128, 4, 1, 16, 160),
        "14B": Size(160, 5, 1, 16, 272),
    }
TOKENS = (1, 3, 19) if REHEARSAL else (1, 130, 4097)
FEW = TOKENS[1]
VOCABULARY = 1111 if REHEARSAL else 151_936
# What no Qwen3 has: a tile and a bit, no power of two, less than a thread's load. (T, width)
AWKWARD = [(130, 96), (3, 320), (17, 7), (5, 2)]


def sized(*, dtypes: Sequence[torch.dtype] = DTYPES) -> pytest.MarkDecorator:
    """Every (size, T) in the main dtype; in the others each size once."""
    cases = [(MAIN_DTYPE, name, t) for name in SIZES for t in TOKENS]
    cases += [(dtype, name, FEW) for dtype in dtypes if dtype != MAIN_DTYPE for name in SIZES]
    ids = [f"{str(dtype).removeprefix('torch.')}-{name}-T{t}" for dtype, name, t in cases]
    rows = [(dtype, SIZES[name], t) for dtype, name, t in cases]
    return pytest.mark.parametrize("dtype, size, t", rows, ids=ids)


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu" if REHEARSAL else "cuda").manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, made where they are used: the same on one device, in each dtype."""
    return torch.randn(*shape, generator=generator(seed), device=DEVICE).to(dtype)


def scalar(value: float, dtype: torch.dtype) -> Tensor:
    return torch.full((), value, dtype=dtype, device=DEVICE)


def wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def assert_close(
    mine: Tensor, plain: Tensor, truth: Tensor, *, little: float | None = None
) -> None:
    """`mine` errs no more than `plain`, PyTorch's result in mine's dtype; `truth` is in fp64.

    As a whole: 1.1 times as much and `little`. Its worst element: twice as much and `little` of
    the largest, so that one wrong element among millions shows.
    """
    assert mine.shape == truth.shape and mine.dtype == plain.dtype
    if not truth.numel():
        return
    little = LITTLE[mine.dtype] if little is None else little
    assert mine.isfinite().all()
    assert difference(mine, truth) <= 1.1 * difference(plain, truth) + little
    worst, theirs = ((x.double() - truth).abs().max().item() for x in (mine, plain))
    assert worst <= 2 * theirs + little * truth.abs().max().item()


def check(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    *tensors: Tensor | None,
    little: float | None = None,
    **options: Any,
) -> Any:
    """Outputs of op as `assert_close` asks, inputs unchanged, and the same bits a second time."""
    before = [t if t is None else t.clone() for t in tensors]
    mine, again = op(*tensors, **options), op(*tensors, **options)
    plain = reference(*tensors, **options)
    truth = reference(*map(wide, tensors), **options)
    for m, a, p, t in zip(*map(as_tuple, (mine, again, plain, truth)), strict=True):
        if t is None:
            assert m is None and a is None
            continue
        assert torch.equal(m, a)
        assert_close(m, p, t, little=little)
    for now, b in zip(tensors, before, strict=True):
        assert b is None or torch.equal(now, b)
    return mine


def waits_for_nothing(*calls: Callable[[], Any]) -> None:
    """No call waits for the device. A first round may compile and fill caches."""
    for call in calls:
        call()
    if REHEARSAL:
        pytest.skip("needs CUDA: whether a call waits for the device")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def extra_memory(call: Callable[[], Any]) -> int:
    """Bytes that a call needs beside what is there before it, its results included."""
    call()  # compiles, and makes the workspaces that stay
    if REHEARSAL:
        pytest.skip("needs CUDA: what a call allocates")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return peak - before


def need_memory(gib: float) -> None:
    """Skip on a card with less than this free."""
    if REHEARSAL:
        return
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < gib:
        pytest.skip(f"needs {gib:.0f} GiB of free GPU memory, has {free:.1f}")


def need_fp8() -> None:
    """Skip on a card without FP8."""
    if not REHEARSAL and torch.cuda.get_device_capability() < (8, 9):
        major, minor = torch.cuda.get_device_capability()
        pytest.skip(f"needs capability 8.9 for FP8, has {major}.{minor}")


def gradients_of(model: Tensor) -> list[Tensor]:
    """Gradients of `model`'s shape as autograd hands them on: with gaps, turned, of stride 0."""
    *first, last = model.shape
    one = torch.ones((), dtype=model.dtype, device=model.device)
    gaps = torch.cat((model, model), -1)[..., :last]
    turned = model.transpose(0, 1).contiguous().transpose(0, 1)
    return [gaps, turned, one.expand(*first, last), model[:1].expand_as(model)]
