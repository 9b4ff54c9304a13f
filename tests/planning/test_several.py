"""Plans of several processes, and of weights whose gradients somebody watches."""

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.planning.accounting import tracked
from tests.planning.test_memory import MID, SELECTIONS, counted
from tests.planning.test_plan_cli import QWEN3_8B, plan
from tests.tiny import packed_batch, tiny_model
from xplus_fast.config import load_recipe
from xplus_fast.model.families import shape_of
from xplus_fast.model.layout import LayerLayout, Layout, UpdateLayout
from xplus_fast.model.prepare import prepare_model
from xplus_fast.model.sums import Sums, summed
from xplus_fast.planning import from_recipe
from xplus_fast.planning.cards import find_card
from xplus_fast.planning.memory import peak_moment, standing


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'met'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("policy", ["keep", "recompute"])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("how", ["exchanged", "hooked"])
def test_the_peak_is_the_engines(monkeypatch, alone, how, policy, selection, steps):
    """Autograd adds: the new gradients of a layer are there beside the sums; and DDP has a place of
    its own for each."""
    layers = SELECTIONS[selection]
    model = prepare_model(tiny_model(**MID), layers, activations=policy)
    trained = [p for p in model.parameters() if p.requires_grad]
    shape, batch = shape_of(model.config), packed_batch([70, 58])
    layout = Layout(
        tuple(LayerLayout(i in layers, activations=policy) for i in range(shape.layers))
    )
    b = replace(counted(batch, steps=steps), **{how: True})
    update = UpdateLayout(master=False)
    buckets = standing(shape, layout, update, b)[0]["gradient buckets"]
    run, apart = model, partial(summed, model.model.layers, Sums())  # which finds the hooks
    with tracked(monkeypatch) as tracker:
        if how == "exchanged":
            run = DistributedDataParallel(model)
            apart = run.no_sync
            assert tracker.now == pytest.approx(buckets, rel=0.001)
        else:
            assert buckets == 0
            for p in trained:
                p.register_hook(lambda g: None)
        for step in range(steps):
            tracker.peak = tracker.now
            with nullcontext() if how == "exchanged" and step == steps - 1 else apart():
                run(**batch).loss.backward()
    expected = peak_moment(shape, layout, update, b)
    assert tracker.peak == pytest.approx(expected.total + buckets, rel=0.02)
    assert all(p.grad is not None for p in trained)


STAGE, SMALL = "stages=[{layers: 'bottom:4'}]", "memory.micro_batch_tokens=4096"


@pytest.fixture
def qwen(tmp_path, monkeypatch):
    monkeypatch.setattr(from_recipe, "local_card", lambda: None)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_8B))
    return folder


def as_json(capsys, qwen, *arguments):
    code, out, err = plan(capsys, qwen, STAGE, "--json", *arguments)
    assert (code, err) == (0, "")
    return json.loads(out)["stages"][0]


def test_each_of_several_has_its_part_of_a_step_and_its_buckets(capsys, qwen):
    card = "--card", "h100-80", "training.tokens_per_step=65536", SMALL
    alone, two = (as_json(capsys, qwen, *card, "--processes", n) for n in ("1", "2"))
    assert alone["device_bytes"]["gradient buckets"] == 0
    assert two["device_bytes"]["gradient buckets"] == 2 * 771_785_728
    _, out, _ = plan(capsys, qwen, STAGE, *card, "--processes", "2")
    assert "32,768 tokens for each of 2 processes" in out and "predicted on each h100-80" in out
    assert "gradient buckets" in out and "memory.sums=32" not in out
    assert "memory.sums=32" in plan(capsys, qwen, STAGE, *card)[1]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("memory.sums=32", "memory.sums: 32 is for one process"),
        ("memory.gradients=host", "memory.gradients: host is for one process"),
        ("stages.0.layers={rotate: 2 of 0-35, every: 20}", "layers.rotate: works with one"),
    ],
)
def test_what_one_process_can_alone_is_not_planned_for_several(capsys, qwen, override, said):
    """`train` has no other checks of it."""
    arguments = STAGE, "--card", "h100-80", override
    assert plan(capsys, qwen, *arguments)[0] == 0
    code, _, err = plan(capsys, qwen, *arguments, "--processes", "2")
    assert code == 2 and err.count("\n") == 1 and said in err


def test_gradients_of_several_stay_on_the_device(capsys, qwen):
    """Where one would send them to the host."""
    card = "--card", "rtx4090", "--budget", "12GB"
    assert as_json(capsys, qwen, *card)["update"]["gradients"] == "host"
    two = as_json(capsys, qwen, *card, "--processes", "2")
    assert two["update"]["gradients"] == "device"


def test_several_pin_what_one_may_together(capsys, qwen):
    _, out, _ = plan(capsys, qwen, STAGE, "--card", "rtx4090", "--budget", "12GB")
    assert "of 102.4 GB" in out
    _, out, _ = plan(
        capsys, qwen, STAGE, "--card", "rtx4090", "--budget", "12GB", "--processes", "4"
    )
    assert "of 25.60 GB" in out and "by all processes" in out


def test_only_those_of_one_machine_share_what_it_may_pin(monkeypatch):
    monkeypatch.setattr(from_recipe, "free_memory", lambda: 96_000_000_000)
    here = find_card("rtx4090")
    recipe = load_recipe(str(Path(__file__).parents[2] / "recipes/demo.yaml"))

    def pinned(processes):
        return from_recipe.find_where(recipe, "", "auto", "auto", here, processes).host

    assert pinned(1) == 96_000_000_000 and pinned(8) == 12_000_000_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # as torchrun says it on each of two machines
    assert pinned(8) == 24_000_000_000


def test_as_many_as_there_can_be(capsys, qwen):
    code, _, err = plan(capsys, qwen, STAGE, "--processes", "0")
    assert code == 2 and err.count("\n") == 1 and "processes: 0" in err


def test_what_wandb_watches(capsys, qwen, monkeypatch):
    """The second micro-batch's gradients are there beside the first's."""
    watched = "--card", "h100-80", SMALL, "stages.0.layers=top:8", "training.report_to=[wandb]"
    before = as_json(capsys, qwen, *watched)
    monkeypatch.setenv("WANDB_WATCH", "gradients")
    after = as_json(capsys, qwen, *watched)
    assert sum(after["device_bytes"].values()) > sum(before["device_bytes"].values()) + 3e8
    assert as_json(capsys, qwen, *watched[:-1]) == before
