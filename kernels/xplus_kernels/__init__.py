"""The non-GEMM steps of a decoder block and the loss head, on plain tensors.

Legend: T packed tokens, H hidden, N query heads, K key/value heads, D head_dim, F ffn,
V vocabulary, S sequences in a pack, R supervised rows.
"""

from xplus_kernels.adamw import adamw_update
from xplus_kernels.fp8 import Fp8Rows, dequantize_fp8, quantize_fp8, require_fp8, transpose_fp8
from xplus_kernels.frozen_linear import (
    Bf16Weight,
    Fp8Weight,
    FrozenWeight,
    WeightRows,
    frozen_linear,
    frozen_linear_dx,
    frozen_rows,
    linear,
    multiplies_in_fp8,
    scratch_bytes,
)
from xplus_kernels.int8 import Int8Weight, dequantize_int8, quantize_int8
from xplus_kernels.intervals import NOBODY, Prefixes, Sees, sees_causally
from xplus_kernels.linear_cross_entropy import linear_cross_entropy
from xplus_kernels.merge_attention import merge_attention
from xplus_kernels.nf4 import Nf4Weight, dequantize_nf4, quantize_nf4
from xplus_kernels.norm_fp8 import add_rms_norm_fp8, rms_norm_fp8
from xplus_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_backward, rope_tables
from xplus_kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_backward,
    rms_norm,
    rms_norm_backward,
)
from xplus_kernels.short_attention import (
    CHUNK,
    short_attention,
    takes_short,
    wants_sees,
)
from xplus_kernels.short_attention_grad import short_attention_backward
from xplus_kernels.swiglu import swiglu, swiglu_backward
from xplus_kernels.swiglu_fp8 import swiglu_backward_fp8, swiglu_fp8
from xplus_kernels.varlen_attention import (
    attention_backend,
    varlen_attention,
    varlen_attention_backward,
)
from xplus_kernels.weight_gradient import weight_gradient

__all__ = [
    "CHUNK",
    "Bf16Weight",
    "Fp8Rows",
    "Fp8Weight",
    "FrozenWeight",
    "Int8Weight",
    "NOBODY",
    "Nf4Weight",
    "Prefixes",
    "Sees",
    "WeightRows",
    "adamw_update",
    "add_rms_norm",
    "add_rms_norm_backward",
    "add_rms_norm_fp8",
    "attention_backend",
    "dequantize_fp8",
    "dequantize_int8",
    "dequantize_nf4",
    "frozen_linear",
    "frozen_linear_dx",
    "frozen_rows",
    "linear",
    "linear_cross_entropy",
    "merge_attention",
    "multiplies_in_fp8",
    "qk_norm_rope",
    "qk_norm_rope_backward",
    "quantize_fp8",
    "quantize_int8",
    "quantize_nf4",
    "require_fp8",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_fp8",
    "rope_tables",
    "scratch_bytes",
    "sees_causally",
    "short_attention",
    "short_attention_backward",
    "swiglu",
    "swiglu_backward",
    "swiglu_backward_fp8",
    "swiglu_fp8",
    "takes_short",
    "transpose_fp8",
    "varlen_attention",
    "varlen_attention_backward",
    "wants_sees",
    "weight_gradient",
]
