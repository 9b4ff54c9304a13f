"""GPUs as a plan sees them: what their makers' data sheets say, and which one is here.

Matrix rates are dense (sheets often print twice as much, "with sparsity"), with sums in fp32, as
training wants them: GeForce cards do half of their fp16-sum rate. Sources: NVIDIA's data sheets of
A100, L4, L40S, H100 (SXM) and H200 (SXM), and its architecture whitepapers of GA102 (RTX 3090), Ada
(RTX 4090) and Blackwell (RTX 5090). Memory is what a program finds there, as PyTorch's messages
tell it, which is less than the box says. PCIe is one way, of 16 lanes: 32 GB/s (generation 4) or 64
(generation 5) by the standard; 25 and 50 are what copies from pinned memory commonly reach.
"""

import difflib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace

from xplus_fast.errors import UserError


@dataclass(frozen=True)
class Card:
    """One GPU model."""

    name: str
    memory: int  # bytes
    bandwidth: float  # of its memory, bytes/s
    bf16: float  # FLOP/s
    fp8: float  # FLOP/s, 0 where it has no FP8
    capability: tuple[int, int]
    pcie: float  # bytes/s, one way, from pinned memory

    @property
    def fp8_gemm(self) -> bool:
        return self.capability >= (8, 9)


def _card(
    name: str, gib: float, gb_s: float, bf16: float, fp8: float, capability: tuple[int, int],
    pcie: float,
) -> Card:  # fmt: skip
    return Card(name, int(gib * 2**30), gb_s * 1e9, bf16 * 1e12, fp8 * 1e12, capability, pcie * 1e9)


CARDS = {
    c.name: c
    for c in (
        # name, GiB, GB/s, bf16 and fp8 TFLOP/s, capability, PCIe GB/s
        _card("rtx3090", 23.6, 936, 71, 0, (8, 6), 25),
        _card("rtx4090", 23.5, 1008, 165.2, 330.3, (8, 9), 25),
        _card("rtx5090", 31.3, 1792, 209.5, 419, (12, 0), 50),
        _card("a100-40", 39.4, 1555, 312, 0, (8, 0), 25),
        _card("a100-80", 79.1, 2039, 312, 0, (8, 0), 25),
        _card("l4", 22.0, 300, 121, 242, (8, 9), 25),
        _card("l40s", 44.4, 864, 362, 733, (8, 9), 25),
        _card("h100-80", 79.1, 3350, 989, 1979, (9, 0), 50),
        _card("h200", 139.8, 4800, 989, 1979, (9, 0), 50),
    )
}


def find_card(name: str) -> Card:
    """A card by its name, however it is written: "RTX 4090", "4090".

    Raises `UserError` with the nearest names.
    """
    plain = {re.sub(r"rtx|[^a-z0-9]", "", key): key for key in CARDS}
    wanted = re.sub(r"nvidia|geforce|rtx|[^a-z0-9]", "", name.lower())
    if wanted in plain:
        return CARDS[plain[wanted]]
    near = [plain[n] for n in difflib.get_close_matches(wanted, plain, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(f"card: {name!r} is not known; {hint}known: {', '.join(CARDS)}")


def smallest_card(budget: int) -> Card:
    """The first in the table with at least so much memory, else the largest."""
    fitting = [c for c in CARDS.values() if c.memory >= budget and c.fp8_gemm]
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
    """ "NVIDIA H100 80GB HBM3, 81559" (name, MiB) -> the card of the table that it is."""
    name, _, mib = line.rpartition(",")
    words = re.sub(r"[^a-z0-9]", "", name.lower())
    if not mib.strip().isdigit():
        return None
    # longest name first: an L40S is no L4
    for card in sorted(CARDS.values(), key=lambda c: len(c.name), reverse=True):
        model = card.name.partition("-")[0]
        if model in words and abs(int(mib) * 2**20 / card.memory - 1) < 0.1:
            return card
    return None
