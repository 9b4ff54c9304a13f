"""Causal attention over packed sequences with grouped heads, exposing out and lse.

out = softmax(scale * q k.T + causal mask) v, each sequence by itself. Kept for the backward: q, k,
v, out, lse; the probabilities are computed again from lse (Dao et al. 2022, arXiv 2205.14135,
section 3.1). Bytes a token at the least, bf16: forward 4ND + 4KD + 4N; backward 8ND + 8KD + 4N.

Whose kernels run on CUDA in bf16 and fp16, the first that can: flash-attn 3 (compute capability
9), flash-attn 4 (9 and 10), flash-attn 2, PyTorch's own flash kernels (from 8.0). All of them take
fewer key than query heads as they are, and give lse as [N, T] in fp32: the natural logarithm of the
sum over exp(scale * q k.T), so that any one's backward goes with any one's forward. PyTorch's and
flash-attn 2's backward make dk and dv for every query head ([T, N, D] each) before they sum a
group. Everything else, fp32 and fp64 on CUDA too, takes the reference: query rows in blocks that
see the keys up to their own end, so a long sequence costs little more than the causal half of its
square; the query heads of a group are stacked along the rows of one product, so k and v are never
repeated.
"""

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from xplus_kernels.numerics import widen

BLOCK = 32  # query rows: the fewer, the nearer to the causal half of the square
REFERENCE, PYTORCH = "reference", "PyTorch flash"
FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_HEAD_DIM = 256  # at most, and a multiple of 8
FLASH_CAPABILITY = 8  # major, at least

log = logging.getLogger(__name__)


def varlen_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`varlen_attention` by blocks of query rows, in any floating dtype; lse in fp64 for fp64."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=widen(q[:0]).dtype, device=q.device)
    for start, a, b in _blocks(cu_seqlens):
        keys, values = k[start:b].transpose(0, 1), v[start:b].transpose(0, 1)  # [K, t, D]
        s = _scores(_group(q[a:b], k.shape[1]), keys, a - start, scale)  # [K, G*rows, t]
        block_lse = s.logsumexp(-1, keepdim=True)
        p = (s - block_lse).exp().to(q.dtype)
        out[a:b] = _ungroup(p @ values, b - a)
        lse[:, a:b] = block_lse.view(-1, b - a)
    return out, lse


def varlen_attention_backward_ref(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`varlen_attention_backward` by blocks of query rows, in any floating dtype."""
    kv_heads = k.shape[1]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = torch.zeros_like(widen(k)), torch.zeros_like(widen(v))
    delta = (widen(dout) * widen(out)).sum(-1)  # [T, N]
    for start, a, b in _blocks(cu_seqlens):
        keys, values = k[start:b].transpose(0, 1), v[start:b].transpose(0, 1)
        queries, douts = _group(q[a:b], kv_heads), _group(dout[a:b], kv_heads)
        s = _scores(queries, keys, a - start, scale)
        p = (s - lse[:, a:b].reshape(kv_heads, -1, 1)).exp()
        dp = widen(douts @ values.transpose(1, 2))
        block_delta = delta[a:b].T.reshape(kv_heads, -1, 1)
        ds = (p * (dp - block_delta) * scale).to(q.dtype)
        dq[a:b] = _ungroup(ds @ keys, b - a)
        dk[start:b] += (ds.transpose(1, 2) @ queries).transpose(0, 1)
        dv[start:b] += (p.to(q.dtype).transpose(1, 2) @ douts).transpose(0, 1)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _blocks(cu_seqlens: Tensor) -> Iterator[tuple[int, int, int]]:
    """(start of the sequence, first and past-last query row of a block) for every block."""
    bounds = cu_seqlens.tolist()
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        for a in range(start, end, BLOCK):
            yield start, a, min(a + BLOCK, end)


def _group(x: Tensor, kv_heads: int) -> Tensor:
    """[rows, N, D] -> [K, G*rows, D]: the G query heads of a key/value head, one under another."""
    return x.transpose(0, 1).reshape(kv_heads, -1, x.shape[-1])


def _ungroup(x: Tensor, rows: int) -> Tensor:
    """[K, G*rows, D] -> [rows, N, D]."""
    return x.reshape(-1, rows, x.shape[-1]).transpose(0, 1)


def _scores(queries: Tensor, keys: Tensor, offset: int, scale: float) -> Tensor:
    """[K, G*rows, D] x [K, t, D] -> masked scores [K, G*rows, t]; row i sees keys to offset + i."""
    t = keys.shape[1]
    rows = t - offset
    s = widen(queries @ keys.transpose(1, 2)) * scale
    future = torch.ones(rows, t, dtype=torch.bool, device=s.device).triu(offset + 1)
    return s.view(keys.shape[0], -1, rows, t).masked_fill_(future, float("-inf")).view_as(s)


@dataclass(frozen=True)
class _Library:
    """Where one flash-attn release keeps its kernels, and what it calls their arguments."""

    module: str
    forward: str
    backward: str
    capabilities: tuple[int, ...]  # majors
    head_dim: int = FLASH_HEAD_DIM
    lse: str = "softmax_lse"
    backward_causal: str = "causal"
    forward_options: dict[str, Any] = field(default_factory=dict)
    backward_options: dict[str, Any] = field(default_factory=dict)


LIBRARIES = {  # best first
    "flash-attn 3": _Library(  # Dao-AILab/flash-attention, hopper/flash_attn_interface.py
        "flash_attn_interface",
        "_flash_attn_forward",
        "_flash_attn_backward",
        capabilities=(9,),
        backward_causal="is_causal",
    ),
    "flash-attn 4": _Library(  # flash_attn/cute/interface.py; without lse unless it is asked for
        "flash_attn.cute.interface",
        "_flash_attn_fwd",
        "_flash_attn_bwd",
        capabilities=(9, 10),
        head_dim=128,
        lse="lse",
        forward_options={"return_lse": True},
    ),
    "flash-attn 2": _Library(  # flash_attn/flash_attn_interface.py, 2.8
        "flash_attn.flash_attn_interface",
        "_flash_attn_varlen_forward",
        "_flash_attn_varlen_backward",
        capabilities=(8, 9, 10, 12),
        forward_options={"dropout_p": 0.0},
        backward_options={
            "dropout_p": 0.0,
            "window_size_left": -1,
            "window_size_right": -1,
            "softcap": 0.0,
            "alibi_slopes": None,
        },
    ),
}
# What every library's two functions are handed besides, by name.
SEQUENCES = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale")
GRADIENTS = ("dq", "dk", "dv")


def attention_backend(q: Tensor) -> str:
    """Whose kernels `varlen_attention` runs for queries like q.

    "flash-attn 3", "flash-attn 4", "flash-attn 2", "PyTorch flash" or "reference". The reasons
    against the better ones are logged when a kind of queries is first seen on CUDA.
    """
    if not q.is_cuda or not q.numel():
        return REFERENCE
    return _choose(q.dtype, q.shape[-1], torch.cuda.get_device_capability(q.device)[0])


@cache
def _choose(dtype: torch.dtype, head_dim: int, major: int) -> str:
    if dtype not in FLASH_DTYPES:
        return _say(REFERENCE, f"flash kernels know bf16 and fp16, not {dtype}")
    if head_dim % 8 or head_dim > FLASH_HEAD_DIM or major < FLASH_CAPABILITY:
        reason = f"flash kernels want a head_dim that is a multiple of 8, at most {FLASH_HEAD_DIM},"
        reason += f" and capability {FLASH_CAPABILITY}.0 or more, not {head_dim} and {major}.x"
        return _say(REFERENCE, reason)
    reasons: list[str] = []
    for name, library in LIBRARIES.items():
        if major not in library.capabilities or head_dim > library.head_dim:
            reason = f"not for capability {major}.x with head_dim {head_dim}"
        else:
            reason = _missing(library)
        if not reason:
            return _say(name, "; ".join(reasons))
        reasons.append(f"{name}: {reason}")
    if torch.backends.cuda.is_flash_attention_available():
        return _say(PYTORCH, "; ".join(reasons))
    return _say(REFERENCE, "; ".join([*reasons, f"{PYTORCH}: not in this build of PyTorch"]))


def _say(name: str, why: str) -> str:
    level = logging.WARNING if name == REFERENCE else logging.INFO
    log.log(level, "varlen attention: %s%s", name, f" ({why})" if why else "")
    return name


def _missing(library: _Library) -> str:
    """Why a library cannot be used; empty where it can."""
    try:
        forward, backward = _functions(library)
    except ImportError as e:
        return f"cannot be imported ({e})"
    except AttributeError as e:
        return f"another version than the one known ({e})"
    tensors = ("q", "k", "v")
    wanted: tuple[tuple[Callable[..., Any], tuple[str, ...]], ...] = (
        (forward, (*tensors, *SEQUENCES, "causal", *library.forward_options)),
        (
            backward,
            ("dout", *tensors, "out", library.lse, *GRADIENTS, *SEQUENCES, "deterministic")
            + (library.backward_causal, *library.backward_options),
        ),
    )
    for function, arguments in wanted:
        # a torch.library.custom_op takes *args and **kwargs; its own function says which
        signature = inspect.signature(getattr(function, "_init_fn", function))
        try:
            signature.bind(**dict.fromkeys(arguments))
        except TypeError as e:
            return f"another version than the one known ({e})"
    return ""


def _functions(library: _Library) -> tuple[Callable[..., Any], Callable[..., Any]]:
    module = importlib.import_module(library.module)
    return getattr(module, library.forward), getattr(module, library.backward)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention of every sequence in a pack to itself.

    Args:
        q: [T, N, D], inner stride 1.
        k, v: [T, K, D] like q, K a divisor of N.
        cu_seqlens: [S+1] int32, the sequences' bounds: from 0 to T.
        max_seqlen: at least the longest sequence's length.
        scale: multiplies the scores.

    Returns:
        out [T, N, D] like q, contiguous, and lse [N, T] fp32 (fp64 for fp64).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or strides other than these.
    """
    _check(q, k, v, cu_seqlens, max_seqlen)
    name = attention_backend(q)
    if name == REFERENCE:
        return varlen_attention_ref(q, k, v, cu_seqlens, max_seqlen=max_seqlen, scale=scale)
    q, k, v = _loadable(q), _loadable(k), _loadable(v)
    longest = _longest(max_seqlen)
    if name == PYTORCH:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest,
            0.0, True, False,  # dropout, causal, debug mask
            scale=scale,
        )  # fmt: skip
    else:
        library = LIBRARIES[name]
        forward, _ = _functions(library)
        values = (cu_seqlens, cu_seqlens, longest, longest, scale)
        sequences = dict(zip(SEQUENCES, values, strict=True))
        out, lse, *_ = forward(
            q=q, k=k, v=v, **sequences, causal=True, **library.forward_options
        )  # fmt: skip
    assert lse.shape == (q.shape[1], q.shape[0]) and lse.dtype == torch.float32
    return out.contiguous(), lse.contiguous()


def varlen_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `varlen_attention`.

    The flash kernels add up dq in an order of their own, unless PyTorch is told to be
    deterministic (`torch.use_deterministic_algorithms`).

    Args:
        dout: [T, N, D], any strides.
        q, k, v, out, lse, cu_seqlens, max_seqlen, scale: the forward's inputs and outputs.

    Returns:
        dq [T, N, D], dk, dv [T, K, D], contiguous.

    Raises:
        ValueError, TypeError: as `varlen_attention`.
    """
    _check(q, k, v, cu_seqlens, max_seqlen)
    for argument, x in (("dout", dout), ("out", out)):
        _same(argument, x, q, tuple(q.shape), q.dtype)
    _same("lse", lse, q, (q.shape[1], q.shape[0]), widen(q[:0]).dtype)
    name = attention_backend(q)
    if name == REFERENCE:
        return varlen_attention_backward_ref(
            dout, q, k, v, out, lse, cu_seqlens, max_seqlen=max_seqlen, scale=scale
        )
    q, k, v, out, lse = _loadable(q), _loadable(k), _loadable(v), _loadable(out), lse.contiguous()
    dout, longest = dout.contiguous(), _longest(max_seqlen)
    if name == PYTORCH:
        # The generator's state and an unused tensor, as the forward returns them: without dropout
        # nothing reads them.
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse, cu_seqlens, cu_seqlens, longest, longest,
            0.0, True, state, state.new_zeros(()), scale=scale,
        )  # fmt: skip
        return dq.contiguous(), dk.contiguous(), dv.contiguous()
    library = LIBRARIES[name]
    _, backward = _functions(library)
    values = (cu_seqlens, cu_seqlens, longest, longest, scale)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    options = {
        **dict(zip(SEQUENCES, values, strict=True)),
        **dict(zip(GRADIENTS, (dq, dk, dv), strict=True)),
        library.lse: lse,
        library.backward_causal: True,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **library.backward_options,
    }
    backward(dout=dout, q=q, k=k, v=v, out=out, **options)
    return dq, dk, dv


def _longest(max_seqlen: int) -> int:
    """The bound on lengths that the flash kernels are told.

    Told 1, flash-attn 2 (and PyTorch's copy of it) takes a path for decoding that reads the batch
    as one token a sequence, which is wrong where a sequence is empty.
    """
    return max(max_seqlen, 2)


def _loadable(x: Tensor) -> Tensor:
    """x itself where a thread can load 16 bytes at every head of every row, else a copy."""
    step = 16 // x.element_size()
    fits = x.data_ptr() % 16 == 0 and all(stride % step == 0 for stride in x.stride()[:-1])
    return x if fits and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    if q.ndim != 3 or not q.is_floating_point():
        raise ValueError(f"q: {_what(q)}; a floating [T, N, D] is wanted")
    if k.ndim != 3 or 0 in k.shape[1:] or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: {_what(k)}; [T, K, D] is wanted, K a divisor of N = {q.shape[1]}")
    for argument, x in (("k", k), ("v", v)):
        _same(argument, x, q, (q.shape[0], k.shape[1], q.shape[2]), q.dtype)
    for argument, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{argument}: strides {x.stride()}; the last must be 1")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: {_what(cu_seqlens)}; int32 is wanted")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or not cu_seqlens.is_contiguous():
        raise ValueError(f"cu_seqlens: {_what(cu_seqlens)}; a contiguous [S + 1] is wanted")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens: on {cu_seqlens.device}; q is on {q.device}")
    if not isinstance(max_seqlen, int):  # a tensor would cost a wait for the device
        raise TypeError(f"max_seqlen: {type(max_seqlen).__name__}; an int is wanted")
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen: {max_seqlen}; the longest sequence's length is wanted")


def _same(argument: str, x: Tensor, q: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{argument}: {_what(x)}; {list(shape)} is wanted, for q {_what(q)}")
    if x.dtype != dtype:
        raise TypeError(f"{argument}: {_what(x)}; {dtype} is wanted, for q {_what(q)}")
    if x.device != q.device:
        raise ValueError(f"{argument}: on {x.device}; q is on {q.device}")


def _what(x: Tensor) -> str:
    return f"shape {list(x.shape)}, {x.dtype}"
