"""A stock Hugging Face causal language model -> the same object, run by the engine.

`prepare_model` replaces the decoder layers and the `forward` of this one instance: a call with
labels goes the engine's way from embedding to loss, a call without a cache goes it to the last
hidden state, and all else (`generate()`, `save_pretrained()`) goes the library's own way over the
same weights.
"""

import functools
from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from xplus_fast.errors import UserError
from xplus_fast.model.block import KEEP
from xplus_fast.model.families import BESIDE, shape_of
from xplus_fast.model.head import LossFunction
from xplus_fast.model.layer import Block, unpack
from xplus_fast.model.offload import Offload
from xplus_fast.model.packing import Pack, make_pack, next_tokens


def prepare_model(
    model: nn.Module,
    layers: Sequence[int] | None = None,
    *,
    also: Iterable[str] = (),
    activations: str | None = None,
) -> nn.Module:
    """Let the engine run `model`, in place, and choose what trains.

    Args:
        model: a stock Qwen3ForCausalLM, Qwen2ForCausalLM or LlamaForCausalLM, or a prepared one.
        layers: ids of the decoder layers that train, everything else frozen; None: as the
            parameters' own `requires_grad` says.
        also: what trains beside them: "embedding", "final_norm", "head" (with `layers` only).
        activations: what blocks keep for the backward: "keep", "recompute_mlp", "recompute" or
            "offload"; None: as before, "keep" to begin with.

    Returns:
        `model` itself.

    Raises:
        UserError: a model that is not supported, or flags that split a packed weight.
    """
    if not type(model).__name__.endswith("ForCausalLM"):
        raise UserError(f"{type(model).__name__}: a ...ForCausalLM model is wanted")
    if activations is not None and activations not in KEEP:
        raise UserError(f"activations: one of {', '.join(KEEP)} is wanted, found {activations!r}")
    config: Any = model.config
    shape = shape_of(config)
    base: Any = model.model
    if not is_prepared(model):
        for i, layer in enumerate(base.layers):
            base.layers[i] = Block(layer, shape, i, config).train(model.training)
        model.forward = MethodType(_wrap(model, _causal_lm_forward), model)  # type: ignore[method-assign]
        base.forward = MethodType(_wrap(base, _base_forward), base)
    if activations is not None:
        offload = Offload()
        for block in base.layers:
            block.activations = activations
            block.offload = offload if activations == "offload" else None
    if layers is not None:
        _select(model, set(layers), set(also))
    elif also:
        raise UserError("`also` goes with `layers`; without it the parameters' own flags count")
    return model


def is_prepared(model: Any) -> bool:
    return isinstance(model.model.layers[0], Block)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What trains, under Hugging Face's names: views into the model's own storage."""
    return _named_tensors(model, trained_only=True)


def load_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors under Hugging Face's names into a prepared model's storage.

    Raises `UserError` for a name or shape that the model does not have.
    """
    state = _named_tensors(model)
    for name, value in tensors.items():
        if name not in state or state[name].shape != value.shape:
            found = tuple(state[name].shape) if name in state else "no such tensor"
            raise UserError(f"{name}: {tuple(value.shape)} does not fit the model: {found}")
        state[name].copy_(value)


def _named_tensors(model: nn.Module, *, trained_only: bool = False) -> dict[str, Tensor]:
    """Parameters under Hugging Face's names, as views; frozen formats have none."""
    tensors: dict[str, Tensor] = {}
    blocks = {f"model.layers.{b.layer_idx}.": b for b in model.modules() if isinstance(b, Block)}
    for name, p in model.named_parameters():
        if trained_only and not p.requires_grad:
            continue
        prefix, _, packed = name.rpartition(".")
        block = blocks.get(prefix + ".")
        if block is None:
            tensors[name] = p.detach()
        else:
            for part, view in unpack(block.shape, packed, p.detach()).items():
                tensors[f"{prefix}.{part}"] = view
    return tensors


def layer_ids(model: nn.Module) -> list[int]:
    """The decoder layers of a prepared model in which anything trains."""
    blocks = [b for b in model.modules() if isinstance(b, Block)]
    return [b.layer_idx for b in blocks if any(p.requires_grad for p in b.parameters())]


def _select(model: Any, layers: set[int], also: set[str]) -> None:
    unknown = also - set(BESIDE)
    if unknown:
        raise UserError(f"also: {unknown.pop()!r} is not one of {', '.join(BESIDE)}")
    missing = [i for i in layers if not 0 <= i < len(model.model.layers)]
    if missing:
        raise UserError(f"layer {missing[0]}: the model has 0 to {len(model.model.layers) - 1}")
    model.requires_grad_(False)
    for i in layers:
        model.model.layers[i].requires_grad_(True)
    for name in also:
        model.get_parameter(BESIDE[name]).requires_grad_(True)


def _wrap(module: nn.Module, forward: Any) -> Any:
    # generate() and Trainer look at the signature: let them see the library's own
    return functools.wraps(type(module).forward)(forward)


def _run_stack(
    model: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
    max_length: int | None,
    collect: list[Tensor] | None = None,
) -> tuple[Tensor, Pack, tuple[int, int]]:
    """Embedding and blocks: a [B, S] batch -> hidden states [T, H] before the final norm."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("exactly one of input_ids and inputs_embeds is wanted")
    given: Any = input_ids if inputs_embeds is None else inputs_embeds
    batch = (given.shape[0], given.shape[1])
    pack = make_pack(
        batch, given.device, attention_mask=attention_mask, position_ids=position_ids,
        cu_seq_lens=cu_seq_lens, max_length=max_length,
        inv_freq=model.rotary_emb.inv_freq, scaling=model.rotary_emb.attention_scaling,
    )  # fmt: skip
    flat = given.flatten(0, 1) if pack.at is None else given.flatten(0, 1)[pack.at]
    if inputs_embeds is None:
        x = model.embed_tokens(flat)
        table = model.embed_tokens.weight  # None where it lies on the host
        if table is None or not table.requires_grad:
            # Trainer's input-require-grads hook would drag a graph through every frozen layer
            x = x.detach()
    else:
        x = flat
    trains = [any(p.requires_grad for p in block.parameters()) for block in model.layers]
    lowest = trains.index(True) if True in trains else len(trains)
    for i, block in enumerate(model.layers):
        if collect is not None:
            collect.append(x)
        if i < lowest and not x.requires_grad:
            with torch.no_grad():
                x = block.run(x, pack)
        else:
            x = block.run(x, pack)
    return x, pack, batch


def _causal_lm_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    **kwargs: Any,
) -> Any:
    """With labels: the loss, by the engine, and no logits. Without: the library's own forward.

    Beside Hugging Face's arguments, `num_items_in_batch` (the divisor of the summed loss),
    `shift_labels` ([B, S], already shifted), and `supervised_rows` ([R] int64, the rows of the
    flattened batch that predict something, so that the device is not asked for them).
    """
    if labels is None or past_key_values is not None or kwargs.get("return_logits"):
        kwargs.pop("return_logits", None)
        kwargs.pop("supervised_rows", None)
        return type(self).forward(
            self, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels,
            use_cache=use_cache, logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip
    x, pack, _ = _run_stack(
        self.model, input_ids, inputs_embeds, attention_mask, position_ids,
        kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q"),
    )  # fmt: skip
    shifted = kwargs.get("shift_labels")
    flat = (labels if shifted is None else shifted).flatten()
    if pack.at is not None:
        hidden = torch.ones_like(flat, dtype=torch.bool)
        hidden[pack.at] = False
        if (flat[hidden] != -100).any():
            raise UserError(
                "labels: a padded position carries a label, -100 is wanted there;"
                " DataCollatorForSeq2Seq pads labels so"
            )
        flat = flat[pack.at]
    targets = next_tokens(flat, pack.cu_seqlens) if shifted is None else flat
    rows = kwargs.get("supervised_rows")
    if rows is None or pack.at is not None:
        rows = (targets != -100).nonzero()[:, 0]
    divisor = kwargs.get("num_items_in_batch")
    if divisor is None:
        divisor = rows.numel()
    norm, head = self.model.norm.weight.to(x.dtype), self.lm_head.weight
    head = self.lm_head.rows if head is None else head.to(x.dtype)  # rows of FP8, frozen
    if not torch.is_grad_enabled():  # a function's inputs tell it what to compute, not the mode
        x, norm = x.detach(), norm.detach()
        head = head.detach() if isinstance(head, Tensor) else head
    with torch.autocast(x.device.type, enabled=False):
        loss = LossFunction.apply(
            x, norm, head, rows, targets[rows], divisor,
            self.model.layers[0].shape.eps,
        )  # fmt: skip
    return CausalLMOutputWithPast(loss=loss)


def _base_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    """The last hidden state [B, S, H]: by the engine where no cache is wanted."""
    use_cache = self.config.use_cache if use_cache is None else use_cache
    plain = attention_mask is None or (torch.is_tensor(attention_mask) and attention_mask.ndim == 2)
    if use_cache or past_key_values is not None or not plain or kwargs.get("output_attentions"):
        return type(self).forward(
            self, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            **kwargs,
        )  # fmt: skip
    states: list[Tensor] | None = [] if kwargs.get("output_hidden_states") else None
    x, pack, (b, s) = _run_stack(
        self, input_ids, inputs_embeds, attention_mask, position_ids,
        kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q"), states,
    )  # fmt: skip

    def unpacked(y: Tensor) -> Tensor:
        if pack.at is not None:
            y = y.new_zeros(b * s, y.shape[1]).index_copy(0, pack.at, y)
        return y.view(b, s, -1)

    last: Any = unpacked(self.norm(x))
    hidden: Any = None if states is None else (*map(unpacked, states), last)
    return BaseModelOutputWithPast(last_hidden_state=last, hidden_states=hidden)
