"""Public kinds of chat templates: what is learnt is what the template renders, to the letter."""

import copy
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xplus_fast.data.chat import Encoded, encode, prompt_text
from xplus_fast.data.files import Rejected
from xplus_fast.data.readers import Example
from xplus_fast.data.template import Chat
from xplus_fast.errors import UserError

START, STOP, EOS = "<|im_start|>", "<|im_end|>", "<|endoftext|>"  # special in the small tokenizer
LOOP = "{% for m in messages %}BODY{% endfor %}"
GENERATE = "{% if add_generation_prompt %}BODY{% endif %}"


def each(body: str, generation: str = "") -> str:
    return LOOP.replace("BODY", body) + (GENERATE.replace("BODY", generation) if generation else "")


USER = "{% if m.role == 'user' %}"
# The public templates' logic in our own words, with the small tokenizer's special tokens.
TEMPLATES = {
    "chatml": each(
        START + "{{ m.role }}\n{{ m.content }}" + STOP + "\n", START + "assistant\n"
    ),
    "llama-2": each(
        USER + "{{ bos_token }}[INST] {{ m.content.strip() }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content.strip() }} {{ eos_token }}{% endif %}"
    ),
    "llama-3": "{{ bos_token }}" + each(
        START + "{{ m.role }}" + START + "\n\n{{ m.content | trim }}" + STOP,
        START + "assistant" + START + "\n\n",
    ),
    "mistral": "{{ bos_token }}" + each(
        USER + "[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
        "{{ m.content }}{{ eos_token }}{% endif %}"
    ),
    "mistral-spaced": "{{ bos_token }}" + each(
        USER + "[INST] {{ m.content }}[/INST]{% elif m.role == 'assistant' %}"
        " {{ m.content | trim }}{{ eos_token }}{% endif %}"
    ),
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + each(
        START + "{% if m.role == 'assistant' %}model{% else %}{{ m.role }}{% endif %}"
        "{{ '\n' + m.content | trim }}" + STOP + "\n",
        START + "model\n",
    ),
    "phi-3": each("<|{{ m.role }}|>\n{{ m.content }}" + STOP + "\n", "<|assistant|>\n")
    + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
    "zephyr": each(
        "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "alpaca": each(
        USER + "### Instruction:\n{{ m.content }}\n\n### Response:\n"
        "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}\n\n{% endif %}"
    ),
    "end-in-text": each("<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n", "<assistant>"),
}  # fmt: skip
STRIPS = ("llama-2", "llama-3", "mistral-spaced", "gemma")


@pytest.fixture(scope="module")
def base(small_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.bos_token, tokenizer.eos_token = START, EOS
    return tokenizer


def with_template(tokenizer: Any, template: str) -> Any:
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


def conversation(texts: list[str], system: str = "") -> Example:
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": r, "content": c} for r, c in zip(roles, texts, strict=False)]
    first = [{"role": "system", "content": system}] if system else []
    return Example((*first, *messages), "f:1", "f", "f\0")


# No thought and no marker of the templates' own: a text that forges one is another matter.
TEXT = st.text("ab .\n\t?-\u00e9\u4f60", min_size=1, max_size=12).filter(str.strip)
TURNS = st.integers(1, 3).flatmap(lambda n: st.lists(TEXT, min_size=2 * n, max_size=2 * n))


@pytest.mark.parametrize("kind", TEMPLATES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(texts=TURNS)
def test_what_is_learnt_is_what_is_rendered(kind: str, texts: list[str], base: Any) -> None:
    tokenizer, e = with_template(base, TEMPLATES[kind]), conversation(texts)
    full = tokenizer.apply_chat_template(list(e.messages), tokenize=False)
    segments = Chat(tokenizer).segments(e, "masked")
    assert not isinstance(segments, Rejected), segments
    whole = "".join(text for text, _ in segments)
    rest = full.removeprefix(whole)
    assert full.startswith(whole) and rest.strip() in ("", EOS)  # what follows the last turn
    # prompts and answers take turns; each prompt is what generation is fed, whole
    assert [on for _, on in segments] == [False, True] * (len(texts) // 2)
    for k in range(1, len(texts), 2):
        prompt = tokenizer.apply_chat_template(
            list(e.messages[:k]), tokenize=False, add_generation_prompt=True
        )
        assert prompt == "".join(text for text, _ in segments[:k])
    assert prompt_text(e, tokenizer, "masked") == prompt
    for (answer, _), text in zip(segments[1::2], texts[1::2], strict=True):
        kept = text.strip() if kind in STRIPS else text
        ends = re.escape("</assistant>" if kind == "end-in-text" else "")
        around = rf"\s*{re.escape(kept)}\s*" if kind in STRIPS else rf"\n?{re.escape(kept)}"
        special = ends or f"({re.escape(STOP)}|{re.escape(EOS)})"
        assert re.fullmatch(around + special, answer), (answer, text)
    # and in tokens
    (encoded,) = encode([e], tokenizer, "masked", 10_000)
    assert isinstance(encoded, Encoded)
    pieces = [tokenizer(t, add_special_tokens=False)["input_ids"] for t, _ in segments]
    assert encoded.input_ids.tolist() == sum(pieces, [])
    marks = sum(([on] * len(p) for (_, on), p in zip(segments, pieces, strict=True)), [])
    assert encoded.supervised.tolist() == marks


@pytest.mark.parametrize("kind", [k for k in TEMPLATES if k not in ("gemma", "llama-2")])
def test_a_system_message_is_context(kind: str, base: Any) -> None:
    tokenizer = with_template(base, TEMPLATES[kind])
    (encoded,) = encode([conversation(["q", "a"], "be")], tokenizer, "masked", 100)
    assert isinstance(encoded, Encoded)
    learnt = tokenizer.decode(encoded.input_ids[encoded.supervised].tolist())
    assert "a" in learnt and "be" not in learnt and "q" not in learnt


def test_a_template_that_refuses_a_role_says_so(base: Any) -> None:
    (said,) = encode([conversation(["q", "a"], "be")], with_template(base, TEMPLATES["gemma"]),
                     "masked", 100)  # fmt: skip
    assert str(said) == "f:1: the chat template refuses it (System role not supported)"


def test_llama_2_learns_the_space_that_it_writes(base: Any) -> None:
    tokenizer = with_template(base, TEMPLATES["llama-2"])
    segments = Chat(tokenizer).segments(conversation(["q", "    a\n", "q", "b"]), "masked")
    assert segments == [
        (f"{START}[INST] q [/INST]", False), (f" a {EOS}", True),
        (f"{START}[INST] q [/INST]", False), (f" b {EOS}", True),
    ]  # fmt: skip


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_pieces_of_sentencepiece_get_no_space_of_their_own(scheme: Any) -> None:
    """A Llama 2 tokenizer in miniature: a text's first word gets a space, later pieces none."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "\u2581", "\n", "\u2581a", "a", "b", "\u2581b", "[", "]",
             "\u2581["]  # fmt: skip
    model = models.BPE({w: i for i, w in enumerate(words)},
                       [("\u2581", "a"), ("\u2581", "b"), ("\u2581", "[")])  # fmt: skip
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = each(
        USER
        + "{{ bos_token }}[{{ m.content }}]{% else %} {{ m.content }} {{ eos_token }}{% endif %}"
    )
    (encoded,) = encode([conversation(["a", "b"])], tokenizer, "masked", 100)
    assert isinstance(encoded, Encoded)
    learnt = tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.supervised].tolist())
    assert learnt == ["\u2581b", "\u2581", "</s>"]  # not a word behind two spaces
    whole = tokenizer("<s>[a] b </s>", add_special_tokens=False)["input_ids"]
    assert encoded.input_ids.tolist() == whole


BOMBS = {
    "{{ 1 / 0 }}": "division by zero",
    "{{ 10 ** (10 ** 10) }}": "takes more than",
    "{{ 2.0 ** 5000 }}": "out of range",
    "{{ messages[7].content.x.y }}": "has no",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}":
        "takes more than 3.0 s",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}":
        "takes more than 3.0 s",
    "{{ 'x' * 3000000000 }}": "takes more than 1,073,741,824 bytes",
    "{% set ns = namespace(s='ab') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}"
    "{% endfor %}": "takes more than 1,073,741,824 bytes",
    "{{ 'x' * 5000000 }}": "it makes 5,000,000 characters",
    "{{ '\\ud800' }}": "surrogates",
    "{% for %}": "Expected",
    "{% if true %}": "end of template",
    "{{ raise_exception('no') }}": "no",
    "{{ ''.__class__.__mro__ }}": "unsafe",
}  # fmt: skip


@pytest.mark.parametrize("template", BOMBS, ids=lambda t: t[:40])
def test_templates_that_raise_loop_or_grow_are_one_line(template: str, base: Any) -> None:
    tokenizer = with_template(base, template)
    with pytest.raises(UserError) as e:
        encode([conversation(["q", "a"])], tokenizer, "masked", 100)
    said = str(e.value)
    assert "its chat template cannot be rendered: " in said and "\n" not in said
    assert BOMBS[template].split()[0] in said


def test_a_template_that_only_fails_for_some_records(base: Any) -> None:
    template = TEMPLATES["chatml"] + "{% if messages[0].content == 'x' %}BODY{% endif %}"
    for body, says in (("{{ 1 / 0 }}", "division by zero"),
                       ("{{ 'x' * 3000000000 }}", "bytes of memory"),
                       ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
                        "{% endfor %}", "it takes more than 0.5 s")):  # fmt: skip
        tokenizer = with_template(base, template.replace("BODY", body))
        good, bad = encode(
            [conversation(["q", "a"]), conversation(["x", "a"])], tokenizer, "masked", 100
        )
        assert isinstance(good, Encoded) and isinstance(bad, Rejected)
        assert bad.reason == "the chat template refuses it" and says in bad.detail
        with pytest.raises(UserError, match=f"f:1: the chat template refuses it .*{says}"):
            prompt_text(conversation(["x", "a"]), tokenizer, "masked")


def test_tokens_that_the_model_does_not_have(base: Any) -> None:
    tokenizer = with_template(base, TEMPLATES["chatml"])
    size = len(tokenizer)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<sw>", "<de>"])
    good, bad = encode(
        [conversation(["q", "a"]), conversation(["<de>", "a"])], tokenizer, "masked", 100, size
    )
    assert isinstance(good, Encoded) and isinstance(bad, Rejected)
    assert str(bad) == (
        f"f:1: a token that the model does not have (the token '<de>', {size + 1}: the model has"
        f" {size:,} (tokens were added, and its embedding was not resized))"
    )
    assert isinstance(encode([conversation(["<de>", "a"])], tokenizer, "masked", 100, size + 2)[0],
                      Encoded)  # fmt: skip
    for template, end in ((TEMPLATES["chatml"].replace(START, "<sw>"), EOS), (None, "<sw>")):
        tokenizer.chat_template, tokenizer.eos_token = template, end
        with pytest.raises(UserError, match="its chat template has the token '<sw>'"):
            encode([conversation(["q", "a"])], tokenizer, "masked", 100, size)
