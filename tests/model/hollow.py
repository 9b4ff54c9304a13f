"""A card of tensors without numbers: shapes, dtypes, strides and devices as on a GPU, nothing else.

Meta tensors say that they are on "cuda". Each op is put to PyTorch's own meta rule, and to what the
CUDA kernel asks beyond it (`RULES`); a Triton launch is held to what was compiled ahead of
time. `FakeTensorMode` would be the library's own, but in a build of PyTorch without CUDA its
tensors can neither be indexed nor differentiated there.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import xplus_kernels as ops
from tests.simulated.pretence import forget_cached
from xplus_fast.model.families import Shape
from xplus_fast.model.frozen import MATRICES
from xplus_kernels.aot import registered_cases
from xplus_kernels.backend import triton

META, CARD = torch.device("meta"), torch.device("cuda", 0)
NARROW = (torch.bfloat16, torch.float16)
real_device = Tensor.device.__get__


def make(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META, requires_grad=grad)


def frozen(form: str, shape: tuple[int, int]) -> ops.FrozenWeight:
    """A weight [N, K] in a format."""
    n, k = shape
    if form == "bf16":
        return ops.Bf16Weight(make(n, k))
    if form == "fp8":
        rows = ops.Fp8Rows(make(n, k, dtype=torch.float8_e4m3fn), make(n, dtype=torch.float32))
        return ops.Fp8Weight(rows)
    scale = make(n * k // 64, dtype=torch.float32)
    if form == "int8":
        return ops.Int8Weight(make(n, k, dtype=torch.int8), scale)
    return ops.Nf4Weight(make(n * k // 2, dtype=torch.uint8), scale, (n, k))


class Kept:
    """A store of frozen matrices."""

    def __init__(self, form: str, shape: Shape) -> None:
        shapes = shape.packed_shapes()
        self.weights = {name: frozen(form, shapes[name]) for name in MATRICES}  # type: ignore

    def fetch(self, *, backward: bool) -> dict[str, ops.FrozenWeight]:
        return self.weights


class Refused(AssertionError):
    """What a GPU would not take, or would take for something else."""


def wanted(holds: bool, what: str, *tensors: Any) -> None:
    if not holds:
        shown = (f"{list(t.shape)} {t.dtype} {t.stride()}" for t in tensors)
        raise Refused(f"{what}: {'; '.join(shown)}")


class Card(TorchDispatchMode):
    """Ops, and what they were: names of those that ran, and of kernels that were launched."""

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__()
        self.capability, self.within = capability, False
        self.ran: Counter[str] = Counter()

    def device(self, t: Tensor) -> torch.device:
        real = real_device(t)
        return CARD if real == META and not self.within else real

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = func.overloadpacket.__name__, dict(kwargs or {})
        to = given.get("device")
        if to is not None and to.type == "cuda":
            given["device"] = META
        self.ran[name] += 1
        self.within = True
        try:
            tensors = [t for t in _flat((*args, *given.values())) if isinstance(t, Tensor)]
            places = {t.device.type for t in tensors if t.dim()}
            away = name in ("copy_", "_to_copy")
            wanted(len(places) < 2 or away, f"{name}: on {' and '.join(sorted(places))}", *tensors)
            if away and "cpu" in (*places, *(to and [to.type] or [])) and "meta" in places:
                return _copied(name, *args, **given)
            made = func(*args, **given)
            if rule := RULES.get(name):
                rule(self.capability, *args, **given)
            return made
        finally:
            self.within = False

    def launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """Instead of Triton's: a compilation that was tried, and a grid that CUDA takes."""
        name = kernel.__name__
        self.ran[name] += 1
        grid = tuple(grid(options) if callable(grid) else grid)
        limits = (2**31 - 1, 65_535, 65_535)
        wanted(all(0 < n <= m for n, m in zip(grid, limits, strict=False)), f"{name}: grid {grid}")
        values = dict(zip(kernel.arg_names, args, strict=False)) | options
        tensors = {k: t for k, t in values.items() if isinstance(t, Tensor)}
        for k, t in tensors.items():
            wanted(t.device == CARD, f"{name}: {k} on {t.device}", t)
        types = {(k, "*" + TYPES[t.dtype]) for k, t in tensors.items()}
        types |= {(k, v) for k, v in values.items() if isinstance(v, bool)}
        known = compiled()[kernel]
        wanted(any(types <= each for each in known), f"{name}: compiled for none of {types}")


TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64",
    torch.int32: "i32", torch.uint8: "u8", torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip


@cache
def compiled() -> dict[Any, list[set[tuple[str, Any]]]]:
    """Kernel -> its compilations: the types of arguments, and what is switched on."""
    known = defaultdict(list)
    for cases in registered_cases().values():
        for case in cases:
            known[case.kernel].append({*case.signature.items(), *case.constexprs.items()})
    return known


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield from value if isinstance(value, (list, tuple)) else (value,)


def _copied(name: str, x: Tensor, *args: Any, **options: Any) -> Tensor:
    """Between host and device."""
    if name == "copy_":
        assert x.shape == args[0].shape
        return x
    made = {k: v for k, v in options.items() if k in ("dtype", "device") and v is not None}
    return torch.empty_like(x, **made)


# What CUDA kernels ask beyond PyTorch's meta rules.


def _scaled_mm(
    capability: tuple[int, int], a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor,
    bias: Any = None, scale_result: Any = None, out_dtype: Any = None, use_fast_accum: bool = False,
) -> None:  # fmt: skip
    """aten/src/ATen/native/cuda/ScaledBlas.cpp, of row-wise scales; and 16 bytes a load."""
    wanted(capability >= (8, 9), f"_scaled_mm: on capability {capability}")
    wanted(out_dtype == torch.bfloat16, f"_scaled_mm: row-wise into {out_dtype}")
    wanted(scale_a.shape == (len(a), 1) and scale_b.shape == (1, b.shape[1]), "_scaled_mm: scales",
           scale_a, scale_b)  # fmt: skip
    places = [(a.stride(0), a.storage_offset()), (b.stride(1), b.storage_offset())]
    wanted(not any(n % 16 for n in sum(places, ())), "_scaled_mm: alignment", a, b)


def _flash(
    capability: tuple[int, int], q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Tensor, Tensor],
    longest: tuple[int, int],
) -> None:  # fmt: skip
    """flash_api.cpp, `mha_varlen_fwd` and `mha_varlen_bwd`."""
    wanted(capability >= (8, 0) and q.dtype in NARROW, f"flash: on capability {capability}", q)
    wanted(k.dtype == v.dtype == q.dtype and k.shape == v.shape, "flash: k, v", q, k, v)
    wanted(q.dim() == k.dim() == 3 and q.shape[2] == k.shape[2], "flash: heads", q, k)
    wanted(q.shape[2] % 8 == 0 and q.shape[2] <= 256 and q.shape[1] % k.shape[1] == 0, "flash", q)
    for x in (q, k, v):
        _loadable("flash", x)
    for cu in bounds:
        fits = cu.dtype == torch.int32 and cu.is_contiguous() and cu.shape == bounds[0].shape
        wanted(fits and len(cu) > 1, "flash: bounds", cu)
    wanted(all(type(n) is int and n > 0 for n in longest), f"flash: longest {longest}")


def _loadable(name: str, x: Tensor) -> None:
    step = 16 // x.element_size()
    at = (*x.stride()[:-1], x.storage_offset())
    wanted(x.stride(-1) == 1 and not any(n % step for n in at), f"{name}: layout", x)


def _flash_forward(
    capability: tuple[int, int], q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor,
    longest_q: int, longest_k: int, dropout: float, causal: bool, debug: bool, *, scale: float,
) -> None:  # fmt: skip
    _flash(capability, q, k, v, (cu_q, cu_k), (longest_q, longest_k))


def _flash_backward(
    capability: tuple[int, int], dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int, dropout: float,
    causal: bool, seed: Tensor, offset: Tensor, *, scale: float,
) -> None:  # fmt: skip
    _flash(capability, q, k, v, (cu_q, cu_k), (longest_q, longest_k))
    for x in (dout, out):
        wanted(x.shape == q.shape and x.dtype == q.dtype, "flash: dout, out", x, q)
        _loadable("flash", x)
    fits = lse.shape == (q.shape[1], len(q)) and lse.dtype == torch.float32
    wanted(fits and lse.is_contiguous(), "flash: lse", lse)


def _cudnn_forward(
    capability: tuple[int, int], q: Tensor, k: Tensor, v: Tensor, bias: Any, wants_lse: bool,
    dropout: float = 0.0, causal: bool = False, debug: bool = False, *,
    scale: float,
) -> None:  # fmt: skip
    """aten/src/ATen/native/transformers/cuda/sdp_utils.cpp and cudnn/MHA.cpp."""
    wanted(capability[0] in (9, 10) and q.dtype in NARROW, f"cuDNN: on capability {capability}", q)
    wanted(k.dtype == v.dtype == q.dtype and k.shape == v.shape, "cuDNN: k, v", q, k, v)
    wanted(q.dim() == 4 and q.shape[1] % k.shape[1] == 0, "cuDNN: heads", q, k)
    wanted(q.shape[3] % 8 == 0 and q.shape[3] <= 128 and q.shape[2] > 1, "cuDNN: sizes", q)
    wanted(wants_lse and not dropout and scale > 0, "cuDNN: options")
    for x in (q, k, v):
        _loadable("cuDNN", x)


def _cudnn_backward(
    capability: tuple[int, int], dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, seed: Tensor, offset: Tensor, bias: Any, cu_q: Any, cu_k: Any, longest_q: int,
    longest_k: int, dropout: float, causal: bool, *, scale: float,
) -> None:  # fmt: skip
    _cudnn_forward(capability, q, k, v, bias, True, dropout, causal, False, scale=scale)
    wanted((longest_q, longest_k) == (q.shape[2], k.shape[2]), "cuDNN: lengths", q, k)
    for x in (dout, out):
        wanted(x.shape == q.shape and x.dtype == q.dtype, "cuDNN: dout, out", x, q)
        _loadable("cuDNN", x)
    fits = lse.shape == (*q.shape[:3], 1) and lse.dtype == torch.float32
    wanted(fits and lse.is_contiguous(), "cuDNN: lse", lse)


def _product(capability: tuple[int, int], *given: Any, out_dtype: Any = None, **_: Any) -> None:
    """Of one dtype, or of narrow ones into fp32 (native/cuda/Blas.cpp)."""
    *added, a, b = (t for t in given if isinstance(t, Tensor))
    for each in given:
        out_dtype = each if isinstance(each, torch.dtype) else out_dtype
    wide = out_dtype or a.dtype
    fits = wide == a.dtype or wide == torch.float32 and a.dtype in NARROW
    fits = fits and a.dtype == b.dtype and all(t.dtype == wide for t in added)
    wanted(fits, f"a product into {wide}", *added, a, b)


RULES: dict[str, Callable[..., None]] = {
    "mm": _product,
    "addmm": _product,
    "_scaled_mm": _scaled_mm,
    "_flash_attention_forward": _flash_forward,
    "_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_cudnn_attention": _cudnn_forward,
    "_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
}


@contextmanager
def hollow_card(capability: tuple[int, int]) -> Iterator[Card]:
    """Meta tensors are a GPU's within it, and the GPU of this capability."""
    card = Card(capability)
    about = SimpleNamespace(
        multi_processor_count=132, major=capability[0], minor=capability[1], name="none"
    )
    values = {
        "is_available": True, "device_count": 1, "current_device": 0,
        "get_device_name": about.name, "get_device_properties": about,
        "get_device_capability": capability, "synchronize": None, "_lazy_init": None,
        "cudart": SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0),
    }  # fmt: skip
    cuda = {name: lambda *_, answer=answer: answer for name, answer in values.items()}
    lanes = {name: mock.MagicMock() for name in ("Stream", "Event", "stream", "current_stream")}
    tensor = {
        "device": property(card.device),
        "is_cuda": property(lambda t: card.device(t) == CARD),
        "data_ptr": lambda t: t.storage_offset() * t.element_size(),
        "pin_memory": lambda t, *_: t,
    }
    with ExitStack() as patches:
        for owner, changes in (
            (Tensor, tensor), (torch.cuda, cuda | lanes),
            (torch.backends.cuda, {"is_flash_attention_available": lambda: True}),
            (torch.backends.cudnn, {"is_available": lambda: True}),
            (triton.runtime.jit.JITFunction, {"run": lambda *a, **o: card.launch(*a, **o)}),
        ):  # fmt: skip
            for name, value in changes.items():
                patches.enter_context(mock.patch.object(owner, name, value))
        forget_cached()
        try:
            with card:
                yield card
        finally:
            forget_cached()
