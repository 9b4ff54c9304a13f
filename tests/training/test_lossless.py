"""State that goes into a checkpoint comes back as it was, types and bits, or is refused."""

import json
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch

from xplus_fast.errors import UserError
from xplus_fast.training.lossless import decode, encode, same

NAN = float("nan")
VALUES: dict[str, Any] = {
    "plain": {"a": 1, "b": [1.5, None, True, "x"], "c": {"d": -0.0, "e": float("inf")}},
    "nan": [NAN, {"x": NAN}],
    "integer keys": {2: 1, 5: 1, -1: {0: "x"}},
    "other keys": {None: 1, True: 2, 1.5: 3, (1, "a"): 4},
    "keys like ours": {"$tensor": "x", "$dict": []},
    "counter": Counter({2: 1, 5: 3}),
    "ordered": OrderedDict([("b", 1), (1, 2)]),
    "tuples": ((0.9, 0.999), [(), ((1,),)]),
    "sets": {1, 2, "x"},
    "frozen": frozenset({(1, 2)}),
    "deque": deque([1, 2.5], maxlen=3),
    "bytes": b"\x00\xff",
    "numpy": [np.float32(0.1), np.int64(3), np.bool_(True), np.arange(6.0).reshape(2, 3)],
    "tensor": torch.tensor([1.5, NAN]),
    "tensors in lists": [torch.ones(2, dtype=torch.bfloat16), (torch.tensor(3), [torch.eye(2)])],
    "no elements": torch.empty(0, 3, dtype=torch.int8),
    "a parameter": torch.nn.Parameter(torch.ones(2)),
    "a frozen parameter": {0: torch.nn.Parameter(torch.ones(2), requires_grad=False)},
    "dtype": torch.bfloat16,
    "large": 2**70,
}


@pytest.mark.parametrize("name", VALUES)
def test_comes_back_equal(name: str) -> None:
    tree, tensors = encode(VALUES[name], "state")
    back = decode(json.loads(json.dumps(tree)), tensors)
    assert same(VALUES[name], back)
    assert all(n.startswith("state") and type(t) is torch.Tensor for n, t in tensors.items())


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (lambda: None, r"state\.x: a value of the type builtins\.function"),
        (defaultdict(list), r"state\.x: a defaultdict"),
        ([object()], r"state\.x\.0: a value of the type builtins\.object"),
        (torch.ones(2, requires_grad=True), r"state\.x: a tensor of the kind Tensor"),
        (np.array(["text"]), r"state\.x: a value of the type numpy\.ndarray"),
        (torch.device("cpu"), r"state\.x: a value of the type torch\.device"),
    ],
)
def test_what_would_not_come_back_is_refused(value: Any, what: str) -> None:
    with pytest.raises(UserError, match=what):
        encode({"x": value}, "state")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 1.0), (1, True), ((1,), [1]), ({1: 2}, {"1": 2}), ({1: 2}, Counter({1: 2})),
        (deque([1], 2), deque([1])), (torch.tensor(0.0), torch.tensor(-0.0)),
        (torch.tensor(1), torch.tensor(1.0)), (np.float32(1), np.float64(1)), ([1], [1, 1]),
    ],
)  # fmt: skip
def test_sameness_is_strict(a: Any, b: Any) -> None:
    assert not same(a, b)


def test_one_tensor_in_two_places_stays_one() -> None:
    shared = torch.zeros(2)
    tree, tensors = encode([{"a": shared}, [shared]], "state")
    back = decode(tree, tensors)
    assert back[0]["a"] is back[1][0] and len(tensors) == 1
