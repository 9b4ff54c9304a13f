"""The non-GEMM steps of a decoder block and the loss head, on plain tensors.

Legend: T packed tokens, H hidden, N query heads, K key/value heads, D head_dim, F ffn,
V vocabulary, S sequences in a pack, R supervised rows.
"""

from xplus_kernels.adamw import adamw_update
from xplus_kernels.linear_cross_entropy import linear_cross_entropy
from xplus_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_backward, rope_tables
from xplus_kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_backward,
    rms_norm,
    rms_norm_backward,
)
from xplus_kernels.swiglu import swiglu, swiglu_backward
from xplus_kernels.varlen_attention import (
    attention_backend,
    varlen_attention,
    varlen_attention_backward,
)

__all__ = [
    "adamw_update",
    "attention_backend",
    "add_rms_norm",
    "add_rms_norm_backward",
    "linear_cross_entropy",
    "qk_norm_rope",
    "qk_norm_rope_backward",
    "rms_norm",
    "rms_norm_backward",
    "rope_tables",
    "swiglu",
    "swiglu_backward",
    "varlen_attention",
    "varlen_attention_backward",
]
