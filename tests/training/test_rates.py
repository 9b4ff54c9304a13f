"""A learning rate for each layer: given by layers, or falling towards the embedding."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.training.workplace import losses, make_workplace, write_recipe, xplus
from xplus_fast.errors import UserError
from xplus_fast.model.checkpoint_files import CheckpointFiles
from xplus_fast.model.families import place_of
from xplus_fast.planning.selection import learning_rates


@pytest.fixture
def place(tmp_path, tiny_model_dir):
    recipe = make_workplace(tmp_path, tiny_model_dir)
    recipe["data"] |= {"heldout": 0, "retention": []}
    recipe["dtype"] = "float32"
    recipe["stages"] = [{"layers": "2-5", "also": ["final_norm"], "steps": 1, "warmup": 0.0}]
    recipe["training"] |= {"weight_decay": 0.0, "max_grad_norm": 0.0}
    return tmp_path, recipe


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"learning_rate": 1e-4}, dict.fromkeys("2345", 1e-4) | {"final_norm": 1e-4}),
        (
            {"learning_rate": {"2-3": 4e-5, "4": 1e-4, "5": 2e-4, "final_norm": 3e-4}},
            {"2": 4e-5, "3": 4e-5, "4": 1e-4, "5": 2e-4, "final_norm": 3e-4},
        ),
        (
            {"learning_rate": 2e-4, "layer_decay": 0.5},
            {"2": 2.5e-5, "3": 5e-5, "4": 1e-4, "5": 2e-4, "final_norm": 2e-4},
        ),
    ],
)
def test_adams_first_step_moves_each_layer_by_its_rate(place, tiny_model_dir, options, wanted):
    folder, recipe = place
    recipe["stages"][0] |= options | {"min_learning_rate": max(wanted.values())}
    assert xplus("train", write_recipe(folder, recipe)) == 0
    base = CheckpointFiles.open(tiny_model_dir)
    moved: dict[str, float] = {}
    for name, value in load_file(folder / "run/stage-1/final/trained.safetensors").items():
        change = float((value - base.tensor(name).float()).abs().max())
        moved[place_of(name)] = max(moved.get(place_of(name), 0.0), change)
    for where, rate in wanted.items():
        assert moved[where] == pytest.approx(rate, rel=0.02), where


def test_the_warm_up_begins_above_0_and_a_run_goes_on_with_its_groups(place, capsys):
    folder, recipe = place
    recipe["stages"][0] |= {
        "learning_rate": 1e-3, "layer_decay": 0.8, "steps": 8, "warmup": 0.5,
    }  # fmt: skip
    recipe["training"]["save_steps"] = 3
    assert xplus("train", write_recipe(folder, recipe)) == 0
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["learning_rate"] for line in lines]
    assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    cosine = [0.5 * (1 + math.cos(math.pi * n / 4)) for n in range(4)]
    assert rates[4:] == pytest.approx([2e-6 + (1e-3 - 2e-6) * c for c in cosine])
    whole, logged = (
        load_file(folder / "run/stage-1/final/trained.safetensors"),
        losses(folder / "run"),
    )
    shutil.rmtree(folder / "run/stage-1/final")
    shutil.rmtree(folder / "run/stage-1/checkpoint-8")
    assert xplus("train", folder / "recipe.yaml") == 0
    assert "going on from" in capsys.readouterr().out and losses(folder / "run") == logged
    again = load_file(folder / "run/stage-1/final/trained.safetensors")
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_what_fits_no_layer_is_refused_before_anything_is_read(place, capsys):
    folder, recipe = place
    for rate, said in (
        ({"2-4": 1e-4, "final_norm": 1e-4}, "no rate is given for 5"),
        ({"2-5": 1e-4, "4": 1e-5, "final_norm": 1e-4}, "4 is given two rates"),
        ({"1-5": 1e-4, "final_norm": 1e-4}, "1, of '1-5', does not train"),
        ({"2-5": 1e-4}, "no rate is given for final_norm"),
        ({"2-5": 1e-4, "head": 1e-4}, "'head'"),
        ({"2-9": 1e-4}, "9"),
        ({"2-5": "fast"}, "stages.0.learning_rate: a number or a mapping is wanted"),
        ({}, "stages.0.learning_rate: a number or some by layers"),
    ):
        recipe["stages"][0]["learning_rate"] = rate
        assert xplus("train", write_recipe(folder, recipe), "--dry-run") == 2
        err = capsys.readouterr().err
        assert said in err, err
        assert err.count("\n") == 1
    recipe["stages"][0] |= {"learning_rate": {"2-5": 1e-4, "final_norm": 1e-5}, "layer_decay": 0.5}
    assert xplus("train", write_recipe(folder, recipe), "--dry-run") == 2
    assert "layer_decay: goes with one learning_rate" in capsys.readouterr().err


def test_decay_counts_the_layers_that_train():
    assert learning_rates(1.0, 0.5, [0, 1, 5], ["head"], 6) == {
        "0": 0.25, "1": 0.5, "5": 1.0, "head": 1.0,
    }  # fmt: skip
    with pytest.raises(UserError, match="layers"):
        learning_rates({"x": 1.0}, 1.0, [0], [], 6)
