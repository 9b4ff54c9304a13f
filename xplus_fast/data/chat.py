r"""Conversations -> token ids and which of them the loss counts.

The tokenizer's own chat template renders the text. An assistant's answer and the token that ends
it are supervised; prompts are not. Prompt and answer are tokenized apart, as generation does it:
the prompt's last token and the answer's first never merge into one that generation cannot see.

    ...Hello<|im_end|>\n<|im_start|>assistant\n | <think>\n\n</think>\n\n | Jambo<|im_end|>
    prompt                                      | block: `think` decides  | answer
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xplus_fast.data.files import Rejected
from xplus_fast.data.readers import Example
from xplus_fast.data.template import Chat, Unrendered
from xplus_fast.errors import UserError


@dataclass(frozen=True)
class Encoded:
    """One tokenized conversation."""

    input_ids: np.ndarray  # int32 [n]
    supervised: np.ndarray  # bool [n]; the first is always False
    cut: bool = False  # whether the last answer's tail was cut to the budget


def encode(
    examples: Sequence[Example],
    tokenizer: Any,
    think: str,
    max_tokens: int,
    vocabulary: int | None = None,
) -> list[Encoded | Rejected]:
    """Tokenize conversations with the tokenizer's chat template.

    think: where Qwen3's empty think block stands: "masked" (before the last answer, outside the
    loss), "loss" (the same, inside it) or "absent". Templates without a block are not affected.
    max_tokens: the last answer's tail is cut to fit; a prompt that leaves it no room, or an answer
    that is longer by itself, is rejected. A document is as long as it is: `pieces` cuts it.
    vocabulary: of the model; a conversation with a token beyond it is rejected.

    Returns one item per example, in order. Raises `UserError` for a template that cannot be
    rendered, or that itself makes tokens beyond the vocabulary.
    """
    chat = Chat(tokenizer)
    tokenized = _Pieces(tokenizer)
    if beyond := beyond_vocabulary(tokenized.ids([[chat.around]])[0][0], tokenizer, vocabulary):
        raise UserError(f"{tokenizer.name_or_path}: its chat template has {beyond}")
    documents = iter(_documents([e for e in examples if e.is_text], tokenizer))
    rendered = [
        # each message is a token at least: what cannot fit is not rendered turn by turn
        Rejected(e.where, "longer than the token budget", f"{len(e.messages)} messages")
        if len(e.messages) > max_tokens
        else chat.segments(e, think)
        for e in examples
        if not e.is_text
    ]
    ids = iter(
        tokenized.ids([[text for text, _ in r] for r in rendered if not isinstance(r, Rejected)])
    )
    encoded: list[Encoded | Rejected] = []
    turns = iter(rendered)
    for example in examples:
        if example.is_text:
            made: Encoded | Rejected = next(documents)
        elif isinstance(r := next(turns), Rejected):
            made = r
        else:
            parts = [(i, supervised) for i, (_, supervised) in zip(next(ids), r, strict=True)]
            made = _join(parts, example.where, max_tokens)
        if isinstance(made, Encoded) and (
            beyond := beyond_vocabulary(made.input_ids, tokenizer, vocabulary)
        ):
            made = Rejected(example.where, "a token that the model does not have", beyond)
        encoded.append(made)
    return encoded


def pieces(encoded: Encoded, max_tokens: int) -> list[Encoded]:
    """A document in rows of at most `max_tokens`; a conversation as it is.

    A piece begins with the token before, so that all but a document's first token are learnt.
    """
    n = len(encoded.input_ids)
    if n <= max_tokens:
        return [encoded]
    starts = range(0, n - 1, max_tokens - 1)
    cuts = [slice(start, start + max_tokens) for start in starts]
    return [Encoded(encoded.input_ids[c], np.arange(len(encoded.input_ids[c])) > 0) for c in cuts]


def _documents(examples: Sequence[Example], tokenizer: Any) -> list[Encoded]:
    """Raw texts as a tokenizer has them for a model to go on with, each ended by eos."""
    if not examples:
        return []
    texts = [e.messages[0]["content"] for e in examples]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    made = []
    for ids in tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]:
        ids = ids if ids[-1:] == end else ids + end
        made.append(Encoded(np.asarray(ids, np.int32), np.arange(len(ids)) > 0))
    return made


def beyond_vocabulary(ids: Any, tokenizer: Any, vocabulary: int | None) -> str:
    """The first token that a model of so many has no row for, in words; empty where all fit."""
    ids = np.asarray(ids, np.int64)
    if vocabulary is None or not len(ids) or ids.max() < vocabulary:
        return ""
    first = int(ids[ids >= vocabulary][0])
    return (
        f"the token {tokenizer.convert_ids_to_tokens(first)!r:.40}, {first}: the model has"
        f" {vocabulary:,} (tokens were added, and its embedding was not resized)"
    )


class _Pieces:
    """Tokenizes the pieces of conversations apart, each as it stands behind the one before.

    SentencePiece's tokenizers (Llama 2's) take the beginning of any text for a word's and put a
    space before it; behind a newline they do not.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        bare, newline, behind = self._ids(["a", "\n", "\na"])
        spaced = behind[: len(newline)] == newline and behind[len(newline) :] != bare
        self.guard = newline if spaced else []

    def ids(self, conversations: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Token ids of each piece of each conversation."""
        texts = [
            f"\n{text}" if self.guard and i else text
            for pieces in conversations
            for i, text in enumerate(pieces)
        ]
        flat = iter(self._ids(texts))
        return [
            [self._unguarded(next(flat), text, i) for i, text in enumerate(pieces)]
            for pieces in conversations
        ]

    def _unguarded(self, ids: list[int], text: str, place: int) -> list[int]:
        n = len(self.guard)
        if not n or not place:
            return ids
        return ids[n:] if ids[:n] == self.guard else self._ids([text])[0]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return self.tokenizer(list(texts), **options)["input_ids"] if texts else []


def prompt_text(example: Example, tokenizer: Any, think: str) -> str:
    """What `generate()` is fed to give the last answer; tokenize it without special tokens.

    The empty think block is in it, so that the answer comes at once, unless `think` is "absent" or
    the example's own answer has a thought. Raises `UserError` where the template refuses it.
    """
    try:
        return Chat(tokenizer).prompt(example, think)
    except Unrendered as e:
        raise UserError(f"{example.where}: the chat template refuses it ({e})") from None


def preview(encoded: Encoded, tokenizer: Any, colour: bool) -> str:
    """The text with its supervised part in green, or in [[ ]] without colour."""
    edges = np.flatnonzero(np.diff(encoded.supervised)) + 1
    start, end = ("\033[32m", "\033[0m") if colour else ("[[", "]]")
    text = ""
    for ids, on in zip(
        np.split(encoded.input_ids, edges), np.split(encoded.supervised, edges), strict=True
    ):
        piece = tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
        text += f"{start}{piece}{end}" if on[0] else piece
    return text


def _join(pieces: list[tuple[list[int], bool]], where: str, max_tokens: int) -> Encoded | Rejected:
    ids = np.concatenate([np.asarray(i, np.int32) for i, _ in pieces])
    supervised = np.repeat([on for _, on in pieces], [len(i) for i, _ in pieces])
    supervised[0] = False  # nothing predicts it
    last = max(i for i, (_, on) in enumerate(pieces) if on)  # what follows it is not learnt
    answer = len(pieces[last][0])
    before = sum(len(i) for i, _ in pieces[:last])
    if answer > max_tokens:
        detail = f"the answer alone has {answer} tokens, data.pack_tokens is {max_tokens}"
    elif before >= max_tokens:
        detail = f"{before} tokens before an answer of {answer}, data.pack_tokens is {max_tokens}"
    else:
        return Encoded(ids[:max_tokens], supervised[:max_tokens], before + answer > max_tokens)
    return Rejected(where, "longer than the token budget", detail)
