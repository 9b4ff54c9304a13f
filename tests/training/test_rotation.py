"""Layers that take turns: as a plain loop with the same flags; states; resumption; plans."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.training.workplace import losses, make_workplace, train_killed, write_recipe, xplus
from xplus_fast.config import MemoryConfig, load_recipe
from xplus_fast.data.corpus import PackCollator, load_corpus
from xplus_fast.data.packed import RowSampler
from xplus_fast.errors import UserError
from xplus_fast.model.families import layer_of, shape_of
from xplus_fast.model.prepare import named_tensors, prepare_model
from xplus_fast.model.pretrained import load_config, load_tokenizer
from xplus_fast.planning.cards import CARDS
from xplus_fast.planning.memory import layer_parameters, state_bytes
from xplus_fast.planning.plan import plan_stage
from xplus_fast.planning.selection import Rotation, resolve_layers
from xplus_fast.training import optimizer as optimizer_module
from xplus_fast.training.optimizer import AdamW
from xplus_fast.training.rotation import turn_seed

TURNS = Rotation("2 of 1-5", 2)


@pytest.fixture
def place(tmp_path, tiny_model_dir):
    recipe = make_workplace(tmp_path, tiny_model_dir)
    recipe["data"] |= {"heldout": 0, "retention": []}
    recipe["dtype"] = "float32"
    recipe["stages"] = [
        {"layers": {"rotate": TURNS.rotate, "every": TURNS.every}, "also": ["final_norm"],
         "steps": 9, "learning_rate": 1e-3},
    ]  # fmt: skip
    return tmp_path, recipe


def final(run, stage="stage-1"):
    return load_file(run / stage / "final" / "trained.safetensors")


def test_it_is_a_plain_loop_with_the_same_flags(place, tiny_model_dir):
    folder, recipe = place
    path = write_recipe(folder, recipe)
    assert xplus("train", path) == 0
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    options = load_recipe(path)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    prepare_model(model, resolve_layers(TURNS, 6), also=["final_norm"])
    corpus = load_corpus(
        options.data.sources, options.data, load_tokenizer(tiny_model_dir), seed=0, show=False,
        vocabulary=model.config.vocab_size,
    )  # fmt: skip
    rows = corpus.train.packed(options.training.tokens_per_step)
    held = [p for p in model.parameters() if p.requires_grad]
    plain = torch.optim.AdamW(held, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    norms = {id(p) for p in held if p.ndim == 1}
    plain.param_groups[0]["params"] = [p for p in held if id(p) not in norms]
    plain.add_param_group({"params": [p for p in held if id(p) in norms], "weight_decay": 0.0})
    collate, order, trained = PackCollator(shared_prefixes=True), [], Counter()
    for epoch in range(9):
        sampler = RowSampler(len(rows), 1, 0)
        sampler.epoch = epoch
        order += list(sampler)
    for step, line in enumerate(logged):
        turn = TURNS.turn(6, turn_seed(0, 0), step)
        trained.update(turn)
        for i, layer in enumerate(model.model.layers):
            layer.requires_grad_(i in turn)
        for group in plain.param_groups:
            group["lr"] = line["learning_rate"]
        loss = model(**collate([rows[order[step]]])).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in held if p.grad is not None], 1.0)
        assert float(loss) == pytest.approx(line["loss"], abs=2e-5)
        assert float(norm) == pytest.approx(line["grad_norm"], rel=1e-4)
        plain.step()
        plain.zero_grad()
    assert len(trained) > 2 and max(trained.values()) < len(logged)
    theirs, ours = named_tensors(model, held), final(folder / "run")
    assert theirs.keys() == ours.keys()
    assert {layer_of(n) for n in ours} == {1, 2, 3, 4, 5, None}
    for name, value in theirs.items():
        assert torch.allclose(value, ours[name], atol=2e-5), name


@pytest.mark.parametrize("kill_at", [3, 4])
def test_killed_anywhere_it_goes_on_bit_for_bit(place, kill_at):
    folder, recipe = place
    recipe["dtype"] = "bfloat16"
    recipe["training"]["save_steps"] = 3
    path = write_recipe(folder, recipe)
    code = f"""
import os, signal
from xplus_fast.training.stage import RunLog
whole = RunLog.on_log
def on_log(self, args, state, control, **more):
    whole(self, args, state, control, **more)
    if state.global_step == {kill_at}:
        os.kill(os.getpid(), signal.SIGKILL)
RunLog.on_log = on_log
"""
    train_killed(path, code)
    assert xplus("train", path) == 0
    recipe["output"] = str(folder / "whole")
    assert xplus("train", write_recipe(folder, recipe)) == 0
    assert losses(folder / "run") == losses(folder / "whole")
    a, b = final(folder / "run"), final(folder / "whole")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_states_of_what_rests_wait_on_the_host_and_come_back(monkeypatch):
    """By who is asked for memory there, as a CPU's host is its device."""
    asked = []
    there = optimizer_module.host_state.zeros_on_host
    monkeypatch.setattr(optimizer_module.host_state, "zeros_on_host",
                        lambda *a: asked.append(a[0]) or there(*a))  # fmt: skip
    p = torch.nn.Parameter(torch.randn(5, 3).to(torch.bfloat16))
    adamw = AdamW([p])
    p.grad = torch.ones_like(p)
    adamw.step()
    before = {k: v.clone() for k, v in adamw.state[p].items()}
    assert asked == []
    p.requires_grad_(False)
    adamw.place(p)
    assert asked == [(5, 3)] * 3  # master, exp_avg, exp_avg_sq
    assert all(torch.equal(adamw.state[p][k], v) for k, v in before.items())
    other = AdamW([p])
    other.restore(p, before)  # a checkpoint's, of a layer that rests
    assert len(asked) == 6
    p.requires_grad_(True)
    adamw.place(p)
    assert len(asked) == 6 and all(torch.equal(adamw.state[p][k], v) for k, v in before.items())


def test_a_plan_counts_the_turns(tiny_model_dir):
    shape = shape_of(load_config(tiny_model_dir))
    options = dict(
        card=CARDS["rtx4090"], dtype_bytes=2, pack_tokens=512, tokens_per_step=4096,
        budget=24 * 10**9, host=64 * 10**9,
    )  # fmt: skip
    memory = replace(MemoryConfig(), states="device", gradients="device", activations="keep")

    def planned(layers, rotation=None):
        return plan_stage(shape, layers, (), memory, rotation=rotation, **options)

    turns, two, all_ = planned(range(1, 6), TURNS), planned([1, 2]), planned(range(1, 6))
    states = layer_parameters(shape) * state_bytes(turns.update, 2)
    assert turns.device_bytes["optimizer"] == two.device_bytes["optimizer"] == 2 * states
    assert turns.host_bytes["optimizer"] == 3 * states and not two.host_bytes["optimizer"]
    assert turns.device_bytes["gradients"] == two.device_bytes["gradients"]
    assert turns.device_bytes["trained layers"] == all_.device_bytes["trained layers"]
    assert two.device_total <= turns.device_total < all_.device_total
    assert all_.flops_per_token > turns.flops_per_token
    assert turns.predicted_tokens_per_s > all_.predicted_tokens_per_s


def test_turns_are_drawn_by_seed_and_number():
    drawn = [TURNS.turn(6, 0, step) for step in range(400)]
    assert all(a == b for a, b in zip(drawn[::2], drawn[1::2], strict=True))
    counts = Counter(i for turn in drawn for i in turn)
    assert set(counts) == {1, 2, 3, 4, 5} and min(counts.values()) > 100
    assert drawn != [TURNS.turn(6, turn_seed(0, 1), step) for step in range(400)]


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ({"rotate": "2", "every": 2}, "such as '2 of 0-35' is wanted"),
        ({"rotate": "2 of embedding", "every": 2}, "embedding"),
        ({"rotate": "0 of 0-3", "every": 2}, "0 at a time of 4 layers"),
        ({"rotate": "4 of 0-3", "every": 2}, "4 at a time of 4 layers; from 1 to 3"),
        ({"rotate": "2 of 0-9", "every": 2}, "9"),
        ({"rotate": "2 of 0-3", "every": 0}, "stages.0.layers.every"),
        ({"rotate": "2 of 0-3", "every": "x"}, "stages.0.layers.every: a whole number"),
        ({"rotate": "2 of 0-3"}, "stages.0.layers.every"),
        ({"rotate": "2 of 0-3", "every": 2, "kind": 1}, "stages.0.layers.kind"),
    ],
)
def test_rotations_that_cannot_be_are_one_line(place, capsys, layers, said):
    folder, recipe = place
    recipe["stages"][0]["layers"] = layers
    for command in (["train", "--dry-run"], ["plan"]):
        path = write_recipe(folder, recipe)
        assert xplus(command[0], path, *command[1:]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1, err


def test_it_exports_and_verifies_and_is_told(place, tiny_model_dir, capsys):
    folder, recipe = place
    recipe["stages"][0]["steps"] = 3
    recipe["stages"].append({"layers": "top:1", "steps": 1})
    path = write_recipe(folder, recipe)
    assert xplus("plan", path) == 0
    assert "2 at a time, others every 2 steps" in capsys.readouterr().out
    assert xplus("train", path) == 0
    assert xplus("export", folder / "run", folder / "out") == 0
    assert xplus("verify", tiny_model_dir, folder / "out") == 0
    shutil.rmtree(folder / "out")
    assert xplus("train", path) == 0  # read back from its recipe.yaml
    with pytest.raises(UserError):
        Rotation("x", 1).read(6)
