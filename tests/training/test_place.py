"""Where a run computes: the allocator's setting, and the card with what is free on it."""

import platform
from types import SimpleNamespace

import pytest
import torch

from xplus_fast.planning import cards
from xplus_fast.planning.cards import CARDS, local_card
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
        ("Tesla T4, 15360, 15000", None, 0),
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
