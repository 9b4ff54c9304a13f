"""The registry: every op that is timed, in which ways, and at which numbers of tokens."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.kernels import ops_gemm as gemm
from benchmarks.kernels import ops_quantized as quantized
from benchmarks.kernels import ops_rows as rows
from benchmarks.kernels.case import Case, Size


@dataclass(frozen=True)
class Op:
    """`build(size, T, way)` makes a case; `weight`: of a weight, whatever the batch."""

    build: Callable[[Size, int, str], Case]
    ways: tuple[str, ...] = ("forward",)
    weight: bool = False


BOTH = ("forward", "backward", "full")
OPS = {
    "rms_norm": Op(rows.rms_norm, BOTH),
    "add_rms_norm": Op(rows.add_rms_norm, BOTH),
    "qk_norm_rope": Op(rows.qk_norm_rope, BOTH),
    "swiglu": Op(rows.swiglu, BOTH),
    "merge_attention": Op(rows.merge_attention),
    "linear_cross_entropy": Op(gemm.linear_cross_entropy, ("forward", "full")),
    "varlen_attention translation": Op(gemm.attention_translation, BOTH),
    "varlen_attention full": Op(gemm.attention_full, BOTH),
    "adamw_update 32-bit": Op(gemm.adamw_32bit, ("full",), weight=True),
    "adamw_update 8-bit": Op(gemm.adamw_8bit, ("full",), weight=True),
    "quantize_fp8": Op(quantized.quantize_fp8),
    "rms_norm_fp8": Op(quantized.rms_norm_fp8),
    "add_rms_norm_fp8": Op(quantized.add_rms_norm_fp8),
    "swiglu_fp8": Op(quantized.swiglu_fp8),
    "swiglu_backward_fp8": Op(quantized.swiglu_backward_fp8, ("backward",)),
    "transpose_fp8": Op(quantized.transpose_fp8, weight=True),
    "dequantize_int8": Op(quantized.dequantize_int8, weight=True),
    "dequantize_nf4": Op(quantized.dequantize_nf4, weight=True),
    "frozen_linear bf16": Op(quantized.frozen_linear_bf16, ("forward", "backward")),
    "frozen_linear fp8": Op(quantized.frozen_linear_fp8, ("forward", "backward")),
    "frozen_linear int8": Op(quantized.frozen_linear_int8, ("forward", "backward")),
    "frozen_linear nf4": Op(quantized.frozen_linear_nf4, ("forward", "backward")),
}


def plan(
    names: Iterable[str], sizes: Iterable[Size], tokens: Iterable[int]
) -> list[tuple[str, str, Size, int]]:
    """(op, way, size, T) of every case, those of the first T first: what comes last may not be
    reached. An op of a weight comes once a size."""
    names, sizes, tokens = list(names), list(sizes), list(tokens)
    return [
        (name, way, size, T)
        for T in tokens
        for size in sizes
        for name in names
        for way in OPS[name].ways
        if T == tokens[0] or not OPS[name].weight
    ]
