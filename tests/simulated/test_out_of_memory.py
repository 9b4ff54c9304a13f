"""Memory runs out anywhere in a step: the same batch, the same loss curve, and nothing is kept.

Here in some of the functions that allocate; everywhere: `python -m tests.simulated.out_of_memory`.
"""

from functools import cache

import pytest

from tests.simulated.out_of_memory import BEYOND, PLANS, judge, play


@cache
def reference(model, plan):
    return play(model, plan)


@pytest.mark.parametrize("plan", PLANS)
def test_in_a_sample_of_places(plan, model_folder):
    plain = reference(model_folder, plan)
    assert not plain.wrong and not any("leaner" in line for line in plain.said)
    chosen = {plain.places[k - 1]: k for k in plain.cases()}  # the last time that it comes by
    assert len(chosen) > 20
    sample = sorted(chosen.items())[[*PLANS].index(plan) :: 4]
    found = {place: judge(model_folder, plan, plain, k) for place, k in sample}
    assert not {place: wrong for place, wrong in found.items() if wrong}


def test_what_the_step_begins_with(model_folder):
    """Its batch, which is not lost, and the optimizer's states, which are not half made."""
    plan = "all on the device"
    plain = reference(model_folder, plan)
    starts = [k for k in plain.cases() if plain.places[k - 1].endswith("optimizer.py _zeros")]
    assert len(starts) > 20
    for k in (plain.cases()[0], starts[0], starts[7], starts[-1]):
        assert judge(model_folder, plan, plain, k) == ""


def test_what_is_beyond_us_is_little(model_folder):
    for plan in PLANS:
        places = reference(model_folder, plan).places
        assert sum(place in BEYOND for place in places) <= 2
