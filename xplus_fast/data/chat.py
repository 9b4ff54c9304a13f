r"""Conversations -> token ids and which of them the loss counts.

The tokenizer's own chat template renders the text. An assistant's answer and the token that ends
it are supervised; prompts are not. Prompt and answer are tokenized apart, as generation does it:
the prompt's last token and the answer's first never merge into one that generation cannot see.

    ...Hello<|im_end|>\n<|im_start|>assistant\n | <think>\n\n</think>\n\n | Jambo<|im_end|>
    prompt                                      | block: `think` decides  | answer
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xplus_fast.data.files import Rejected
from xplus_fast.data.readers import Example
from xplus_fast.errors import UserError

_Segments = list[tuple[str, bool]]  # (text, supervised), alternating, ends with an answer


@dataclass(frozen=True)
class Encoded:
    """One tokenized conversation."""

    input_ids: np.ndarray  # int32 [n]
    supervised: np.ndarray  # bool [n]; the first is always False
    cut: bool = False  # whether the last answer's tail was cut to the budget


def encode(
    examples: Sequence[Example], tokenizer: Any, think: str, max_tokens: int
) -> list[Encoded | Rejected]:
    """Tokenize conversations with the tokenizer's chat template.

    think: where Qwen3's empty think block stands: "masked" (before the last answer, outside the
    loss), "loss" (the same, inside it) or "absent". Templates without a block are not affected.
    max_tokens: the last answer's tail is cut to fit; a prompt that leaves it no room, or an answer
    that is longer by itself, is rejected.

    Returns one item per example, in order.
    """
    chat = _Chat(tokenizer)
    rendered = [chat.segments(example, think) for example in examples]
    texts = [text for r in rendered if not isinstance(r, Rejected) for text, _ in r]
    ids: Iterator[list[int]] = iter(())
    if texts:
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        ids = iter(tokenizer(texts, **options)["input_ids"])
    encoded: list[Encoded | Rejected] = []
    for example, r in zip(examples, rendered, strict=True):
        if isinstance(r, Rejected):
            encoded.append(r)
        else:
            pieces = [(next(ids), supervised) for _, supervised in r]
            encoded.append(_join(pieces, example.where, max_tokens))
    return encoded


def prompt_text(example: Example, tokenizer: Any, think: str) -> str:
    """What `generate()` is fed to give the last answer; tokenize it without special tokens.

    The empty think block is in it, so that the answer comes at once, unless `think` is "absent" or
    the example's own answer has a thought.
    """
    return _Chat(tokenizer).prompt(example, think)


def has_template(tokenizer: Any) -> bool:
    """Whether conversations are rendered by a template; if not: prompt, newline, answer, eos."""
    return tokenizer.chat_template is not None


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


class _Chat:
    """A tokenizer's chat template, and what it puts around an answer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.block = ""
        if has_template(tokenizer):
            from jinja2 import TemplateError

            probe = [{"role": "user", "content": "?"}]
            try:
                plain = self._render(probe, True)
                without = self._render(probe, True, enable_thinking=False)
            except TemplateError as e:
                raise UserError(
                    f"{tokenizer.name_or_path}: its chat template cannot be rendered: {e}"
                ) from None
            self.block = without.removeprefix(plain) if without.startswith(plain) else ""
        # Base checkpoints end turns with a token that is not their eos.
        added = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
        self.stops = [s for s in (tokenizer.eos_token, *added) if s]

    def _render(self, messages: Sequence[dict[str, str]], prompt: bool, **options: Any) -> str:
        if not has_template(self.tokenizer):
            bos = self.tokenizer.bos_token
            begins = self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]
            texts = [m["content"] + "\n" for m in messages]
            return (bos if bos and begins else "") + "".join(texts)
        return self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, **options
        )

    def prompt(self, example: Example, think: str) -> str:
        """The text up to the last answer."""
        answer = self._tidy(example.messages[-1])["content"]
        block = "" if think == "absent" or answer.startswith("<think>") else self.block
        return self._render(example.messages[:-1], True) + block

    def segments(self, example: Example, think: str) -> _Segments | Rejected:
        from jinja2 import TemplateError

        messages = [self._tidy(m) for m in example.messages]
        if not has_template(self.tokenizer):
            return [
                (self._render(messages[:-1], True), False),
                (messages[-1]["content"] + self.tokenizer.eos_token, True),
            ]
        try:
            full = self._render(messages, False)
            # Generation prompts up to every answer, the think block not in them.
            prompts = [
                (k, self._render(messages[:k], True))
                for k, m in enumerate(messages)
                if m["role"] == "assistant"
            ]
        except TemplateError as e:
            return Rejected(example.where, "the chat template refuses it", str(e))
        segments: _Segments = []
        done = 0  # characters of `full` that are in segments already
        for k, prompt in prompts:
            content = messages[k]["content"]
            found = self._find(full, len(prompt), content) if full.startswith(prompt) else None
            if found is None:
                return Rejected(
                    example.where, "the chat template does not keep the answer", f"turn {k + 1}"
                )
            head, answer = found
            end = len(prompt) + len(head) + len(answer)
            stop = next((s for s in self.stops if full.startswith(s, end)), None)
            if stop is None:
                return Rejected(
                    example.where, "the chat template ends the answer with no special token"
                )
            # The block goes where the template puts it, and before the last answer in any case:
            # that is where generation without thinking has it.
            thought = head if head != self.block else ""
            last = k == len(messages) - 1 and not thought and not answer.startswith("<think>")
            block = self.block if think != "absent" and (last or head == self.block) else ""
            masked, learnt = (block, thought) if think == "masked" else ("", block + thought)
            segments += [(full[done : len(prompt)] + masked, False)]
            segments += [(learnt, True)] if learnt else []
            segments += [(answer + stop, True)]
            done = end + len(stop)
        return segments

    def _tidy(self, message: dict[str, str]) -> dict[str, str]:
        """An answer without space around it (templates differ there) and without empty thought."""
        if message["role"] != "assistant":
            return message
        content = message["content"].strip()
        if self.block:
            content = content.removeprefix(self.block.strip()).strip()
        return {"role": "assistant", "content": content}

    def _find(self, full: str, at: int, content: str) -> tuple[str, str] | None:
        """What stands before the answer at `full[at:]`, and the answer itself; None: not there."""
        thought, mark, answer = content.rpartition("</think>")
        thought, answer = thought.removeprefix("<think>").strip(), answer.strip()
        ways = [(self.block, content), ("", content)]
        if mark:  # rewritten by the template, or dropped from all turns but the last
            ways += [
                (f"<think>\n{thought}\n</think>\n\n", answer),
                (self.block, answer),
                ("", answer),
            ]
        return next((way for way in ways if full.startswith("".join(way), at)), None)


def _join(pieces: list[tuple[list[int], bool]], where: str, max_tokens: int) -> Encoded | Rejected:
    ids = np.concatenate([np.asarray(i, np.int32) for i, _ in pieces])
    supervised = np.repeat([on for _, on in pieces], [len(i) for i, _ in pieces])
    supervised[0] = False  # nothing predicts it
    answer = len(pieces[-1][0])
    before = len(ids) - answer
    if answer > max_tokens:
        detail = f"the answer alone has {answer} tokens, data.pack_tokens is {max_tokens}"
    elif before >= max_tokens:
        detail = f"{before} tokens before an answer of {answer}, data.pack_tokens is {max_tokens}"
    else:
        return Encoded(ids[:max_tokens], supervised[:max_tokens], cut=len(ids) > max_tokens)
    return Rejected(where, "longer than the token budget", detail)
