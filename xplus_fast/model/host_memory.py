"""Memory on the host that a GPU copies from and to by itself, while it computes."""

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from xplus_fast.errors import UserError


class _Pages(mmap.mmap):
    """Memory that the GPU may read and write by itself, as long as somebody looks at it."""

    address = 0
    device: torch.device

    def __del__(self) -> None:
        if self.address:
            torch.cuda.synchronize(self.device)  # a copy may be on its way
            torch.cuda.cudart().cudaHostUnregister(self.address)


def zeros_on_host(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros in host memory, pinned if `device`, whose data they hold, is a GPU.

    Raises `UserError` if the memory cannot be had.
    """
    if device.type != "cuda":
        return torch.zeros(shape, dtype=dtype)
    n = torch.Size(shape).numel()
    if n == 0:
        return torch.zeros(shape, dtype=dtype)
    # not pin_memory=True: that takes the next power of two, up to twice what is asked for
    size = n * dtype.itemsize
    error: object
    try:
        pages = _Pages(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)  # tens of GB of small pages are slow to pin
        if hasattr(mmap, "MADV_DONTFORK"):
            # a forked process shares pages until one of both writes: this one would get others
            # then, and the GPU go on with the old ones
            pages.madvise(mmap.MADV_DONTFORK)
        flat = torch.frombuffer(pages, dtype=dtype, count=n)
        portable = 1  # pinned for every device
        error = int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), size, portable))
    except (OSError, MemoryError, RuntimeError) as e:
        error = e
    if error:
        raise UserError(
            f"host memory: {size:,} bytes more cannot be pinned"
            f" ({f'CUDA error {error}' if isinstance(error, int) else error}); allow more locked"
            " memory, or keep more on the device"
        )
    pages.address, pages.device = flat.data_ptr(), device
    return flat.view(*shape)
