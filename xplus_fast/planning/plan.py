"""What to put where: the fastest layout of a stage that fits a budget.

The search goes through micro-batch sizes, frozen formats, head, embedding, gradients and states,
and how many layers stream, and gives each as good activation policies as fit. It chooses by
predicted time; what a recipe pins is not touched, nor is the optimizer's arithmetic.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from xplus_fast.config import MemoryConfig
from xplus_fast.errors import UserError
from xplus_fast.model.families import Shape
from xplus_fast.model.layout import FORMATS, Layout, Policy, UpdateLayout, united
from xplus_fast.planning.candidates import Request, candidates, fp8_fits, stride, with_policies
from xplus_fast.planning.cards import Card
from xplus_fast.planning.flops import Work, assumed_work, necessary_flops, recompute_flops
from xplus_fast.planning.hidden import Hidden
from xplus_fast.planning.memory import MARGIN, account, peak_moment, standing
from xplus_fast.planning.replay import Batch
from xplus_fast.planning.selection import Rotation, resolve_layers
from xplus_fast.planning.speed import step_seconds

LADDER: tuple[Policy, ...] = ("offload", "recompute", "recompute_mlp", "keep")  # leanest first
FASTER = 1.05  # how much faster FP8 must be to be pointed out
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


def plan_stage(
    shape: Shape,
    layers: Sequence[int],
    also: Sequence[str],
    memory: MemoryConfig,
    *,
    card: Card | None,
    dtype_bytes: int,
    pack_tokens: int,
    tokens_per_step: int,
    budget: int | None = None,
    host: int | None = None,
    work: Work | None = None,
    hidden: Hidden | None = None,
    rotation: Rotation | None = None,
) -> Plan:
    """The fastest plan that fits.

    Args:
        shape: the model's sizes.
        layers, also: what trains: layer ids, and "embedding", "final_norm", "head".
        memory: what is pinned; its budget, host and card are not read here.
        card: what the time is predicted for; None: a CPU.
        dtype_bytes: of the run's dtype.
        pack_tokens: of the longest sequence; a micro-batch is so many tokens, or times as many.
        tokens_per_step: of the data, in one optimizer step.
        budget, host: bytes on the device and of pinned host memory; None: unlimited.
        work: of such data, in any amount; None: assumed.
        hidden: what is kept of the layers below; not counted here.
        rotation: by which `layers` take turns.

    Raises:
        UserError: nothing fits, or a pin that this model or selection does not allow.
    """
    request = Request(
        shape, tuple(sorted(layers)), united(tuple(also), tied=shape.tied), memory, card, budget,
        host, dtype_bytes,
        pack_tokens, tokens_per_step, work or assumed_work(True), hidden=hidden,
        rotation=rotation,
    )  # fmt: skip
    _check(request)
    found = search(request)
    if found is None:  # at any price
        request = replace(request, formats=FORMATS)
        found = search(request)
    if found is None:
        from xplus_fast.planning.impossible import explain

        raise UserError(explain(request))
    return replace(found, notes=(*_notes(found), *_faster_notes(found)))


def leaner(plan: Plan) -> Plan | None:
    """A plan of at least 5 % less memory with nothing reloaded: activations and micro-batch only.

    None where there is none.
    """
    r = plan.request
    memory = replace(
        pin(r, plan.layout, plan.update, plan.micro_batch_tokens).memory,
        micro_batch_tokens=r.memory.micro_batch_tokens,
    )
    streamed = sum(i.placement == "host" for i in plan.layout.layers)
    small = replace(r, memory=memory, budget=int(plan.device_total * 0.95))
    # on a CPU "auto" keeps everything: say what may give way
    found = search(small, streams=(streamed,), free=True, most_tokens=plan.micro_batch_tokens)
    return found and replace(found, request=r, notes=tuple(_notes(replace(found, request=r))))


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


def _notes(plan: Plan) -> Iterator[str]:
    r, m = plan.request, plan.request.memory
    frozen = [i for i in plan.layout.layers if not i.trains]
    narrow = sorted({i.format for i in frozen} - {"bf16"})
    if narrow and m.frozen == "auto":
        yield (
            f"frozen layers are rounded to {' and '.join(narrow)}, chosen by this plan;"
            " memory.frozen=bf16 leaves them as they are"
        )
    if plan.layout.head == "fp8" and m.head == "auto":
        yield "the frozen head is rounded to fp8, chosen by this plan; memory.head=bf16 does not"
    if "fp8" in narrow and r.card and not r.card.fp8_gemm:
        yield f"{r.card.name} has no FP8 matrix rate: fp8 layers are unpacked to bf16 before use"
    if not r.card:
        return
    keep = with_policies(plan.layout, r.lowest, "keep", "keep", 0)
    if keep != plan.layout and r.budget is not None:
        b = r.batch(plan.micro_batch_tokens)
        needs, _ = account(r.shape, keep, plan.update, b, context=r.context)
        more = (sum(needs.values()) - r.budget) / 1e9
        if more > 0:
            yield f"needs {max(more, 0.05):.1f} GB more to keep all activations"
    if any(i.placement == "host" for i in frozen) and r.budget is not None:
        resident = tuple(replace(i, placement="device") for i in plan.layout.layers)
        b, layout = r.batch(plan.micro_batch_tokens), replace(plan.layout, layers=resident)
        needs, _ = account(r.shape, layout, plan.update, b, context=r.context)
        more = (sum(needs.values()) - r.budget) / 1e9
        if more > 0:
            yield f"needs {max(more, 0.05):.1f} GB more to have all layers on the device"
    b, update = r.batch(plan.micro_batch_tokens), replace(plan.update, sums=32)
    if b.steps > 1 and r.element == 2 and update != plan.update and r.budget is not None:
        needs, _ = account(r.shape, plan.layout, update, b, context=r.context)
        if sum(needs.values()) <= r.budget:
            more = (sum(needs.values()) - plan.device_total) / 1e9
            yield f"memory.sums=32 would sum gradients in fp32; its {more:.1f} GB more fit"


def _faster_notes(plan: Plan) -> Iterator[str]:
    """What "auto" leaves out for its rounding, where it would be much faster."""
    r = plan.request
    if r.memory.frozen != "auto" or not r.card or not r.card.fp8_gemm:
        return
    if not fp8_fits(r.shape) or not r.fp8_dtype or not plan.predicted_tokens_per_s:
        return
    rough = search(replace(r, memory=replace(r.memory, frozen="fp8")))
    ratio = (rough.predicted_tokens_per_s or 0) / plan.predicted_tokens_per_s if rough else 0
    if ratio > FASTER:
        yield f"memory.frozen=fp8 is predicted {ratio:.2f}x as fast; it rounds more than auto may"


def _check(r: Request) -> None:
    m = r.memory
    if m.head == "fp8" and (r.shape.tied or "head" in r.also):
        why = "is the embedding, too" if r.shape.tied else "trains"
        raise UserError(f"memory.head: fp8 is for a frozen head of its own; this one {why}")
    if m.embedding == "host" and (r.shape.tied or "embedding" in r.also):
        why = "is the head, too" if r.shape.tied else "trains"
        raise UserError(f"memory.embedding: host is for a frozen embedding; this one {why}")
    named = m.frozen.values() if isinstance(m.frozen, dict) else (m.frozen,)
    if "fp8" in named and not fp8_fits(r.shape):
        raise UserError("memory.frozen: fp8 wants layer sizes that are multiples of 16")
    if "fp8" in named and not r.fp8_dtype:
        raise UserError("memory.frozen: on a GPU fp8 goes with dtype=bfloat16 alone")
    if isinstance(m.frozen, dict):
        seen: set[int] = set()
        for spec in m.frozen:
            try:
                ids = set(resolve_layers(spec, r.shape.layers))
            except UserError as e:
                raise UserError(f"memory.frozen: {str(e).removeprefix('layers: ')}") from None
            if seen & ids:
                raise UserError(f"memory.frozen: layer {min(seen & ids)} is named twice")
            seen |= ids


def to_dict(plan: Plan) -> dict[str, Any]:
    """For --json: the plan without what it was made from."""
    return {
        f.name: _plain(getattr(plan, f.name))
        for f in dataclasses.fields(plan)
        if f.name != "request"
    } | {
        "device_total": plan.device_total,
        "host_total": plan.host_total,
        "hidden_states": _plain(plan.request.hidden),
    }


def _plain(value: Any) -> Any:
    plain = isinstance(value, type) or not dataclasses.is_dataclass(value)
    return value if plain else dataclasses.asdict(value)
