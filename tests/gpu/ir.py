"""What the tests ask of a GPU and ttsem does not answer, for `XPLUS_REHEARSE=ir`.

There every op is done at once and on the CPU, so streams have nothing to order.
"""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack


class Event:
    """A point that has been passed."""

    def record(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...


class Stream:
    """Orders nothing."""

    def __init__(self, device: torch.device | None = None) -> None: ...
    def wait_event(self, event: Event) -> None: ...
    def wait_stream(self, stream: "Stream") -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self) -> Event:
        return Event()


def scaled_mm(
    a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, **_: Any
) -> Tensor:
    """A GPU multiplies the sums by the scales; a CPU what is summed, and rounds more."""
    return ((a.float() @ b.float()) * scale_a * scale_b).to(out_dtype)


def stay_in_backward() -> None:
    """ttsem's "cuda is the CPU", which torch leaves for the time of a backward, holds there too."""
    mode, run = _get_current_function_mode_stack()[-1], torch.autograd._engine_run_backward

    def under_mode(*args: Any, **options: Any) -> Any:
        with mode:
            return run(*args, **options)

    torch.autograd._engine_run_backward = under_mode


def install() -> None:
    """Put them into torch, for the rest of this process."""
    done = lambda *_: 0  # noqa: E731
    for name, value in {
        "Event": Event,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": nullcontext,
        "cudart": lambda: SimpleNamespace(cudaHostRegister=done, cudaHostUnregister=done),
    }.items():
        setattr(torch.cuda, name, value)
    torch._scaled_mm = scaled_mm
    torch.Tensor.pin_memory = lambda x: x
    stay_in_backward()
    torch.backends.cuda.is_flash_attention_available = lambda: False  # even if built with CUDA
