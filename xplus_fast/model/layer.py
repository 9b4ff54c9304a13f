"""The decoder layer that stands in a Hugging Face model: packed inside, its names outside.

A block's weights lie in modules that are called as in the stock layer (`mlp.down_proj.weight`), so
that names, paths and flags mean the same there and here. Of what is packed, the whole has a name:
`self_attn.qkv_proj` and `mlp.gate_up_proj`.
"""

import weakref
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
from xplus_fast.model.families import HELD, PACKED, Shape
from xplus_fast.model.frozen import Store
from xplus_fast.model.linear import Products
from xplus_fast.model.offload import Offload
from xplus_fast.model.packing import LastRows, Pack
from xplus_fast.model.stock import check_parts
from xplus_fast.model.sums import Sums

# What else Hugging Face hands down to a layer and its attention function; all is in the mask, the
# positions and the cache already.
PASSED_ON = {
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "is_causal", "max_length_k", "max_length_q",
    "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits",
    "return_dict", "seq_idx",
}  # fmt: skip


# A module that a stock layer has and a block has not -> the packed weight that it is a part of.
APART = {
    name.split(".")[1]: packed
    for packed, names in PACKED.items()
    for name in names
    if len(names) > 1
}


class Parts(nn.Module):
    """`self_attn` or `mlp` of a block: a place in which its weights have their names."""

    def forward(self, *_: Any, **__: Any) -> Any:
        raise UserError(
            "self_attn and mlp of a prepared model hold the weights and compute nothing: the"
            " engine computes a layer as a whole; call the layer, or the model"
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in APART:
                raise
            parts = ", ".join(part.split(".")[1] for part in PACKED[APART[name]])
            whole = HELD[APART[name]].split(".")[1]
            raise AttributeError(
                f"{name}: {parts} are one packed weight in a prepared model, {whole}: they train"
                " together; state_dict() has them apart"
            ) from None


def check_layer(layer: nn.Module, shape: Shape, index: int) -> None:
    """Raise `UserError` for a stock layer that cannot become a block; nothing has changed then."""
    stock = dict(layer.named_parameters())
    for packed in shape.packed_shapes():
        parts = {name: stock.pop(name) for name in PACKED[packed]}
        if len({p.requires_grad for p in parts.values()}) > 1:
            named = ", ".join(
                f"{n} {'trains' if p.requires_grad else 'is frozen'}" for n, p in parts.items()
            )
            raise UserError(
                f"layer {index}: {named}: these are one packed weight here, so they train"
                " together or not at all"
            )
        for name, p in parts.items() if len(parts) > 1 else ():
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                raise UserError(
                    f"layer {index}: {name}: has a hook on its gradient, and is a part of one"
                    " packed weight here: it would not be run"
                )
    if stock:
        raise UserError(f"layer {index}: unexpected weights: {', '.join(sorted(stock))}")


class Block(nn.Module):
    """One decoder layer. `run` is the engine's way through it; calling it is Hugging Face's.

    Parameters are packed, and lie where `HELD` says; `weight("qkv")` is one of them.
    `state_dict()` and `load_state_dict()` speak Hugging Face's unpacked names, so
    `save_pretrained()` and everything above see an ordinary layer.
    """

    def __init__(self, layer: nn.Module, shape: Shape, index: int, config: Any) -> None:
        """Take over a layer that `check_layer` has seen, releasing it as we go: modules, parameters
        and `requires_grad` are the stock layer's but for those that are packed into one."""
        super().__init__()
        self.shape, self.layer_idx, self.config = shape, index, config
        self.activations = "keep"
        self.frozen: Store | None = None
        self.scratch: Tensor | None = None
        self.offload: Offload | None = None
        self.sums: Sums | None = None
        # what Hugging Face's attention functions ask of a module
        self.num_key_value_groups = shape.heads // shape.kv_heads
        self.scaling = shape.head_dim**-0.5
        self.is_causal = True
        # parameters that were packed, if anybody has them still; name; whether they trained then
        self.replaced: list[tuple[weakref.ref[nn.Parameter], str, bool]] = []
        self.self_attn, self.mlp = Parts(), Parts()
        stock = dict(layer.named_parameters())
        self.packed = tuple(name for name in HELD if name in shape.packed_shapes())
        for packed in self.packed:
            parts = [stock[name] for name in PACKED[packed]]
            whole = parts[0]
            whole.grad = None
            if len(parts) > 1:
                data = torch.cat([p.data for p in parts])
                whole = nn.Parameter(data, requires_grad=whole.requires_grad)
                for name, p, view in zip(
                    PACKED[packed], parts, data.split(shape.rows(packed)), strict=True
                ):
                    p.data = view  # whoever holds it goes on seeing the weight
                    self.replaced.append((weakref.ref(p), name, p.requires_grad))
            path, _, kind = HELD[packed].rpartition(".")
            parent, _, name = path.rpartition(".")
            modules = self.get_submodule(parent)._modules
            if name not in modules:
                modules[name] = _module(layer, path, whole)
            self.get_submodule(path).register_parameter(kind, whole)
        self.register_state_dict_post_hook(_unpack_hook)
        self.register_load_state_dict_pre_hook(_pack_hook)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "replaced"}

    def weight(self, packed: str) -> nn.Parameter | None:
        """A packed weight; None where the family has none, or `frozen` holds it.

        Raises `UserError` where the module that held it is gone.
        """
        if packed not in self.packed:
            return None
        module: Any = self
        *path, kind = HELD[packed].split(".")
        try:
            for name in path:
                module = module._modules[name]
            return module._parameters[kind]
        except KeyError:
            raise UserError(
                f"layer {self.layer_idx}: {HELD[packed]} is not there any more: something else was"
                " put in its place, which the engine would not run"
            ) from None

    def hold(self, packed: str, value: nn.Parameter | None) -> None:
        """Put a packed weight where the one before it is."""
        path, _, kind = HELD[packed].rpartition(".")
        setattr(self.get_submodule(path), kind, value)

    def run(self, x: Tensor, pack: Pack, last: LastRows | None = None) -> Tensor:
        """x [T, H] -> y [T, H], or [R, H] of the `last` rows.

        Under autocast in its dtype, the residual stream too.
        """
        weights: list[Tensor | None] = [self.weight(name) for name in WEIGHTS]
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            weights = [w if w is None else w.to(dtype) for w in weights]
            x = x.to(dtype)
        with torch.autocast(kind, enabled=False):
            return BlockFunction.apply(x, self._spec(), pack, last, *weights)

    def _spec(self) -> BlockSpec:
        offload = self.offload if torch.is_grad_enabled() else None  # else nobody takes it back
        return BlockSpec(
            self.shape, self.activations, self.frozen, self.scratch, offload, self.sums
        )

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
        check_parts(self, f"layer {self.layer_idx}")
        cache = past_key_values if cache is None else cache
        assert position_embeddings is not None
        s, m = self.shape, Products(hidden_states.dtype, self.scratch)
        w = self._spec().weights(tuple(map(self.weight, WEIGHTS)), backward=False)

        def norm(x: Tensor, weight: Tensor) -> Tensor:
            return ops.rms_norm(x, weight.to(x.dtype), eps=s.eps)  # they differ under autocast

        n = norm(hidden_states, w["input_norm"])
        heads = m.linear(n, w["qkv"], w["qkv_bias"]).unflatten(-1, (-1, s.head_dim))
        q, k, v = heads.split((s.heads, s.kv_heads, s.kv_heads), 2)  # [B, S, heads, D]
        if w["q_norm"] is not None:
            q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
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
        n = norm(h, w["post_norm"])
        return h + m.linear(ops.swiglu(m.linear(n, w["gate_up"])), w["down"])

    def extra_repr(self) -> str:
        flags = {name: p.requires_grad for name, p in self.named_parameters()}
        trained = [name for name, flag in flags.items() if flag]
        some = "" if all(flags.values()) else " " + ", ".join(trained)
        return f"layer {self.layer_idx}, {'trains' + some if trained else 'frozen'}"


def _module(layer: nn.Module, path: str, weight: Tensor) -> nn.Module:
    """What holds a weight: the stock layer's own module, or for packed matrices one like theirs."""
    try:
        return layer.get_submodule(path)
    except AttributeError:
        rows, columns = weight.shape
        return nn.Linear(columns, rows, bias=False, device="meta")


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
    for packed in module.packed:
        whole = state.pop(prefix + HELD[packed])
        for name, view in unpack(module.shape, packed, whole).items():
            state[prefix + name] = view


def _pack_hook(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for packed in module.packed:
        names = [prefix + name for name in PACKED[packed]]
        if all(name in state for name in names):  # else load_state_dict reports what is missing
            state[prefix + HELD[packed]] = torch.cat([state.pop(name) for name in names])
