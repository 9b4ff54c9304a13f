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

RESULT = json.loads(
    (Path(__file__).parents[2] / "benchmarks/results/train.json").read_text(encoding="utf-8")
)
MEASURED = [
    row
    for row in RESULT["rows"]
    if row["status"] == "ok" and row["mix"] == "pairs" and "budget" in row and row["planned"]
]


@pytest.mark.parametrize("row", MEASURED, ids=lambda r: f"{r['contestant']} {r['layers']}")
def test_tokens_a_second_are_those_that_were_measured(row):
    about = RESULT["device"]
    card = match_card(f"{about['name']}, {about['memory_bytes'] >> 20}")
    assert card is not None
    options = dict(CONTESTANTS[row["contestant"]].options)
    shared, budget = options.pop("shared", True), options.pop("budget", 0)
    shape = shape_of(make_config(RESULT["model"]))
    work = assumed_work(shared)
    plan = plan_stage(
        shape, resolve_layers(row["layers"], shape.layers), (), MemoryConfig(**options),
        card=card, dtype_bytes=2, pack_tokens=4096, tokens_per_step=RESULT["tokens_per_step"],
        work=work, budget=budget or int(card.memory * USABLE), host=10**11,
    )  # fmt: skip
    assert plan.predicted_tokens_per_s == pytest.approx(row["tokens_per_s"], rel=0.021)


def test_there_is_something_to_compare_with():
    assert len(MEASURED) >= 4
