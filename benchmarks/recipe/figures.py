"""What the experiment's results come to: changes from the base with intervals, over all seeds.

A group is a variant at a learning rate, with or without replay: the runs of its seeds. What was
measured of a sequence is averaged over them; intervals are paired bootstraps over sequences
(`xplus_fast.evaluation.verdict`), so that they say nothing about other seeds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xplus_fast.evaluation.verdict import Means, difference

SAMPLES, CONFIDENCE = 400, 0.95
BASE, PROSE = "base", "prose"
ABILITY, TRANSLATION, CHRF = "answers", "translation", "chrf"
Array = NDArray[np.float64]
Key = tuple[str, float, bool]  # variant, learning rate, replay


@dataclass(frozen=True, eq=False)
class Point:
    """A model, or the mean of several seeds' at one scale.

    hits: by task, share of the seeds that answer each question. loss: by text, nats of each
    sequence. statistics: by direction, chrF++'s of each seed, [seeds, sentences, n]; or none.
    """

    hits: dict[str, Array]
    loss: dict[str, Array]
    statistics: dict[str, Array]


@dataclass(frozen=True, eq=False)
class Results:
    """tokens: by text, of each sequence. curves: group -> scale -> the mean of its seeds."""

    base: Point
    tokens: dict[str, Array]
    curves: dict[Key, dict[float, Point]]
    seeds: dict[Key, int]
    single: dict[Key, list[Point]]  # each seed's, all of its change taken

    @property
    def directions(self) -> list[str]:
        return [text for text in self.tokens if text != PROSE]

    def gain(self, point: Point) -> float:
        """Nats a token taken off the loss of held-out translations, the mean of directions."""
        off = [(self.base.loss[t] - point.loss[t]).sum() / self.tokens[t].sum()
               for t in self.directions]  # fmt: skip
        return float(np.mean(off))

    def most(self) -> float:
        """The largest gain of any group at any scale."""
        return max(self.gain(p) for curve in self.curves.values() for p in curve.values())

    def at_gain(self, key: Key, gain: float) -> Point | None:
        """Where a group's curve first has this gain, between two points in proportion; or None."""
        before = self.base
        for _, point in sorted(self.curves[key].items()):
            low, high = self.gain(before), self.gain(point)
            if high >= gain > low:
                return _between(before, point, (gain - low) / (high - low))
            before = point
        return None

    @cache  # noqa: B019 - a report's few points
    def changes(self, point: Point) -> dict[str, dict[str, Any]]:
        """What `verdict.Means` tells: by kind change, low, high, verdict; a rise is a gain.

        Answers in points of 100, translation and prose in nats a token taken off, chrF++ in points.
        """
        means = Means(CONFIDENCE)
        for task, hits in point.hits.items():
            self._add(means, ABILITY, _mean(100 * self.base.hits[task]), _mean(100 * hits),
                      len(hits))  # fmt: skip
        for text, tokens in self.tokens.items():
            kind = PROSE if text == PROSE else TRANSLATION
            was, now = (_rate(p.loss[text], tokens) for p in (self.base, point))
            self._add(means, kind, was, now, len(tokens), falling=True)
        for tag, statistics in point.statistics.items():
            was, now = (_chrf(s) for s in (self.base.statistics[tag], statistics))
            self._add(means, CHRF, was, now, statistics.shape[1])
        return means.told()

    @staticmethod
    def _add(
        means: Means, kind: str, was: Callable, now: Callable, count: int, *, falling: bool = False
    ) -> None:
        found = difference(was, now, count, samples=SAMPLES, confidence=CONFIDENCE, seed=0)
        means.add(kind, found.change, found, falling=falling)


def read(result: dict[str, Any]) -> Results:
    """result: as the experiment writes it."""
    runs = dict(result["runs"])
    base, asked = runs.pop(BASE), result["tasks"]
    tokens = {text: np.array(n, float) for text, n in base["tokens"].items()}
    groups: dict[Key, list[dict[str, Any]]] = {}
    for run in runs.values():
        groups.setdefault((run["variant"], run["rate"], run["replay"]), []).append(run["points"])
    curves = {
        key: {float(s): _mean_of([points[s] for points in seeds], asked) for s in seeds[0]}
        for key, seeds in groups.items()
    }
    single = {k: [_mean_of([p["1"]], asked) for p in seeds] for k, seeds in groups.items()}
    return Results(
        _mean_of([base], asked), tokens, curves, {k: len(v) for k, v in groups.items()}, single
    )


def _mean_of(points: Sequence[dict[str, Any]], asked: Sequence[str]) -> Point:
    return Point(
        {t: np.mean([[int(x) for x in p["hits"][t]] for p in points], axis=0) for t in asked},
        {t: np.mean([p["loss"][t] for p in points], axis=0) for t in points[0]["loss"]},
        {t: np.array([p["chrf"][t] for p in points], float) for t in points[0].get("chrf", {})},
    )


def _between(a: Point, b: Point, share: float) -> Point:
    def mixed(x: dict[str, Array], y: dict[str, Array]) -> dict[str, Array]:
        return {t: (1 - share) * x[t] + share * y[t] for t in y}

    return Point(mixed(a.hits, b.hits), mixed(a.loss, b.loss), {})


def _mean(values: Array) -> Callable:
    return lambda chosen: float(values[chosen].mean())


def _rate(loss: Array, tokens: Array) -> Callable:
    return lambda chosen: float(loss[chosen].sum() / tokens[chosen].sum())


def _chrf(statistics: Array) -> Callable:
    from sacrebleu.metrics import CHRF

    metric = CHRF(word_order=2)

    def scored(chosen: NDArray[np.intp]) -> float:
        scores = [metric._compute_score_from_stats(seed[chosen].sum(0).tolist()).score
                  for seed in statistics]  # fmt: skip
        return float(np.mean(scores))

    return scored
