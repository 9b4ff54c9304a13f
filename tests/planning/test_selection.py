import pytest

from xplus_fast.errors import UserError
from xplus_fast.planning.selection import describe_layers, resolve_layers


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("bottom:4", [0, 1, 2, 3]),
        ("top:15", list(range(21, 36))),
        ("bottom:2,top:1", [0, 1, 35]),
        ("0-3,30-35", [0, 1, 2, 3, 30, 31, 32, 33, 34, 35]),
        ("-15:", list(range(21, 36))),
        (":2", [0, 1]),
        ("10:12", [10, 11]),
        ("30:-4", [30, 31]),
        ("7", [7]),
        ("-1", [35]),
        (" 3 , 1 ", [1, 3]),
        ("all", list(range(36))),
        ([5, 0, -1], [0, 5, 35]),
        (7, [7]),
    ],
)
def test_resolves(spec, expected):
    assert resolve_layers(spec, 36) == expected
    assert resolve_layers(describe_layers(expected), 36) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bottom:0", "bottom:0: the model has 36 layers, 1 to 36"),
        ("top:37", "top:37: the model has 36 layers"),
        ("0-36", "0-36 is out of range: the model has layers 0 to 35"),
        ("36", "36 is out of range"),
        ([36], "36 is out of range"),
        ([-37], "-37 is out of range"),
        ("-37:", "-37: is out of range"),
        ("5-3", "runs backwards"),
        ("0-3,2", "layer 2 is named twice"),
        ([1, 1], "layer 1 is named twice"),
        ([-1, 35], "layer 35 is named twice"),
        ("", "is no selection"),
        ([], "selects no layer"),
        ("4:4", "selects no layer"),
        ("layers.3", "is no selection; known forms: bottom:4"),
        ("3*", "is no selection"),
        ("bottom", "is no selection"),
        (["3"], "'3' is not a layer id"),
        ([True], "True is not a layer id"),
        ("bottom:" + "9" * 5000, "is no selection"),
        ("0-" + "9" * 5000, "is no selection"),
        (":" + "9" * 5000, "is no selection"),
        ("9" * 5000, "is no selection"),
        ("\u0663", "is no selection"),  # a digit, but no ASCII
        ("all," * 60_000, "layer 0 is named twice"),
        ([0] * 50_000, "layer 0 is named twice"),
    ],
)
def test_refuses_in_one_line(spec, message):
    with pytest.raises(UserError, match="^layers: ") as e:
        resolve_layers(spec, 36)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_describe():
    assert describe_layers([3, 0, 1, 7]) == "0-1,3,7"
    assert describe_layers([]) == ""
