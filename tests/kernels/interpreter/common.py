"""What the tests of the interpreted Triton code share: inputs, poison and the comparison.

fp32: the reference's numbers but for the order of a sum. fp16: no further from the fp64 truth than
the reference in fp16, by a tenth and one rounding.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import difference
from xplus_kernels import backend

INTERPRETED = pytest.mark.skipif(
    not backend.INTERPRET, reason="needs Triton and TRITON_INTERPRET=1 before Python starts"
)
if backend.INTERPRET:  # Triton 3.6's asks int() of an array of one element, which numpy 2.4 refuses
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = _patch_lang_tensor

ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-11}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poison(made: Tensor) -> Tensor:
    """NaN in every element, or a number that is no result where there is no NaN."""
    return made.fill_(torch.nan if made.is_floating_point() else 0x55)


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel does not store stays NaN."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: poison(make(*a, **k)))


def as_tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def check(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    *tensors: Tensor | None,
    **options: Any,
) -> Any:
    """Outputs of op against the reference, inputs unchanged, and the same bits a second time."""
    before = [t if t is None else t.clone() for t in tensors]
    mine, again = op(*tensors, **options), op(*tensors, **options)
    theirs = reference(*tensors, **options)
    truth = reference(*(t if t is None else t.double() for t in tensors), **options)
    for m, a, r, t in zip(*map(as_tuple, (mine, again, theirs, truth)), strict=True):
        if t is None:
            assert m is None and a is None
            continue
        assert m.shape == t.shape and m.dtype == r.dtype and torch.equal(m, a)
        assert difference(m, t) <= 1.1 * difference(r, t) + ROUNDING[m.dtype]
    for t, b in zip(tensors, before, strict=True):
        assert b is None or torch.equal(t, b)
    return mine
