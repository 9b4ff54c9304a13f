"""Attention of sequences of one length: cuDNN's kernels, as PyTorch has them.

Measured on an H100, torch 2.11, 8B's heads, 16,384 tokens, forward and backward in ms: sequences of
4096 0.898 and 2.937 where PyTorch's flash kernels take 1.656 and 5.104; of 1024 0.285 and 1.250
against 0.648 and 1.930; of 512 0.181 and 1.047 against 0.466 and 1.347. cuDNN plans a shape when it
first sees it, in 40 ms (the first of all in 0.5 s). PyTorch also has an entry for sequences of many
lengths, `_cudnn_attention_forward`: it took 42 to 64 ms there, and its gradients were wrong.
"""

import torch
from torch import Tensor

CAPABILITIES = (9, 10)  # majors where cuDNN has kernels made for them; 10 was not measured
HEAD_DIM = 128  # at most, and a multiple of 8
LEAST = 512  # tokens of a sequence; shorter ones have kernels of ours, and cuDNN none of one token


def is_even(q: Tensor, k: Tensor, cu_seqlens: Tensor, cu_k: Tensor, max_seqlen: int) -> bool:
    """Whether a pack is for these kernels: `max_seqlen` queries and keys in every sequence.

    q, k: [T, heads, D]; max_seqlen is at least the longest sequence's length, so that only equal
    ones can fill T.
    """
    return (
        cu_k is cu_seqlens
        and max_seqlen * (len(cu_seqlens) - 1) == len(q) == len(k)
        and max_seqlen >= LEAST
        and q.shape[-1] <= HEAD_DIM
        and torch.cuda.get_device_capability(q.device)[0] in CAPABILITIES
        and torch.backends.cudnn.is_available()
        # its backward adds up in an order of its own
        and not torch.are_deterministic_algorithms_enabled()
    )


def even_attention(
    q: Tensor, k: Tensor, v: Tensor, length: int, *, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """q [T, N, D], k, v [T, K, D] -> out [T, N, D], lse [N, T] fp32."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(_apart(x, length) for x in (q, k, v)),
        None, True, 0.0, causal, False,  # bias, lse is wanted, dropout, causal, debug mask
        scale=scale,
    )  # fmt: skip
    return _joined(out), lse.flatten(2).transpose(0, 1).reshape(q.shape[1], len(q))


def even_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, length: int, *,
    scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq [T, N, D], dk and dv [T, K, D], contiguous."""
    apart = lse.view(len(lse), -1, length).transpose(0, 1).contiguous()[..., None]  # [B, N, S, 1]
    state = torch.zeros((), dtype=torch.int64, device=q.device)  # dropout's, which nothing reads
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(_apart(x, length) for x in (dout, q, k, v, out)),
        apart, state, state, None, None, None, length, length, 0.0, causal, scale=scale,
    )  # fmt: skip
    dq, dk, dv = (_joined(x) for x in grads)
    return dq, dk, dv


def _apart(x: Tensor, length: int) -> Tensor:
    """[T, heads, D] -> a view [B, heads, S, D]."""
    return x.unflatten(0, (-1, length)).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    """[B, heads, S, D] -> [T, heads, D], contiguous."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()
