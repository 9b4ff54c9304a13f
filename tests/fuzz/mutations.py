"""Hostile variants of good input, the same ones every time: of trees of values, and of bytes."""

import copy
import random
from typing import Any

# What has broken one reader or another.
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e308, float("nan"), float("inf"), 10**15, 10**30,
    10**400, 2**31, 2**63, "", " ", "x", "0", "null", "\0", "\ud800", "\u202e", "\u2028", "\n",
    "../x", "/", "~", "~nobody", ".", "a" * 300, "a/" * 2100, "{", "{text", "{0}", "%s", "auto",
    "all",
    "bottom:0", "0-", "-", "9" * 5000, "2025-01-31", "no", [], {}, [[]], [{}], {"": 0}, {"a": {}},
    [None], [1, "a"], {"0": 1}, "cuda:9", "meta", "float64", "int8", "1TB", "0GB", "-1GB",
]  # fmt: skip


ODD = [b"\0", b"\xff", b"\xed\xa0\x80", b'"', b"{", b"&a ", b"*a", b"\n", b"!!x ", b"\xe2\x80\xa8"]


def mutate_tree(tree: Any, rng: random.Random, times: int) -> Any:
    """A copy with some of its values replaced, removed, repeated, wrapped or moved."""
    tree = copy.deepcopy(tree)
    for _ in range(times):
        places = list(_places(tree))
        if not places:
            return rng.choice(VALUES)
        parent, key = rng.choice(places)
        act = rng.randrange(7)
        if act < 3:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
        elif act == 3:
            del parent[key]
        elif act == 4:
            parent[key] = rng.choice([[parent[key]], {"a": parent[key]}, [parent[key]] * 2])
        elif act == 5:
            other, at = rng.choice(places)
            parent[key] = copy.deepcopy(other[at])
        elif isinstance(parent, dict):
            parent[rng.choice(["", "x", f"{key}s", str(key).upper(), "a" * 300])] = parent.pop(key)
    return tree


def _places(tree: Any) -> Any:
    """(container, key) of every value in a tree."""
    keys = (
        list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    )
    for key in keys:
        yield tree, key
        yield from _places(tree[key])


def mutate_bytes(data: bytes, rng: random.Random, times: int) -> bytes:
    """The bytes with some flipped, cut out, doubled, or replaced by odd ones."""
    raw = bytearray(data)
    for _ in range(times):
        at = rng.randrange(len(raw) + 1)
        some = rng.choice([1, 1, 2, 8, 64, 1000])
        act = rng.randrange(6)
        if act == 0 and raw:
            raw[at % len(raw)] ^= 1 << rng.randrange(8)
        elif act == 1:
            del raw[at : at + some]
        elif act == 2:
            del raw[at:]
        elif act == 3:
            raw[at:at] = raw[at : at + some]
        elif act == 4:
            raw[at:at] = rng.choice([*ODD, b"[" * some, b"9" * some])
        else:
            raw[at : at + some] = bytes(rng.randrange(256) for _ in range(some))
    return bytes(raw)
