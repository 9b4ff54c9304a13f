"""What to put where: the fastest layout of a stage that fits a budget, and what to say of it."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from xplus_fast.config import MemoryConfig
from xplus_fast.errors import UserError
from xplus_fast.model.families import Shape
from xplus_fast.model.layout import FORMATS, united
from xplus_fast.planning.candidates import Request, fp8_fits, with_policies
from xplus_fast.planning.cards import Card
from xplus_fast.planning.flops import Work, assumed_work
from xplus_fast.planning.hidden import Hidden
from xplus_fast.planning.impossible import explain
from xplus_fast.planning.memory import account
from xplus_fast.planning.search import Plan, pin, search
from xplus_fast.planning.selection import Rotation, resolve_layers

FASTER = 1.05  # how much faster FP8 must be to be pointed out


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
    processes: int = 1,
    hooked: bool = False,
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
        processes: that train together, of which each does an equal part of a step.
        hooked: whether somebody wants to see each gradient, so that no GEMM adds it to a sum.

    Raises:
        UserError: nothing fits, or a pin that this model or selection does not allow.
    """
    request = Request(
        shape, tuple(sorted(layers)), united(tuple(also), tied=shape.tied), memory, card, budget,
        host, dtype_bytes,
        pack_tokens, math.ceil(tokens_per_step / processes), work or assumed_work(True),
        hidden=hidden, rotation=rotation, processes=processes, hooked=hooked,
    )  # fmt: skip
    _check(request)
    found = search(request)
    if found is None:  # at any price
        request = replace(request, formats=FORMATS)
        found = search(request)
    if found is None:
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
    if b.adds and r.element == 2 and update != plan.update and r.budget is not None:
        needs, _ = account(r.shape, plan.layout, update, b, context=r.context)
        if sum(needs.values()) <= r.budget:
            more = max(0.1, (sum(needs.values()) - plan.device_total) / 1e9)
            yield (
                f"memory.sums=32 would sum gradients in fp32 (in one process); its {more:.1f} GB"
                " more fit"
            )


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
    if r.processes > 1:
        _check_several(r)
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


def _check_several(r: Request) -> None:
    if r.rotation is not None:
        raise UserError("layers.rotate: works with one process only")
    if r.memory.gradients == "host":
        raise UserError(
            "memory.gradients: host is for one process: those of several meet on the device"
        )
    if r.memory.sums == 32 and r.element != 4:
        raise UserError(
            "memory.sums: 32 is for one process; several exchange gradients in the weights' own"
            " dtype: 16 is wanted"
        )


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
