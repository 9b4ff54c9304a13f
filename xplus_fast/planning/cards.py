"""Which card is meant, by whatever name, and which one is here."""

import difflib
import os
import re
import shutil
import subprocess
from dataclasses import replace

from xplus_fast.errors import UserError
from xplus_fast.planning.card_table import (
    BF16_FROM,
    CARDS,
    MULTIPROCESSORS,
    NAMES,
    SLICES,
    Card,
)

NEAR = 8  # names in a message at most
SAME_SIZE = 0.1  # share by which a card's memory may differ from the table's
SLICE = re.compile(r"(?:\bmig)?[\s_-]*\b(\d)g[. ]?(\d+)gb(?:\+[a-z.]+)?\s*$")  # "MIG 1g.10gb+me"
SIZE = re.compile(r"[\s_(-]+(\d+)\s*gi?b?\)?\s*$")  # "RTX 3090 24GB"


def find_card(name: str) -> Card:
    """A card by its name or the start of it, however it is written: "RTX 4090", "4090", "l40s",
    "NVIDIA A100-SXM4-80GB", "RTX 4060 Ti 16 GB", "H100 80GB HBM3 MIG 3g.40gb".

    Raises `UserError` with the near names, where it is unknown or more than one card's.
    """
    found = _named(name.lower())
    if len(found) == 1:
        return found[0]
    if found:
        told = [card.name for card in found]
        raise UserError(f"card: {name!r} may be several; did you mean {_one_of(told)}?")
    raise UserError(f"card: {name!r} is not known; {_hint(name.lower())}")


def _hint(text: str) -> str:
    """The names nearest to an unknown one, or all."""
    if part := SLICE.search(text):
        sliced = [card.name for card in _named(text[: part.start()]) if card.name in SLICES]
        every = [f"{key}-{profile}" for key in sliced or SLICES for profile in SLICES[key]]
        return f"did you mean {_one_of(difflib.get_close_matches(part[0], every, 3, 0))}?"
    plain = {_plain(called): key for called, key in NAMES}
    close = difflib.get_close_matches(_plain(SIZE.sub("", text)), plain, 3, 0.6)
    near = list(dict.fromkeys(plain[one] for one in close))
    return f"did you mean {_one_of(near)}?" if near else f"known: {', '.join(CARDS)}"


def _one_of(names: list[str]) -> str:
    more = f" or {len(names) - NEAR} more" if len(names) > NEAR else ""
    return " or ".join(names[:NEAR]) + more


def _named(text: str) -> list[Card]:
    """The cards that may be meant by this text, in lower case."""
    if part := SLICE.search(text):
        wholes = _named(text[: part.start()])
        profile = f"{part[1]}g.{part[2]}gb"
        return [_slice(c, profile) for c in wholes if profile in SLICES.get(c.name, ())]
    if found := _called(_plain(text)):
        return found
    if size := SIZE.search(text):
        # a box's GB are up to 7 % more than nvidia-smi's GiB
        given, found = int(size[1]) << 30, _called(_plain(text[: size.start()]))
        return [card for card in found if abs(card.memory / given - 1) < SAME_SIZE]
    return []


def _called(plain: str) -> list[Card]:
    """Cards of just this name, else those whose name begins like this."""
    names = [(_plain(called), key) for called, key in NAMES]
    same = dict.fromkeys(key for called, key in names if called == plain)
    return [
        CARDS[key]
        for key in same or dict.fromkeys(k for called, k in names if called.startswith(plain))
    ]


def _plain(text: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|rtx|[^a-z0-9]", "", text.lower())


def _slice(card: Card, profile: str) -> Card:
    """A part of a card: its multiprocessors' share of the rates, and of the bandwidth that of its
    memory, which is cut in eighths. Copies have all of PCIe while the other parts make none."""
    gib, processors = SLICES[card.name][profile]
    share = min(1.0, processors / MULTIPROCESSORS[card.name])
    memory = int(gib * 2**30)
    return replace(
        card, name=f"{card.name}-{profile}", memory=memory, bf16=card.bf16 * share,
        fp8=card.fp8 * share, bandwidth=card.bandwidth * round(8 * memory / card.memory) / 8,
    )  # fmt: skip


def check_trains(name: str, capability: tuple[int, int]) -> None:
    """Raises `UserError` for a card that no run can use."""
    if capability < BF16_FROM:
        have, want = (".".join(map(str, c)) for c in (capability, BF16_FROM))
        raise UserError(
            f"{name} has compute capability {have} and no bf16; training on a GPU needs {want}"
            " (Ampere) or later; a small model trains with device=cpu"
        )


def smallest_card(budget: int, capability: tuple[int, int] | None = None) -> Card:
    """The one with least memory, but at least so much, else the largest; of this compute
    capability if there is one."""
    fitting = [c for c in CARDS.values() if c.memory >= budget]
    alike = [c for c in fitting if c.capability == capability]
    fitting = alike or [c for c in fitting if c.fp8_gemm]
    key = min if fitting else max
    return key(fitting or CARDS.values(), key=lambda c: (c.memory, -c.bf16))


def local_card() -> Card | None:
    """The first GPU here with the memory that is free on it, asked of nvidia-smi: torch takes
    seconds to load.

    None where there is none, or one that the table does not know.
    """
    if not (tool := shutil.which("nvidia-smi")):
        return None
    command = [tool, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    if first := os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip():
        command += ["-i", first]
    try:
        said = subprocess.run(
            command, capture_output=True, text=True, timeout=5, check=True
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    name, _, free = said.partition("\n")[0].rpartition(",")
    card = match_card(name)
    if card is None or not free.strip().isdigit():
        return card
    return replace(card, memory=left(card.memory, int(free) << 20))


def left(total: int, free: int) -> int:
    """Bytes of a card's memory that others left: all, where they have under 3 % of it, else whole
    sixteenths, so that a run that goes on is not planned anew for every megabyte."""
    return total if free >= 0.97 * total else free * 16 // total * total // 16


def match_card(line: str) -> Card | None:
    """ "NVIDIA H100 80GB HBM3, 81559" (name, MiB) -> the card of the table that it is.

    With the table's memory; or with that of the line where it is another's, as where a card was
    made in two sizes of which the table has one.
    """
    name, _, mib = line.rpartition(",")
    if not mib.strip().isdigit() or int(mib) == 0:
        return None
    called = {_plain(one) for one, _ in NAMES}
    if _plain(SLICE.sub("", name.lower())) not in called:
        return None  # the start of a name is none
    memory = int(mib) << 20
    card = min(_named(name.lower()), key=lambda c: abs(c.memory - memory), default=None)
    if card is None or abs(memory / card.memory - 1) < SAME_SIZE:
        return card
    return replace(card, memory=memory)
