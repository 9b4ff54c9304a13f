"""Which layers train: "bottom:4", "top:15", "0-3,30-35", "-15:", [0, 1, 2] -> layer ids."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from xplus_fast.errors import UserError
from xplus_fast.options import Count

FORMS = "bottom:4, top:15, all, 0-3,30-35 (both ends included), -15: (a Python slice), [0, 1, 2]"


@dataclass(frozen=True)
class Rotation:
    """Layers that take turns (LISA, Pan et al. 2024, arXiv 2403.17919)."""

    rotate: str  # how many at a time, of which: "2 of 0-35"
    every: Count  # steps of a turn

    def read(self, layers: int) -> tuple[int, list[int]]:
        """How many train at a time, and of which ids. Raises `UserError`."""
        found = re.fullmatch(r"\s*([0-9]{1,4})\s+of\s+(.+)", self.rotate)
        if not found:
            raise UserError(f"layers.rotate: {self.rotate!r:.60}; such as '2 of 0-35' is wanted")
        count, ids = int(found[1]), resolve_layers(found[2], layers)
        if not 1 <= count < len(ids):
            raise UserError(
                f"layers.rotate: {count} at a time of {len(ids)} layers; from 1 to {len(ids) - 1}"
                " take turns, and all at once need no rotation"
            )
        return count, ids

    def turn(self, layers: int, seed: int, step: int) -> list[int]:
        """The ids that train in a step, from 0: drawn for each turn, by its number and the seed."""
        import numpy as np  # a plan is made in a second, most of them without turns

        count, ids = self.read(layers)
        rng = np.random.default_rng([seed, step // self.every])
        return sorted(int(i) for i in rng.choice(ids, count, replace=False))


def resolve_layers(spec: str | int | Sequence[int] | Rotation, layers: int) -> list[int]:
    """Layer ids, ascending, of a selection from `layers` layers; 0 is next to the embedding.

    Comma-separated parts are joined: "bottom:4,top:8". Of a rotation: all that take turns.

    Raises:
        UserError: a form that is not known, an id out of range, a layer named twice, or none at
        all.
    """
    ids: list[int] = []
    if isinstance(spec, Rotation):
        return spec.read(layers)[1]
    spec = [spec] if isinstance(spec, int) else spec
    if isinstance(spec, str):
        for part in spec.split(","):
            ids += _part(part.strip(), layers, spec)
            if len(ids) > layers:
                break  # one is named twice
    else:
        for i in spec:
            if isinstance(i, bool) or not isinstance(i, int):
                raise UserError(f"layers: {i!r} is not a layer id; known forms: {FORMS}")
        ids = [i + layers if -layers <= i < 0 else i for i in spec]
    for i in ids:
        if not 0 <= i < layers:
            raise UserError(f"layers: {i} is out of range: the model has layers 0 to {layers - 1}")
    if twice := [i for i, n in Counter(ids).items() if n > 1]:
        raise UserError(f"layers: layer {min(twice)} is named twice in {spec!r}")
    if not ids:
        raise UserError(f"layers: {spec!r} selects no layer of 0 to {layers - 1}")
    return sorted(ids)


def learning_rates(
    asked: float | Mapping[str, float], decay: float, ids: Sequence[int], also: Collection[str],
    layers: int,
) -> dict[str, float]:  # fmt: skip
    """The learning rate of each layer that trains ("21") and of what trains beside them ("head").

    asked: one for all, or by layers and names. decay: of a layer, from the next above it that
    trains. ids, also: what trains. Raises `UserError` for what has none, two, or does not train.
    """
    places = [str(i) for i in ids] + list(also)
    if not isinstance(asked, Mapping):
        top = len(ids) - 1
        return {p: asked * decay ** max(0, top - n) if n < len(ids) else asked
                for n, p in enumerate(places)}  # fmt: skip
    found: dict[str, float] = {}
    for what, rate in asked.items():
        named = [what] if what in also else [str(i) for i in resolve_layers(what, layers)]
        for place in named:
            if place not in places:
                raise UserError(f"learning_rate: {place}, of {what!r}, does not train")
            if place in found:
                raise UserError(
                    f"learning_rate: {place} is given two rates, the second by {what!r}"
                )
            found[place] = rate
    if missing := [place for place in places if place not in found]:
        raise UserError(f"learning_rate: no rate is given for {', '.join(missing)}")
    return found


def describe_layers(ids: Sequence[int]) -> str:
    """[0, 1, 2, 3, 35] -> "0-3,35", which `resolve_layers` reads back."""
    runs: list[list[int]] = []
    for i in sorted(ids):
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def _part(part: str, layers: int, spec: str) -> list[int]:
    if part == "all":
        return list(range(layers))
    if m := re.fullmatch(r"(bottom|top):([0-9]{1,9})", part):
        n = int(m[2])
        if not 1 <= n <= layers:
            raise UserError(
                f"layers: {part}: the model has {layers} layers, 1 to {layers} are wanted"
            )
        return list(range(n)) if m[1] == "bottom" else list(range(layers - n, layers))
    if m := re.fullmatch(r"([0-9]{1,9})-([0-9]{1,9})", part):
        if int(m[1]) > int(m[2]):
            raise UserError(f"layers: {part}: the range runs backwards")
        if int(m[2]) >= layers:
            raise UserError(
                f"layers: {part} is out of range: the model has layers 0 to {layers - 1}"
            )
        return list(range(int(m[1]), int(m[2]) + 1))
    if m := re.fullmatch(r"(-?[0-9]{0,9}):(-?[0-9]{0,9})", part):
        for end in m.groups():
            if end not in ("", "-") and not -layers <= int(end) <= layers:
                raise UserError(
                    f"layers: {part} is out of range: the model has layers 0 to {layers - 1}"
                )
        if "-" not in m.groups():
            return list(range(layers))[slice(*(int(e) if e else None for e in m.groups()))]
    if re.fullmatch(r"-?[0-9]{1,9}", part):
        i = int(part)
        return [i + layers if -layers <= i < 0 else i]
    raise UserError(f"layers: {part!r} in {spec!r} is no selection; known forms: {FORMS}")
