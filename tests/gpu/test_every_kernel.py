"""Every kernel once, at small sizes with a ragged end: what compute-sanitizer runs.

Values are compared elsewhere, and nothing is poisoned: to fill a buffer would hide from initcheck
what no kernel wrote. README.md beside this has the commands.
"""

import pytest
import torch

import xplus_kernels as ops
from tests.gpu import common
from tests.gpu.common import DEVICE, DTYPES, GPU, randn
from xplus_kernels.adamw import adamw_update

pytestmark = GPU
T, EPS = 5, 1e-6


def finite(*made):
    for t in made:
        assert t is None or t.float().isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 320])
def test_norms(width, dtype):
    x, w = randn(T, width, dtype=dtype), randn(width, dtype=dtype)
    finite(ops.rms_norm(x, w, eps=EPS), *ops.add_rms_norm(x, x, w, eps=EPS))
    for need_dw in (False, True):
        finite(*ops.rms_norm_backward(x, x, w, eps=EPS, need_dw=need_dw))
        finite(*ops.add_rms_norm_backward(x, x, x, w, eps=EPS, need_dw=need_dw))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(5, 1, 12), (8, 8, 128), (5, 0, 12), (0, 8, 128)])
def test_qk_norm_rope(heads, dtype):
    n, k, d = heads
    cos, sin = ops.rope_tables(torch.arange(T, device=DEVICE), randn(d // 2).abs())
    qkv, w = randn(T, (n + 2 * k) * d, dtype=dtype), randn(d, dtype=dtype)
    norms = [w if count else None for count in (n, k)]
    grads = ops.qk_norm_rope(qkv, *norms, cos, sin, heads=n, kv_heads=k, eps=EPS)
    finite(*grads)
    for given in (norms, (None, None)):
        for need_dw in (False, True):
            options = dict(eps=EPS, need_dw=need_dw)
            finite(*ops.qk_norm_rope_backward(*grads, qkv, *given, cos, sin, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("f", [7, 320])
def test_swiglu(f, dtype):
    x = randn(T, 2 * f, dtype=dtype)
    finite(ops.swiglu(x), ops.swiglu_backward(x[:, :f], x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(9, 12), (8, 128)])
def test_merge_attention(heads, dtype):
    n, d = heads
    out, lse = randn(T, n, d, dtype=dtype), randn(n, T + 3)[:, 3:]
    ops.merge_attention(out, lse, randn(T, n, d, dtype=dtype), randn(n, T))
    finite(out, lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_short_attention(dtype):
    cu = torch.tensor([0, 3, 5, 12], dtype=torch.int32, device=DEVICE)
    sees = ops.sees_causally(cu, cu, 12, 12)
    shared = torch.full((2, 12), ops.NOBODY, dtype=torch.int32, device=DEVICE)
    shared[1] = 0
    shared[0, 3:], shared[1, 3:] = 0, 3
    chunks = [[0, 3, 0, 3, 0], [0, 3, 3, 9, 3], [0, 3, 9, 12, 6]]
    tables = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (chunks, [0, 3]))
    shared = ops.Prefixes(shared, *tables, longest=3, keys=3, rows=9)
    for given in (sees, ops.Sees(sees.keys, sees.queries, shared)):
        q, k = randn(12, 5, 16, dtype=dtype), randn(12, 1, 16, dtype=dtype)
        out, lse = ops.short_attention(q, k, k, given, scale=0.25)
        finite(out, lse, *ops.short_attention_backward(out, q, k, k, out, lse, given, scale=0.25))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [17, 9001])
def test_linear_cross_entropy(vocabulary, dtype):
    x, w = randn(T, 16, dtype=dtype), randn(vocabulary, 16, dtype=dtype)
    targets = torch.tensor([3, -100, 16, 0, 5], device=DEVICE)
    finite(*ops.linear_cross_entropy(x, w, targets, divisor=4, need_dw=True))
    finite(*ops.linear_cross_entropy(x, w, targets, divisor=4, need_dx=False))


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw(dtype, eight_bit):
    n = 515
    param, kind = randn(n, dtype=dtype), torch.uint8 if eight_bit else torch.float32
    states = [torch.zeros(n, dtype=kind, device=DEVICE) for _ in range(2)]
    more = {"master": param.float() if dtype == torch.float16 else None, "seed": 0}
    if eight_bit:
        names = ("exp_avg_absmax", "exp_avg_sq_absmax")
        more |= {name: torch.zeros(3, device=DEVICE) for name in names}
    numbers = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
    for step in (1, 2):
        adamw_update(param, randn(n, dtype=dtype), *states, step=step, **more, **numbers)
    finite(param)


@pytest.mark.parametrize("width", [16, 352])  # half of 352, too, has a ragged end
def test_fp8(width):
    fp8 = pytest.importorskip("xplus_kernels.fp8", reason="needs xplus_kernels.fp8")
    norm = pytest.importorskip("xplus_kernels.norm_fp8", reason="needs xplus_kernels.norm_fp8")
    act = pytest.importorskip("xplus_kernels.swiglu_fp8", reason="needs xplus_kernels.swiglu_fp8")
    common.need_fp8()
    dtype = common.MAIN_DTYPE
    x, w = randn(T, width, dtype=dtype), randn(width, dtype=dtype)
    column = randn(width).abs()
    made = fp8.quantize_fp8(x), fp8.quantize_fp8(x, column_scale=column)
    made += norm.rms_norm_fp8(x, w, eps=EPS), norm.add_rms_norm_fp8(x, x, w, eps=EPS)[1]
    made += act.swiglu_fp8(x), act.swiglu_backward_fp8(x[:, ::2], x, column_scale=column)
    for rows in made:
        finite(*rows)
        finite(fp8.dequantize_fp8(rows, out=torch.empty(rows.data.shape, device=DEVICE)))
        finite(fp8.transpose_fp8(rows.data))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 64), (130, 320)])
def test_nf4(shape, dtype):
    nf4 = pytest.importorskip("xplus_kernels.nf4", reason="needs xplus_kernels.nf4")
    numel = shape[0] * shape[1]
    codes = torch.arange(numel // 2, device=DEVICE).to(torch.uint8)
    weight = nf4.Nf4Weight(codes, randn(numel // 64).abs(), shape)
    finite(nf4.dequantize_nf4(weight, out=torch.empty(shape, dtype=dtype, device=DEVICE)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 64), (130, 320)])
def test_int8(shape, dtype):
    int8 = pytest.importorskip("xplus_kernels.int8", reason="needs xplus_kernels.int8")
    weight = int8.quantize_int8(randn(*shape))
    finite(int8.dequantize_int8(weight, out=torch.empty(shape, dtype=dtype, device=DEVICE)))
