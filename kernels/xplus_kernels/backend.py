"""Which code an op runs: Triton on CUDA, its PyTorch reference on a CPU.

Under `TRITON_INTERPRET=1` (set before the first import) the Triton code runs on the CPU, through
Triton's interpreter: slow, and what the tests use where there is no GPU.
"""

import os
from typing import Any

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU machine needs no Triton
    triton = tl = None  # type: ignore[assignment]

INTERPRET = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def jit(kernel: Any = None, **options: Any) -> Any:
    """`triton.jit` where Triton is installed; else the plain function, which nothing launches.

    What a batch decides, the number of rows and where a part of them begins, stands in
    `do_not_specialize` or `do_not_specialize_on_alignment`: else Triton compiles the kernel again,
    in the middle of training, for the first batch in which such a number divides by 16 or does not.
    """
    if kernel is None:
        return lambda kernel: jit(kernel, **options)
    return kernel if triton is None else triton.jit(kernel, **options)


def use_triton(x: Tensor) -> bool:
    """Whether an op on x launches its Triton kernels."""
    if x.is_cuda and triton is None:
        raise RuntimeError("the tensors are on a GPU, and Triton is missing: pip install triton")
    return x.is_cuda or INTERPRET
