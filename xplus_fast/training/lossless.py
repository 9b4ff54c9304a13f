"""State of any library's scheduler or optimizer -> JSON and tensors, and the same state back.

JSON alone turns a key 2 into "2", a tuple into a list and a Counter into a dict, and what reads
them (MultiStepLR's milestones, say) goes on with something else. Here whatever JSON does not give
back is written as {"$kind": ...}, and a state that would not come back equal is refused when it is
saved, not found out when it is resumed.
"""

import json
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xplus_fast.errors import UserError

# Kind -> (type, how it is made of a list of what it holds).
_PAIRS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "$dict": (dict, dict),
    "$counter": (Counter, lambda pairs: Counter(dict(pairs))),
    "$ordered": (OrderedDict, OrderedDict),
}
_ITEMS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "$tuple": (tuple, tuple),
    "$set": (set, set),
    "$frozenset": (frozenset, frozenset),
}


def encode(value: Any, where: str) -> tuple[Any, dict[str, Tensor]]:
    """A JSON-able tree, and the tensors that it names.

    value: of plain Python types, NumPy's and torch's, nested. where: its name, such as "scheduler";
    it begins the tensors' names, and is told in an error. Tensors are not copied; one that stands
    in several places is one again when it comes back.

    Raises `UserError` for what would not come back equal, naming where in `value` it stands.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode(value, where, tensors)
    if not same(value, decode(json.loads(json.dumps(tree)), tensors)):
        raise UserError(f"{where}: its state does not read back as it was, so it cannot be saved")
    return tree, tensors


def decode(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `encode` was given; its tensors are those of `tensors`."""
    if isinstance(tree, list):
        return [decode(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1 and (kind := next(iter(tree))).startswith("$"):
        held = tree[kind]
        if kind == "$tensor":
            return tensors[held]
        if kind == "$parameter":
            return torch.nn.Parameter(tensors[held["tensor"]], requires_grad=held["trains"])
        if kind == "$array":
            return tensors[held].numpy()
        if kind == "$numpy":
            return np.dtype(held[0]).type(held[1])
        if kind == "$dtype":
            return getattr(torch, held)
        if kind == "$bytes":
            return bytes.fromhex(held)
        if kind == "$deque":
            return deque((decode(item, tensors) for item in held[0]), held[1])
        if kind in _PAIRS:
            return _PAIRS[kind][1]([(decode(k, tensors), decode(v, tensors)) for k, v in held])
        return _ITEMS[kind][1](decode(item, tensors) for item in held)
    return {key: decode(item, tensors) for key, item in tree.items()}


def same(a: Any, b: Any) -> bool:
    """Equal in type and value, all the way down; tensors by their bits, a NaN equal to itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        alike = (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, b.requires_grad)
        return alike and (a is b or bool(torch.equal(_bits(a), _bits(b))))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(*keys) and same(a[keys[0]], b[keys[1]]) for keys in zip(a, b, strict=True)
        )
    if isinstance(a, list | tuple | deque):
        ends = getattr(a, "maxlen", None) == getattr(b, "maxlen", None)
        return ends and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b or (a != a and b != b))


def _encode(value: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value

    def named(tensor: Tensor) -> str:
        for name, other in tensors.items():
            if other is tensor:  # one tensor in several places stays one
                return name
        assert at not in tensors, at
        tensors[at] = tensor
        return at

    def items(values: Iterable[Any]) -> list[Any]:
        return [_encode(item, f"{at}.{i}", tensors) for i, item in enumerate(values)]

    kind = type(value)
    if kind is torch.nn.Parameter:
        return {"$parameter": {"tensor": named(value.detach()), "trains": value.requires_grad}}
    if isinstance(value, Tensor):
        if kind is not Tensor or value.requires_grad:
            raise UserError(f"{at}: a tensor of the kind {kind.__name__} cannot be saved")
        return {"$tensor": named(value)}
    if kind is np.ndarray and value.dtype.kind in "biuf":
        return {"$array": named(torch.from_numpy(np.ascontiguousarray(value)))}
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return {"$numpy": [value.dtype.str, value.item()]}
    if kind is torch.dtype:
        return {"$dtype": str(value).removeprefix("torch.")}
    if kind is bytes:
        return {"$bytes": value.hex()}
    if kind is list:
        return items(value)
    if kind is deque:
        return {"$deque": [items(value), value.maxlen]}
    if kind is defaultdict:  # its factory is code; a dict of its items would lack it
        raise UserError(f"{at}: a defaultdict cannot be saved")
    if kind is dict and all(type(k) is str and not k.startswith("$") for k in value):
        return {k: _encode(v, f"{at}.{k}", tensors) for k, v in value.items()}
    for name, (wanted, _) in _PAIRS.items():
        if kind is wanted:
            return {
                name: [
                    [_encode(k, f"{at}.key{i}", tensors), _encode(v, f"{at}.{k}", tensors)]
                    for i, (k, v) in enumerate(value.items())
                ]
            }
    for name, (wanted, _) in _ITEMS.items():
        if kind is wanted:
            return {name: items(value)}
    raise UserError(
        f"{at}: a value of the type {kind.__module__}.{kind.__qualname__} cannot be saved;"
        " numbers, texts, tensors and containers of them can"
    )


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else flat
