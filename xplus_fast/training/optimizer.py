"""AdamW whose arithmetic is fp32 whatever the weights are, with its memory on device or host.

A bf16 weight of 2e-2 has neighbours 1e-4 away, so a step of 1e-5 rounds to nothing. So a bf16
parameter is the rounding of an fp32 master copy that takes the updates; or, without one, it is
rounded up or down at random, such that the mean is right.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from xplus_fast.errors import UserError
from xplus_fast.model.layout import Placement
from xplus_fast.model.sums import Sums
from xplus_fast.training import host_state
from xplus_fast.training.host_state import HostGradients, Job, Lane, Shuttle, norms_of
from xplus_fast.training.shortage import twice
from xplus_kernels.adamw import adamw_update
from xplus_kernels.blockwise import QUANTUM

NARROW = (torch.bfloat16, torch.float16)


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101).

    On CUDA one fused pass over memory (`adamw_update`). On a CPU, torch's fused update; there,
    8-bit states and stochastic rounding take the reference, which is several times slower.

    State per parameter: `step` [] fp32 on the CPU; `exp_avg` and `exp_avg_sq` as wide as fp32 or
    wider, or uint8 codes with `exp_avg_absmax` and `exp_avg_sq_absmax` [ceil(n / 256)] fp32; and
    `master` fp32 where a narrow parameter has one.

    Args:
        bits: of exp_avg and exp_avg_sq: 32, or 8 for codes by blocks of 256.
        master: fp32 copies of narrow parameters. Without them bf16 is rounded stochastically.
        states: where exp_avg, exp_avg_sq and master lie: "device", or "host" memory, out of which
            a step brings them piece by piece. Those of a parameter whose flag was taken away wait
            on the host, if `place` is called.
        gradients: "host" takes each gradient to host memory when the backward has made it:
            `p.grad` is None then, and `grad_norm` tells the norm.
        sums: of gradients over several backward passes: 32 makes those of narrow parameters fp32
            (`p.grad_dtype`), which DistributedDataParallel cannot add up; 16 leaves them in the
            parameter's dtype.
        seed: at least 0, under 2^64: of the stochastic rounding. It is drawn from seed, step and
            place: the same again after a resumption.
        The placements change no bit of the result.

    Raises:
        UserError: an option, or a parameter that it does not suit.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        bits: int = 32,
        master: bool = True,
        states: Placement = "device",
        gradients: Placement = "device",
        sums: Literal[16, 32] = 16,
        seed: int = 0,
    ) -> None:
        for name, value in (("states", states), ("gradients", gradients)):
            if value not in ("device", "host"):
                raise UserError(f"{name}: {value!r} is not a placement; allowed: device, host")
        if bits not in (32, 8):
            raise UserError(f"bits: {bits!r}; allowed: 32, 8")
        if sums not in (16, 32):
            raise UserError(f"sums: {sums!r}; allowed: 16, 32")
        if not 0 <= seed < 2**64:
            raise UserError(f"seed: {seed!r}; allowed: 0 to 2^64 - 1")
        self._on_host = states == "host"
        self._wide_sums = sums == 32
        self._host_gradients = HostGradients() if gradients == "host" else None
        self._shuttle: Shuttle | None = None
        # [] on the device: the next step multiplies gradients by it and forgets it; where it is
        # not finite, that step changes nothing but the number of steps (see `take_back`)
        self.gradient_scale: Tensor | None = None
        self._counted: list[Tensor] = []  # the `step` of what the last step updated
        # in the groups: what a checkpoint has to tell of how its states came about
        kinds = dict(bits=bits, master=master, seed=seed)
        super().__init__(
            params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **kinds)
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; see the class for what is refused."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            if p.dtype == torch.float16 and not group["master"]:
                raise UserError("master: float16 parameters need one (bfloat16 can do without)")
            if p.dtype == torch.float64 and group["bits"] == 8:
                raise UserError("bits: float64 parameters have no 8-bit states")
            shape = tuple(p.shape)
            if not p.is_contiguous():
                raise UserError(f"params: one of shape {shape} is not contiguous in memory")
            if self._host_gradients is not None and not p.requires_grad:
                raise UserError(f"params: one of shape {shape} requires no gradient to be watched")
        for p in group["params"]:
            dtype = torch.promote_types(p.dtype, torch.float32) if self._wide_sums else p.dtype
            if p.grad_dtype not in (None, dtype):
                p.grad, p.grad_dtype = None, dtype
        if self._host_gradients is not None:
            self._host_gradients.watch(group["params"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; those on the host whatever `set_to_none` says."""
        super().zero_grad(set_to_none)
        self.gradient_scale = None
        if self._host_gradients is not None:
            self._host_gradients.reset()

    @property
    def gradients(self) -> Placement:
        """Where gradients are summed."""
        return "device" if self._host_gradients is None else "host"

    @property
    def sums(self) -> Sums:
        """What a backward adds to, see `summed`."""
        return Sums() if self._host_gradients is None else self._host_gradients

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """[] on the device, fp32 or wider: the norm of all gradients; no host sync."""
        norms: list[Tensor | None]
        host = self._host_gradients
        parameters = self._parameters()
        if host is None:
            norms = [*norms_of([p.grad for p in parameters if p.grad is not None])]
        else:
            host.settle(parameters[0].device)
            norms = [host.norm(p) for p in parameters]
        found = [n.to(parameters[0].device) for n in norms if n is not None]
        if not found:
            return torch.zeros((), device=parameters[0].device)
        wide = max((n.dtype for n in found), key=lambda dtype: dtype.itemsize)
        return torch.linalg.vector_norm(torch.stack([n.to(wide) for n in found]))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        device = self._device()
        if self._host_gradients is not None:
            self._host_gradients.settle(device)
        twice(self._start_all)
        jobs: list[Job] = []
        self._counted = []
        number = 0  # of a piece, counted over all parameters: names its random stream
        for group in self.param_groups:
            for p in group["params"]:
                pieces = -(-p.numel() // host_state.CHUNK)
                grad = self._gradient(p)
                if grad is not None:
                    jobs += self._jobs(p, grad, group, number)
                number += pieces
        if self._shuttle is None:
            self._shuttle = Shuttle(device)
        self._shuttle.run(jobs)
        self.gradient_scale = None
        return loss

    def take_back(self) -> None:
        """Count the last step as not made: its `gradient_scale` was not finite."""
        for step in self._counted:
            step -= 1
        self._counted = []

    def _jobs(self, p: Tensor, grad: Tensor, group: dict[str, Any], number: int) -> list[Job]:
        """A parameter's update in pieces of at most `CHUNK` elements."""
        state = self.state[p]
        state["step"] += 1
        self._counted.append(state["step"])
        step = int(state["step"])
        flat, chunk = p.detach().view(-1), host_state.CHUNK
        pieces = {k: t.view(-1) for k, t in state.items() if k != "step"}
        pieces = {
            k: t.split(chunk // QUANTUM if k.endswith("absmax") else chunk)
            for k, t in pieces.items()
        }
        jobs = []
        for i, (part, g) in enumerate(
            zip(flat.split(chunk), grad.reshape(-1).split(chunk), strict=True)
        ):
            mine = {k: t[i] for k, t in pieces.items()}
            back = tuple(mine) if self._on_host else ()
            brought, here = (mine, {}) if self._on_host else ({}, mine)
            if self._host_gradients is None:
                here = {**here, "grad": g}
            else:
                brought = {**brought, "grad": g}
            update = partial(_update, part, here, group, step, number + i, self.gradient_scale)
            jobs.append(Job(brought, update, back))
        return jobs

    def restore(self, p: Tensor, state: dict[str, Any]) -> None:
        """Take up one parameter's saved state, of any placement, in this optimizer's."""
        restored = {}
        for key, value in state.items():
            if key == "step":
                restored[key] = torch.tensor(float(value), dtype=torch.float32)
                continue
            restored[key] = self._zeros(p, value.shape, value.dtype, resting=not p.requires_grad)
            restored[key].copy_(value)
        self.state[p] = restored

    def place(self, p: Tensor) -> None:
        """Bring a parameter's states where they belong, after its flag has changed: those of one
        that does not train wait on the host."""
        state, resting = self.state.get(p, {}), not p.requires_grad
        if self._on_host:
            return
        for key, value in state.items():
            if key != "step":
                state[key] = self._zeros(p, value.shape, value.dtype, resting=resting).copy_(value)

    def check_saved(self, groups: Iterable[dict[str, Any]], where: str) -> None:
        """Refuse param groups saved with other states. Raises `UserError`; `where`: their file."""
        for ours, saved in zip(self.param_groups, groups, strict=True):
            # checkpoints made before there was a choice do not tell
            theirs = _kind(saved.get("bits", 32), saved.get("master", True))
            if theirs != (mine := _kind(ours["bits"], ours["master"])):
                raise UserError(
                    f"{where}: its optimizer has {theirs}, and this run asks for {mine}; only"
                    " their placement can change"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states keep their dtype and take this optimizer's placement."""
        self.check_saved(state_dict["param_groups"], "state_dict")
        super().load_state_dict({**state_dict, "state": {}})
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(ids, self._parameters(), strict=True):
            if i in state_dict["state"]:
                self.restore(p, state_dict["state"][i])

    def synchronize(self) -> None:
        """Wait until states in host memory are what the last step made them."""
        Lane.current(self._device()).synchronize()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _device(self) -> torch.device:
        devices = {p.device for p in self._parameters()}
        if len(devices) > 1 and (self._on_host or self._host_gradients is not None):
            raise UserError("states, gradients: in host memory only for parameters of one device")
        return self._parameters()[0].device

    def _gradient(self, p: Tensor) -> Tensor | None:
        return p.grad if self._host_gradients is None else self._host_gradients.get(p)

    def _start_all(self) -> None:
        """States for every parameter that has a gradient, before the first of them changes."""
        for group in self.param_groups:
            for p in group["params"]:
                if self._gradient(p) is not None and not self.state[p]:
                    self._start(p, self.state[p], group)

    def _start(self, p: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        wide = torch.promote_types(p.dtype, torch.float32)
        made = {"step": torch.zeros((), dtype=torch.float32)}
        for name in ("exp_avg", "exp_avg_sq"):
            if group["bits"] == 8:
                made[name] = self._zeros(p, p.shape, torch.uint8)
                blocks = -(-p.numel() // QUANTUM)
                made[f"{name}_absmax"] = self._zeros(p, (blocks,), torch.float32)
            else:
                made[name] = self._zeros(p, p.shape, wide)
        if p.dtype in NARROW and group["master"]:
            made["master"] = self._zeros(p, p.shape, wide)
            chunk = host_state.CHUNK  # in pieces: on its way to the host each is fp32 on the device
            for ours, theirs in zip(
                made["master"].view(-1).split(chunk), p.detach().view(-1).split(chunk), strict=True
            ):
                ours.copy_(theirs)
        state.update(made)  # all or, where memory is short, nothing

    def _zeros(
        self, p: Tensor, shape: Iterable[int], dtype: torch.dtype, *, resting: bool = False
    ) -> Tensor:
        if self._on_host or resting:
            return host_state.zeros_on_host(tuple(shape), dtype, p.device)
        return torch.zeros(tuple(shape), dtype=dtype, device=p.device)


def _update(
    p: Tensor, here: dict[str, Tensor], group: dict[str, Any], step: int, number: int,
    scale: Tensor | None, brought: dict[str, Tensor],
) -> None:  # fmt: skip
    """One piece of a parameter, [n]: its tensors that are here, and those brought."""
    tensors = {**here, **brought}
    g, m, v = (tensors.pop(k) for k in ("grad", "exp_avg", "exp_avg_sq"))
    master = tensors.get("master")
    wide = torch.promote_types(p.dtype, torch.float32)
    if scale is not None:
        scale = scale.to(p.device, wide)
    beta1, beta2 = group["betas"]
    lr, eps, decay = float(group["lr"]), group["eps"], group["weight_decay"]
    random = master is None and p.dtype in NARROW
    if p.is_cuda or group["bits"] == 8 or random:
        adamw_update(
            p, g, m, v, step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay,
            master=master, grad_scale=scale, seed=group["seed"] if random else None,
            exp_avg_absmax=tensors.get("exp_avg_absmax"),
            exp_avg_sq_absmax=tensors.get("exp_avg_sq_absmax"), parameter=number,
        )  # fmt: skip
        return
    g = g.to(wide)
    if scale is not None:
        if not scale.isfinite():
            return
        g = g * scale
    target = p if master is None else master
    adamw(
        [target], [g], [m], [v], [], [torch.tensor(float(step - 1))], fused=True, amsgrad=False,
        beta1=beta1, beta2=beta2, lr=lr, weight_decay=decay, eps=eps, maximize=False,
    )  # fmt: skip
    if master is not None:
        p.copy_(master)


def _kind(bits: int, master: bool) -> str:
    return f"{bits}-bit states {'with' if master else 'without'} an fp32 master"
