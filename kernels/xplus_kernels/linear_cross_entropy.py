"""Linear head and cross-entropy without ever holding all logits.

Rows go in chunks: logits = x @ W.T, softmax statistics in fp32, the chunk turns into its own
gradient in place, and that is multiplied straight back to dX (and dW where the head is trained).
The idea of making the gradient in the forward is Liger-Kernel's FusedLinearCrossEntropy (arXiv
2410.10989). Kept for the backward: nothing but dX.
"""

import torch
from torch import Tensor

from xplus_kernels.numerics import widen

LOGITS_BYTES = 512 * 2**20  # cap for one chunk of logits in fp32
LEAST_ROWS = 1024  # a chunk is never skinnier: a small GEMM would waste the hardware


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    divisor: Tensor | float,
    need_dx: bool = True,
    need_dw: bool = False,
    ignore_index: int = -100,
    logits_bytes: int = LOGITS_BYTES,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sum of the rows' cross-entropies over max(divisor, 1), and its gradients.

    Args:
        x: [R, H], the rows to predict from.
        weight: [V, H], the head.
        targets: [R] int64, `ignore_index` where a row is not to be counted.
        divisor: what the sum is divided by: the supervised tokens of the whole optimizer step.
        need_dx, need_dw: which gradients to make.
        logits_bytes: cap for a chunk of fp32 logits, though a chunk has at least 1024 rows.

    Returns:
        loss [] fp32, dx [R, H] like x or None, dw [V, H] like weight or None.
    """
    rows, vocabulary = x.shape[0], weight.shape[0]
    divisor = torch.as_tensor(divisor, device=x.device).clamp(min=1)
    loss = torch.zeros((), dtype=widen(x[:0]).dtype, device=x.device)
    dx = torch.empty_like(x) if need_dx else None
    dw = torch.zeros(weight.shape, dtype=loss.dtype, device=x.device) if need_dw else None
    chunk = max(LEAST_ROWS, logits_bytes // (4 * vocabulary))
    for a in range(0, rows, chunk):
        part, target = x[a : a + chunk], targets[a : a + chunk]
        counted = target != ignore_index
        at = target.where(counted, 0)[:, None]
        logits = widen(part @ weight.T)  # [chunk, V]
        lse = logits.logsumexp(-1)
        loss += (lse - logits.gather(1, at)[:, 0]).where(counted, 0).sum()
        if not need_dx and not need_dw:
            continue
        # d(loss)/d(logits) = softmax - onehot, over the chunk itself
        grad = logits.sub_(lse[:, None]).exp_()
        grad.scatter_add_(1, at, torch.full_like(grad[:, :1], -1))
        grad.mul_((counted.to(grad.dtype) / divisor)[:, None])
        grad = grad.to(x.dtype)
        if dx is not None:
            dx[a : a + chunk] = grad @ weight
        if dw is not None:
            dw += grad.T @ part
    return loss / divisor, dx, None if dw is None else dw.to(weight.dtype)
