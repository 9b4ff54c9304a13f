"""What a benchmark of an op is: its inputs, who computes it, the truth and the limit.

Sizes: T packed tokens, H hidden, N query heads, K key/value heads, D head_dim, F ffn, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Outputs = Sequence[Tensor]
SAMPLED = 32  # rows of an output that are held against the truth


@dataclass(frozen=True)
class Size:
    """A row of the table of models."""

    name: str
    H: int
    N: int
    K: int
    F: int
    V: int = 151_936
    D: int = 128
    copies: int = 4096  # the longest sequence of the pack of full ones

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """A block's four weights, [out, in]."""
        qkv = (self.N + 2 * self.K) * self.D
        return {
            "qkv": (qkv, self.H),
            "o": (self.H, self.N * self.D),
            "gate_up": (2 * self.F, self.H),
            "down": (self.H, self.F),
        }


SIZES = (
    Size("8B", H=4096, N=32, K=8, F=12_288),
    Size("14B", H=5120, N=40, K=8, F=17_408),
)
TINY = Size("tiny", H=256, N=4, K=2, F=512, V=1000, D=64, copies=32)


@dataclass(frozen=True)
class Provider:
    """Who computes an op. `bind` is called once for a set of inputs, untimed: imports, compiles and
    does what a forward leaves behind; the call that it returns is what is timed."""

    bind: Callable[[Inputs], Callable[[], Outputs]]
    cuda_only: bool = False
    mutates: bool = False  # its inputs: it is given copies of its own
    compiled: bool = False
    gated: bool = True  # False: it computes less than the op, as its limit


@dataclass(frozen=True)
class Case:
    """One op in one way at one size."""

    op: str
    way: str  # forward, backward, full
    size: str
    tokens: int | None  # None: the op is of a weight, whatever the batch
    make: Callable[["Maker"], Inputs]
    providers: dict[str, Provider]
    truth: Callable[[Inputs, Tensor], Outputs]  # inputs, rows -> fp32, those rows
    limit: str  # copy_bytes, bf16_flops, fp8_flops; or a provider's name
    rows: int  # of the outputs
    bound: float  # on the relative error, see `error`
    bytes: int = 0  # the op's minimum
    flops: int = 0
    # outputs, rows -> what stands against the truth
    view: Callable[[Outputs, Tensor], Outputs] = field(default=lambda o, rows: pick(o, rows))
    sample: tuple[int, int] | None = None  # rows to compare, where they must be neighbours
    element: float = 8  # of one element: so many bounds, see `error`


class Maker:
    """Random inputs of one set, on a device."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def randn(
        self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0, mean: float = 0
    ) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=self.device)
        return x.normal_(mean, scale, generator=self.generator)

    def ints(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(high, shape, dtype=dtype, device=self.device, generator=self.generator)


def pick(outputs: Outputs, rows: Tensor) -> Outputs:
    """The rows of every output; scalars whole."""
    return [o[rows] if o.dim() else o for o in outputs]


def sampled_rows(case: Case, device: torch.device) -> Tensor:
    """First, last and evenly between, or the neighbours that the case wants."""
    if case.sample:
        return torch.arange(*case.sample, device=device)
    return torch.linspace(0, case.rows - 1, min(case.rows, SAMPLED), device=device).long()


def error(outputs: Outputs, truth: Outputs, bound: float, element: float = 8) -> tuple[float, str]:
    """Relative error in the 2-norm, the worst output's; and what is wrong, empty where nothing.

    Wrong is an output whose error passes `bound`, or an element that is off by more than `element`
    bounds of (its own size + the root mean square, the output's or its row's, which is larger).
    """
    if len(outputs) != len(truth):
        return math.inf, f"{len(outputs)} outputs, not {len(truth)}"
    worst, wrong = 0.0, ""
    for i, (o, t) in enumerate(zip(outputs, truth, strict=True)):
        if o.shape != t.shape:
            return math.inf, f"output {i} has shape {list(o.shape)}, not {list(t.shape)}"
        o, t = o.float(), t.float()
        off, rms = (o - t).abs(), t.square().mean().sqrt()
        if t.dim() > 1:  # dk of a token that many attend to errs by its own size
            rms = t.square().mean(-1, keepdim=True).sqrt().maximum(rms)
        relative = float(off.norm() / t.norm().clamp(min=1e-30))
        elements = bool((off <= element * bound * (t.abs() + rms)).all())
        if not (relative <= bound and elements) and not wrong:  # so written that NaN is wrong
            what = "elements off" if relative <= bound else f"error {relative:.2g}"
            wrong = f"output {i}: {what}, bound {bound:.2g}"
        worst = max(worst, relative) if math.isfinite(relative) else math.inf
    return worst, wrong


def by_autograd(
    way: str, function: Callable[..., Any], take: Callable[[Inputs], Inputs], grads: Sequence[str]
) -> Callable[[Inputs], Callable[[], Outputs]]:
    """`bind` of a provider that has autograd make the backward.

    take: inputs -> the function's arguments; those under the names in `inputs["leaves"]` are what
    gradients are made for. grads: names of the outputs' gradients in the inputs.
    """

    def bind(inputs: Inputs) -> Callable[[], Outputs]:
        arguments = take(inputs)
        if way == "forward":

            def forward() -> Outputs:
                with torch.no_grad():
                    return _tuple(function(**arguments))

            return forward
        leaves = {k: arguments[k].detach().requires_grad_() for k in inputs["leaves"]}
        given = [inputs[name] for name in grads]

        def run() -> Outputs:
            return _tuple(function(**{**arguments, **leaves}))

        def back(outputs: Outputs, retain: bool) -> Outputs:
            with torch.enable_grad():
                return torch.autograd.grad(
                    outputs, list(leaves.values()), given, retain_graph=retain
                )

        if way == "full":

            def full() -> Outputs:
                made = run()
                return (*(o.detach() for o in made), *back(made, False))

            return full
        saved = run()
        return lambda: back(saved, True)

    return bind


def compiled(
    way: str, function: Callable[..., Any], take: Callable[[Inputs], Inputs], grads: Sequence[str]
) -> Provider:
    """The same function through torch.compile, at fixed shapes, which is its best."""

    def bind(inputs: Inputs) -> Callable[[], Outputs]:
        import torch._functorch.config as functorch

        functorch.donated_buffer = False  # else a backward cannot be called twice
        made = torch.compile(function, dynamic=False, fullgraph=True)
        call = by_autograd(way, made, take, grads)(inputs)
        call()
        return call

    return Provider(bind, cuda_only=True, compiled=True)


def eager_and_compiled(
    way: str, function: Callable[..., Any], take: Callable[[Inputs], Inputs], grads: Sequence[str]
) -> dict[str, Provider]:
    return {
        "eager": Provider(by_autograd(way, function, take, grads)),
        "torch.compile": compiled(way, function, take, grads),
    }


def _tuple(x: Any) -> tuple:
    return tuple(x) if isinstance(x, tuple | list) else (x,)
