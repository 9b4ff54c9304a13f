"""The search for a stage's fastest layout that fits a budget.

It goes through micro-batch sizes, frozen formats, head, embedding, gradients and states, and how
many layers stream, and gives each as good activation policies as fit. It chooses by predicted time;
what a recipe pins is not touched, nor is the optimizer's arithmetic.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from xplus_fast.model.layout import Layout, Policy, UpdateLayout
from xplus_fast.planning.candidates import Request, candidates, stride, with_policies
from xplus_fast.planning.flops import necessary_flops, recompute_flops
from xplus_fast.planning.memory import MARGIN, account, peak_moment, standing
from xplus_fast.planning.replay import Batch
from xplus_fast.planning.speed import step_seconds

LADDER: tuple[Policy, ...] = ("offload", "recompute", "recompute_mlp", "keep")  # leanest first
BETTER = 1.01  # a plainer plan is given up for this much predicted speed


@dataclass(frozen=True)
class Plan:
    """A stage's layout, and what it should take."""

    layout: Layout
    update: UpdateLayout
    micro_batch_tokens: int
    device_bytes: dict[str, int]  # by purpose, at the peak
    host_bytes: dict[str, int]  # pinned
    flops_per_token: float  # of the data, necessary
    recompute_flops_per_token: float
    predicted_tokens_per_s: float | None  # None without a card
    request: Request = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def device_total(self) -> int:
        return sum(self.device_bytes.values())

    @property
    def host_total(self) -> int:
        return sum(self.host_bytes.values())


def search(
    r: Request, *, streams: tuple[int, ...] | None = None, free: bool = False,
    most_tokens: int | None = None, first: bool = False,
) -> Plan | None:  # fmt: skip
    """The fastest plan that fits, or None.

    Args:
        streams: numbers of streamed layers to try, instead of what the recipe allows.
        free: let "auto" choose even without a card.
        most_tokens: of a micro-batch.
        first: any plan that fits will do.
    """
    best: tuple[float, Layout, UpdateLayout, int] | None = None
    for layout, update, tokens in candidates(r, streams, free, most_tokens):
        b = r.batch(tokens)
        if best and _seconds(r, layout, update, b, least=True) * BETTER >= best[0]:
            continue
        fitted = fit(r, layout, update, b, free)
        if fitted is None:
            continue
        time = _seconds(r, fitted, update, b)
        if best is None or time * BETTER < best[0]:
            best = (time, fitted, update, tokens)
            if first:
                break
    if best is None:
        return None
    if streams is None and not first and r.memory.placement == "auto":
        n = sum(i.placement == "host" for i in best[1].layers)
        pinned = pin(r, best[1], best[2], best[3])
        finer = search(pinned, streams=tuple(range(max(0, n - stride(r) + 1), n + 1)), free=free)
        if finer is not None:
            return replace(finer, request=r)
    return _plan(r, *best[1:])


def pin(r: Request, layout: Layout, update: UpdateLayout, tokens: int) -> Request:
    """The same request with all but activations and streams decided."""
    frozen: dict[str, str] = {
        str(i): layer.format for i, layer in enumerate(layout.layers) if not layer.trains
    }
    memory = replace(
        r.memory, frozen=frozen or "bf16", head=layout.head, embedding=layout.embedding,
        gradients=update.gradients, states=update.states, micro_batch_tokens=tokens,
    )  # fmt: skip
    return replace(r, memory=memory)


def fit(r: Request, layout: Layout, update: UpdateLayout, b: Batch, free: bool) -> Layout | None:
    """The layout with the best activation policies that fit, or None."""
    device, host = standing(r.shape, layout, update, b)
    if r.host is not None and sum(host.values()) > r.host:
        return None
    room = math.inf
    if r.budget is not None:
        room = (r.budget - r.context) / (1 + (MARGIN if r.context else 0)) - sum(device.values())
    if room < 0:
        return None

    def fits(given: Layout) -> bool:  # the device
        return room == math.inf or peak_moment(r.shape, given, update, b).total <= room

    def allowed(given: Layout) -> Layout | None:  # by the host
        away = b.tokens * r.shape.hidden * b.element
        away *= sum(i.activations == "offload" for i in given.layers)
        return given if r.host is None or sum(host.values()) + away <= r.host else None

    fixed = r.memory.activations
    if fixed == "auto" and r.card is None and not free:
        fixed = "keep"
    if fixed != "auto":
        given = with_policies(layout, r.lowest, fixed, fixed, 0)
        return allowed(given) if fits(given) else None
    saving = r.shape.layers - r.lowest
    full = with_policies(layout, r.lowest, "keep", "keep", 0)
    if fits(full):
        return full
    for base, better in reversed(list(zip(LADDER, LADDER[1:], strict=False))):
        if not fits(with_policies(layout, r.lowest, base, better, 0)):
            continue
        low, high = 0, saving - 1  # the most layers that get the better one
        while low < high:
            middle = (low + high + 1) // 2
            if fits(with_policies(layout, r.lowest, base, better, middle)):
                low = middle
            else:
                high = middle - 1
        # more of the better one is less on the host, too: if this is too much there, all are
        return allowed(with_policies(layout, r.lowest, base, better, low))
    return None


def _seconds(
    r: Request, layout: Layout, update: UpdateLayout, b: Batch, least: bool = False
) -> float:
    if r.card is None:  # plainer first, larger micro-batches first: the first that fits
        return 1.0
    times = [
        step_seconds(
            r.shape, _in_turn(layout, turn), update, b, r.card,
            tokens_per_step=r.tokens_per_step, work=r.work, least=least,
        )
        for turn in (r.turns if layout.at_once is not None else [None])
    ]  # fmt: skip
    return sum(times) / len(times)


def _in_turn(layout: Layout, turn: Sequence[int] | None) -> Layout:
    """A rotation's layout while some of its layers train; the others are as if frozen."""
    if turn is None:
        return layout
    layers = [
        replace(layer, trains=layer.trains and i in turn) for i, layer in enumerate(layout.layers)
    ]
    return replace(layout, layers=tuple(layers))


def _plan(r: Request, layout: Layout, update: UpdateLayout, tokens: int) -> Plan:
    b = r.batch(tokens)
    device, host = account(r.shape, layout, update, b, context=r.context)
    if r.hidden is not None and r.card is not None:  # of a micro-batch, on their way
        host["hidden states"] = b.tokens * r.hidden.token_bytes
    work, top = r.work, len(layout.layers) - 1
    needed = [necessary_flops(r.shape, turn, r.also, work).total for turn in r.turns]
    necessary = sum(needed) / len(needed) / work.data_tokens
    again = sum(
        recompute_flops(r.shape, layer.activations, work, last=i == top)
        for i, layer in enumerate(layout.layers)
        if i >= r.lowest
    )
    speed = None if r.card is None else r.tokens_per_step / _seconds(r, layout, update, b)
    return Plan(
        layout, update, tokens, device, host, necessary, again / work.data_tokens, speed, r
    )  # fmt: skip
