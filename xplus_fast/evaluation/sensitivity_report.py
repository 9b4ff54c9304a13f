"""What a pass of `sensitivity` says: scores with intervals, selections for a budget, a picture.

Intervals are by bootstrap over the rows: the same figures of as many rows drawn with replacement,
again and again. They say what other rows of the same data would change, nothing about other data.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xplus_fast.errors import UserError
from xplus_fast.evaluation.sensitivity import PARTS, Sensitivity
from xplus_fast.files import write_json, write_picture
from xplus_fast.planning.from_recipe import read_shape
from xplus_fast.planning.memory import layer_parameters
from xplus_fast.planning.selection import describe_layers

RESAMPLES = 1000
LEVEL = 0.95  # of an interval
COLORS = {"attention": "#1f6f8b", "mlp": "#c8553d", "norms": "#8a8f98"}


def parse_parameters(text: str) -> int:
    """ "3B" -> 3e9, "250M", "900K", "14160384"."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([KMB]?)", text.strip(), re.IGNORECASE)
    count = float(found[1]) * 1000 ** " KMB".index(found[2].upper() or " ") if found else 0
    if not count:
        raise UserError(f"--budget: parameters such as 3B or 250M are wanted, not {text!r:.60}")
    return round(count)


def layers_of(budget: int, layers: int, each: int) -> int:
    """How many layers of `each` parameters a budget holds. Raises `UserError` if none."""
    if budget < each:
        raise UserError(f"--budget: {budget:,} parameters are fewer than one layer has, {each:,}")
    return min(layers, budget // each)


def check_budget(model: str, text: str | None) -> int | None:
    """The budget in parameters, before anything is loaded.

    Raises `UserError` for one that is no number or too small, and for a model that is not there.
    """
    shape = read_shape(model)
    if text is None:
        return None
    budget = parse_parameters(text)
    layers_of(budget, shape.layers, layer_parameters(shape))
    return budget


def summarize(seen: Sensitivity, about: dict[str, Any], *, budget: int | None) -> dict[str, Any]:
    """All figures, JSON-able.

    Without a budget, "top k" is a quarter of the layers and nothing is proposed. With a single
    row there are no intervals: they are null.
    """
    count, each = about["layers"], about["layer_parameters"]
    k = max(1, count // 4) if budget is None else layers_of(budget, count, each)
    by_layer = seen.squares.sum(2)  # [B, L]
    fisher, whole = by_layer.mean(0), float(by_layer.sum(1).mean())
    pulls = np.sqrt(seen.squares).mean(0) / seen.weights  # [L, P]
    own = np.sqrt(by_layer).mean(0) / np.sqrt((seen.weights**2).sum(1))  # [L]
    ranks = _ranks(fisher)
    intervals, stability = bootstrap(by_layer, k)
    layers = []
    for i in range(count):
        parts = {
            part: {
                "gradient": float(pulls[i, p]),
                "fisher": float(seen.squares[:, i, p].mean()),
                "weight_norm": float(seen.weights[i, p]),
            }
            for p, part in enumerate(PARTS)
        }
        layers.append(
            {
                "layer": i,
                "gradient": float(own[i]),
                "fisher": float(fisher[i]),
                "share": float(fisher[i] / whole),
                "rank": int(ranks[i]) + 1,
                **{name: values[i] for name, values in intervals.items()},
                "parts": parts,
            }
        )
    return {
        **about,
        "formulas": {
            "gradient": "mean over rows of |g| / |w|",
            "fisher": "mean over rows of |g|^2; g of a row's mean loss, not of each example's",
        },
        "top": k,
        "stability": stability,
        "table": layers,
        "budget": budget,
        "proposals": [] if budget is None else propose(fisher, k, each),
    }


def bootstrap(scores: np.ndarray, k: int) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Intervals by layer, and how stable the ranking is.

    scores: [B, L], of each row. k: whose membership of the first k is counted.

    Returns by layer `share_interval`, `rank_interval` and `in_top` (share of the resamples), and
    `rank_correlation`: Spearman's, of a resample with all rows, its median and interval.
    """
    rows, count = scores.shape
    about: dict[str, Any] = {"rows": rows, "resamples": RESAMPLES, "level": LEVEL}
    if rows < 2:
        nothing: list[Any] = [None] * count
        names = ("share_interval", "rank_interval", "in_top")
        return dict.fromkeys(names, nothing), {**about, "rank_correlation": None}
    drawn = np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), RESAMPLES)
    means = drawn @ scores / rows  # [RESAMPLES, L]
    shares = means / means.sum(1, keepdims=True)
    ranks, true = _ranks(means), _ranks(scores.mean(0))
    low, high = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    share_ends = np.quantile(shares, (low, high), axis=0).T
    rank_ends = np.quantile(ranks, (low, high), axis=0, method="nearest").T + 1
    # without ties, Spearman's is 1 - 6 sum d^2 / (L (L^2 - 1))
    distance = ((ranks - true) ** 2).sum(1)
    correlation = 1 - 6 * distance / max(1, count * (count**2 - 1))
    middle, *ends = np.quantile(correlation, (0.5, low, high)).tolist()
    return (
        {
            "share_interval": share_ends.tolist(),
            "rank_interval": rank_ends.astype(int).tolist(),
            "in_top": (ranks < k).mean(0).tolist(),
        },
        {**about, "rank_correlation": {"median": middle, "interval": ends}},
    )


def propose(scores: np.ndarray, k: int, each: int) -> list[dict[str, Any]]:
    """Selections of k layers, as recipes take them, with their share of the total score.

    scores: [L]. The lowest and highest k, the contiguous run and the two ends of highest score,
    and the k layers of highest score wherever they lie (which for a sum is what a greedy search
    finds, and the most there is).
    """
    count = len(scores)
    runs = [(float(scores[i : i + k].sum()), -i) for i in range(count - k + 1)]
    start = -max(runs)[1]
    found = {
        "lowest layers": list(range(k)),
        "highest layers": list(range(count - k, count)),
        "best contiguous": list(range(start, start + k)),
    }
    splits = [  # a at the bottom, the others at the top
        (float(scores[:a].sum() + scores[count - k + a :].sum()), -a) for a in range(1, k)
    ]
    if splits and k < count:
        a = -max(splits)[1]
        found["best two ends"] = [*range(a), *range(count - k + a, count)]
    found["best of all"] = sorted(np.argsort(-scores, kind="stable")[:k].tolist())
    total = float(scores.sum())
    return [
        {
            "how": how,
            "layers": _spec(ids, count),
            "ids": ids,
            "parameters": k * each,
            "share": float(scores[ids].sum()) / total,
        }
        for how, ids in found.items()
    ]


def describe(result: dict[str, Any]) -> str:
    """The figures for a terminal."""
    rows, level = result["rows"], f"{result['stability']['level']:.0%}"
    fewer = "" if rows["used"] == rows["asked"] else f" ({rows['asked']} asked for)"
    sampled = result["stability"]["rank_correlation"]
    lines = [
        f"{result['model']}: {result['layers']} layers of {result['layer_parameters']:,}"
        f" parameters, {result['dtype']}, {result['device']}",
        f"{rows['used']} rows{fewer} of {rows['there']}, {result['tokens']:,} tokens,"
        f" {result['supervised']:,} supervised, loss {result['loss']:.3f},"
        f" {result['seconds']:.0f} s",
        "",
        "       |g| / |w|, mean over rows             Fisher score",
        f"layer  attention       mlp     norms   share  ({level})         rank  ({level})"
        f"  in top {result['top']}",
    ]
    for found in result["table"]:
        pulls = "".join(f"{found['parts'][part]['gradient']:10.2e}" for part in PARTS)
        share, rank = "", ""
        if sampled:
            a, b = found["share_interval"]
            share = f"({100 * a:4.1f} to {100 * b:4.1f})"
            a, b = found["rank_interval"]
            rank = f"({a} to {b})"
        top = f"{found['in_top']:9.0%}" if sampled else ""
        score = f"{100 * found['share']:4.1f} % {share:14}  {found['rank']:4d}  {rank:10}{top}"
        lines.append(f"{found['layer']:5d} {pulls}  {score}".rstrip())
    lines += ["", _stability(result)]
    if not result["proposals"]:
        lines.append("--budget 3B (parameters) proposes selections")
    for i, found in enumerate(result["proposals"]):
        if not i:
            size = f"{found['parameters']:,} parameters"
            lines += ["", f"selections of {result['top']} layers, {size}"]
        lines.append(
            f"  {found['how']:16} {100 * found['share']:5.1f} % of the score   layers:"
            f" {found['layers']}"
        )
    return "\n".join(lines)


def draw(result: dict[str, Any], file: Path) -> None:
    """Fisher shares stacked by part with their intervals; below, relative gradient norms."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    table = result["table"]
    x, total = np.arange(len(table)), sum(found["fisher"] for found in table)
    figure = Figure(figsize=(max(8.0, 0.32 * len(x) + 2), 6.6), dpi=130, layout="constrained")
    top, low = figure.subplots(2, 1, sharex=True)
    at = np.zeros(len(x))
    for part in PARTS:
        shares = np.array([found["parts"][part]["fisher"] for found in table]) / total
        top.bar(x, shares, 0.8, bottom=at, color=COLORS[part], label=part)
        at += shares
        pulls = [found["parts"][part]["gradient"] for found in table]
        low.plot(x, pulls, "o-", ms=5, lw=1, color=COLORS[part])
    if result["stability"]["rank_correlation"]:
        ends = np.array([found["share_interval"] for found in table]).T
        away = np.maximum(0, np.stack([at - ends[0], ends[1] - at]))
        top.errorbar(x, at, away, fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
    level = f"{result['stability']['level']:.0%}"
    top.set_title(
        f"Fisher score: share of all layers; bars are stacked, whiskers {level} over rows",
        loc="left", fontsize=11,
    )  # fmt: skip
    top.yaxis.set_major_formatter(PercentFormatter(1.0))
    top.legend(frameon=False, ncols=len(PARTS))
    low.set_title("gradient norm relative to weight norm (log scale)", loc="left", fontsize=11)
    low.set_yscale("log")
    low.set_xlabel("layer: 0 is next to the embedding")
    low.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))
    for axes in (top, low):
        axes.grid(axis="y", color="#e4e8ec", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    low.margins(x=0.01)
    write_picture(file, figure)


def write(result: dict[str, Any], out: Path) -> list[Path]:
    """`sensitivity.json` and `sensitivity.png` in `out`. Raises `UserError` for a full disk."""
    files = [out / "sensitivity.json", out / "sensitivity.png"]
    write_json(files[0], result)
    draw(result, files[1])
    return files


def _ranks(scores: np.ndarray) -> np.ndarray:
    """0 for the highest score along the last axis; the lower layer goes first of equal ones."""
    return np.argsort(np.argsort(-scores, -1, kind="stable"), -1)


def _spec(ids: Sequence[int], layers: int) -> str:
    """The selection in a recipe's words."""
    k = len(ids)
    if k == layers:
        return "all"
    if list(ids) == list(range(k)):
        return f"bottom:{k}"
    if list(ids) == list(range(layers - k, layers)):
        return f"top:{k}"
    bottom = next(i for i, layer in enumerate([*ids, layers]) if layer != i)
    if bottom and list(ids[bottom:]) == list(range(layers - k + bottom, layers)):
        return f"bottom:{bottom},top:{k - bottom}"
    return describe_layers(ids)


def _stability(result: dict[str, Any]) -> str:
    found = result["stability"]
    if not found["rank_correlation"]:
        return "stability: one row says nothing of it; take more (--batches)"
    (low, high), k = found["rank_correlation"]["interval"], result["top"]
    always = [i["layer"] for i in result["table"] if i["in_top"] >= found["level"]]
    never = [i["layer"] for i in result["table"] if i["in_top"] <= 1 - found["level"]]
    between = [
        i["layer"] for i in result["table"] if 1 - found["level"] < i["in_top"] < found["level"]
    ]
    return (
        f"stability over {found['rows']} rows, {found['resamples']} resamples: rank correlation"
        f" {found['rank_correlation']['median']:.3f} ({low:.3f} to {high:.3f});\n"
        f"among the first {k}: nearly always {describe_layers(always) or 'none'}, nearly never"
        f" {describe_layers(never) or 'none'}, in between {describe_layers(between) or 'none'}"
    )
