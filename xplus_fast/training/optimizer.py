"""AdamW whose arithmetic is fp32 whatever the weights are.

A bf16 weight of 2e-2 has neighbours 1e-4 away, so a step of 1e-5 rounds to nothing: bf16 parameters
get an fp32 master copy that takes the updates, and are its rounding. fp32 parameters are their own
master.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101), torch's fused update.

    State per parameter: `step` [] fp32, `exp_avg` and `exp_avg_sq` fp32, and `master` fp32 where
    the parameter is narrower.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        # `fused` tells whoever restores a state that `step` lives beside its parameter
        super().__init__(
            params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    self._start(p, state)
                master = state.get("master", p)
                adamw(
                    [master], [p.grad.to(master.dtype)], [state["exp_avg"]], [state["exp_avg_sq"]],
                    [], [state["step"]], fused=True, amsgrad=False, beta1=beta1, beta2=beta2,
                    lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
                    maximize=False,
                )  # fmt: skip
                if master is not p:
                    p.copy_(master)
        return loss

    @staticmethod
    def _start(p: Tensor, state: dict[str, Tensor]) -> None:
        wide = torch.float32 if p.dtype in (torch.bfloat16, torch.float16) else p.dtype
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        state["exp_avg"] = torch.zeros_like(p, dtype=wide)
        state["exp_avg_sq"] = torch.zeros_like(p, dtype=wide)
        if wide != p.dtype:
            state["master"] = p.detach().to(wide)
