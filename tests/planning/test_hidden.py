"""Which stages keep what leaves their frozen layers, and what that takes."""

from dataclasses import replace

import pytest

from tests.planning.test_plan_cli import RECIPE, model, plan  # noqa: F401  (a fixture)
from xplus_fast.config import DataConfig, Recipe, Source, Stage
from xplus_fast.errors import UserError
from xplus_fast.model.families import Shape
from xplus_fast.planning.hidden import Rows, on_host, plan_hidden

QWEN3_8B = Shape("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, 1e-6, False)
A, B = [Source("a.jsonl")], [Source("b.jsonl")]
ROWS = Rows("digest", 1_000_000, 800_000, 100)
TOKEN = 2 * 4096 + 4


def kept(stages, where="host", read=(), shape=QWEN3_8B):
    """For each stage: the level of what it keeps, and the last stage that it is kept for."""
    given = [
        Stage(layers, epochs=epochs, sources=sources, also=also)
        for layers, epochs, sources, also in ((*s, *[None, A, []][len(s) - 1 :]) for s in stages)
    ]
    recipe = Recipe("model", "/run", given, DataConfig(cache_hidden=where))
    return plan_hidden(recipe, shape, 2, read or [])


def levels(*args, **kwargs):
    return [h and (h.level, h.last) for h in kept(*args, **kwargs)]


@pytest.mark.parametrize(
    ("stages", "found"),
    [
        ([("top:15", 2.0)], [(21, 0)]),
        ([("top:15", 1.1)], [(21, 0)]),
        ([("bottom:4", 2.0), ("top:15", 2.0)], [None, (21, 1)]),
        ([("top:15",), ("top:15",)], [(21, 1), (21, 1)]),
        ([("top:15",), ("top:8",)], [(21, 1), (21, 1)]),
        ([("top:8",), ("top:15", 2.0)], [None, (21, 1)]),  # the first one's are of no use
        ([("top:15", 2.0), ("bottom:4",), ("top:15", 2.0)], [(21, 0), None, (21, 2)]),
        ([("top:15",), ("top:4", None, B), ("top:8",)], [(21, 2), None, (21, 2)]),
        ([("top:15", 2.0), ("top:8", 2.0, B)], [(21, 0), (28, 1)]),
        ([("top:15", 2.0), ("top:8", 3.0)], [(21, 1), (21, 1)]),  # 21 layers of 28 spared at once
        ([("5-35", 2.0), ("30-35", 3.0)], [(5, 0), (30, 1)]),  # 3 x 25 layers, or once 30
        ([("5-35",), ("30-35",)], [(5, 1), (5, 1)]),
        ([("top:15", None, A, ["head", "final_norm"]), ("top:1",)], [(21, 1), (21, 1)]),
    ],
)
def test_who_keeps_what(stages, found):
    assert levels(stages) == found


NOTHING = [
    [("top:15",)],
    [("top:15", 1.0)],
    [("top:15", 0.5)],
    [("bottom:4", 3.0)],
    [("all", 3.0), ("0,35", 2.0)],
    [("top:15", 3.0, A, ["embedding"])],
    [("top:15", None, A), ("top:15", None, B)],
    [("top:15",), ("bottom:4",), ("top:15",)],
    [("top:8",), ("top:15",)],
]


@pytest.mark.parametrize("stages", NOTHING)
def test_an_option_that_does_nothing_is_refused(stages):
    with pytest.raises(UserError, match="^data.cache_hidden: would do nothing: no stage goes over"):
        kept(stages)
    assert kept(stages, where="off") == [None] * len(stages)


def test_a_tied_head_trains_the_embedding():
    stages = [("top:15", 3.0, A, ["head"])]
    assert levels(stages) == [(21, 0)]
    with pytest.raises(UserError, match="would do nothing"):
        kept(stages, shape=replace(QWEN3_8B, tied=True))


@pytest.mark.parametrize(("steps", "of_any"), [(101, True), (100, False), (None, False)])
def test_steps_are_epochs_once_the_data_are_read(steps, of_any):
    recipe = Recipe("m", "/r", [Stage("top:15", steps=steps)], DataConfig(A, cache_hidden="host"))
    if steps:
        assert plan_hidden(recipe, QWEN3_8B, 2)[0].level == 21  # not known yet
    if of_any:
        assert plan_hidden(recipe, QWEN3_8B, 2, [ROWS])[0].bytes == 800_000 * TOKEN
    else:
        with pytest.raises(UserError, match="would do nothing"):
            plan_hidden(recipe, QWEN3_8B, 2, [ROWS])


def test_what_it_takes():
    one, two = kept([("top:15", 0.25), ("top:8", 0.5)], read=[ROWS, ROWS])
    assert one.bytes == two.bytes == 400_000 * TOKEN and one.places == 1_000_000
    assert one.name == two.name and one.token_bytes == 8192
    (other,) = kept([("top:8", 2.0)], read=[ROWS])
    (again,) = kept([("top:15", 2.0)], read=[ROWS])
    (data,) = kept([("top:15", 2.0)], read=[replace(ROWS, digest="other")])
    assert again.name == one.name and len({one.name, other.name, data.name}) == 3
    assert again.bytes == 800_000 * TOKEN


def test_what_lies_on_the_host_at_once():
    rows = [ROWS, replace(ROWS, digest="b", tokens=100_000), ROWS, ROWS]
    stages = [("top:15",), ("top:8", 2.0, B), ("top:15",), ("top:15", 1.0, [Source("c")])]
    planned = kept(stages, read=rows)
    sizes = [on_host(planned, i, None) for i in range(4)]
    assert sizes == [800_000 * TOKEN, 900_000 * TOKEN, 800_000 * TOKEN, 0]
    assert on_host(planned, 1, 900_000 * TOKEN) == sizes[1]
    with pytest.raises(UserError) as e:
        on_host(planned, 1, 900_000 * TOKEN - 1)
    assert str(e.value).startswith("data.cache_hidden: hidden states of 7.4 GB on the host, which")
    assert [on_host(kept(stages, where="/x", read=()), i, 1) for i in range(4)] == [0] * 4


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    free = [0]
    monkeypatch.setattr(
        "xplus_fast.planning.hidden.shutil.disk_usage",
        lambda home: type("Usage", (), {"free": free[0]}) if home == tmp_path else 1 / 0,
    )
    where = tmp_path / "not" / "there"
    size = 800_000 * TOKEN
    free[0] = size
    (planned,) = kept([("top:15", 2.0)], where=str(where), read=[ROWS])
    free[0] -= 1
    with pytest.raises(UserError, match="6.6 GB of hidden states are to be kept, 6.6 GB of them"):
        kept([("top:15", 2.0)], where=str(where), read=[ROWS])
    there = where / planned.name
    there.mkdir(parents=True)
    (there / "states.bin").write_bytes(bytes(1 << 20))  # so much less is wanted
    monkeypatch.setattr(
        "xplus_fast.planning.hidden.shutil.disk_usage",
        lambda home: type("Usage", (), {"free": size - (1 << 20)}),
    )
    kept([("top:15", 2.0)], where=str(where), read=[ROWS])


def test_the_plan_says_so(capsys, model, tmp_path):  # noqa: F811
    given = ["--card=h100-80", "stages.0.epochs=2", "stages.1.epochs=2", "data.cache_hidden=host"]
    code, out, _ = plan(capsys, model, *given)
    assert code == 0 and out.count("hidden states: ") == 1  # layer 0 is trained in the first stage
    assert "hidden states: 8.0 KiB a token, in host memory\n" in out
    assert "22.2 GFLOP a token necessary" in out  # 66 units, and 45:
    assert "what enters layer 21; 15.4 GFLOP a token where it is there already\n" in out
    lines = out.replace(str(model), "model").splitlines()
    assert max(map(len, lines)) <= 110
    code, out, err = plan(capsys, model, "--card=h100-80", "data.cache_hidden=host")
    assert (code, out) == (2, "") and "would do nothing" in err and err.count("\n") == 1
