"""What is foretold of a step's time against what was measured."""

import json
from pathlib import Path

import pytest

from benchmarks.models import make_config
from benchmarks.training.contestants import CONTESTANTS
from xplus_fast.config import MemoryConfig
from xplus_fast.model.families import shape_of
from xplus_fast.planning.cards import match_card
from xplus_fast.planning.flops import assumed_work
from xplus_fast.planning.from_recipe import USABLE
from xplus_fast.planning.plan import plan_stage
from xplus_fast.planning.selection import resolve_layers

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
WITHIN = {  # an H200, an H100, the H200 earlier
    "train": 0.055,
    "train-2026-11-26T114400-fc2b217": 0.044,
    "train-2026-11-26T044251-4c4e470-dirty": 0.021,
}
FOUND = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in WITHIN}
MEASURED = [
    (name, row)
    for name, result in FOUND.items()
    for row in result["rows"]
    if row["status"] == "ok" and row["mix"] == "pairs" and row["planned"]
]


@pytest.mark.parametrize(
    ("name", "row"), MEASURED,
    ids=[f"{FOUND[n]['device']['name']}, {r['contestant']} {r['layers']}" for n, r in MEASURED],
)  # fmt: skip
def test_tokens_a_second_are_those_that_were_measured(name, row):
    result = FOUND[name]
    about = result["device"]
    card = match_card(f"{about['name']}, {about['memory_bytes'] >> 20}")
    assert card is not None
    options = dict(CONTESTANTS[row["contestant"]].options)
    shared, budget = options.pop("shared", True), options.pop("budget", 0)
    shape = shape_of(make_config(result["model"]))
    work = assumed_work(shared)
    plan = plan_stage(
        shape, resolve_layers(row["layers"], shape.layers), (), MemoryConfig(**options),
        card=card, dtype_bytes=2, pack_tokens=4096, tokens_per_step=result["tokens_per_step"],
        work=work, budget=budget or int(card.memory * USABLE), host=10**11,
    )  # fmt: skip
    assert plan.predicted_tokens_per_s == pytest.approx(row["tokens_per_s"], rel=WITHIN[name])


def test_peaks_are_those_that_were_planned():
    """Of steps that share no prompts, which is what a plan counts on; `docs/memory.md` says so."""
    apart = [
        row for name in list(WITHIN)[:2] for row in FOUND[name]["rows"]
        if row["status"] == "ok" and row["planned"]
        and (row["mix"] == "1k" or row["contestant"] == "ours, prompts apart")
    ]  # fmt: skip
    shares = [row["peak"]["allocated"] / row["planned"] for row in apart]
    assert len(shares) == 14 and 0.965 < min(shares) and max(shares) < 0.985


def test_there_is_something_to_compare_with():
    assert [sum(n == name for n, _ in MEASURED) for name in WITHIN] == [8, 6, 4]
