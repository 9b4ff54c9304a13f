"""When the device's memory gives out."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def ran_out(e: RuntimeError) -> bool:
    """Whether the device's memory gave out: cuBLAS and CUDA itself say so in other words."""
    return isinstance(e, torch.OutOfMemoryError) or any(
        words in str(e) for words in ("out of memory", "ALLOC_FAILED")
    )


def twice(make: Callable[[], T]) -> T:
    """What `make` makes, which may fail half-way: then once more, if it was for want of memory.

    What the allocator holds in pieces may do when it is given back.
    """
    try:
        return make()
    except RuntimeError as e:
        if not ran_out(e):
            raise
    torch.cuda.empty_cache()  # out here: the exception's frames would hold what was made
    return make()
