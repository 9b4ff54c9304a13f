"""How well a stock model expects given answers: loss and greedy hits, what all begin with once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

BATCH = 2048  # tokens, padding counted, of one forward


@dataclass(frozen=True)
class Answer:
    """loss: of its tokens, summed, in nats. hit: whether each of them is the likeliest one."""

    loss: float
    tokens: int
    hit: bool


@torch.no_grad()
def score(model: Any, sequences: Sequence[tuple[Tensor, Tensor]]) -> list[Answer]:
    """Score sequences by their supervised tokens.

    model: a stock causal language model. sequences: (input_ids, labels), int64 [T] each, labels not
    shifted, -100 where nothing is asked; at least one is asked of each.
    """
    first = min(_asked_from(labels) for _, labels in sequences) - 1  # what predicts is not shared
    ids = [s for s, _ in sequences]
    shared = 0
    while shared < first and len({int(s[shared]) for s in ids}) == 1:
        shared += 1
    prefix = None
    if shared:
        prefix = model.model(input_ids=ids[0][None, :shared], use_cache=True).past_key_values
    found: list[Answer | None] = [None] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    while order:
        longest = len(ids[order[-1]]) - shared
        chosen = [order.pop() for _ in range(min(len(order), max(1, BATCH // longest)))]
        some = [sequences[i] for i in chosen]
        for i, answer in zip(chosen, _batch(model, some, prefix, shared), strict=True):
            found[i] = answer
    return found  # type: ignore[return-value]


def _asked_from(labels: Tensor) -> int:
    return int((labels != -100).nonzero()[0])


def _batch(
    model: Any, sequences: Sequence[tuple[Tensor, Tensor]], prefix: Any, shared: int
) -> list[Answer]:
    """Padding stands on the right, where nothing that counts sees it."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([s[shared:] for s, _ in sequences], batch_first=True)  # [B, S]
    labels = pad([y[shared:] for _, y in sequences], batch_first=True, padding_value=-100)
    b, s = ids.shape
    given: dict[str, Any] = {}
    if prefix is not None:
        layers = [
            (layer.keys.expand(b, -1, -1, -1), layer.values.expand(b, -1, -1, -1))
            for layer in prefix.layers
        ]
        given["past_key_values"] = DynamicCache(layers)
        given["position_ids"] = torch.arange(shared, shared + s).expand(b, s)
    hidden = model.model(input_ids=ids, use_cache=prefix is not None, **given).last_hidden_state
    targets = labels[:, 1:]
    asked = targets != -100  # [B, S - 1]
    logits = model.lm_head(hidden[:, :-1][asked]).float()  # [R, V]
    loss = torch.nn.functional.cross_entropy(logits, targets[asked], reduction="none")
    right = logits.argmax(1) == targets[asked]
    counts = asked.sum(1).tolist()
    return [
        Answer(float(one.sum()), len(one), bool(hits.all()))
        for one, hits in zip(loss.split(counts), right.split(counts), strict=True)
    ]
