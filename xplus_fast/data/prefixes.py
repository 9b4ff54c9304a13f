"""Which sequences begin with the same tokens, and which of them go into one micro-batch.

Groups are found by the tokens alone: sorted, sequences that share a beginning are neighbours, and
the beginnings they share make a tree. A group of n that shares p tokens saves (n - 1) p; the tree
says which groups save most: a group is a node of it, with leaves below.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST = 8  # tokens of a shared prefix: of fewer, the work to join them is more
LEVELS = 64  # nodes one on another that may be groups: beyond it, only the inner ones


@dataclass(frozen=True)
class Group:
    """Sequences with the same first tokens; or, with a prefix of 0 tokens, of one each."""

    prefix: int  # tokens
    members: tuple[int, ...]


def find_groups(sequences: Sequence[np.ndarray], shareable: Sequence[int]) -> list[Group]:
    """The groups that save most tokens, every sequence in one.

    sequences: int32 tokens of each. shareable: how many of the first may be shared, each less than
    all. Returns groups in the order of their tokens, so that like ones are neighbours.
    """
    n = len(sequences)
    keys = [s[:k].astype(">u4").tobytes() for s, k in zip(sequences, shareable, strict=True)]
    order = sorted(range(n), key=keys.__getitem__)
    root = _tree([_common(keys[a], keys[b]) for a, b in zip(order, order[1:], strict=False)])
    of: dict[int, list[int]] = {}  # a leaf's or an opened node's number -> leaves
    prefixes: dict[int, int] = {}
    todo = [(root, 0, -1)] if n else []
    while todo:
        node, above, opened = todo.pop()
        if node.opens(above):
            above, opened = node.depth, len(prefixes)
            prefixes[opened] = node.depth
        todo += [(child, above, opened) for child in node.children]
        for leaf in node.leaves:
            of.setdefault(opened if opened >= 0 else n + leaf, []).append(leaf)
    groups = [
        (min(m), Group(prefixes.get(k, 0), tuple(order[i] for i in sorted(m))))
        for k, m in of.items()
    ]
    return [group for _, group in sorted(groups, key=lambda g: g[0])]


def _common(a: bytes, b: bytes) -> int:
    """How many tokens two keys have in common."""
    n = min(len(a), len(b)) // 4
    if a[: 4 * n] == b[: 4 * n]:
        return n
    x, y = np.frombuffer(a, ">u4", n), np.frombuffer(b, ">u4", n)
    return int((x != y).argmax())


class _Node:
    """A beginning of `depth` tokens that several sequences share.

    An opened node is a group: it costs its depth once, and saves it for each of the leaves below
    that no opened node further down has.
    """

    def __init__(self, depth: int) -> None:
        self.depth, self.children, self.leaves = depth, list[_Node](), list[int]()
        self.level = 0  # of nodes below, one on another
        self._known: dict[int, int] = {}

    def add(self, child: "_Node") -> None:
        if child.depth < LEAST or child.level == LEVELS:  # never opened: what is in it is ours
            self.children += child.children
            self.leaves += child.leaves
            self.level = max(self.level, child.level)
        else:
            self.children.append(child)
            self.level = max(self.level, child.level + 1)

    def saves(self, above: int) -> int:
        """Tokens saved at best by the leaves below, where a group of `above` tokens is open."""
        if above not in self._known:
            self._known[above] = max(self._closed(above), self._opened())
        return self._known[above]

    def opens(self, above: int) -> bool:
        return self._opened() > self._closed(above)

    def _closed(self, above: int) -> int:
        return len(self.leaves) * above + sum(child.saves(above) for child in self.children)

    def _opened(self) -> int:
        return self._closed(self.depth) - self.depth


def _tree(common: list[int]) -> _Node:
    """Neighbours' common prefixes -> the tree whose leaves the neighbours are, in order."""
    open_ = [_Node(0)]  # from the root to where the walk is
    for i, prefix in enumerate([*common, 0]):
        if open_[-1].depth < prefix:
            open_.append(_Node(prefix))
        open_[-1].leaves.append(i)
        while open_[-1].depth > prefix:
            done = open_.pop()
            if open_[-1].depth < prefix:
                open_.append(_Node(prefix))
            open_[-1].add(done)
    return open_[0]


def partition(groups: Sequence[Group], lengths: Sequence[int], tokens: int) -> list[list[Group]]:
    """Cut groups into parts of at most `tokens` computed tokens, or of a single sequence.

    lengths: of every sequence, with its prefix. A group that is cut has its prefix in each part.
    The longest that share nothing are placed first, then groups in their order, then what fits into
    the room that is left.
    """
    alone = sorted((g.members[0] for g in groups if not g.prefix), key=lambda i: lengths[i])
    shared = [g for g in groups if g.prefix]
    queue = [(n, i) for n, g in enumerate(shared) for i in g.members]
    parts, at = [], 0
    while at < len(queue) or alone:
        part: dict[int, list[int]] = {}  # group's number -> members
        single: list[int] = []
        room = _fill(single, alone, lengths, tokens, above=tokens // 4)
        while at < len(queue):
            n, i = queue[at]
            wanted = lengths[i] - (shared[n].prefix if n in part else 0)
            if wanted > room and (part or single):
                break
            part.setdefault(n, []).append(i)
            room -= wanted
            at += 1
        _fill(single, alone, lengths, room, above=0)
        if not part and not single:
            single.append(alone.pop())  # longer than a part
        made = [Group(shared[n].prefix if len(m) > 1 else 0, tuple(m)) for n, m in part.items()]
        parts.append(made + [Group(0, (i,)) for i in single])
    return parts


def _fill(
    single: list[int], alone: list[int], lengths: Sequence[int], room: int, above: int
) -> int:
    """Move the longest that fit, if longer than `above`; returns the room that is left.

    alone: ascending by length.
    """
    while True:
        i = bisect_right(alone, room, key=lengths.__getitem__)
        if not i or lengths[alone[i - 1]] <= above:
            return room
        room -= lengths[alone[i - 1]]
        single.append(alone.pop(i - 1))


def share(groups: Sequence[Group], lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Cut a step into the shares of several processes: sequences, about as many tokens in each.

    Along groups, where it can be: a group that is cut is computed with its prefix twice. None is
    empty if there are as many sequences as parts.
    """
    members = [i for g in groups for i in g.members]
    costs = [lengths[i] - (g.prefix if k else 0) for g in groups for k, i in enumerate(g.members)]
    middles = np.cumsum(costs) - np.asarray(costs) / 2
    of = np.minimum((middles * parts / max(1, sum(costs))).astype(np.int64), parts - 1)
    cuts = np.searchsorted(of, np.arange(1, parts))
    n = len(members)
    for p in range(parts - 1):  # one at least for each
        before = cuts[p - 1] if p else 0
        cuts[p] = min(max(cuts[p], before + 1), n - (parts - 1 - p))
    return [members[a:b] for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
