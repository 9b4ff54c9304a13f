"""Batches of other lengths, other prefixes and other supervised rows compile nothing anew.

A kernel that Triton compiles in the middle of training makes that step last seconds.
"""

import pytest
import torch

from tests.gpu import common
from tests.gpu.common import DEVICE, GPU
from tests.gpu.test_block import HEADS
from tests.tiny import VOCABULARY, tiny_model
from xplus_fast.data.collate import PackCollator
from xplus_fast.model.prepare import prepare_model

pytestmark = [
    *GPU,
    pytest.mark.skipif(common.REHEARSAL, reason="Triton compiles for a GPU alone"),
]


def rows(seed, short):
    """Sequences of any lengths, some of which begin alike."""
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=g))

    made = []
    for _ in range(draw(1, 4)):
        prefix = torch.randint(0, VOCABULARY, (draw(9, 40),), generator=g)
        for _ in range(draw(2, 5)):
            own = torch.randint(0, VOCABULARY, (draw(3, 90) + (0 if short else 900),), generator=g)
            ids = torch.cat([prefix, own])
            labels = ids.clone()
            labels[: len(prefix) + draw(1, 3)] = -100
            made.append({"input_ids": ids, "labels": labels})
    return made


@pytest.mark.parametrize("short", [True, False], ids=["short", "long"])
@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [2, 3]], ids=["all", "top"])
def test_other_batches_compile_nothing(layers, short, monkeypatch):
    import triton

    made = tiny_model(**HEADS, num_hidden_layers=4).to(DEVICE, torch.bfloat16)
    model = prepare_model(made, layers)
    collate = PackCollator(shared_prefixes=True)
    compiled = []

    def note(*, fn, **_):
        compiled.append(fn.name)

    def step(seed):
        batch = collate(rows(seed, short))
        batch = {k: x.to(DEVICE) if torch.is_tensor(x) else x for k, x in batch.items()}
        model(**batch).loss.backward()
        return batch["layout"]

    layouts = [step(0)]
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    layouts += [step(seed) for seed in range(1, 13)]
    assert not compiled
    # what decides has been seen either way: divisible by 16, or not
    for sizes in (
        [int(x.edges[-1]) for x in layouts], [int(x.predicts.sum()) for x in layouts],
        [x.prefix_tokens for x in layouts],
    ):  # fmt: skip
        assert len({n % 2 for n in sizes}) == 2
