"""SwiGLU (Shazeer 2020, arXiv 2002.05202): silu(gate) * up on the packed gate_up GEMM output.

Rounds silu(gate) to the input's dtype before multiplying, as Hugging Face does.
Kept for the backward: gate_up.
"""

import torch
from torch import Tensor

from xplus_kernels.numerics import widen


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2F] -> [T, F]."""
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """dy [T, F], gate_up [T, 2F] -> d(gate_up) [T, 2F]."""
    gate, up = widen(gate_up).chunk(2, -1)
    dy, sig = widen(dy), gate.sigmoid()
    silu = gate * sig
    d = torch.empty_like(gate_up)
    f = gate.shape[-1]
    # silu'(g) = sig * (1 + g * (1 - sig)) = sig + silu - silu * sig
    d[:, :f] = dy * up * (sig + silu - silu * sig)
    d[:, f:] = dy * silu
    return d
