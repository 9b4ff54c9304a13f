"""Whether a model's modules are what the engine takes them for: it reads weights, not modules.

An adapter, a hook or a quantized matrix on a module that the engine does not call would silently
not count. So what is there before a model is prepared is looked at then, and what may be added
later, at each call.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from xplus_fast.errors import UserError

# Where the classes of a stock model's modules are defined, and of a prepared one's.
KNOWN = ("torch.nn.modules.", "transformers.models.", "transformers.activations", "xplus_fast.")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_stock(model: Any) -> None:
    """Refuse a model that is no stock causal language model, or not only one.

    Raises `UserError` naming the module: an adapter, a hook, a quantized or foreign layer, weights
    without memory. Hooks and adapters on the embedding are run, and allowed.
    """
    name = type(model).__name__
    if _is_adapted(model):
        raise UserError(f"{name}: a PEFT model; merge its adapters first: model.merge_and_unload()")
    if not name.endswith("ForCausalLM"):
        raise UserError(f"{name}: a ...ForCausalLM model is wanted")
    if getattr(model, "hf_quantizer", None) is not None:
        kind = getattr(model, "quantization_method", None) or "quantized"
        raise UserError(
            f"{name}: its weights are quantized ({getattr(kind, 'value', kind)}); load it without"
            " quantization_config; `memory.frozen` of a recipe quantizes what is frozen"
        )
    parts = {"model.norm": model.model.norm, "lm_head": model.lm_head}
    parts |= {f"model.layers.{i}": layer for i, layer in enumerate(model.model.layers)}
    for at, part in parts.items():
        for below, module in part.named_modules():
            _check(module, f"{at}.{below}".rstrip("."))
    embedding = model.model.embed_tokens
    for at, tensor in [*model.named_parameters(), *model.named_buffers()]:
        _check_tensor(at, tensor)
    if not isinstance(embedding, nn.Embedding):
        _check(embedding, "model.embed_tokens")


def check_modules(modules: Iterable[nn.Module]) -> None:
    """Refuse modules of a prepared model to which something was added that would not be run."""
    for module in modules:
        layer = getattr(module, "layer_idx", None)
        where = type(module).__name__ if layer is None else f"layer {layer}"
        _check(module, where)
        check_parts(module, where)
        for held, name, trained in getattr(module, "replaced", ()):
            p = held()
            if p is not None and p.requires_grad != trained:
                raise UserError(
                    f"{where}: {name}: a parameter that was taken from the model before it was"
                    f" prepared now says requires_grad={p.requires_grad}, and is not in the model"
                    " any more; take the prepared model's parameters"
                )


def check_parts(module: nn.Module, where: str) -> None:
    """Refuse what was added below a module of a prepared model and would not be run."""
    if all(map(_is_plain, module.modules())):  # as ever: this is asked at each call of each layer
        return
    for below, part in module.named_modules():
        if below:
            _check(part, f"{where}: {below}")


def _check(module: nn.Module, where: str) -> None:
    """Refuse what is not the library's own module, or ours, untouched."""
    kind = type(module)
    if _is_adapted(module):
        raise UserError(
            f"{where}: an adapter ({kind.__module__}.{kind.__name__}) on a module that the engine"
            " does not call: it would not be run; merge it first, or leave it out"
        )
    if _hooked(module):
        raise UserError(
            f"{where}: has a hook, and the engine does not call this module: it would not be run"
        )
    if not kind.__module__.startswith(KNOWN):
        raise UserError(
            f"{where}: a {kind.__module__}.{kind.__name__}; the engine computes what transformers'"
            " own modules do, and would not run this one"
        )
    if "forward" in module.__dict__ and getattr(module, "rows", None) is None:
        raise UserError(
            f"{where}: its forward was replaced on this instance (device_map, a patch?): it would"
            " not be run"
        )


def _is_plain(module: nn.Module) -> bool:
    """Whether `_check` has nothing to look at."""
    has = module.__dict__
    return (
        not (has["_forward_hooks"] or has["_forward_pre_hooks"])
        and not (has["_backward_hooks"] or has["_backward_pre_hooks"])
        and "forward" not in has
        and type(module).__module__.startswith(KNOWN)
    )


def _check_tensor(at: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise UserError(f"{at}: on the device 'meta', without values; load the weights first")
    if type(tensor.data) is not Tensor:
        raise UserError(f"{at}: a {type(tensor.data).__name__}; plain tensors are wanted")
    if tensor.is_floating_point() and tensor.itemsize >= 2:
        return
    if isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{at}: stored as {dtype}: quantized weights are not computed with here")


def _hooked(module: nn.Module) -> bool:
    """Whether anything but the library's own recorder of hidden states waits on the module."""
    hooks = [hook for kind in HOOKS for hook in getattr(module, kind).values()]
    return any(not getattr(h, "__module__", "").startswith("transformers.utils.") for h in hooks)


def _is_adapted(module: Any) -> bool:
    """Whether PEFT made the module, or wrapped it."""
    return type(module).__module__.startswith("peft.") or "base_layer" in module._modules
