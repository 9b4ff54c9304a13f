"""Cards by every name that people give them, and the figures that plans count with."""

import re
from pathlib import Path

import pytest

from xplus_fast.config import MemoryConfig
from xplus_fast.errors import UserError
from xplus_fast.model.families import Shape
from xplus_fast.planning.card_table import NAMES, SLICES
from xplus_fast.planning.cards import (
    CARDS,
    check_trains,
    find_card,
    match_card,
    smallest_card,
)
from xplus_fast.planning.memory import context_bytes
from xplus_fast.planning.plan import plan_stage

MIB = 2**20
SEEN = """
Tesla V100-SXM2-16GB, 16384           Tesla V100-SXM2-32GB, 32768
Tesla T4, 15360                       NVIDIA GeForce RTX 3060, 12288
NVIDIA GeForce RTX 3070, 8192         NVIDIA GeForce RTX 3080, 10240
NVIDIA GeForce RTX 3080 Ti, 12288     NVIDIA GeForce RTX 3090, 24576
NVIDIA GeForce RTX 3090 Ti, 24564     NVIDIA RTX A4000, 16376
NVIDIA RTX A5000, 24564               NVIDIA RTX A6000, 49140
NVIDIA A10, 23028                     NVIDIA A10G, 23028
NVIDIA A40, 46068                     NVIDIA A30, 24576
NVIDIA A100-SXM4-40GB, 40960          NVIDIA A100-PCIE-40GB, 40960
NVIDIA A100-SXM4-80GB, 81920          NVIDIA A100 80GB PCIe, 81920
NVIDIA GeForce RTX 4060, 8188         NVIDIA GeForce RTX 4070, 12282
NVIDIA GeForce RTX 4070 SUPER, 12282  NVIDIA GeForce RTX 4070 Ti, 12282
NVIDIA GeForce RTX 4070 Ti SUPER, 16376
NVIDIA GeForce RTX 4080, 16376        NVIDIA GeForce RTX 4080 SUPER, 16376
NVIDIA GeForce RTX 4090, 24564        NVIDIA GeForce RTX 4060 Laptop GPU, 8188
NVIDIA GeForce RTX 4080 Laptop GPU, 12282
NVIDIA GeForce RTX 4090 Laptop GPU, 16376
NVIDIA RTX 4000 SFF Ada Generation, 20475
NVIDIA RTX 4000 Ada Generation, 20475
NVIDIA RTX 5000 Ada Generation, 32760
NVIDIA RTX 6000 Ada Generation, 49140
NVIDIA L4, 23034                      NVIDIA L40, 46068
NVIDIA L40S, 46068                    NVIDIA H100 PCIe, 81559
NVIDIA H100 80GB HBM3, 81559          NVIDIA H100 NVL, 95830
NVIDIA H20, 97871                     NVIDIA GH200 480GB, 97871
NVIDIA H200, 143771                   NVIDIA H200 NVL, 143771
NVIDIA B200, 183359                   NVIDIA B300 SXM6 AC, 275040
NVIDIA GeForce RTX 5070, 12227        NVIDIA GeForce RTX 5070 Ti, 16303
NVIDIA GeForce RTX 5080, 16303        NVIDIA GeForce RTX 5090, 32607
NVIDIA GeForce RTX 5090 Laptop GPU, 24463
NVIDIA RTX PRO 6000 Blackwell Workstation Edition, 97887
NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition, 97887
NVIDIA RTX PRO 6000 Blackwell Server Edition, 97887
"""
LINES = re.split(r"\n|  +", SEEN.strip())


@pytest.mark.parametrize("line", LINES)
def test_nvidia_smis_own_name_and_memory(line):
    name, mib = line.split(", ")
    card = find_card(name)
    assert card.memory == int(mib) * MIB
    assert match_card(line) is card is CARDS[card.name]
    for spelling in (name.lower(), name.upper(), name.replace(" ", ""), f"  {name}  "):
        assert find_card(spelling) is card


def test_the_names_in_the_document_are_names():
    text = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
    section = text.partition("### Naming a card")[2]
    named = re.findall(r'--card ("[^"]+"|[a-z0-9][^\s]*)', section.partition("The start of")[0])
    found = [find_card(name.strip('"')).name for name in named]
    assert found == ["rtx3060", "rtx3060", "rtx4060ti-16", "rtx4090laptop", "a100-40",
                     "h100-80-3g.40gb", "h100-80-3g.40gb"]  # fmt: skip
    assert "about 60 cards" in section and 55 <= len(CARDS) <= 65
    assert {key.partition("-")[0] for key in SLICES} == {"a30", "a100", "h100", "h200"}


def test_the_lines_are_many_and_of_different_cards():
    assert len(LINES) > 40
    assert len({find_card(line.split(", ")[0]).name for line in LINES}) == len(LINES) - 1  # A100-40


@pytest.mark.parametrize("key", CARDS)
def test_every_card_is_found_by_the_name_that_messages_show(key):
    assert find_card(key) is CARDS[key]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("rtx4090", "rtx4090"), ("RTX 4090", "rtx4090"), ("rtx-4090", "rtx4090"),
        ("4090", "rtx4090"), ("4090 laptop", "rtx4090laptop"), ("RTX 3090 24GB", "rtx3090"),
        ("rtx 4070ti super", "rtx4070tisuper"), ("4070s", "rtx4070super"), ("4070", "rtx4070"),
        ("RTX 4060 Ti 16 GB", "rtx4060ti-16"), ("RTX 4060 Ti (8GB)", "rtx4060ti-8"),
        ("V100 32GB", "v100-32"), ("a10", "a10"), ("A100 40 GB", "a100-40"),
        ("a100 80gb", "a100-80"), ("A100 80GB PCIe", "a100-80-pcie"), ("l4", "l4"),
        ("L40S 48GB", "l40s"), ("RTX 6000 Ada", "rtx6000ada"), ("RTX A6000", "rtxa6000"),
        ("RTX PRO 6000", "rtxpro6000"), ("H100 SXM", "h100-80"), ("h100 80gb", "h100-80"),
        ("H200 141GB", "h200"), ("b2", "b200"), ("B200 192GB", "b200"),
    ],
)  # fmt: skip
def test_a_card_is_found_by_the_start_of_its_name_and_by_its_size(name, key):
    assert find_card(name) is CARDS[key]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a100", "may be several; did you mean a100-40 or a100-80 or a100-80-pcie?"),
        ("H100", "may be several; did you mean h100-pcie or h100-80 or h100-nvl?"),
        ("NVIDIA GeForce RTX 4060 Ti", "several; did you mean rtx4060ti-8 or rtx4060ti-16?"),
        ("v100", "may be several; did you mean v100-16 or v100-32?"),
        ("H100 MIG 3g.40gb", "did you mean h100-pcie-3g.40gb or h100-80-3g.40gb?"),
        ("RTX 40", "or rtx4070ti or rtx4070tisuper or rtx4080 or "),
        ("rtx4095", "is not known; did you mean rtx4090"),
        ("NVIDIA GeForce RTX 2080 Ti", "is not known; did you mean rtx3080ti"),
        ("Quadro RTX 6000", "is not known; did you mean "),
        ("RTX 3080 12GB", "is not known; did you mean rtx3080 "),  # the table has the 10 GB one
        ("H100 80GB HBM3 MIG 3g.41gb", "is not known; did you mean h100-80-3g.40gb or"),
        ("RTX 4090 MIG 1g.5gb", " or a100-40-1g.5gb?"),
        ("zzz", "is not known; known: v100-16, v100-32, t4, rtx3060, "),
    ],
)  # fmt: skip
def test_of_a_name_that_is_no_cards_or_several_one_line_lists_the_near_ones(name, told):
    with pytest.raises(UserError) as e:
        find_card(name)
    assert told in str(e.value) and str(e.value).startswith(f"card: {name!r} ")
    assert "\n" not in str(e.value) and len(str(e.value)) < 860


@pytest.mark.parametrize(
    ("name", "whole", "mib", "processors", "of", "eighths"),
    [
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "a100-40", 4864, 14, 108, 1),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "a100-40", 20090, 42, 108, 4),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "h100-80", 40448, 60, 132, 4),
        ("h100-80 1g.10gb", "h100-80", 9984, 16, 132, 1),
        ("h100-80-2g.20gb", "h100-80", 20090, 32, 132, 2),
        ("H100 80GB HBM3 MIG 1g.10gb+me", "h100-80", 9984, 16, 132, 1),
        ("NVIDIA H200 MIG 1g.18gb", "h200", 16384, 16, 132, 1),
        ("A30 MIG 2g.12gb", "a30", 11970, 28, 56, 4),
        ("a100 mig 3g20gb", "a100-40", 20090, 42, 108, 4),  # only one A100 has such a slice
    ],
)
def test_a_slice_has_its_share(name, whole, mib, processors, of, eighths):
    card, full = find_card(name), CARDS[whole]
    assert card.memory // MIB == mib and card.capability == full.capability
    assert card.bf16 == pytest.approx(full.bf16 * processors / of)
    assert card.fp8 == pytest.approx(full.fp8 * processors / of)
    assert card.bandwidth == full.bandwidth * eighths / 8
    assert find_card(card.name) == card


def test_every_slice_is_smaller_than_its_card_and_found():
    for key, profiles in SLICES.items():
        for profile in profiles:
            card = find_card(f"{key}-{profile}")
            assert card.memory < CARDS[key].memory and card.bf16 <= CARDS[key].bf16


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("NVIDIA GeForce RTX 4060 Ti, 8188", "rtx4060ti-8"),
        ("NVIDIA GeForce RTX 4060 Ti, 16380", "rtx4060ti-16"),
        ("NVIDIA GeForce RTX 5060 Ti, 8151", "rtx5060ti-8"),
        ("NVIDIA GeForce RTX 5060 Ti, 16311", "rtx5060ti-16"),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb, 40320", "h100-80-3g.40gb"),  # as PyTorch tells it
        ("NVIDIA H200, [N/A]", None),
        ("NVIDIA H200, 0", None),
        ("NVIDIA GeForce RTX 4090 D, 24564", None),  # the start of a name is not that name
        ("NVIDIA A, 23028", None),
        ("NVIDIA GeForce RTX 2080 Ti, 11264", None),
        ("NVIDIA RTX MIG 3g.40gb, 40448", None),
    ],
)
def test_what_nvidia_smi_says_is_matched(line, name):
    found = match_card(line)
    assert found == (find_card(name) if name else None)


def test_a_size_that_the_table_lacks_is_taken_from_nvidia_smi():
    found = match_card("NVIDIA GeForce RTX 3080, 12288")
    assert (found.name, found.memory) == ("rtx3080", 12288 * MIB)
    assert found.bf16 == CARDS["rtx3080"].bf16


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("rtx3090", 23.6), ("rtx4090", 23.5), ("rtx5090", 31.3), ("a100-40", 39.4),
        ("a100-80", 79.1), ("l4", 22.0), ("l40s", 44.4), ("h100-80", 79.1), ("h200", 139.8),
    ],
)  # fmt: skip
def test_what_a_plan_uses_of_it_is_there_for_a_program(name, gib):
    """GiB: as PyTorch's messages tell the card's capacity."""
    assert 0.97 * CARDS[name].memory <= gib * 2**30 <= CARDS[name].memory


def test_the_table_is_dense_rates():
    for card in CARDS.values():
        assert bool(card.fp8) == card.fp8_gemm
        assert not card.fp8 or card.fp8 == pytest.approx(2 * card.bf16, rel=0.02)
        assert 200e9 < card.bandwidth < 9e12 and 10e9 < card.pcie < 400e9
        # operations a byte: data sheets' lie between those of an H20 and of an L40S
        assert 36 < card.bf16 / card.bandwidth < 490
    assert len(NAMES) == len(set(NAMES))


@pytest.mark.parametrize(
    ("budget", "capability", "name"),
    [
        (20 * 10**9, None, "rtx4000ada"),
        (24 * 10**9, None, "l4"),
        (40 * 10**9, None, "l40s"),
        (10**15, None, "b300"),
        (12 * 10**9, (8, 6), "rtx3080ti"),  # an unknown card: one of its generation
        (14 * 10**9, (8, 7), "rtx5080"),
    ],
)
def test_the_smallest_card_with_so_much_memory(budget, capability, name):
    assert smallest_card(budget, capability).name == name


@pytest.mark.parametrize("name", CARDS)
def test_what_trains_is_told_by_compute_capability(name):
    card = CARDS[name]
    if name not in ("t4", "v100-16", "v100-32"):
        check_trains(name, card.capability)
        return
    with pytest.raises(UserError) as e:
        check_trains(name, card.capability)
    have = "7.5" if name == "t4" else "7.0"
    assert f"{name} has compute capability {have} and no bf16" in str(e.value)
    assert "needs 8.0" in str(e.value) and "device=cpu" in str(e.value)


@pytest.mark.parametrize(
    ("card", "gigabytes"),
    [("a100-80", 0.6), ("rtx4090", 0.6), ("h100-80", 1.05), ("b200", 0.9), ("rtx5090", 0.7)],
)
def test_what_cuda_takes_is_by_capability(card, gigabytes):
    """A plan counts it, and on the card what is free is told without it."""
    assert context_bytes(CARDS[card].capability) == gigabytes * 1e9
    found = plan_stage(
        Shape("qwen3", 4, 256, 4, 2, 64, 512, 1024, 1e-6, False), [3], (), MemoryConfig(),
        card=CARDS[card], dtype_bytes=2, pack_tokens=512, tokens_per_step=512,
    )  # fmt: skip
    assert found.device_bytes["CUDA context"] == gigabytes * 1e9
    assert context_bytes((13, 0)) == 1.05e9  # of what nobody knows yet, the most
