"""A stock Hugging Face causal language model -> the same object, run by the engine.

`prepare_model` replaces the decoder layers and the `forward` of this one instance: a call with
labels goes the engine's way from embedding to loss, a call without a cache goes it to the last
hidden state, and all else (`generate()`, `save_pretrained()`) goes the library's own way over the
same weights.
"""

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from xplus_fast.errors import UserError
from xplus_fast.model.block import KEEP
from xplus_fast.model.families import BESIDE, shape_of
from xplus_fast.model.head import LossFunction
from xplus_fast.model.layer import Block, check_layer, unpack
from xplus_fast.model.offload import Offload
from xplus_fast.model.packing import (
    LastRows,
    Pack,
    last_rows,
    make_pack,
    next_tokens,
    unpad_labels,
)
from xplus_fast.model.stock import check_modules, check_stock


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
    check_stock(model)
    return take_over(model, layers, also=also, activations=activations)


def take_over(
    model: nn.Module,
    layers: Sequence[int] | None = None,
    *,
    also: Iterable[str] = (),
    activations: str | None = None,
) -> nn.Module:
    """`prepare_model` without a look at what the modules are: for one that holds no weights yet."""
    if activations is not None and activations not in KEEP:
        raise UserError(f"activations: one of {', '.join(KEEP)} is wanted, found {activations!r}")
    config: Any = model.config
    shape = shape_of(config)
    base: Any = model.model
    fresh = not is_prepared(model)
    if fresh:
        for i, layer in enumerate(base.layers):
            check_layer(layer, shape, i)
        for i, layer in enumerate(base.layers):
            base.layers[i] = Block(layer, shape, i, config).train(model.training)
    own: Any
    for module, own in ((model, _causal_lm_forward), (base, _base_forward)):
        # one that comes from torch.load has its class's own again
        if fresh or getattr(module.forward, "__func__", None) is type(module).forward:
            module.forward = _wrap(module, own)
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
    return named_tensors(model, [p for p in model.parameters() if p.requires_grad])


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors under Hugging Face's names into a prepared model's storage.

    Raises `UserError` for a name or shape that the model does not have; nothing is copied then.
    """
    state = named_tensors(model, model.parameters())
    for name, value in tensors.items():
        if name not in state or state[name].shape != value.shape:
            found = tuple(state[name].shape) if name in state else "no such tensor"
            raise UserError(f"{name}: {tuple(value.shape)} does not fit the model: {found}")
    for name, value in tensors.items():
        state[name].copy_(value)


def named_tensors(
    model: nn.Module, parameters: Iterable[nn.Parameter], instead: Mapping[int, Tensor] = {}
) -> dict[str, Tensor]:
    """Some of a model's parameters under Hugging Face's names, as views of them.

    instead: what stands for a parameter, of its shape, by the parameter's id.
    """
    wanted = {id(p) for p in parameters}
    tensors: dict[str, Tensor] = {}
    blocks = [b for b in model.modules() if isinstance(b, Block)]
    held = {id(b.weight(packed)): (b, packed) for b in blocks for packed in b.packed}
    for name, p in model.named_parameters():
        if id(p) not in wanted:
            continue
        value = instead.get(id(p), p.detach())
        if id(p) not in held:
            tensors[name] = value
            continue
        block, packed = held[id(p)]
        for part, view in unpack(block.shape, packed, value).items():
            tensors[f"model.layers.{block.layer_idx}.{part}"] = view
    return tensors


def note_changes(model: Any, names: Iterable[str]) -> None:
    """Remember which tensors may differ from the base model's, whoever trains them."""
    model.__dict__.setdefault("_xplus_changed", set()).update(names)


def forget_changes(model: Any) -> None:
    """What has changed so far is kept elsewhere."""
    model.__dict__.pop("_xplus_changed", None)


def changed_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors that `note_changes` was told of, as `trained_tensors` has them."""
    names = model.__dict__.get("_xplus_changed", set())
    tensors = named_tensors(model, model.parameters())
    return {name: tensors[name] for name in sorted(names)}


def layer_ids(model: nn.Module) -> list[int]:
    """The decoder layers of a prepared model in which anything trains."""
    blocks = [b for b in model.modules() if isinstance(b, Block)]
    return [b.layer_idx for b in blocks if any(p.requires_grad for p in b.parameters())]


def trained_beside(model: nn.Module) -> list[str]:
    """What trains beside decoder layers, by the names of `BESIDE`."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return [kind for kind, name in BESIDE.items() if name in trained]


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


# What the engine's own way through a model takes; with anything else the library's way is gone.
ENGINE = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "shift_labels",
    "num_items_in_batch", "supervised_rows", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q",
    "max_length_k", "layout", "below", "use_cache", "take_losses",
}  # fmt: skip


class Below(Protocol):
    """What enters a layer, where all below it is frozen: known from before, or kept for later."""

    level: int  # the layer

    def get(self) -> Tensor | None:
        """It [T, H], if it is known."""

    def put(self, x: Tensor) -> None:
        """It [T, H], computed."""


def _wrap(module: nn.Module, forward: Any) -> Any:
    """The method that stands before a module's own forward: all arguments by their names."""
    stock = type(module).forward
    names = list(inspect.signature(stock).parameters)[1:]

    @functools.wraps(stock)  # generate() and Trainer look at the signature
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, dict(zip(names, args, strict=False)) | kwargs)

    return MethodType(method, module)


def _embed(model: Any, given: dict[str, Any]) -> tuple[Tensor, Pack, tuple[int, int]]:
    """A [B, S] batch -> what goes into the first block, [T, H]."""
    check_modules(model.layers)
    input_ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if (input_ids is None) == (embeds is None):
        raise ValueError("exactly one of input_ids and inputs_embeds is wanted")
    if embeds is None:
        layout = given.get("layout")
        if model.embed_tokens.weight is None and layout is not None and layout.ids is not None:
            input_ids = torch.from_numpy(layout.ids)[None]  # the table is on the host, too
        embeds = model.embed_tokens(input_ids)  # [B, S, H], as hooks on it expect
        if not any(p.requires_grad for p in model.embed_tokens.parameters()):
            # Trainer's input-require-grads hook would drag a graph through every frozen layer
            embeds = embeds.detach()
    batch = (embeds.shape[0], embeds.shape[1])
    pack = make_pack(
        batch, embeds.device, attention_mask=given.get("attention_mask"),
        position_ids=given.get("position_ids"), cu_seq_lens=given.get("cu_seq_lens_q"),
        max_length=given.get("max_length_q"), layout=given.get("layout"),
        inv_freq=model.rotary_emb.inv_freq, scaling=model.rotary_emb.attention_scaling,
    )  # fmt: skip
    x = embeds.flatten(0, 1) if pack.at is None else embeds.flatten(0, 1)[pack.at]
    return x, pack, batch


def _run_blocks(
    model: Any, x: Tensor, pack: Pack, *, last: LastRows | None = None,
    collect: list[Tensor] | None = None, first: int = 0, below: Below | None = None,
) -> Tensor:  # fmt: skip
    """x [T, H] -> hidden states before the final norm: [T, H], or [R, H] of the `last` rows.

    first: the layer that x enters. below: takes what enters a layer above it.
    """
    trains = [any(p.requires_grad for p in block.parameters()) for block in model.layers]
    lowest = trains.index(True) if True in trains else len(trains)
    for i, block in list(enumerate(model.layers))[first:]:
        if collect is not None:
            collect.append(x)
        if below is not None and i == below.level > first:
            below.put(x)
        only = last if i == len(trains) - 1 else None
        if i < lowest and not x.requires_grad:
            with torch.no_grad():
                x = block.run(x, pack, only)
        else:
            x = block.run(x, pack, only)
    return x


def _causal_lm_forward(self: Any, given: dict[str, Any]) -> Any:
    """With labels: the loss, by the engine, and no logits. Without: the library's own forward.

    Beside Hugging Face's arguments, `num_items_in_batch` (the divisor of the summed loss),
    `shift_labels` ([B, S], already shifted), `supervised_rows` ([R] int64, the rows of the
    flattened batch that predict something, so that the device is not asked for them), `layout`
    (the `PackLayout` of a row, without `shift_labels`), `below` (what enters a layer, for a pack
    without padding), and `take_losses` (which is given each predicting row's loss, [R] fp32). With
    `return_logits`, or whatever else the engine does not make, all goes the library's own way.
    """
    asked = {k for k, v in given.items() if v is not None and v is not False}
    asked -= {"return_dict"} if given.get("return_dict") else set()
    asked -= {"logits_to_keep"} if type(given.get("logits_to_keep")) is int else set()
    if given.get("labels") is None or asked - ENGINE or given.get("return_dict") is False:
        own = ("return_logits", "supervised_rows", "layout", "below", "take_losses")
        layout = given.get("layout")
        if layout is not None and len(layout.members):
            raise ValueError("layout: shared prefixes are computed with labels, and give a loss")
        return type(self).forward(self, **{k: v for k, v in given.items() if k not in own})
    check_modules([self.model.norm, self.lm_head])
    below: Below | None = given.get("below")
    known = None if below is None else below.get()
    if known is not None:
        given = {**given, "input_ids": None, "inputs_embeds": known[None]}
    x, pack, _ = _embed(self.model, given)
    labels, shifted = given["labels"], given.get("shift_labels")
    mask = given.get("attention_mask")
    if shifted is None:
        flat = unpad_labels(labels, mask, pack, shifted=False)
        targets = next_tokens(flat, pack.row_ends)
    else:
        targets = unpad_labels(shifted, mask, pack, shifted=True)
    rows, layout = given.get("supervised_rows"), given.get("layout")
    if layout is not None and shifted is not None:
        raise ValueError("layout: it says what `labels` predict; shift_labels are something else")
    if rows is None or pack.at is not None:
        rows = (targets != -100).nonzero()[:, 0]
    elif layout is None:
        rows = rows.sort().values  # as ours are
    last = last_rows(pack, rows, layout)
    first = below.level if below is not None and known is not None else 0
    x = _run_blocks(self.model, x, pack, last=last, first=first, below=below)
    divisor = given.get("num_items_in_batch")
    if divisor is None:
        divisor = rows.numel()
    norm, head = self.model.norm.weight.to(x.dtype), self.lm_head.weight
    head = self.lm_head.rows if head is None else head.to(x.dtype)  # rows of FP8, frozen
    if not torch.is_grad_enabled():  # a function's inputs tell it what to compute, not the mode
        x, norm = x.detach(), norm.detach()
        head = head.detach() if isinstance(head, Tensor) else head
    take = given.get("take_losses")
    losses = None if take is None else torch.empty(len(rows), dtype=torch.float32, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        loss = LossFunction.apply(
            x, norm, head, rows if last is None else None, targets[rows], divisor,
            self.model.layers[0].shape.eps, losses,
        )  # fmt: skip
    if take is not None:
        take(losses)
    return CausalLMOutputWithPast(loss=loss)


def _base_forward(self: Any, given: dict[str, Any]) -> Any:
    """The last hidden state [B, S, H]: by the engine where no cache is wanted."""
    asked_cache = given.get("use_cache")
    asked_cache = self.config.use_cache if asked_cache is None else asked_cache
    given = {k: v for k, v in given.items() if v is not None and v is not False}
    config, mask = self.config, given.get("attention_mask")
    plain = mask is None or (torch.is_tensor(mask) and mask.ndim == 2)
    recorded = given.pop("output_hidden_states", getattr(config, "output_hidden_states", False))
    if given.get("output_attentions", getattr(config, "output_attentions", False)):
        raise UserError("output_attentions: a prepared model does not make them")
    others = given.keys() - ENGINE - {"cache_position", "return_dict"}
    if recorded and (recorded is not True or others or not plain or given.get("use_cache")):
        raise UserError(
            "output_hidden_states: a prepared model has those of all layers, and without a cache:"
            " use_cache=False"
        )
    if not recorded and (others or not plain or given.get("use_cache", asked_cache)):
        return type(self).forward(self, **{"use_cache": asked_cache} | given)
    states: list[Tensor] | None = [] if recorded else None
    x, pack, (b, s) = _embed(self, given)
    x = _run_blocks(self, x, pack, collect=states)

    def unpacked(y: Tensor) -> Tensor:
        if pack.at is not None:
            y = y.new_zeros(b * s, y.shape[1]).index_copy(0, pack.at, y)
        return y.view(b, s, -1)

    last: Any = unpacked(self.norm(x))
    hidden: Any = None if states is None else (*map(unpacked, states), last)
    return BaseModelOutputWithPast(last_hidden_state=last, hidden_states=hidden)
