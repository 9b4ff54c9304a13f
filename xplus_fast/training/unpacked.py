"""A prepared model's parameters as a library's optimizer has to see them: a matrix at a time.

Blocks keep q, k and v in one tensor, and gate and up in another. What works on elements does not
mind; what looks at rows, columns or a whole matrix (Adafactor, Muon, GaLore, Lion's 8-bit blocks)
would compute something else. So such an optimizer is made of views under Hugging Face's names,
which share the packed tensors' memory and, when a step is due, their gradients.
"""

from typing import Any

import torch
from torch import Tensor, nn

from xplus_fast.errors import UserError
from xplus_fast.model.families import PACKED
from xplus_fast.model.layer import Block

# Of torch.optim: an element's update depends on that element alone.
ELEMENTWISE = (
    torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW,
    torch.optim.Adamax, torch.optim.ASGD, torch.optim.NAdam, torch.optim.RAdam,
    torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD,
)  # fmt: skip


class Unpacked(nn.Module):
    """Modules and parameters as the stock model has them, over a prepared model's memory.

    Linear layers are `nn.Linear`, so that what selects modules by type or name finds them. It
    computes nothing: it is there to be asked for its parameters.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._shared: list[tuple[nn.Parameter, tuple[nn.Parameter, ...]]] = []
        self.model = nn.Module()
        base = model.model
        self.model.embed_tokens = base.embed_tokens
        self.model.layers = nn.ModuleList(self._layer(block) for block in base.layers)
        self.model.norm = base.norm
        self.lm_head = model.lm_head
        self.config = model.config

    def _layer(self, block: Block) -> nn.Module:
        layer = nn.Module()
        for packed in block.packed:
            whole = block.weight(packed)
            if whole is None:
                continue
            parts = whole.data.split(block.shape.rows(packed))
            views = tuple(nn.Parameter(part, requires_grad=whole.requires_grad) for part in parts)
            self._shared.append((whole, views))
            for name, view in zip(PACKED[packed], views, strict=True):
                _put(layer, name, view)
        return layer

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer's steps see the packed tensors' gradients."""
        optimizer.register_step_pre_hook(lambda *_: self.share_gradients())
        optimizer.register_step_post_hook(self._after_step)

    def share_gradients(self) -> None:
        """Each view's gradient is its part of the packed tensor's, or None as that is."""
        for whole, views in self._shared:
            sizes = [len(view) for view in views]
            parts = [None] * len(views) if whole.grad is None else whole.grad.split(sizes)
            for view, part in zip(views, parts, strict=True):
                view.grad = part

    def packed(self) -> dict[int, nn.Parameter]:
        """id of a view -> the packed parameter it is a part of."""
        return {id(view): whole for whole, views in self._shared for view in views}

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for whole, views in self._shared:
            at = whole.data_ptr()
            for view in views:
                view.grad = None  # else zeroing the packed one would free nothing
                if view.data_ptr() != at:
                    raise UserError(
                        f"{type(optimizer).__name__} puts other tensors in the parameters' place;"
                        " the engine needs it to change them where they are"
                    )
                at += view.nbytes


def check_given(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer made by hand of packed parameters that may look at whole matrices."""
    from xplus_fast.training.optimizer import AdamW

    if not isinstance(optimizer, (AdamW, *ELEMENTWISE)):
        name = type(optimizer).__name__
        raise UserError(
            f"optimizers: {name} may look at whole matrices, and q, k, v are one here (gate, up"
            f" too); optimizer_cls_and_kwargs=({name}, {{...}}) makes it of the matrices apart"
        )


def _put(layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register "self_attn.q_proj.weight" and its like, with the modules on the way."""
    *path, module, kind = name.split(".")
    for part in path:
        if part not in layer._modules:
            layer.add_module(part, nn.Module())
        layer = layer.get_submodule(part)
    if module not in layer._modules:
        made: nn.Module = nn.Module()
        if parameter.ndim == 2:
            rows, columns = parameter.shape
            made = nn.Linear(columns, rows, bias=False, device="meta")
        layer.add_module(module, made)
    layer.get_submodule(module).register_parameter(kind, parameter)


def named(model: nn.Module, unpacked: Unpacked | None) -> dict[int, tuple[str, Tensor]]:
    """id of a parameter that an optimizer may hold -> its name and itself."""
    sources = [model] if unpacked is None else [model, unpacked]
    return {id(p): (name, p) for source in sources for name, p in source.named_parameters()}
