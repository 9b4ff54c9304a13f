"""What is trained in the training benchmark: models, stages, and steps of real lengths.

Every contestant gets the same weights (drawn from a tensor's name) and the same sequences.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.models import RandomWeights
from xplus_fast.data.collate import PackCollator
from xplus_fast.planning.flops import PROMPT, Work, work_of

STEP, ROW = 16384, 4096  # tokens of an optimizer step, and of a packed row
STAGES = {"stage1": "bottom:4", "stage2": "top:15", "b4t8": "bottom:4,top:8"}
MIXES = ("pairs", "full", "1k")
LENGTHS = Path(__file__).parent / "lengths.json"


@dataclass(frozen=True)
class Scale:
    """How large a run is."""

    model: str  # a key of `models.CONFIGS`
    step: int = STEP
    row: int = ROW
    stages: tuple[tuple[str, str], ...] = tuple(STAGES.items())
    warm: int = 2  # steps, before those that are timed
    timed: int = 3


SMOKE = Scale("tiny", step=256, row=128, stages=(("stage2", "top:2"),), warm=1, timed=2)


@dataclass(frozen=True)
class Sequence:
    """One conversation: tokens, of which the last `answer` are learnt."""

    ids: Tensor  # [n] int64
    answer: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> Tensor:
        labels = self.ids.clone()
        labels[: len(self.ids) - self.answer] = -100
        return labels


class NamedWeights(RandomWeights):
    """Random weights that depend on a tensor's name alone."""

    def read(self, names: tuple[str, ...], dtype: torch.dtype, *, staged: bool = False) -> Tensor:
        return torch.cat([self._one(name, dtype) for name in names])

    def _one(self, name: str, dtype: torch.dtype) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=self._device)
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
        generator = torch.Generator(self._device).manual_seed(seed)
        made = torch.empty(shape, dtype=dtype, device=self._device)
        return made.normal_(0, 0.02, generator=generator)


def make_steps(scale: Scale, mix: str, count: int, vocabulary: int) -> list[list[list[Sequence]]]:
    """`count` optimizer steps, each of rows of sequences that fill `scale.row` tokens.

    mix: "pairs", lengths of real translation conversations in four directions, each with a prompt
    of `PROMPT` tokens (drawn in turn, packed first-fit: what no row has room for waits for the next
    step); "full": one sequence a row; "1k": four, of 1024 tokens where a row has 4096.
    """
    generator = torch.Generator().manual_seed(0)
    rows = scale.step // scale.row

    def sequence(length: int, answer: int) -> Sequence:
        ids = torch.randint(0, vocabulary, (length,), generator=generator)
        return Sequence(ids, max(1, answer))

    if mix != "pairs":
        each = 1 if mix == "full" else 4  # of a row

        def row() -> list[Sequence]:
            length = scale.row // each
            return [sequence(length, length // 2) for _ in range(each)]

        return [[row() for _ in range(rows)] for _ in range(count)]
    lengths = _real_lengths()
    prompts = [torch.randint(0, vocabulary, (PROMPT,), generator=generator) for _ in range(4)]
    shrink = scale.row / ROW  # a smoke run's rows are shorter, and so are its sentences
    steps, at = [], 0
    for _ in range(count):
        packed: list[list[Sequence]] = [[] for _ in range(rows)]
        room, missed = [scale.row] * rows, 0
        while missed < 8:
            prompt, answer = (max(1, int(n * shrink)) for n in lengths[at % len(lengths)])
            at += 1
            row = next((r for r in range(rows) if room[r] >= prompt + answer), None)
            if row is None:
                missed += 1
                continue
            made = sequence(prompt + answer, answer)
            shared = min(int(PROMPT * shrink), prompt - 1)  # what predicts the answer is its own
            made.ids[:shared] = prompts[at % len(prompts)][:shared]
            packed[row].append(made)
            room[row] -= prompt + answer
        steps.append(packed)
    return steps


@cache
def _real_lengths() -> list[list[int]]:
    return json.loads(LENGTHS.read_text())["prompt_answer"]


def necessary_work(step: list[list[Sequence]]) -> Work:
    """What there is to do in a step, whoever does it: what sequences share, once."""
    rows = [{"input_ids": s.ids, "labels": s.labels} for row in step for s in row]
    return work_of(PackCollator(shared_prefixes=True)(rows)["layout"])
