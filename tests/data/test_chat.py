"""Token ids against the tokenizer's own chat template, and what the loss counts."""

import copy
from typing import Any

import numpy as np
import pytest

from xplus_fast.data.chat import Encoded, encode, preview, prompt_text
from xplus_fast.data.files import Rejected
from xplus_fast.data.readers import Example

BLOCK = "<think>\n\n</think>\n\n"
END = "<|im_end|>"


def example(*contents: str, system: str = "") -> Example:
    roles = ["user", "assistant"] * (len(contents) // 2)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    first = [{"role": "system", "content": system}] if system else []
    return Example((*first, *messages), "f:1", "f", "f\0")


def one(e: Example, tokenizer: Any, think: str = "masked", max_tokens: int = 10_000) -> Encoded:
    (encoded,) = encode([e], tokenizer, think, max_tokens)
    assert isinstance(encoded, Encoded), encoded
    assert encoded.input_ids.dtype == np.int32 and encoded.supervised.dtype == np.bool_
    assert not encoded.supervised[0]
    return encoded


def rejected(e: Example, tokenizer: Any, max_tokens: int = 10_000) -> str:
    (encoded,) = encode([e], tokenizer, "masked", max_tokens)
    assert isinstance(encoded, Rejected)
    return str(encoded)


def supervised(encoded: Encoded, tokenizer: Any) -> str:
    return tokenizer.decode(encoded.input_ids[encoded.supervised].tolist())


def template_ids(e: Example, tokenizer: Any, **options: Any) -> list[int]:
    """What the template itself gives, without what follows the last end of turn."""
    ids = tokenizer.apply_chat_template(list(e.messages), **options)["input_ids"]
    return ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]


def with_template(tokenizer: Any, template: str | None) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


SENTENCES = [
    ("Translate {x}", "Habari ya asubuhi"),
    ("a\n\nb", "\u4f60\u597d\uff0c\u4e16\u754c"),
    ("q", "think"),  # a word that stands in the block too
    ("q", "</s>"),
    ("q", "1"),
]


@pytest.mark.parametrize(("question", "answer"), SENTENCES)
def test_masked_and_loss_are_the_template_and_differ_in_the_mask(
    question: str, answer: str, qwen_tokenizer: Any
) -> None:
    e = example(question, answer, system="s")
    masked, loss = one(e, qwen_tokenizer, "masked"), one(e, qwen_tokenizer, "loss")
    expected = template_ids(e, qwen_tokenizer, enable_thinking=False)
    assert masked.input_ids.tolist() == loss.input_ids.tolist() == expected
    assert supervised(masked, qwen_tokenizer) == answer + END
    assert supervised(loss, qwen_tokenizer) == BLOCK + answer + END


@pytest.mark.parametrize("think", ["masked", "loss", "absent"])
@pytest.mark.parametrize(("question", "answer"), SENTENCES)
def test_training_sees_what_generation_sees(
    question: str, answer: str, think: str, qwen_tokenizer: Any
) -> None:
    e = example(question, answer)
    prompt = prompt_text(e, qwen_tokenizer, think)
    assert prompt.endswith("assistant\n" + ("" if think == "absent" else BLOCK))
    ids = [qwen_tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, answer + END)]
    assert one(e, qwen_tokenizer, think).input_ids.tolist() == ids[0] + ids[1]


def test_absent_leaves_the_block_out(qwen_tokenizer: Any) -> None:
    encoded = one(example("q", "a"), qwen_tokenizer, "absent")
    text = qwen_tokenizer.decode(encoded.input_ids.tolist())
    assert text == f"<|im_start|>user\nq{END}\n<|im_start|>assistant\na{END}"
    assert supervised(encoded, qwen_tokenizer) == "a" + END


def test_every_assistant_turn_is_learnt(qwen_tokenizer: Any) -> None:
    e = example("q1", "a1", "q2", "a2", "q3", "a3")
    encoded = one(e, qwen_tokenizer)
    assert encoded.input_ids.tolist() == template_ids(e, qwen_tokenizer)
    assert preview(encoded, qwen_tokenizer, colour=False) == (
        f"<|im_start|>user\nq1{END}\n<|im_start|>assistant\n[[a1{END}]]\n"
        f"<|im_start|>user\nq2{END}\n<|im_start|>assistant\n[[a2{END}]]\n"
        f"<|im_start|>user\nq3{END}\n<|im_start|>assistant\n{BLOCK}[[a3{END}]]"
    )


def test_a_thought_is_learnt_and_an_empty_one_is_not(qwen_tokenizer: Any) -> None:
    thought = "<think>\nhm\n</think>\n\nyes"
    for written in (thought, "<think>hm</think>yes"):
        e = example("q", written)
        encoded = one(e, qwen_tokenizer)
        assert encoded.input_ids.tolist() == template_ids(e, qwen_tokenizer)
        assert supervised(encoded, qwen_tokenizer) == thought + END
    empty = one(example("q", BLOCK + "yes"), qwen_tokenizer)
    assert supervised(empty, qwen_tokenizer) == "yes" + END
    earlier = one(example("q", thought, "q", "a"), qwen_tokenizer)  # the template drops it
    assert supervised(earlier, qwen_tokenizer) == f"yes{END}a{END}"


def test_a_prompt_for_a_thought_leaves_room_for_it(qwen_tokenizer: Any) -> None:
    e = example("q", "<think>\nhm\n</think>\n\nyes")
    assert prompt_text(e, qwen_tokenizer, "masked").endswith("<|im_start|>assistant\n")


def test_space_around_an_answer_stays_where_the_template_keeps_it(qwen_tokenizer: Any) -> None:
    for answer in ("    return x\n", " \n yes\n", "\tyes", "yes "):
        encoded = one(example("q", answer), qwen_tokenizer)
        assert supervised(encoded, qwen_tokenizer) == answer + END
        assert encoded.input_ids.tolist() == template_ids(example("q", answer), qwen_tokenizer)
    # the template strips newlines before the last answer
    assert supervised(one(example("q", "\n\n  a"), qwen_tokenizer), qwen_tokenizer) == "  a" + END


LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}"
    "<|endoftext|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}"
)


@pytest.mark.parametrize("think", ["masked", "loss", "absent"])
def test_a_template_without_a_block_ignores_think(think: str, small_tokenizer: Any) -> None:
    # The turn ends in a special token that is not eos, as in base checkpoints.
    tokenizer = with_template(small_tokenizer, LLAMA)
    encoded = one(example("q", "a", "q", "b"), tokenizer, think)
    assert preview(encoded, tokenizer, colour=True) == (
        "<|start|>user\n\nq<|endoftext|><|start|>assistant\n\n\033[32ma<|endoftext|>\033[0m"
        "<|start|>user\n\nq<|endoftext|><|start|>assistant\n\n\033[32mb<|endoftext|>\033[0m"
    )


def test_without_a_template(small_tokenizer: Any) -> None:
    tokenizer = with_template(small_tokenizer, None)
    encoded = one(example("q", "a"), tokenizer)
    assert tokenizer.decode(encoded.input_ids.tolist()) == f"q\na{END}"
    assert supervised(encoded, tokenizer) == f"a{END}"
    assert prompt_text(example("q", "a"), tokenizer, "masked") == "q\n"


def test_templates_that_cannot_be_followed(small_tokenizer: Any) -> None:
    def says(template: str) -> str:
        return rejected(example("q", "a"), with_template(small_tokenizer, template))

    loop = "{% for m in messages %}{{ m['content']BODY }}{% endfor %}"
    assert "ends the answer with no special token" in says(loop.replace("BODY", ""))
    changed = says(loop.replace("BODY", " | upper + '<|im_end|>'"))
    assert changed == "f:1: the chat template does not keep the answer (turn 2)"
    refusing = "{{ raise_exception('no') if messages | length > 1 else '' }}"
    assert says(refusing) == "f:1: the chat template refuses it (no)"


def test_budget(small_tokenizer: Any) -> None:
    e = example("one two three", "four five six seven")
    whole = one(e, small_tokenizer)
    n, answer = len(whole.input_ids), int(whole.supervised.sum())
    prompt = n - answer
    assert not whole.cut and not one(e, small_tokenizer, max_tokens=n).cut
    cut = one(e, small_tokenizer, max_tokens=n - 1)
    assert cut.cut and cut.input_ids.tolist() == whole.input_ids.tolist()[:-1]
    least = one(e, small_tokenizer, max_tokens=prompt + 1)
    assert least.cut and least.supervised.sum() == 1
    says = rejected(e, small_tokenizer, max_tokens=prompt)
    assert says == (
        f"f:1: longer than the token budget ({prompt} tokens before an answer of {answer},"
        f" data.pack_tokens is {prompt})"
    )
    assert f"the answer alone has {answer} tokens" in rejected(
        e, small_tokenizer, max_tokens=answer - 1
    )


def test_a_batch_keeps_its_order(small_tokenizer: Any) -> None:
    examples = [example("q", "a"), example("q " * 50, "a"), example("q", "b")]
    first, second, third = encode(examples, small_tokenizer, "masked", 30)
    assert isinstance(second, Rejected)
    assert isinstance(first, Encoded) and supervised(first, small_tokenizer) == f"a{END}"
    assert isinstance(third, Encoded) and supervised(third, small_tokenizer) == f"b{END}"
    assert encode([], small_tokenizer, "masked", 30) == []
