"""Gradients of matrices, summed over the micro-batches of a step by the GEMMs that make them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import xplus_kernels as ops


class Sums:
    """Where the sums are: in `p.grad`, which is added to in place."""

    open = True  # False: nothing is added, whoever asks for gradients gets them

    def bring(self, parameters: Iterable[Tensor]) -> None:
        """The backward of what these belong to begins."""

    def so_far(self, p: Tensor) -> Tensor | None:
        """What p's next gradient is to be added to; None: there is nothing, or whoever hooked
        itself to p's gradients wants to see each."""
        if not p.is_leaf or p._backward_hooks or p._post_accumulate_grad_hooks:
            return None
        fits = p.grad is not None and p.grad.dtype == gradient_dtype(p) and p.grad.is_contiguous()
        return p.grad if fits else None

    def put(self, p: Tensor, total: Tensor) -> None:
        """It has been added."""


def gradient_dtype(p: Tensor) -> torch.dtype:
    """Of p's gradient: p's own, unless p says otherwise."""
    return (p.grad_dtype if p.is_leaf else None) or p.dtype


def matrix_gradient(w: Tensor, sums: Sums | None, *parts: tuple[Tensor, Tensor]) -> Tensor | None:
    """dy.T @ x of each part, one below the other: a gradient like w [N, K] for autograd to add.

    parts: dy [T, rows], x [T, K]. None where it has been added to what `sums` has already.
    """
    total = sums.so_far(w) if sums is not None and sums.open else None
    made = torch.empty_like(w, dtype=gradient_dtype(w)) if total is None else total
    at = 0
    for dy, x in parts:
        rows = dy.shape[1]
        ops.weight_gradient(dy, x, made[at : at + rows], add=total is not None)
        at += rows
    if sums is None or total is None:
        return made
    sums.put(w, total)
    return None


@contextmanager
def summed(layers: Sequence[Any], sums: Sums | None) -> Iterator[None]:
    """Within it, a backward of these blocks adds to `sums`: for a `backward()` of the whole loss,
    with nothing else that waits for gradients, such as another process."""
    for block in layers:
        block.sums = sums
    try:
        yield
    finally:
        for block in layers:
            block.sums = None


@contextmanager
def only_in_backward(accelerator: Any, sums: Sums) -> Iterator[None]:
    """Within it, the accelerator's own `backward` adds to `sums`, and nothing else does: a loss
    that is itself made of gradients (`torch.autograd.grad`) asks for them in a step, too."""
    backward = accelerator.backward

    def adding(*args: Any, **options: Any) -> None:
        sums.open = True
        try:
            backward(*args, **options)
        finally:
            sums.open = False

    sums.open, accelerator.backward = False, adding
    try:
        yield
    finally:
        sums.open, accelerator.backward = True, backward
