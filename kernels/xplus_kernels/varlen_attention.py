"""Attention over packed sequences with grouped heads, exposing out and lse.

out = softmax(scale * q k.T + mask) v, each sequence by itself; its queries may be fewer than its
keys, or others. Kept for the backward: q, k, v, out, lse; the probabilities are computed again from
lse (Dao et al. 2022, arXiv 2205.14135, section 3.1). So the backward computes what this call adds
to the gradients of a softmax over more keys, where out and lse are those of the whole
(`merge_attention`). Bytes a token at the least, bf16: forward 4ND + 4KD + 4N; backward
8ND + 8KD + 4N.

Whose kernels run on CUDA in bf16 and fp16, the first that can: flash-attn 3 (compute capability
9), flash-attn 4 (9 and 10), flash-attn 2, PyTorch's own flash kernels (from 8.0). All of them take
fewer key than query heads as they are, and give lse as [N, T] in fp32: the natural logarithm of the
sum over exp(scale * q k.T), so that any one's backward goes with any one's forward. PyTorch's and
flash-attn 2's backward make dk and dv for every query head ([T, N, D] each) before they sum a
group. Where PyTorch's would run and all sequences are equally long, cuDNN's do, by way of PyTorch
(`even_attention.py`). Everything else, fp32 and fp64 on CUDA too, takes the reference
(`attention_reference.py`).

Read in one copy of each source; PyTorch's ran and was right on an H100 and an H200, the others on
no GPU yet. A causal mask is aligned to the end of the
keys: flash-attn 2 (since 2.1, its README) and PyTorch (mask.h of each), 3 (hopper/mask.h), 4
(cute/mask.py). Where a sequence has no queries, the backward's dk and dv are zeros: 2 and PyTorch
store them (flash_bwd_kernel.h); 3 (store_zero in hopper/epilogue_bwd.hpp) and 4 on capability 10
(flash_bwd_sm100.py) store them or, with fewer key than query heads, add nothing to accumulators
that begin as zeros. 4's on capability 9 was not read, nor head dim 256, which is not asked of it.
Where a sequence has queries and no keys they disagree: lse is +inf in 2, -inf in 3; 4 not read.
"""

import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from xplus_kernels.attention_reference import (
    varlen_attention_backward_ref,
    varlen_attention_ref,
)
from xplus_kernels.even_attention import even_attention, even_attention_backward, is_even
from xplus_kernels.numerics import widen

REFERENCE, PYTORCH = "reference", "PyTorch flash"
FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_HEAD_DIM = 256  # at most, and a multiple of 8
FLASH_CAPABILITY = 8  # major, at least

log = logging.getLogger(__name__)


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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    scale: float,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention of every sequence's queries to its own keys.

    Args:
        q: [Tq, N, D], inner stride 1.
        k, v: [Tk, K, D] like q, K a divisor of N.
        cu_seqlens: [S+1] int32, the bounds of the sequences' queries: from 0 to Tq.
        max_seqlen: at least the longest sequence's number of queries.
        scale: multiplies the scores.
        cu_seqlens_k, max_seqlen_k: the same of the keys, from 0 to Tk; both None where the keys
            have the queries' bounds. A sequence may have keys and no queries; one that has
            queries has keys.
        causal: whether a query sees no later key. The mask is aligned to the end of the keys:
            query i of n sees the keys up to m - n + i of m, and m is no less than n. Else it sees
            all keys.

    Returns:
        out [Tq, N, D] like q, contiguous, and lse [N, Tq] fp32 (fp64 for fp64).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or strides other than these.
    """
    cu_k, longest_k = _check(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
    name = attention_backend(q) if len(k) else REFERENCE
    if name == REFERENCE:
        return varlen_attention_ref(
            q, k, v, cu_seqlens, max_seqlen=max_seqlen, scale=scale,
            cu_seqlens_k=cu_k, max_seqlen_k=longest_k, causal=causal,
        )  # fmt: skip
    q, k, v = _loadable(q), _loadable(k), _loadable(v)
    values = (cu_seqlens, cu_k, _longest(max_seqlen), _longest(longest_k))
    if name == PYTORCH and is_even(q, k, cu_seqlens, cu_k, max_seqlen):
        return even_attention(q, k, v, max_seqlen, scale=scale, causal=causal)
    if name == PYTORCH:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *values,
            0.0, causal, False,  # dropout, causal, debug mask
            scale=scale,
        )  # fmt: skip
    else:
        library = LIBRARIES[name]
        forward, _ = _functions(library)
        sequences = dict(zip(SEQUENCES, (*values, scale), strict=True))
        out, lse, *_ = forward(
            q=q, k=k, v=v, **sequences, causal=causal, **library.forward_options
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
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `varlen_attention`.

    The flash kernels add up dq in an order of their own, unless PyTorch is told to be
    deterministic (`torch.use_deterministic_algorithms`).

    Args:
        dout: [Tq, N, D], any strides.
        q, k, v, cu_seqlens and the options: the forward's.
        out, lse: the forward's; or those of a softmax over these keys and others, of which the
            gradients are then this call's share.

    Returns:
        dq [Tq, N, D], dk, dv [Tk, K, D], contiguous; zeros in dk and dv where a sequence has no
        queries.

    Raises:
        ValueError, TypeError: as `varlen_attention`.
    """
    cu_k, longest_k = _check(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
    for argument, x in (("dout", dout), ("out", out)):
        _same(argument, x, q, tuple(q.shape), q.dtype)
    _same("lse", lse, q, (q.shape[1], q.shape[0]), widen(q[:0]).dtype)
    name = attention_backend(q) if len(k) else REFERENCE
    if name == REFERENCE:
        return varlen_attention_backward_ref(
            dout, q, k, v, out, lse, cu_seqlens, max_seqlen=max_seqlen, scale=scale,
            cu_seqlens_k=cu_k, max_seqlen_k=longest_k, causal=causal,
        )  # fmt: skip
    q, k, v, out, lse = _loadable(q), _loadable(k), _loadable(v), _loadable(out), lse.contiguous()
    dout = dout.contiguous()
    values = (cu_seqlens, cu_k, _longest(max_seqlen), _longest(longest_k))
    if name == PYTORCH and is_even(q, k, cu_seqlens, cu_k, max_seqlen):
        return even_attention_backward(
            dout, q, k, v, out, lse, max_seqlen, scale=scale, causal=causal
        )
    if name == PYTORCH:
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse, *values, 0.0, causal, *_no_dropout(q.device), scale=scale
        )
        return dq.contiguous(), dk.contiguous(), dv.contiguous()
    library = LIBRARIES[name]
    _, backward = _functions(library)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    options = {
        **dict(zip(SEQUENCES, (*values, scale), strict=True)),
        **dict(zip(GRADIENTS, (dq, dk, dv), strict=True)),
        library.lse: lse,
        library.backward_causal: causal,
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


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int | None,
) -> tuple[Tensor, int]:
    """The keys' bounds and longest length, once all arguments match."""
    if q.ndim != 3 or not q.is_floating_point():
        raise ValueError(f"q: {_what(q)}; a floating [T, N, D] is wanted")
    if k.ndim != 3 or 0 in k.shape[1:] or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: {_what(k)}; [T, K, D] is wanted, K a divisor of N = {q.shape[1]}")
    rows = len(q) if cu_seqlens_k is None else len(k)
    for argument, x in (("k", k), ("v", v)):
        _same(argument, x, q, (rows, k.shape[1], q.shape[2]), q.dtype)
    for argument, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{argument}: strides {x.stride()}; the last must be 1")
    _check_bounds("", cu_seqlens, max_seqlen, q)
    if cu_seqlens_k is None or max_seqlen_k is None:
        if cu_seqlens_k is not None or max_seqlen_k is not None:
            raise ValueError("cu_seqlens_k, max_seqlen_k: one of them is None; both or neither")
        return cu_seqlens, max_seqlen
    _check_bounds("_k", cu_seqlens_k, max_seqlen_k, q)
    if len(cu_seqlens_k) != len(cu_seqlens):
        raise ValueError(
            f"cu_seqlens_k: {_what(cu_seqlens_k)}; [{len(cu_seqlens)}] is wanted, as of cu_seqlens"
        )
    return cu_seqlens_k, max_seqlen_k


def _check_bounds(of: str, cu_seqlens: Tensor, max_seqlen: int, q: Tensor) -> None:
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens{of}: {_what(cu_seqlens)}; int32 is wanted")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or not cu_seqlens.is_contiguous():
        raise ValueError(f"cu_seqlens{of}: {_what(cu_seqlens)}; a contiguous [S + 1] is wanted")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens{of}: on {cu_seqlens.device}; q is on {q.device}")
    if not isinstance(max_seqlen, int):  # a tensor would cost a wait for the device
        raise TypeError(f"max_seqlen{of}: {type(max_seqlen).__name__}; an int is wanted")
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen{of}: {max_seqlen}; the longest sequence's length is wanted")


@cache
def _no_dropout(device: torch.device) -> tuple[Tensor, Tensor]:
    """The generator's state and an unused tensor, as the forward returns them: nothing reads them,
    so they are made once."""
    state = torch.zeros(2, dtype=torch.uint64, device=device)
    return state, state.new_zeros(())


def _same(argument: str, x: Tensor, q: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{argument}: {_what(x)}; {list(shape)} is wanted, for q {_what(q)}")
    if x.dtype != dtype:
        raise TypeError(f"{argument}: {_what(x)}; {dtype} is wanted, for q {_what(q)}")
    if x.device != q.device:
        raise ValueError(f"{argument}: on {x.device}; q is on {q.device}")


def _what(x: Tensor) -> str:
    return f"shape {list(x.shape)}, {x.dtype}"
