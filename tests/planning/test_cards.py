import pytest

from xplus_fast.errors import UserError
from xplus_fast.planning.cards import CARDS, find_card, match_card, smallest_card


@pytest.mark.parametrize("name", ["rtx4090", "RTX 4090", "rtx-4090", "NVIDIA GeForce RTX 4090"])
def test_a_card_is_found_however_it_is_written(name):
    assert find_card(name) is CARDS["rtx4090"]


@pytest.mark.parametrize(("name", "near"), [("rtx4080", "rtx4090"), ("a100", "a100-40")])
def test_an_unknown_card_gets_the_nearest_names(name, near):
    with pytest.raises(UserError) as e:
        find_card(name)
    assert near in str(e.value).partition("known: ")[0].partition("did you mean")[2]
    assert "\n" not in str(e.value)


def test_nothing_near_lists_all():
    with pytest.raises(UserError, match="is not known; known: rtx3090, rtx4090, .*, h200"):
        find_card("zzz")


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("NVIDIA H100 80GB HBM3, 81559", "h100-80"),
        ("NVIDIA H200, 143771", "h200"),
        ("NVIDIA GeForce RTX 4090, 24564", "rtx4090"),
        ("NVIDIA A100-SXM4-40GB, 40960", "a100-40"),
        ("NVIDIA A100-SXM4-80GB, 81920", "a100-80"),
        ("NVIDIA L40S, 46068", "l40s"),
        ("NVIDIA L4, 23034", "l4"),
        ("NVIDIA L40, 46068", None),
        ("Tesla T4, 15360", None),
        ("NVIDIA H200, [N/A]", None),
    ],
)
def test_what_nvidia_smi_says_is_matched(line, name):
    assert match_card(line) is (CARDS[name] if name else None)


def test_the_table_is_dense_rates():
    for card in CARDS.values():
        assert bool(card.fp8) == card.fp8_gemm
        assert not card.fp8 or card.fp8 == pytest.approx(2 * card.bf16, rel=0.02)
    assert smallest_card(20 * 10**9).name == "l4"
    assert smallest_card(10**15).name == "h200"
