"""Numbers of the device, read while it goes on with what was enqueued after them."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Reading:
    """Numbers of any float dtype and shape, as they are at this point of the current stream.

    They are on their way to the host at once. Who reads them waits for nothing that is enqueued
    later.
    """

    def __init__(self, numbers: Sequence[Tensor]) -> None:
        wide = torch.cat([x.detach().double().flatten() for x in numbers])
        self._here = wide.to("cpu", non_blocking=True)  # pinned by torch
        self._arrived = torch.cuda.Event() if wide.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> list[float]:
        """Waits until they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._here.tolist()
