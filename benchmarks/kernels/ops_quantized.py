"""FP8, INT8 and NF4: quantization, the ops fused with it, and the frozen linears of a block."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Inputs, Maker, Outputs, Provider, Size
from benchmarks.kernels.ops_rows import (
    BOUND,
    EPS,
    hf_add_rms_norm,
    hf_rms_norm,
    hf_swiglu,
    truth_by,
)

FP8, FP8_MAX = torch.float8_e4m3fn, 448.0
FP8_BOUND = 0.04  # e4m3 rounds by 2^-4 at most: 0.026 in the 2-norm of normal numbers
FP8_GEMM_BOUND = 0.04  # x is rounded, the truth has the weight as quantized
# QLoRA (Dettmers and others 2023, arXiv 2305.14314), appendix E
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def _op(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"xplus_kernels.{module}"), name)


def torch_quantize(x: Tensor, column_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Row-wise FP8 as one writes it in PyTorch -> data, scale."""
    f = x.float() if column_scale is None else x.float() * column_scale
    scale = f.abs().amax(-1).clamp_min(1e-12) / FP8_MAX
    return (f / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def _view(outputs: Outputs, rows: Tensor) -> Outputs:
    """[..., data, scale] -> [..., data * scale]."""
    *others, data, scale = outputs
    # index FP8 as bytes: not every backend indexes it
    few = data.view(torch.uint8)[rows].view(FP8).float() * scale[rows, None]
    return [*(o[rows] for o in others), few]


def _unfused(function: Callable[[Inputs], Any]) -> dict[str, Provider]:
    """PyTorch's expression, its last output then quantized; also compiled."""

    def whole(i: Inputs) -> Outputs:
        made = function(i)
        *others, last = made if isinstance(made, tuple) else (made,)
        return (*others, *torch_quantize(last, i.get("column_scale")))

    def eager(i: Inputs) -> Callable[[], Outputs]:
        return lambda: whole(i)

    def compiled(i: Inputs) -> Callable[[], Outputs]:
        made = torch.compile(whole, dynamic=False, fullgraph=True)
        made(i)
        return lambda: made(i)

    return {
        "eager": Provider(eager),
        "torch.compile": Provider(compiled, cuda_only=True, compiled=True),
    }


def _fp8_case(
    op: str, way: str, size: Size, T: int, make: Callable[[Maker], Inputs],
    bind: Callable[[Inputs], Callable[[], Outputs]], function: Callable[[Inputs], Any],
    truth: Callable[[Inputs, Tensor], Outputs], moved: int,
) -> Case:  # fmt: skip
    return Case(
        op, way, size.name, T, make, {"ours": Provider(bind), **_unfused(function)}, truth,
        "copy_bytes", T, FP8_BOUND, bytes=moved, view=_view,
    )  # fmt: skip


def quantize_fp8(size: Size, T: int, way: str) -> Case:
    def bind(i: Inputs) -> Callable[[], Outputs]:
        ours = _op("fp8", "quantize_fp8")
        return lambda: ours(i["x"])

    return _fp8_case(
        "quantize_fp8", way, size, T, lambda m: {"x": m.randn(T, size.H)}, bind,
        lambda i: i["x"], lambda i, rows: [i["x"][rows].float()], 3 * T * size.H,
    )  # fmt: skip


def rms_norm_fp8(size: Size, T: int, way: str) -> Case:
    def make(m: Maker) -> Inputs:
        weight = m.randn(size.H, mean=1, scale=0.02)
        return {"x": m.randn(T, size.H), "weight": weight, "leaves": ()}

    def bind(i: Inputs) -> Callable[[], Outputs]:
        ours = _op("norm_fp8", "rms_norm_fp8")
        return lambda: ours(i["x"], i["weight"], eps=EPS)

    return _fp8_case(
        "rms_norm_fp8", way, size, T, make, bind, lambda i: hf_rms_norm(i["x"], i["weight"]),
        truth_by("forward", hf_rms_norm, ("x", "weight"), ("x",), ()), 3 * T * size.H,
    )  # fmt: skip


def add_rms_norm_fp8(size: Size, T: int, way: str) -> Case:
    names = ("x", "residual", "weight")

    def make(m: Maker) -> Inputs:
        weight = m.randn(size.H, mean=1, scale=0.02)
        x, residual = m.randn(T, size.H), m.randn(T, size.H)
        return {"x": x, "residual": residual, "weight": weight, "leaves": ()}

    def bind(i: Inputs) -> Callable[[], Outputs]:
        ours = _op("norm_fp8", "add_rms_norm_fp8")

        def run() -> Outputs:
            summed, rows = ours(i["x"], i["residual"], i["weight"], eps=EPS)
            return (summed, *rows)

        return run

    return _fp8_case(
        "add_rms_norm_fp8", way, size, T, make, bind,
        lambda i: hf_add_rms_norm(*(i[name] for name in names)),
        truth_by("forward", hf_add_rms_norm, names, ("x", "residual"), ()), 7 * T * size.H,
    )  # fmt: skip


def swiglu_fp8(size: Size, T: int, way: str) -> Case:
    def make(m: Maker) -> Inputs:
        return {"gate_up": m.randn(T, 2 * size.F), "leaves": ()}

    def bind(i: Inputs) -> Callable[[], Outputs]:
        ours = _op("swiglu_fp8", "swiglu_fp8")
        return lambda: ours(i["gate_up"])

    return _fp8_case(
        "swiglu_fp8", way, size, T, make, bind, lambda i: hf_swiglu(i["gate_up"]),
        truth_by("forward", hf_swiglu, ("gate_up",), ("gate_up",), ()), 5 * T * size.F,
    )  # fmt: skip


def swiglu_backward_fp8(size: Size, T: int, way: str) -> Case:
    """Its minimum reads gate, up and dy once; a kernel that needs the row's amax before it can
    write may read them twice."""

    def make(m: Maker) -> Inputs:
        scale = m.randn(2 * size.F, dtype=torch.float32, scale=0.2).exp() * 1e-3
        return {
            "dy": m.randn(T, size.F), "gate_up": m.randn(T, 2 * size.F), "column_scale": scale,
            "leaves": ("gate_up",),
        }  # fmt: skip

    def bind(i: Inputs) -> Callable[[], Outputs]:
        ours = _op("swiglu_fp8", "swiglu_backward_fp8")
        return lambda: ours(i["dy"], i["gate_up"], column_scale=i["column_scale"])

    def plain(i: Inputs) -> Tensor:
        gate, up = i["gate_up"].float().chunk(2, -1)
        dy, sig = i["dy"].float(), gate.sigmoid()
        return torch.cat((dy * up * sig * (1 + gate * (1 - sig)), dy * gate * sig), -1)

    made = truth_by("backward", hf_swiglu, ("gate_up",), ("gate_up",), ("dy",))
    return _fp8_case(
        "swiglu_backward_fp8", way, size, T, make, bind, plain,
        lambda i, rows: [made(i, rows)[0] * i["column_scale"]], 8 * T * size.F,
    )  # fmt: skip


def transpose_fp8(size: Size, T: int, way: str) -> Case:
    n, k = size.linears["gate_up"]

    def make(m: Maker) -> Inputs:
        return {"w": m.randn(n, k).to(FP8)}

    def bind(i: Inputs) -> Callable[[], Outputs]:
        ours = _op("fp8", "transpose_fp8")
        out = torch.empty(k, n, dtype=FP8, device=i["w"].device)
        return lambda: (ours(i["w"], out=out),)

    def eager(i: Inputs) -> Callable[[], Outputs]:
        return lambda: (i["w"].view(torch.uint8).T.contiguous().view(FP8),)

    def view(outputs: Outputs, rows: Tensor) -> Outputs:
        return [outputs[0].view(torch.uint8)[rows]]

    return Case(
        "transpose_fp8", way, size.name, None, make,
        {"ours": Provider(bind), "eager": Provider(eager)},
        lambda i, rows: [i["w"].view(torch.uint8)[:, rows].T], "copy_bytes", k, 1e-7,
        bytes=2 * n * k, view=view,
    )  # fmt: skip


def _nf4_wide(codes: Tensor, absmax: Tensor, n: int, k: int) -> Tensor:
    """[n, k] fp32."""
    both = torch.stack((codes >> 4, codes & 15), -1).reshape(-1).long()
    values = torch.tensor(NF4, device=codes.device)[both].view(-1, 64) * absmax[:, None]
    return values.view(n, k)


def _nf4(m: Maker, n: int, k: int) -> Inputs:
    absmax = m.randn(n * k // 64, dtype=torch.float32).abs_().add_(1).mul_(k**-0.5)
    return {"codes": m.ints(256, n * k // 2, dtype=torch.uint8), "absmax": absmax}


def dequantize_nf4(size: Size, T: int, way: str) -> Case:
    n, k = size.linears["gate_up"]

    def bind(i: Inputs) -> Callable[[], Outputs]:
        ours, weight = _op("nf4", "dequantize_nf4"), _op("nf4", "Nf4Weight")(**i, shape=(n, k))
        out = torch.empty(n, k, dtype=torch.bfloat16, device=i["codes"].device)
        return lambda: (ours(weight, out=out),)

    def eager(i: Inputs) -> Callable[[], Outputs]:
        return lambda: (_nf4_wide(i["codes"], i["absmax"], n, k).bfloat16(),)

    def bitsandbytes(i: Inputs) -> Callable[[], Outputs]:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        table = torch.tensor(NF4, device=i["codes"].device)
        state = QuantState(
            absmax=i["absmax"], shape=torch.Size((n, k)), code=table, blocksize=64,
            quant_type="nf4", dtype=torch.bfloat16,
        )  # fmt: skip
        codes = i["codes"].view(-1, 1)
        return lambda: (dequantize_4bit(codes, state),)

    def truth(i: Inputs, rows: Tensor) -> Outputs:
        codes, absmax = i["codes"].view(n, -1)[rows], i["absmax"].view(n, -1)[rows]
        return [_nf4_wide(codes.reshape(-1), absmax.reshape(-1), len(rows), k)]

    return Case(
        "dequantize_nf4", way, size.name, None, lambda m: _nf4(m, n, k),
        {
            "ours": Provider(bind), "eager": Provider(eager),
            "bitsandbytes": Provider(bitsandbytes, cuda_only=True),
        },
        truth, "copy_bytes", n, BOUND, bytes=n * k * 5 // 2 + n * k // 16,
    )  # fmt: skip


def _int8_wide(codes: Tensor, scale: Tensor) -> Tensor:
    """[n, k] fp32."""
    return (codes.reshape(-1, 64).float() * scale.reshape(-1, 1)).view(codes.shape)


def _int8(m: Maker, n: int, k: int) -> Inputs:
    scale = m.randn(n * k // 64, dtype=torch.float32).abs_().add_(1).mul_(k**-0.5 / 127)
    codes = m.ints(255, n, k, dtype=torch.uint8).to(torch.int16) - 127
    return {"codes": codes.to(torch.int8), "scale": scale}


def dequantize_int8(size: Size, T: int, way: str) -> Case:
    n, k = size.linears["gate_up"]

    def bind(i: Inputs) -> Callable[[], Outputs]:
        ours, weight = _op("int8", "dequantize_int8"), _op("int8", "Int8Weight")(**i)
        out = torch.empty(n, k, dtype=torch.bfloat16, device=i["codes"].device)
        return lambda: (ours(weight, out=out),)

    def eager(i: Inputs) -> Callable[[], Outputs]:
        return lambda: (_int8_wide(**i).bfloat16(),)

    return Case(
        "dequantize_int8", way, size.name, None, lambda m: _int8(m, n, k),
        {"ours": Provider(bind), "eager": Provider(eager)},
        lambda i, rows: [_int8_wide(i["codes"][rows], i["scale"].view(n, -1)[rows])],
        "copy_bytes", n, BOUND, bytes=3 * n * k + n * k // 16,
    )  # fmt: skip


def _frozen_linear(form: str) -> Callable[[Size, int, str], Case]:
    def case(size: Size, T: int, way: str) -> Case:
        """A block's four GEMMs in a row; way: forward, or backward for dX. FP8's time includes
        quantizing the bf16 input; a kept transposed copy is `ours`, made each time a peer."""
        shapes = list(size.linears.values())
        inner = [k if way == "forward" else n for n, k in shapes]

        def make(m: Maker) -> Inputs:
            weights: list[Any] = []
            for n, k in shapes:
                w = m.randn(n, k, scale=k**-0.5)
                if form == "fp8":
                    weights.append(tuple(_chunked_quantize(w)))
                elif form == "int8":
                    weights.append(_int8(m, n, k))
                else:
                    weights.append(_nf4(m, n, k) if form == "nf4" else w)
            return {"x": [m.randn(T, width) for width in inner], "weights": weights}

        def formed(i: Inputs, kept: bool) -> list[Any]:
            if form == "bf16":
                return [_op("frozen_linear", "Bf16Weight")(w) for w in i["weights"]]
            if form == "int8":
                return [_op("int8", "Int8Weight")(**w) for w in i["weights"]]
            if form == "nf4":
                cls = _op("nf4", "Nf4Weight")
                return [cls(**w, shape=s) for w, s in zip(i["weights"], shapes, strict=True)]
            cls, rows = _op("frozen_linear", "Fp8Weight"), _op("fp8", "Fp8Rows")
            turn = _op("fp8", "transpose_fp8")
            return [
                cls(rows(*w), transposed=turn(w[0]) if kept else None) for w in i["weights"]
            ]  # fmt: skip

        def ours(kept: bool) -> Callable[[Inputs], Callable[[], Outputs]]:
            def bind(i: Inputs) -> Callable[[], Outputs]:
                run = _op("frozen_linear", f"frozen_linear{'' if way == 'forward' else '_dx'}")
                weights, x = formed(i, kept), i["x"]
                most = max(n * k for n, k in shapes)
                scratch = None
                if form in ("int8", "nf4") or (form == "fp8" and not kept):
                    scratch = torch.empty(most, dtype=torch.bfloat16, device=x[0].device)
                return lambda: [
                    run(a, w, scratch=scratch) for a, w in zip(x, weights, strict=True)
                ]  # fmt: skip

            return bind

        def wide(i: Inputs) -> list[Tensor]:
            return [_widen(form, w, s) for w, s in zip(i["weights"], shapes, strict=True)]

        def cublas(i: Inputs) -> Callable[[], Outputs]:
            turned = [w.T if way == "forward" else w for w in (w.bfloat16() for w in wide(i))]
            return lambda: [a @ w for a, w in zip(i["x"], turned, strict=True)]

        def truth(i: Inputs, rows: Tensor) -> Outputs:
            return [
                a[rows].float() @ (w.T if way == "forward" else w)
                for a, w in zip(i["x"], wide(i), strict=True)
            ]  # fmt: skip

        peers = {"bf16 cuBLAS": Provider(cublas)}
        if form == "fp8" and way == "backward":
            peers["ours, transposing"] = Provider(ours(kept=False))
        return Case(
            f"frozen_linear {form}", way, size.name, T, make,
            {"ours": Provider(ours(kept=way == "backward")), **peers}, truth,
            "fp8_flops" if form == "fp8" else "bf16_flops", T,
            FP8_GEMM_BOUND if form == "fp8" else BOUND,
            flops=sum(2 * T * n * k for n, k in shapes),
        )  # fmt: skip

    return case


def _chunked_quantize(w: Tensor) -> Sequence[Tensor]:
    """`torch_quantize`, a few rows at a time: its fp32 copies would be large."""
    parts = [torch_quantize(p) for p in w.split(4096)]
    data = torch.cat([d.view(torch.uint8) for d, _ in parts]).view(FP8)
    return data, torch.cat([scale for _, scale in parts])


def _widen(form: str, weight: Any, shape: tuple[int, int]) -> Tensor:
    if form == "int8":
        return _int8_wide(**weight)
    if form == "nf4":
        return _nf4_wide(weight["codes"], weight["absmax"], *shape)
    return weight.float() if form == "bf16" else weight[0].float() * weight[1][:, None]


frozen_linear_bf16 = _frozen_linear("bf16")
frozen_linear_fp8 = _frozen_linear("fp8")
frozen_linear_int8 = _frozen_linear("int8")
frozen_linear_nf4 = _frozen_linear("nf4")
