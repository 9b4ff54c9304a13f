"""In what precision the references compute."""

from torch import Tensor, float64


def widen(x: Tensor) -> Tensor:
    """fp16, bf16 and fp32 -> fp32; fp64 stays, so that gradcheck can ask for it."""
    return x if x.dtype == float64 else x.float()
