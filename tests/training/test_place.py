"""Where a run computes: the allocator's setting, and the card with what is free on it."""

import importlib
import platform
from types import SimpleNamespace

import pytest
import torch

from xplus_fast.cli import main
from xplus_fast.planning import cards
from xplus_fast.planning.cards import CARDS, find_card, local_card
from xplus_fast.training import place
from xplus_fast.training.place import Place, card_here, set_allocator

GIB, MIB = 2**30, 2**20
CONF = "PYTORCH_CUDA_ALLOC_CONF"


@pytest.mark.parametrize(
    "release, given, made",
    [
        ("6.8.0-45-generic", {}, "expandable_segments:True"),
        ("5.15.153.1-microsoft-standard-WSL2", {}, None),
        ("6.8.0", {CONF: "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ("6.8.0", {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, None),
    ],
)
def test_the_allocator_is_set_where_it_can_be(release, given, made, monkeypatch):
    monkeypatch.setattr(platform, "release", lambda: release)
    environment = dict(given)
    monkeypatch.setattr(place.os, "environ", environment)
    set_allocator()
    assert environment.get(CONF) == made
    assert given.items() <= environment.items()


def say(text, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{text}'\n")
    tool.chmod(0o755)
    monkeypatch.setattr(cards.shutil, "which", lambda name: str(tool))


@pytest.mark.parametrize(
    "said, name, memory",
    [
        ("NVIDIA L40S, 46068, 45700", "l40s", CARDS["l40s"].memory),
        (
            "NVIDIA GeForce RTX 4090, 24564, 20000",
            "rtx4090",
            CARDS["rtx4090"].memory // 16 * 13,
        ),  # a screen, games
        ("NVIDIA H100 80GB HBM3, 81559, [N/A]", "h100-80", CARDS["h100-80"].memory),
        ("Tesla T4, 15360, 15000", "t4", CARDS["t4"].memory),
        ("NVIDIA GeForce RTX 2080 Ti, 11264, 11000", None, 0),
    ],
)
def test_a_card_has_what_is_free_on_it(said, name, memory, tmp_path, monkeypatch):
    say(said, tmp_path, monkeypatch)
    found = local_card()
    assert (found and found.name) == name and (found is None or found.memory == memory)


def test_the_card_is_the_first_that_is_visible(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\ncase "$*" in *"-i 1"*) echo "NVIDIA L4, 23034, 23000";;'
        ' *) echo "NVIDIA H200, 143771, 143000";; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setattr(cards.shutil, "which", lambda name: str(tool))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local_card().name == "h200"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert local_card().name == "l4"


@pytest.mark.parametrize(
    "total, free, reserved, memory",
    [
        (79.1, 78.6, 0, 79.1),  # nobody else: all of it
        (80, 38.0, 2.0, 40.0),  # others have a half; what is reserved is ours
    ],
)
def test_a_run_plans_for_what_others_left(total, free, reserved, memory, tmp_path, monkeypatch):
    say("NVIDIA H100 80GB HBM3, 81559, 80000", tmp_path, monkeypatch)
    about = SimpleNamespace(name="x", total_memory=int(total * GIB), major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (int(free * GIB), int(total * GIB)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(reserved * GIB))
    found = card_here(Place(torch.device("cuda", 0), torch.bfloat16, 0, 1))
    assert found.name == "h100-80" and found.bandwidth == CARDS["h100-80"].bandwidth
    assert found.memory == pytest.approx(memory * GIB, rel=1e-6)


def test_a_slice_is_no_whole_card(tmp_path, monkeypatch):
    say("NVIDIA H100 80GB HBM3, 81559, 80000", tmp_path, monkeypatch)
    size = 20 * GIB
    about = SimpleNamespace(name="a slice", total_memory=size, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size, size))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    found = card_here(Place(torch.device("cuda", 0), torch.bfloat16, 0, 1))
    assert found.name == "a slice" and found.memory == size and found.capability == (9, 0)


def stand_in(monkeypatch, name, gib, capability):
    """torch.cuda with one such GPU, which nobody uses."""
    size = int(gib * GIB)
    about = SimpleNamespace(name=name, total_memory=size, major=capability[0], minor=capability[1])
    for what, answer in {
        "is_available": True, "set_device": None, "get_device_properties": about,
        "mem_get_info": (size, size), "memory_reserved": 0,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, what, lambda *_, answer=answer: answer)
    monkeypatch.setattr(cards.shutil, "which", lambda name: None)
    monkeypatch.setattr(place, "set_allocator", lambda: None)


@pytest.mark.parametrize(
    "name, gib, capability, same",
    [
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 39.4, (9, 0), "h100-80-3g.40gb"),
        ("NVIDIA GeForce RTX 3060", 11.76, (8, 6), "rtx3060"),
        ("NVIDIA RTX A2000 12GB", 11.6, (8, 6), "rtx3080ti"),  # unknown: of its generation
    ],
)
def test_torchs_name_tells_the_rates(name, gib, capability, same, monkeypatch):
    stand_in(monkeypatch, name, gib, capability)
    found, like = card_here(Place(torch.device("cuda", 0), torch.bfloat16, 0, 1)), find_card(same)
    assert (found.bandwidth, found.bf16, found.fp8) == (like.bandwidth, like.bf16, like.fp8)
    assert found.memory == int(gib * GIB) and found.capability == capability


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "name, capability",
    [("Tesla T4", (7, 5)), ("Tesla V100-SXM2-16GB", (7, 0)), ("Quadro RTX 8000", (7, 5))],
)
def test_a_card_without_bf16_is_refused_before_anything_is_loaded(
    name, capability, dtype, monkeypatch, tmp_path, capsys
):
    importlib.import_module(
        "xplus_fast.training.run"
    )  # torch's own imports ask what is stood in for
    stand_in(monkeypatch, name, 14.6, capability)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"{{model: nothing-here, output: {tmp_path}/run, stages: [{{layers: 'top:1'}}],"
        f" data: {{sources: [{{path: none.jsonl}}]}}, device: cuda, dtype: {dtype}}}"
    )
    assert main(["train", str(recipe)]) == 2
    out, err = capsys.readouterr()
    told = ".".join(map(str, capability))
    assert err.startswith(f"xplus-fast: device: {name} has compute capability {told} and no bf16;")
    assert out == "" and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_ampere_is_taken(monkeypatch, tmp_path):
    stand_in(monkeypatch, "NVIDIA A100-SXM4-40GB", 39.4, (8, 0))
    recipe = SimpleNamespace(device="auto", dtype="auto")
    found = place.find_place(recipe)
    assert (found.device.type, found.dtype) == ("cuda", torch.bfloat16)
