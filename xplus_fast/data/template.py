r"""A tokenizer's chat template: rendered within limits, and where in its text the answers stand.

    ...[INST] Hello [/INST]| Jambo </s>        <|im_start|>assistant\n|Jambo<|im_end|>|\n
    prompt                 | answer            prompt                 | answer        | dropped

A prompt is what the template renders of the messages before an answer, as generation is fed it; an
answer is all that follows up to the token (or text) that ends the turn, with the space around it.
Calls of tools are part of an answer, as the template writes them. What a conversation has and the
template leaves out (tools, calls, what a tool gave) is a reason to reject it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xplus_fast.data.files import TEXT_LIMIT, Rejected
from xplus_fast.data.readers import Example
from xplus_fast.errors import UserError
from xplus_fast.limits import TooSlow, limits

Segments = list[tuple[str, bool]]  # (text, supervised), prompts and answers in turns

_MARK = "xplusprobe"  # by which is seen whether a template renders what it is given
_CALL = {"type": "function", "function": {"name": _MARK, "arguments": {}}}
_TOOL = {"type": "function", "function": {"name": _MARK, "description": "", "parameters": {}}}

SECONDS = 0.5  # of processor time that one rendering may take
COMPILING = 3.0  # that the first one may take
MEMORY = 1 << 30  # bytes that a rendering may take
_SPACE = re.compile(r"\s*")


class Unrendered(Exception):
    """The template cannot be rendered: why."""


@dataclass(frozen=True)
class _Found:
    """An answer in the rendered text: head, then text[begin:end] with the space around it."""

    head: str  # the empty think block, a thought, or nothing
    begin: int
    end: int


def has_template(tokenizer: Any) -> bool:
    """Whether conversations are rendered by a template; if not: prompt, newline, answer, eos."""
    return tokenizer.chat_template is not None


def template_variables(tokenizer: Any) -> set[str]:
    """What a tokenizer's chat template reads beside the messages: tools, documents, ..."""
    import jinja2.meta

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    templates = tokenizer.chat_template or ""
    found: set[str] = set()
    for text in templates.values() if isinstance(templates, dict) else [templates]:
        try:
            found |= jinja2.meta.find_undeclared_variables(environment.parse(text))
        except jinja2.TemplateError:  # with a tag of transformers' own
            continue
    return found - {"messages"}


class Chat:
    """A tokenizer's chat template, and what it puts around an answer.

    Raises `UserError` where the template cannot be rendered.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.block = ""
        self._kept: dict[str, bool] = {}
        if has_template(tokenizer):
            probe = [{"role": "user", "content": "?"}]
            try:
                self._render(probe, True, seconds=COMPILING)
                plain = self._render(probe, True)
                without = self._render(probe, True, enable_thinking=False)
            except Unrendered as e:
                raise UserError(
                    f"{tokenizer.name_or_path}: its chat template cannot be rendered: {e}"
                ) from None
            self.block = without.removeprefix(plain) if without.startswith(plain) else ""
            self.around = without
        elif tokenizer.eos_token is None:
            raise UserError(
                f"{tokenizer.name_or_path}: neither a chat template nor an eos token: nothing"
                " tells where an answer ends"
            )
        else:
            self.around = tokenizer.eos_token
        # Base checkpoints end turns with a token that is not their eos.
        added = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
        self.stops = sorted({s for s in (tokenizer.eos_token, *added) if s}, key=len, reverse=True)

    def prompt(self, example: Example, think: str) -> str:
        """The text up to the last answer, as generation is fed it. Raises `Unrendered`."""
        answer = self._tidy(example.messages[-1])["content"].lstrip()
        block = "" if think == "absent" or answer.startswith("<think>") else self.block
        return self._render(example.messages[:-1], True, tools=example.tools) + block

    def segments(self, example: Example, think: str) -> Segments | Rejected:
        """The conversation's text in pieces, supervised and not.

        An answer that is not to be learnt ("learn": False) is a piece by itself all the same.
        """
        if lost := self._lost(example):
            return Rejected(example.where, "the chat template has no place for it", lost)
        messages = [self._tidy(m) for m in example.messages]
        learnt = [m.get("learn", True) for m in messages if m["role"] == "assistant"]
        try:
            if not has_template(self.tokenizer):
                return [
                    (self._render(messages[:-1], True), False),
                    (messages[-1]["content"] + self.tokenizer.eos_token, True),
                ]
            full = self._render(messages, False, tools=example.tools)
            # Generation prompts up to every answer, the think block not in them.
            turns = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
            prompts = [self._render(messages[:k], True, tools=example.tools) for k in turns]
            calls = [self._calls(messages[: k + 1], p, example.tools)
                     for k, p in zip(turns, prompts, strict=True)]  # fmt: skip
        except Unrendered as e:
            return Rejected(example.where, "the chat template refuses it", str(e))
        answers = []
        for k, prompt, call in zip(turns, prompts, calls, strict=True):
            found = None
            if full.startswith(prompt) and call is not None:
                found = self._find(full, len(prompt), messages[k]["content"], call)
            if found is None:
                return Rejected(
                    example.where, "the chat template does not keep the answer", f"turn {k + 1}"
                )
            answers.append(found)
        # a turn's end that is no token, such as "###": what follows the last answer
        tail = full[self._past_space(full, answers[-1].end) :].rstrip()
        segments: Segments = []
        done = 0  # characters of `full` that are in segments already
        for prompt, found, learn in zip(prompts, answers, learnt, strict=True):
            end = found.end + self._ending(full, found.end, tail)
            if end == found.end:
                return Rejected(
                    example.where, "the chat template ends the answer with no special token",
                    "nor with any text",
                )  # fmt: skip
            # The block goes where the template puts it, and before the last answer in any case:
            # that is where generation without thinking has it.
            answer = full[found.begin : end]
            thought = found.head if found.head != self.block else ""
            last = (
                found is answers[-1] and not thought and not answer.lstrip().startswith("<think>")
            )
            put = think != "absent" and (last or found.head == self.block)
            block = self.block if put else ""
            masked, own = (block, thought) if think == "masked" else ("", block + thought)
            segments += [(full[done : len(prompt)] + masked, False)]
            segments += [(own, learn)] if own else []
            segments += [(answer, learn)]
            done = end
        return segments

    def _lost(self, example: Example) -> str:
        """What the template would leave out of a conversation, in words; empty if nothing."""
        has = {
            "tools": example.tools is not None,
            "tool_calls": any("tool_calls" in m for m in example.messages),
            "messages of a tool": any(m["role"] == "tool" for m in example.messages),
        }
        return ", ".join(what for what, there in has.items() if there and not self._keeps(what))

    def _keeps(self, what: str) -> bool:
        """Whether the template renders it: asked once, of a conversation with a mark in it."""
        if what not in self._kept:
            user = {"role": "user", "content": "?"}
            call: dict[str, Any] = {"role": "assistant", "content": ""}
            messages: list[dict[str, Any]] = {
                "tools": [user],
                "tool_calls": [user, call | {"tool_calls": [_CALL]}],
                "messages of a tool": [user, call | {"content": "?"},
                                       {"role": "tool", "name": "f", "content": _MARK}],
            }[what]  # fmt: skip
            tools = [_TOOL] if what == "tools" else None
            try:
                self._kept[what] = has_template(self.tokenizer) and _MARK in self._render(
                    messages, False, tools=tools
                )
            except Unrendered:  # the conversation itself will be refused, with the reason
                self._kept[what] = True
        return self._kept[what]

    def _calls(self, messages: Sequence[dict[str, Any]], prompt: str, tools: Any) -> str | None:
        """What the template writes of the last answer's calls behind its content; None: unclear.

        It is seen where nothing follows: there the turn's end is the text's. Raises `Unrendered`.
        """
        if "tool_calls" not in messages[-1]:
            return ""
        alone = self._render(messages, False, tools=tools)
        if not alone.startswith(prompt):
            return None
        found = self._find(alone, len(prompt), messages[-1]["content"], "")
        if found is None:
            return None
        calls = alone[found.end :].rstrip()
        stop = next((s for s in self.stops if calls.endswith(s)), "")
        return calls.removesuffix(stop).rstrip() or None

    def _render(
        self, messages: Sequence[dict[str, Any]], prompt: bool, *, seconds: float = SECONDS,
        **options: Any,
    ) -> str:  # fmt: skip
        """The messages' text; with `prompt`, the answer's beginning after it."""
        if not has_template(self.tokenizer):
            bos = self.tokenizer.bos_token
            begins = self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]
            texts = [m["content"] + "\n" for m in messages]
            return (bos if bos and begins else "") + "".join(texts)
        try:
            with limits(seconds, MEMORY):
                given = [{k: v for k, v in m.items() if k != "learn"} for m in messages]
                text = self.tokenizer.apply_chat_template(
                    given, tokenize=False, add_generation_prompt=prompt, **options
                )
                text.encode()  # a lone surrogate is no text
        except TooSlow:
            raise Unrendered(f"it takes more than {seconds} s") from None
        except MemoryError:
            raise Unrendered(f"it takes more than {MEMORY:,} bytes of memory") from None
        except Exception as e:  # a template is a program of somebody's, and may raise anything
            said = " ".join(str(e).split())[:200] or type(e).__name__
            raise Unrendered(said) from None
        if len(text) > TEXT_LIMIT:
            raise Unrendered(f"it makes {len(text):,} characters, {TEXT_LIMIT:,} are read at most")
        return text

    def _tidy(self, message: dict[str, Any]) -> dict[str, Any]:
        """An answer without the empty thought that some data write before it."""
        content = message["content"].lstrip()
        empty = self.block.strip()
        if message["role"] != "assistant" or not empty or not content.startswith(empty):
            return message
        return message | {"content": content.removeprefix(empty).lstrip("\n")}

    def _find(self, full: str, at: int, content: str, calls: str = "") -> _Found | None:
        """The answer at full[at:], which the template may have stripped; None: not there.

        calls: what it ends with, behind its content.
        """
        thought, mark, answer = content.rpartition("</think>")
        ways = [(re.escape(self.block), content), ("", content)]
        if mark:  # rewritten by the template, or dropped from all turns but the last
            inner = re.escape(thought.strip().removeprefix("<think>").strip())
            ways += [
                (rf"<think>\s*{inner}\s*</think>\n*", answer),
                (re.escape(self.block), answer),
                ("", answer),
            ]
        for head, text in ways:
            if not (m := re.compile(head).match(full, at)):
                continue
            core = text.strip()
            start = self._past_space(full, m.end())
            if full.startswith(core + calls, start):
                return _Found(m.group(), m.end(), start + len(core) + len(calls))
        return None

    def _ending(self, full: str, at: int, tail: str) -> int:
        """Characters of full[at:] up to where the turn is over; 0 where nothing tells."""
        mark = self._past_space(full, at)
        stop = next((s for s in (*self.stops, tail) if s and full.startswith(s, mark)), None)
        return mark + len(stop) - at if stop is not None else 0

    @staticmethod
    def _past_space(text: str, at: int) -> int:
        return _SPACE.match(text, at).end()  # type: ignore[union-attr]
