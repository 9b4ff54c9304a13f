"""The decoder layer that stands in a Hugging Face model: packed inside, its names outside."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import (
    ALL_ATTENTION_FUNCTIONS,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

import xplus_kernels as ops
from xplus_fast.errors import UserError
from xplus_fast.model.block import WEIGHTS, BlockFunction, BlockSpec
from xplus_fast.model.families import PACKED, Shape
from xplus_fast.model.frozen import Store
from xplus_fast.model.linear import Products
from xplus_fast.model.offload import Offload
from xplus_fast.model.packing import LastRows, Pack

# What else Hugging Face hands down to a layer and its attention function; all is in the mask, the
# positions and the cache already.
PASSED_ON = {
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "is_causal", "max_length_k", "max_length_q",
    "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits",
    "return_dict", "seq_idx",
}  # fmt: skip


class Block(nn.Module):
    """One decoder layer. `run` is the engine's way through it; calling it is Hugging Face's.

    Parameters are packed (`qkv`, `gate_up`); `state_dict()` and `load_state_dict()` speak Hugging
    Face's names, so `save_pretrained()` and everything above see an ordinary layer.
    """

    qkv: nn.Parameter | None  # the four matrices: None where `frozen` holds them
    qkv_bias: nn.Parameter | None
    q_norm: nn.Parameter | None
    k_norm: nn.Parameter | None
    o: nn.Parameter | None
    gate_up: nn.Parameter | None
    down: nn.Parameter | None
    input_norm: nn.Parameter
    post_norm: nn.Parameter

    def __init__(self, layer: nn.Module, shape: Shape, index: int, config: Any) -> None:
        """Take over a stock layer's weights and their `requires_grad`, releasing it as we go.

        Raises `UserError` if the flags of tensors that are packed into one differ.
        """
        super().__init__()
        self.shape, self.layer_idx, self.config = shape, index, config
        self.activations = "keep"
        self.frozen: Store | None = None
        self.scratch: Tensor | None = None
        self.offload: Offload | None = None
        # what Hugging Face's attention functions ask of a module
        self.num_key_value_groups = shape.heads // shape.kv_heads
        self.scaling = shape.head_dim**-0.5
        self.is_causal = True
        stock = dict(layer.named_parameters())
        for packed in WEIGHTS:
            if packed not in shape.packed_shapes():
                self.register_parameter(packed, None)
                continue
            parts = [stock.pop(name) for name in PACKED[packed]]
            flags = {p.requires_grad for p in parts}
            if len(flags) > 1:
                named = ", ".join(
                    f"{n} {'trains' if p.requires_grad else 'is frozen'}"
                    for n, p in zip(PACKED[packed], parts, strict=True)
                )
                raise UserError(
                    f"layer {index}: {named}: these are one packed weight here, so they train"
                    " together or not at all"
                )
            data = torch.cat([p.data for p in parts]) if len(parts) > 1 else parts[0].data
            self.register_parameter(packed, nn.Parameter(data, requires_grad=flags.pop()))
        if stock:
            raise UserError(f"layer {index}: unexpected weights: {', '.join(sorted(stock))}")
        self.register_state_dict_post_hook(_unpack_hook)
        self.register_load_state_dict_pre_hook(_pack_hook)

    def packed_names(self) -> dict[str, tuple[str, ...]]:
        """Packed weight -> the Hugging Face names, within the layer, of what it holds."""
        return {packed: PACKED[packed] for packed in self.shape.packed_shapes()}

    def run(self, x: Tensor, pack: Pack, last: LastRows | None = None) -> Tensor:
        """x [T, H] -> y [T, H], or [R, H] of the `last` rows.

        Under autocast in its dtype, the residual stream too.
        """
        weights = [getattr(self, name) for name in WEIGHTS]
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            weights = [w if w is None else w.to(dtype) for w in weights]
            x = x.to(dtype)
        with torch.autocast(kind, enabled=False):
            return BlockFunction.apply(x, self._spec(), pack, last, *weights)

    def _spec(self) -> BlockSpec:
        offload = self.offload if torch.is_grad_enabled() else None  # else nobody takes it back
        return BlockSpec(self.shape, self.activations, self.frozen, self.scratch, offload)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        cache: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hugging Face's call, for `generate()`: any mask, a cache; [B, S, H] -> [B, S, H].

        cache: what transformers before 5.24 calls `past_key_values`. Raises `TypeError` for an
        argument that is not known: what it asks for would not be done.
        """
        if unknown := kwargs.keys() - PASSED_ON:
            raise TypeError(
                f"layer {self.layer_idx}: unknown argument {unknown.pop()!r}; this version of"
                " transformers is not supported"
            )
        cache = past_key_values if cache is None else cache
        assert position_embeddings is not None
        s, m = self.shape, Products(hidden_states.dtype, self.scratch)
        w = self._spec().weights(tuple(getattr(self, name) for name in WEIGHTS), backward=False)

        def norm(x: Tensor, weight: Tensor) -> Tensor:
            return ops.rms_norm(x, weight.to(x.dtype), eps=s.eps)  # they differ under autocast

        n = norm(hidden_states, self.input_norm)
        heads = m.linear(n, w["qkv"], w["qkv_bias"]).unflatten(-1, (-1, s.head_dim))
        q, k, v = heads.split((s.heads, s.kv_heads, s.kv_heads), 2)  # [B, S, heads, D]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = norm(q, self.q_norm), norm(k, self.k_norm)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, heads, S, D]
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out, _ = attention(
            self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling,
            sliding_window=None, **kwargs,
        )  # fmt: skip
        h = hidden_states + m.linear(out.flatten(2), w["o"])
        n = norm(h, self.post_norm)
        return h + m.linear(ops.swiglu(m.linear(n, w["gate_up"])), w["down"])

    def extra_repr(self) -> str:
        trained = [n for n, p in self.named_parameters() if p.requires_grad]
        return f"layer {self.layer_idx}, {'trains ' + ', '.join(trained) if trained else 'frozen'}"


def unpack(shape: Shape, packed: str, value: Tensor) -> dict[str, Tensor]:
    """A packed weight (or a tensor laid out like it) -> views under Hugging Face's names."""
    parts = value.split(shape.rows(packed))
    return dict(zip(PACKED[packed], parts, strict=True))


def _unpack_hook(module: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    if module.frozen is not None:
        raise UserError(
            f"layer {module.layer_idx}: its frozen matrices are not here as they were read; what"
            " trained is in the checkpoints, and `xplus-fast export` makes a whole model of it"
        )
    for packed in module.shape.packed_shapes():
        for name, view in unpack(module.shape, packed, state.pop(prefix + packed)).items():
            state[prefix + name] = view


def _pack_hook(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for packed in module.shape.packed_shapes():
        names = [prefix + name for name in PACKED[packed]]
        if all(name in state for name in names):  # else load_state_dict reports what is missing
            state[prefix + packed] = torch.cat([state.pop(name) for name in names])
