"""Loss by source: what each of several data sets contributes to a step's loss."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from xplus_fast.model.packing import PackLayout, send


class SourceLosses:
    """Adds up rows' losses by source, on the device, until they are read.

    names: of the sources, by number.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names, self._device = list(names), device
        self._numbers = torch.arange(len(self.names), device=device)[:, None]
        self.restart()

    def restart(self) -> None:
        """Forget what was added since the last reading."""
        self.sums = torch.zeros(len(self.names), dtype=torch.float32, device=self._device)
        self._counts = np.zeros(len(self.names), np.int64)

    def of(self, layout: PackLayout) -> Callable[[Tensor], None] | None:
        """What takes the losses of a row's predicting tokens; None where it tells no sources."""
        if layout.sources is None:
            return None
        found = np.repeat(layout.sources, layout.lengths)[layout.predicts]
        self._counts += np.bincount(found, minlength=len(self.names))
        ids = send(torch.from_numpy(found), self._device)

        def take(losses: Tensor) -> None:
            # not index_add_, whose order of adding, and so last bits, a GPU leaves open
            self.sums += losses.where(ids == self._numbers, 0).sum(1)

        return take

    def read(self, sums: Sequence[float] | None = None) -> dict[str, float]:
        """{"loss/NAME": nats per supervised token} of all processes; every process calls this.

        sums: what `sums` [sources] are, where a single process has read them already.
        """
        if sums is not None:
            counts = self._counts.tolist()
            self.restart()
            return self._means(sums, counts)
        counted = send(torch.from_numpy(self._counts).float(), self._device)
        found = torch.stack([self.sums, counted])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(found)
        self.restart()
        return self._means(*found.cpu().tolist())

    def _means(self, sums: Sequence[float], counts: Sequence[float]) -> dict[str, float]:
        return {f"loss/{name}": s / n
                for name, s, n in zip(self.names, sums, counts, strict=True) if n}  # fmt: skip
