"""When nothing fits: what is too big, by how much, and the nearest requests that would fit."""

import math
from collections.abc import Iterator
from dataclasses import replace

from xplus_fast.model.families import Shape
from xplus_fast.model.layout import Layout, UpdateLayout
from xplus_fast.planning.candidates import Request, candidates, with_policies
from xplus_fast.planning.memory import account, standing
from xplus_fast.planning.replay import Batch
from xplus_fast.planning.search import LADDER, Plan, fit, search
from xplus_fast.planning.selection import describe_layers

PINS = ("activations", "micro_batch_tokens", "frozen", "placement", "states", "gradients", "head",
        "embedding")  # fmt: skip


def explain(r: Request) -> str:
    """One line for a `UserError`."""
    least = leanest(r) or leanest(replace(r, host=None))
    if r.host is not None and fits(replace(r, host=None)):  # the host's limit alone
        return "memory.host: " + _host_line(r) + _nearest(r, None)
    assert least is not None
    device, _ = least
    total = sum(device.values())
    assert r.budget is not None
    purpose = max(device, key=lambda k: device[k])
    return (
        f"memory.budget: the leanest plan for layers {describe_layers(r.layers)} needs"
        f" {_gb(total)}, {_gb(total - r.budget)} more than {_gb(r.budget)}; the biggest part is"
        f" {purpose}, {_gb(device[purpose])}" + _nearest(r, total)
    )


def leanest(r: Request) -> tuple[dict[str, int], dict[str, int]] | None:
    """Bytes, device and host, of the plan that needs least on the device; None: none fits the host.

    The budget is not looked at.
    """
    best = None
    for layout, update, tokens in _extremes(r):
        base = LADDER[0] if r.memory.activations == "auto" else r.memory.activations
        for policy in {base, "recompute" if r.memory.activations == "auto" else base}:
            given = with_policies(layout, r.lowest, policy, policy, 0)  # type: ignore[arg-type]
            device, host = account(r.shape, given, update, r.batch(tokens), context=r.context)
            if r.host is not None and sum(host.values()) > r.host:
                continue
            if best is None or sum(device.values()) < sum(best[0].values()):
                best = (device, host)
    return best


def _extremes(r: Request) -> Iterator:
    frozen = r.shape.layers - len(r.layers)
    streams = {"device": (0,), "host": (frozen,)}.get(r.memory.placement, (0, frozen))
    least = r.pack_tokens if r.memory.micro_batch_tokens == "auto" else None
    return candidates(r, streams, False, least)


def _host_line(r: Request) -> str:
    needed = leanest_host(r)
    assert needed is not None and r.host is not None
    found = search(replace(r, host=needed), first=True)
    assert found is not None
    host = found.host_bytes
    purpose = max(host, key=lambda k: host[k])
    return (
        f"{_gb(r.host)} of pinned memory are too little: what the device cannot hold is"
        f" {_gb(needed)}, of which {purpose} {_gb(host[purpose])}"
    )


def _nearest(r: Request, least: int | None) -> str:
    found = [text for text, _ in _alternatives(r, least)][:3]
    return ("; what would fit: " + " | ".join(found)) if found else ""


def _alternatives(r: Request, least: int | None) -> Iterator[tuple[str, Request]]:
    """Requests that fit, nearest first; each has been planned."""
    for key in PINS:
        if getattr(r.memory, key) != "auto":
            other = replace(r, memory=replace(r.memory, **{key: "auto"}))  # type: ignore[arg-type]
            if fits(other):
                yield f"memory.{key}=auto", other
    if r.host is not None and least is None:
        free = leanest_host(r)
        if free is not None:
            other = replace(r, host=free)
            if search(other, first=True) is not None:
                yield f"host memory of {_gb(free)}", other
    fewer = _fewer_layers(r)
    if fewer:
        yield fewer
    light = replace(r, memory=replace(r.memory, bits=8))
    if r.memory.bits == 32 and fits(light):
        yield "memory.bits=8", light
    if least is not None:
        step = 10**8
        budget = math.ceil(least / step) * step
        other = replace(r, budget=budget)
        if fits(other):
            yield f"a budget of {_gb(budget)}", other
    if r.memory.bits == 32 and not fits(light):
        more = _fewer_layers(light)
        if more and len(more[1].layers) > (len(fewer[1].layers) if fewer else 0):
            yield f"{more[0]} with memory.bits=8", more[1]
    if r.pack_tokens >= 1024 and r.memory.micro_batch_tokens == "auto":
        other = replace(r, pack_tokens=r.pack_tokens // 2)
        if fits(other):
            yield f"data.pack_tokens={other.pack_tokens}", other


def leanest_host(r: Request) -> int | None:
    """Pinned bytes, rounded up, that some plan must have to fit the device; None: none fits."""
    least = None
    free = replace(r, host=None)
    tokens = r.pack_tokens if r.memory.micro_batch_tokens == "auto" else None
    for layout, update, t in candidates(free, None, False, tokens):
        fitted = fit(free, layout, update, r.batch(t), False)
        if fitted is not None:
            needs = host_bytes(r.shape, fitted, update, r.batch(t))
            least = needs if least is None else min(least, needs)
    return None if least is None else math.ceil(least / 1e8) * 10**8


def host_bytes(shape: Shape, layout: Layout, update: UpdateLayout, b: Batch) -> int:
    return sum(standing(shape, layout, update, b)[1].values())


def _fewer_layers(r: Request) -> tuple[str, Request] | None:
    """As many of a bottom or top selection as fit."""
    n, total = len(r.layers), r.shape.layers
    bottom, top = list(range(n)), list(range(total - n, total))
    if list(r.layers) not in (bottom, top) or n == total:
        return None
    low, high = 0, n - 1
    made: Request | None = None
    while low < high:
        middle = (low + high + 1) // 2
        ids = range(middle) if list(r.layers) == bottom else range(total - middle, total)
        other = replace(r, layers=tuple(ids))
        if fits(other):
            low, made = middle, other
        else:
            high = middle - 1
    if made is None:
        return None
    end = "bottom" if list(r.layers) == bottom else "top"
    return f"{end}:{low} instead of {end}:{n}", made


def fits(r: Request) -> bool:
    """Whether the leanest plan does: far fewer candidates than a search."""
    frozen = r.shape.layers - len(r.layers)
    auto = r.memory.placement == "auto"
    found: Plan | None = search(
        r, streams=(frozen, 0) if auto else None, first=True,
        most_tokens=r.pack_tokens if r.memory.micro_batch_tokens == "auto" else None,
    )  # fmt: skip
    return found is not None


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"
