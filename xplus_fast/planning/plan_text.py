"""A plan as a user reads it."""

import json
import math

from xplus_fast.config import Recipe
from xplus_fast.model.families import Shape
from xplus_fast.model.layout import LayerLayout
from xplus_fast.planning.flops import (
    ANSWER,
    PROMPT,
    SENTENCE,
    below_flops,
    total_parameters,
    trained_parameters,
)
from xplus_fast.planning.from_recipe import Where, plan_recipe
from xplus_fast.planning.hidden import describe_hidden
from xplus_fast.planning.memory import MARGIN, context_bytes
from xplus_fast.planning.plan import to_dict
from xplus_fast.planning.search import Plan
from xplus_fast.planning.selection import describe_layers

BAR = 32  # characters of the longest


def plan_text(
    recipe: Recipe, *, budget: str, card: str, host: str, processes: int, as_json: bool
) -> str:
    """A recipe's plans, or for programs as JSON; the options are `plan_recipe`'s, which raises."""
    shape, where, plans = plan_recipe(
        recipe, budget=budget, card=card, host=host, processes=processes
    )
    if not as_json:
        return describe(recipe.model, shape, where, plans)
    stages = [{"name": name, **to_dict(plan)} for name, plan in plans]
    return json.dumps({"model": recipe.model, "stages": stages}, indent=2)


def describe(
    model: str, shape: Shape, where: Where, plans: list[tuple[str, Plan]], *, whole: bool = True,
    known: bool = False,
) -> str:  # fmt: skip
    """All stages, ready to print; not `whole`: what trains alone; known: the data were read."""
    lines = [
        f"{model}: {shape.family}, {shape.layers} layers, {total_parameters(shape):,} parameters"
    ]
    if not whole:
        return "\n".join([*lines, *(describe_stage(name, plan)[0] for name, plan in plans)])
    lines.append(_place(where))
    if where.assumed:
        lines.append(where.assumed)
    for name, plan in plans:
        lines += ["", *describe_stage(name, plan)]
    lines += ["", _footnote(where, known)]
    return "\n".join(lines)


def describe_stage(name: str, plan: Plan) -> list[str]:
    """One stage's lines."""
    r, update, layout = plan.request, plan.update, plan.layout
    count = trained_parameters(r.shape, r.layers, r.also)
    trained = ", ".join((f"layers {describe_layers(r.layers)}", *r.also))
    if r.rotation is not None:
        trained += f", {r.at_once} at a time, others every {r.rotation.every} steps"
    lines = [
        f"{name}: trains {trained} ({len(r.layers)} of {r.shape.layers} layers), {count:,}"
        f" parameters ({count / total_parameters(r.shape):.1%})"
    ]
    speed = plan.predicted_tokens_per_s
    alone = "each " if r.processes > 1 else ""
    if speed is not None and r.card is not None:
        lines.append(
            _row("speed", f"{_round(speed)} tokens/s predicted on {alone}{r.card.name},"
                 f" {r.tokens_per_step / speed:.1f} s a step")
        )  # fmt: skip
    again = plan.recompute_flops_per_token
    share = f", and {again / 1e9:.1f} recomputed (+{again / plan.flops_per_token:.0%})"
    lines.append(
        _row("work", f"{plan.flops_per_token / 1e9:.1f} GFLOP a token necessary"
             + (share if again else ", nothing recomputed"))
    )  # fmt: skip
    steps = math.ceil(r.computed_per_step / plan.micro_batch_tokens)
    batches = f"{steps} micro-batches" if steps > 1 else "1 micro-batch"
    each = f" for each of {r.processes} processes" if r.processes > 1 else ""
    once = f" ({r.computed_per_step:,} computed: prompts once)" if r.work.saved else ""
    lines.append(
        _row("step", f"{r.tokens_per_step:,} tokens{each}{once} in {batches} of up to"
             f" {plan.micro_batch_tokens:,}")
    )  # fmt: skip
    if r.hidden is not None:
        lines.append(_row("kept", describe_hidden(r.hidden)))
        spared = below_flops(r.shape, r.work, r.hidden.level) / r.work.data_tokens
        less = (plan.flops_per_token - spared) / 1e9
        lines.append(
            _row("", f"what enters layer {r.hidden.level}; {less:.1f} GFLOP a token where it is"
                 " there already")
        )  # fmt: skip
        if r.hidden.bytes is None:
            lines.append(_row("", "`train --dry-run` reads the data, and says how many GB"))
    for i, (ids, what) in enumerate(_ranges(plan)):
        lines.append(_row("layers" if not i else "", f"{ids:<8} {what}"))
    plain = "fp32" if r.element == 4 else "bf16"
    head = "fp8" if layout.head == "fp8" else plain
    if r.shape.tied:
        lines.append(_row("embedding", f"on the device, {plain}; it is the head, too"))
    else:
        lines.append(
            _row("embedding", f"on the {layout.embedding}, {plain}; head on the device, {head}")
        )
    moments = "fp32 states" if update.bits == 32 else "8-bit states"
    master = wide = ""
    if r.element == 2:
        wide = " summed in fp32" if update.sums == 32 else ""
        master = ", fp32 master weights" if update.master else ", stochastic rounding"
    lines.append(
        _row("update", f"gradients{wide} on the {update.gradients}; {moments}{master} on the"
             f" {update.states}")
    )  # fmt: skip
    limit = "" if r.budget is None else f" of {_gb(r.budget).strip()}"
    lines += ["", f"  device at its peak: {_gb(plan.device_total).strip()}{limit} GB"]
    lines += _bars(plan.device_bytes)
    if plan.host_total:
        limit = "" if r.host is None else f" of {_gb(r.host).strip()}"
        lines += [f"  pinned on the host: {_gb(plan.host_total).strip()}{limit} GB"]
        lines += _bars(plan.host_bytes)
    if plan.notes:
        lines += ["", *(f"  * {note}" for note in plan.notes)]
    return lines


def policies(plan: Plan) -> str:
    """What layers keep for the backward: "21-30 recompute, 31-35 keep"."""
    kept: dict[str, list[int]] = {}
    for i, layer in list(enumerate(plan.layout.layers))[plan.request.lowest :]:
        kept.setdefault(layer.activations, []).append(i)
    return ", ".join(f"layers {describe_layers(ids)} {policy}" for policy, ids in kept.items())


def _ranges(plan: Plan) -> list[tuple[str, str]]:
    """Neighbouring layers that are alike, from the bottom."""
    lowest = plan.request.lowest
    found: list[tuple[list[int], str]] = []
    plain = "fp32" if plan.request.element == 4 else "bf16"
    for i, layer in enumerate(plan.layout.layers):
        what = _layer(layer, i < lowest, plain)
        if found and found[-1][1] == what:
            found[-1][0].append(i)
        else:
            found.append(([i], what))
    return [(describe_layers(ids), what) for ids, what in found]


def _layer(layer: LayerLayout, prefix: bool, plain: str) -> str:
    form = plain if layer.format == "bf16" else layer.format
    what = f"trained {plain}" if layer.trains else f"frozen {form}"
    what += ", streamed" if layer.placement == "host" and not layer.trains else ""
    return what + (": forward only" if prefix else f": {layer.activations}")


def _bars(sizes: dict[str, int]) -> list[str]:
    most = max(sizes.values())
    return [
        f"    {name:<19}{_gb(size)}  {'#' * round(BAR * size / most)}".rstrip()
        for name, size in sorted(sizes.items(), key=lambda item: -item[1])
        if size >= 5e6 or most < 5e8 and size
    ]


def _place(where: Where) -> str:
    if where.card is None:
        return "no GPU found and none named: planned for a CPU, unquantized, all kept (see --card)"
    return f"{where.card.name}, {_gb(where.card.memory).strip()} GB"


def _footnote(where: Where, known: bool) -> str:
    lines = ["GB = 10^9 bytes."]
    if where.card is not None:
        lines = [
            "GB = 10^9 bytes. All predicted from data sheets, not measured. Assumed:"
            f" {context_bytes(where.card.capability) / 1e9:.1f} GB for CUDA itself,",
            f"{MARGIN:.0%} lost between allocations.",
        ]
    if not known:
        lines[-1] += f" The data are taken for sentences of {SENTENCE} tokens,"
        lines.append(
            f"{ANSWER} of them supervised, {PROMPT} of a prompt that is computed once (if"
            " data.shared_prompts)."
        )
    return "\n".join(lines)


def _row(name: str, text: str) -> str:
    return f"  {name:<10} {text}"


def _gb(size: float) -> str:
    digits = 1 if size >= 1e11 else 2 if size >= 1e8 else 4
    return f"{size / 1e9:7.{digits}f}"


def _round(x: float) -> str:
    """Two digits: the rates behind it are no better."""
    return f"{round(x, 1 - math.floor(math.log10(x))):,.0f}"
