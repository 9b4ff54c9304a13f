"""dW on the GPU: rounded once, whatever it is added to, and cuBLAS left as it was."""

import pytest
import torch

from tests.gpu import common
from tests.gpu.common import DEVICE, GPU, IR, REHEARSAL
from tests.tiny import difference
from xplus_kernels import weight_gradient

pytestmark = GPU
SIZES = [(1, 16, 24), (70, 24, 40)] if REHEARSAL else [(1, 128, 64), (4096, 4096, 12288)]
SIZES += [] if REHEARSAL else [(16_384, 9000, 1024)]  # a sum in pieces; parts of a product


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_one_rounding(size, dtype, wide):
    if IR and wide:
        pytest.skip("products in bf16 that come out in fp32 are cuBLAS's")
    t, n, k = size
    to = torch.float32 if wide else dtype
    g = common.generator(0)
    dy, x = (
        torch.randn(t, m, generator=g, device=DEVICE).to(dtype) for m in (n, k)
    )  # fmt: skip
    before = torch.randn(n, k, generator=g, device=DEVICE).to(to)
    truth = dy.double().T @ x.double()
    flags = torch.backends.cuda.matmul
    kept = flags.allow_bf16_reduced_precision_reduction
    # of one rounding; of sums in fp32 as tensor cores make them
    most = 0.6 * torch.finfo(dtype).eps if not wide else 1e-4
    made = weight_gradient(dy, x, torch.full_like(before, torch.nan), add=False)
    assert difference(made, truth) < most
    total = before.clone()
    assert weight_gradient(dy, x, total, add=True) is total
    assert difference(total, truth + before.double()) < most
    again = weight_gradient(dy, x, before.clone(), add=True)
    assert torch.equal(again, total)
    assert flags.allow_bf16_reduced_precision_reduction == kept
