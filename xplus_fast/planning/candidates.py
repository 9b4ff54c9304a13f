"""What a plan may choose from: every layout that a recipe's pins leave open.

Coarse where choices are many: numbers of streamed layers in strides, micro-batches that divide a
step. Frozen layers stream from the bottom up, since one below all trained layers is needed once in
a step's pass and one above twice.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from xplus_fast.config import MemoryConfig
from xplus_fast.model.families import Shape
from xplus_fast.model.layout import (
    Format,
    LayerLayout,
    Layout,
    Placement,
    Policy,
    UpdateLayout,
)
from xplus_fast.planning.cards import Card
from xplus_fast.planning.flops import Work, assumed_work
from xplus_fast.planning.hidden import Hidden
from xplus_fast.planning.memory import context_bytes, matrices
from xplus_fast.planning.replay import Batch
from xplus_fast.planning.selection import Rotation, resolve_layers

# Formats that "auto" prefers: the loss curve of the demo's model stays within 1 % (docs/memory.md)
FAITHFUL: tuple[Format, ...] = ("bf16", "int8")


TURNS = 16  # of a rotation, over which work and time are averaged


@dataclass(frozen=True)
class Request:
    """One stage and all that bounds its plan."""

    shape: Shape
    layers: tuple[int, ...]
    also: tuple[str, ...]
    memory: MemoryConfig
    card: Card | None  # None: a CPU
    budget: int | None  # bytes on the device; None: unlimited
    host: int | None  # pinned bytes on the host; None: unlimited
    element: int  # bytes of the run's dtype
    pack_tokens: int
    tokens_per_step: int  # of the data, in this process
    work: Work = field(default_factory=lambda: assumed_work(True))  # of such data, in any amount
    formats: tuple[Format, ...] = FAITHFUL  # what "auto" may give frozen layers
    hidden: Hidden | None = None  # what is kept of the layers below
    rotation: Rotation | None = None  # by which `layers` take turns
    processes: int = 1  # this one and others, of which each computes as much
    hooked: bool = False  # somebody wants to see each gradient

    @property
    def at_once(self) -> int | None:
        """How many of the layers train in a step; None: all."""
        return None if self.rotation is None else self.rotation.read(self.shape.layers)[0]

    @cached_property
    def turns(self) -> list[tuple[int, ...]]:
        """What trains in a step: one case, or of a rotation some, for means over them."""
        if self.rotation is None:
            return [self.layers]
        turn, every = self.rotation.turn, self.rotation.every
        return [tuple(turn(self.shape.layers, 0, n * every)) for n in range(TURNS)]

    @property
    def lowest(self) -> int:
        return 0 if "embedding" in self.also else min(self.layers, default=self.shape.layers)

    @property
    def computed_per_step(self) -> int:
        """Tokens of a step that are computed: what sequences share, once."""
        return math.ceil(self.tokens_per_step * self.work.tokens / self.work.data_tokens)

    def batch(self, tokens: int) -> Batch:
        steps = math.ceil(self.computed_per_step / tokens)
        # a step may share less than others, a process's part be larger than another's
        if self.tokens_per_step > tokens or self.processes > 1:
            steps = max(2, steps)
        fp8 = self.card is None or self.card.fp8_gemm
        # of the rows any may predict something: memory is there for all of them
        shared = tokens if self.work.saved else 0
        return Batch(
            tokens, tokens, tokens, self.element, steps, fp8, self.card is not None,
            prefixes=shared, suffixes=shared, exchanged=self.processes > 1, hooked=self.hooked,
        )  # fmt: skip

    @property
    def fp8_dtype(self) -> bool:
        """Whether the run's dtype is one that FP8 GEMMs give: on a GPU, bf16 alone."""
        return self.card is None or self.element == 2

    @property
    def context(self) -> int:
        return context_bytes(self.card.capability) if self.card else 0


def candidates(
    r: Request, streams: tuple[int, ...] | None, free: bool, most_tokens: int | None
) -> Iterator[tuple[Layout, UpdateLayout, int]]:
    """Layouts without policies yet, plain ones first."""
    m, auto = r.memory, free or r.card is not None
    both: tuple[Placement, ...] = ("device", "host")
    aside = not r.shape.tied and "embedding" not in r.also
    heads = ["bf16", "fp8"] if m.head == "auto" and auto else [or_else(m.head, "bf16")]
    if r.shape.tied or "head" in r.also:
        heads = ["bf16"]
    embeddings = (
        both if m.embedding == "auto" and auto and aside else (or_else(m.embedding, "device"),)
    )
    gradients = both if m.gradients == "auto" and auto else (or_else(m.gradients, "device"),)
    if r.processes > 1:
        gradients = ("device",)
    states = both if m.states == "auto" and auto else (or_else(m.states, "device"),)
    frozen = [i for i in range(r.shape.layers) if i not in r.layers]
    if streams is None:
        streams = {"device": (0,), "host": (len(frozen),)}.get(m.placement)
    if streams is None:
        streams = tuple(sorted({*range(0, len(frozen), stride(r)), len(frozen)}))
        streams = streams if auto else (0,)
    for formats in _formats(r, auto):
        for count in streams:
            host = set(frozen[:count])
            kinds: dict[tuple, LayerLayout] = {}
            layers = []
            for i in range(r.shape.layers):
                trains = i in r.layers
                key = (trains, "bf16" if trains else formats[i], i in host)
                if key not in kinds:
                    kinds[key] = LayerLayout(trains, key[1], "host" if key[2] else "device")
                layers.append(kinds[key])
            for head in heads:
                for embedding in embeddings:
                    form: Any = head
                    layout = Layout(tuple(layers), r.also, embedding, form, r.at_once)
                    for gradient in gradients:
                        for state in states:
                            update = UpdateLayout(gradient, state, m.bits, m.master, m.sums)
                            for tokens in micro_batches(r, auto, most_tokens):
                                yield layout, update, tokens


def micro_batches(r: Request, auto: bool, most: int | None) -> list[int]:
    """Tokens of a micro-batch worth trying: the least of each number of micro-batches a step."""
    if r.memory.micro_batch_tokens != "auto":
        return [int(r.memory.micro_batch_tokens)]
    if not auto:
        return [r.pack_tokens]
    rows = math.ceil(r.computed_per_step / r.pack_tokens)
    # micro-batches of one size where there are such: a smaller last one leaves the device idle
    counts = [n for n in range(rows, 0, -1) if rows % n == 0 or n & (n - 1) == 0]
    return [n * r.pack_tokens for n in counts if n * r.pack_tokens <= (most or math.inf)]


def _formats(r: Request, auto: bool) -> list[list[Format]]:
    m, n = r.memory, r.shape.layers
    given: list[str] = [m.frozen] * n if isinstance(m.frozen, str) else ["auto"] * n
    if isinstance(m.frozen, dict):
        for spec, form in m.frozen.items():
            for i in resolve_layers(spec, n):
                given[i] = form
    if "auto" not in given:
        return [given]  # type: ignore[list-item]
    forms = ["bf16"]
    if auto:
        forms = [f for f in r.formats if f != "fp8" or fp8_fits(r.shape) and r.fp8_dtype]
    return [[form if g == "auto" else g for g in given] for form in forms]  # type: ignore[misc]


def fp8_fits(shape: Shape) -> bool:
    """FP8 GEMMs want multiples of 16."""
    return all(rows % 16 == 0 and columns % 16 == 0 for rows, columns in matrices(shape))


def with_policies(layout: Layout, lowest: int, base: Policy, better: Policy, top: int) -> Layout:
    """`base` from the lowest trained layer up, `better` for the top ones; nothing below keeps."""
    made: dict[tuple[int, Policy], LayerLayout] = {}
    layers = []
    for i, layer in enumerate(layout.layers):
        policy: Policy = "keep" if i < lowest else better if i >= len(layout.layers) - top else base
        key = (id(layer), policy)
        if key not in made:
            made[key] = replace(layer, activations=policy)
        layers.append(made[key])
    return replace(layout, layers=tuple(layers))


def or_else(value: Any, otherwise: Any) -> Any:
    return otherwise if value == "auto" else value


def stride(r: Request) -> int:
    """Steps in which numbers of streamed layers are tried before the best is refined."""
    return max(1, math.ceil((r.shape.layers - len(r.layers)) / 6))
