"""What a finished run changed, and as much of it as is asked for.

A stage took each tensor that it trains from what it was to what it became, in fp32 where it has
masters: base + scale * change is a model at any scale, and each stage and layer may have a scale of
its own. It is computed in fp32 and rounded once, by whoever stores it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xplus_fast import __version__
from xplus_fast.config import stage_name
from xplus_fast.errors import UserError
from xplus_fast.model.checkpoint_files import CheckpointFiles, read_entry, resolve_model
from xplus_fast.model.families import BESIDE, layer_of, place_of, shape_of, stage_shapes
from xplus_fast.model.pretrained import load_config
from xplus_fast.planning.selection import resolve_layers
from xplus_fast.training.checkpoints import FINAL, Final
from xplus_fast.training.run_folder import read_recipe

MOST = 1.5  # of a scale: beyond it nothing is known of the model
MOST_POINTS = 100  # of a curve
NUMBER = r"[0-9]{1,9}(?:\.[0-9]{0,12})?|\.[0-9]{1,12}"


@dataclass(frozen=True)
class Scales:
    """How much of a change is wanted, 1 for all of it: by layer, else by stage, else of all."""

    everything: float = 1.0
    stages: Mapping[str, float] = field(default_factory=dict)
    places: Mapping[str, float] = field(default_factory=dict)  # by what `place_of` calls them

    def of(self, stage: str, name: str) -> float:
        """What a stage's change of a tensor is multiplied by."""
        return self.places.get(place_of(name), self.stages.get(stage, self.everything))


class Changes(Mapping[str, Tensor]):
    """The tensors that a run changed, by Hugging Face name; each is read when it is asked for.

    base: the folder of its base model. record: what an export tells of it. Tensors that a scale of
    0 leaves as they were are not among them.
    """

    def __init__(self, run: Path) -> None:
        """Raises `UserError` where the run is not there, not finished or damaged."""
        recipe = read_recipe(run)
        self.run, self.base = run, (base := resolve_model(recipe.model))
        self._files = CheckpointFiles.open(base)
        self._shape = shape_of(load_config(self.base))
        self._stages: dict[str, Final] = {}
        self._layers: dict[str, list[int]] = {}
        self._also: dict[str, list[str]] = {}
        checksums = []
        for i, stage in enumerate(recipe.stages):
            name = stage_name(recipe, i)
            folder = run / name / FINAL
            if not folder.exists():
                raise UserError(
                    f"{run}: stage {name} is not finished; start its recipe again first"
                )
            self._layers[name] = resolve_layers(stage.layers, self._shape.layers)
            self._also[name] = list(stage.also)
            shapes = stage_shapes(self._shape, self._layers[name], stage.also)
            self._stages[name] = Final(folder, name, shapes)
            checksums.append(self._stages[name].checksum)
        self._told = {
            "base": recipe.model,
            "stages": [{"name": n, "layers": ids} for n, ids in self._layers.items()],
            "checksums": checksums,  # of the stages' tensors, as trained
            "xplus_fast": __version__,
        }
        self._scale("", Scales())

    def _scale(self, text: str, scales: Scales) -> None:
        self._asked, self._scales = text, scales
        # a dict, for it is asked for names often
        self._names = dict.fromkeys(n for n in self.trained if any(s for s, _ in self._parts(n)))

    def at(self, text: str, option: str = "--scale") -> "Changes":
        """The same changes at other scales, such as "0.7", "stage-1=1,stage-2=0.5", "21-28=0.5".

        A number stands for all that is not named. Raises `UserError`, which names the `option`, for
        what cannot be read, stages that do not exist and layers in which nothing was trained.
        """
        made = object.__new__(Changes)
        made.__dict__ |= self.__dict__
        made._scale(text, self.read_scales(text, option))
        return made

    def read_scales(self, text: str, option: str) -> Scales:
        """See `at`."""
        everything, stages, places = None, {}, {}
        for part in text.split(","):
            what, equals, number = part.strip().rpartition("=")
            scale = _number(number.strip(), option, part)
            what = what.strip()
            if not equals:
                if everything is not None:
                    raise UserError(f"{option}: {text!r} has two scales for everything")
                everything = scale
            elif what in self._stages:
                if what in stages:
                    raise UserError(f"{option}: {what} is named twice in {text!r}")
                stages[what] = scale
            else:
                for place in self._places(what, option):
                    if place in places:
                        raise UserError(f"{option}: {place} is named twice in {text!r}")
                    places[place] = scale
        return Scales(1.0 if everything is None else everything, stages, places)

    def _places(self, what: str, option: str) -> list[str]:
        if what in BESIDE:
            found = ["embedding" if what == "head" and self._shape.tied else what]
        else:
            try:
                found = [str(i) for i in resolve_layers(what, self._shape.layers)]
            except UserError as e:
                names = ", ".join(self._stages)
                raise UserError(
                    f"{option}: {what!r} is no stage of {self.run} ({names}) and no layers ({e})"
                ) from None
        trained = set(map(place_of, self.trained))
        if strange := [place for place in found if place not in trained]:
            kind = "" if what in BESIDE else "layer "
            raise UserError(f"{option}: {kind}{strange[0]} of {what!r} was not trained")
        return found

    @property
    def trained(self) -> list[str]:
        """What any stage trained, whatever its scale."""
        return list(dict.fromkeys(name for final in self._stages.values() for name in final))

    @property
    def dtypes(self) -> set[torch.dtype]:
        """In which the weights of its stages trained."""
        found = set()
        for final in self._stages.values():
            found |= {final.dtype or e.dtype for n, e in final.entries.items() if n in self._names}
        return found

    @property
    def record(self) -> dict[str, Any]:
        """JSON-able: what an export notes beside the names of its tensors."""
        mine = {n for n, entries in self._stages.items() if set(entries) & set(self._names)}
        layers = {i for name in self._names if (i := layer_of(name)) is not None}
        also = {kind for name in mine for kind in self._also[name]}
        told = {**self._told, "layers": sorted(layers), "also": sorted(also)}
        scaled = any(s != 1 for name in self.trained for s, _ in self._parts(name))
        return told | ({"scale": self._asked} if scaled else {})

    def __getitem__(self, name: str) -> Tensor:
        """On the CPU: as the run left it, or in fp32 where it is scaled."""
        if name not in self._names:
            raise KeyError(name)
        parts = self._parts(name)
        ones = [s for s, _ in parts if s]
        # the first stages whole and no more of it: just what they left
        if all(s == 1 for s in ones) and all(s for s, _ in parts[: len(ones)]):
            final = self._stages[parts[len(ones) - 1][1]]
            return final[name].to(final.dtype or final.entries[name].dtype)
        before = self.base_tensor(name)
        made = before.clone()
        for scale, stage in parts:
            after = self._stages[stage][name].float()
            made += scale * (after - before)
            before = after
        return made

    def base_tensor(self, name: str) -> Tensor:
        """What a tensor was before the run, on the CPU, fp32."""
        entry = self._files.entries[name]
        read_entry(entry, made := torch.empty(entry.shape))
        return made

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _parts(self, name: str) -> list[tuple[float, str]]:
        """(scale, stage) of each stage that trained a tensor, in their order."""
        stages = [stage for stage, entries in self._stages.items() if name in entries]
        return [(self._scales.of(stage, name), stage) for stage in stages]


def _number(text: str, option: str, part: str) -> float:
    if not re.fullmatch(NUMBER, text) or float(text) > MOST:
        raise UserError(
            f"{option}: {part.strip()!r}: a scale from 0 to {MOST} is wanted, as in 0.7,"
            " stage-2=0.5 or 21-28=0.5"
        )
    return float(text)


def grid(options: Sequence[str]) -> list[str]:
    """--scales, given once or by stage or layers, as the scales of each point.

    ["0,0.5,1"] -> 0, 0.5, 1; ["stage-1=0,1", "stage-2=0,0.5,1"] -> their six combinations.
    Raises `UserError` for what cannot be read.
    """
    points = [""]
    for option in options:
        what, equals, values = option.rpartition("=")
        numbers = [number.strip() for number in values.split(",")]
        found = [_number(number, "--scales", option) for number in numbers]
        if len(set(found)) != len(found):
            raise UserError(f"--scales: {option!r:.60} names a scale twice")
        if len(points) * len(numbers) > MOST_POINTS:
            raise UserError(
                f"--scales: more than {MOST_POINTS} points, which are evaluated at most"
            )
        here = [f"{what.strip()}{equals}{number}" for number in numbers]
        points = [f"{before},{one}".lstrip(",") for before in points for one in here]
    return points
