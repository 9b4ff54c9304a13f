"""Greedy answers of a model to prompts, and a thought taken out of one."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from xplus_fast.data.chat import beyond_vocabulary
from xplus_fast.errors import UserError

_TAG = re.compile(r"<\s*(/?)\s*(?:think|thinking|thought|reasoning|reflection)\s*>", re.IGNORECASE)


@contextmanager
def greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> Iterator[None]:
    """Evaluation mode, greedy generation, no gradients; all put back at the end.

    The model's own generation config is set aside rather than overridden: a sampling temperature
    left in it warns, and a repetition penalty would change what greedy means.
    """
    training, use_cache = model.training, model.config.use_cache
    generation, pad = model.generation_config, tokenizer.pad_token_id
    ends = getattr(generation, "eos_token_id", None)
    both = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
    size = model.config.vocab_size
    ends = sorted(end for end in both if end is not None)
    # rows that are over are filled with it, and it is embedded
    pad = next((i for i in (pad, *ends) if i is not None and i < size), 0)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        use_cache=True,
    )
    model.eval()
    try:
        with torch.no_grad():  # inference_mode would leave tensors that training cannot use
            yield
    finally:
        model.train(training)
        model.config.use_cache = use_cache
        model.generation_config = generation


def answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], batch_size: int
) -> Iterator[list[tuple[int, str, bool]]]:
    """Batches of (index of the prompt, answer, whether it stopped only at the token limit).

    In `greedy`. Longest prompts first: a batch too large for the memory fails at once.
    """
    model.config.use_cache = True
    generation = model.generation_config
    tokens = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    for prompt, ids in zip(prompts, tokens, strict=True):
        if beyond := beyond_vocabulary(ids, tokenizer, model.config.vocab_size):
            raise UserError(f"prompt {prompt!r:.60}: {beyond}")
    order = sorted(range(len(prompts)), key=lambda i: -len(tokens[i]))
    for at in range(0, len(order), batch_size):
        ids = order[at : at + batch_size]
        width = len(tokens[ids[0]])
        # [B, width], padded on the left, so that every row's next token is the last column's
        input_ids = torch.full((len(ids), width), generation.pad_token_id)
        mask = torch.zeros_like(input_ids)
        for b, i in enumerate(ids):
            input_ids[b, width - len(tokens[i]) :] = torch.tensor(tokens[i])
            mask[b, width - len(tokens[i]) :] = 1
        made = model.generate(
            input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device)
        )
        batch = []
        for i, answer in zip(ids, made[:, width:].tolist(), strict=True):
            ends = generation.eos_token_id or []
            end = next((n for n, token in enumerate(answer) if token in ends), None)
            text = tokenizer.decode(answer[:end], skip_special_tokens=True).strip()
            batch.append((i, text, end is None))
        yield batch


def without_thought(text: str, source: str = "") -> tuple[str, bool]:
    """A text less its think blocks, and whether it had one.

    One that does not end takes all that follows; one that does not begin, as its beginning stood in
    the prompt, takes all before. A source with such tags is about them: they stay.
    """
    tags = list(_TAG.finditer(text))
    if not tags or _TAG.search(source):
        return text, False
    kept: list[str] = []
    at, inside = 0, False
    for tag in tags:
        if tag[1]:
            kept = kept if inside else []
            at, inside = tag.end(), False
        elif not inside:
            kept.append(text[at : tag.start()])
            inside = True
    if not inside:
        kept.append(text[at:])
    return "".join(kept), True
