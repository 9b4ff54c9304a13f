"""dW on the GPU: how often it is rounded, and that cuBLAS is left as it was."""

import math

import pytest
import torch

from tests.gpu import common
from tests.gpu.common import DEVICE, GPU, IR, REHEARSAL
from tests.tiny import difference
from xplus_kernels import weight_gradient

pytestmark = GPU
SIZES = [(1, 16, 24), (70, 24, 40)] if REHEARSAL else [(1, 128, 64), (4096, 4096, 12288)]
SIZES += [] if REHEARSAL else [(16_384, 9000, 1024)]  # a sum in pieces; parts of a product


def of_sums(terms):
    """Relative to the norm of sums of so many random terms: what fp32 may leave of them.

    Products of bf16 or fp16 are exact in fp32. Tensor cores add 8 at a time, or more, to a sum that
    they cut off (Fasi et al. 2021, doi 10.7717/peerj-cs.330): all in one direction, by less than
    2^-23 of it each time. A sum of j terms of n is sqrt(j / n) as large as the whole, on average
    over j 2/3. One more for what was there before. Emulated so, 4096 terms err by 1.3e-5 and 16,384
    by 5e-5: of these 1e-4 will do.
    """
    return min(1e-4, 2**-23 * (2 / 3 * -(-terms // 8) + 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_roundings(size, dtype, wide):
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

    # seen with CUDA 13.0's cuBLAS on an H200; which GEMM it takes decides
    twice = not (wide or REHEARSAL or IR)

    def most(exact, product=None):
        """The rounding of exact sums, an eighth for numbers on the other side of one, the sums; and
        that of a product where it is rounded before it is added."""
        once = difference(exact.to(to), exact)
        before = 0 if product is None else difference(exact - product + product.to(to), exact)
        return of_sums(t) + 1.125 * math.hypot(once, before)

    made = weight_gradient(dy, x, torch.full_like(before, torch.nan), add=False)
    assert difference(made, truth) < most(truth)
    total = before.clone()
    assert weight_gradient(dy, x, total, add=True) is total
    whole = truth + before.double()
    off = difference(total, whole)
    assert off < most(whole, truth if twice else None)
    if to == torch.bfloat16:
        assert difference(before + truth.to(to), whole) > most(whole)
    again = weight_gradient(dy, x, before.clone(), add=True)
    assert torch.equal(again, total)
    assert flags.allow_bf16_reduced_precision_reduction == kept
    if off >= most(whole):
        pytest.xfail("cuBLAS rounded the product before it added it")
