"""Messages as people write them: flags, parts, tools and calls, as the chat template has them."""

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.kinds import (
    BLOCK,
    CALL,
    CHAT_OF_TOOLS,
    PLAIN,
    TALK,
    TOOL,
    jsonl,
    message,
    previews,
    share,
)
from xplus_fast.config import Source
from xplus_fast.data.chat import encode
from xplus_fast.data.readers import Reading, read_examples
from xplus_fast.errors import UserError

TOOLS_SEEN = "# Tools\n\nYou may call one or more functions"
CALL_SEEN = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def shown(record: dict[str, Any], tmp_path: Path, tokenizer: Any, **options: Any) -> str:
    path = jsonl(tmp_path / "x.jsonl", record)
    return previews(Source(str(path), **options), tokenizer)[0]


def refused(record: dict[str, Any], tmp_path: Path) -> str:
    path = jsonl(tmp_path / "x.jsonl", record)
    with pytest.raises(UserError) as e:
        list(read_examples(Source(str(path)), PLAIN, Reading()))
    assert "\n" not in str(e.value) and str(e.value).startswith(f"{path}:1: ")
    return str(e.value)


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": 0.0}], ids=str
)
@pytest.mark.parametrize("sharegpt", [False, True])
@pytest.mark.parametrize("which", [0, 1])
def test_an_answer_that_is_not_to_be_learnt(
    flag: dict[str, Any], sharegpt: bool, which: int, tmp_path: Path, small_tokenizer: Any
) -> None:
    said = [("q", "a"), ("r", "b")]
    items = []
    for i, (question, answer) in enumerate(said):
        mine = flag if i == which else {}
        if sharegpt:
            items += [share("human", question, **flag), share("gpt", answer, **mine)]
        else:
            items += [message("user", question, **flag), message("assistant", answer, **mine)]
    seen = shown({"conversations": items}, tmp_path, small_tokenizer)
    marks = ["[[b<|im_end|>]]" in seen, "[[a<|im_end|>]]" in seen]
    assert marks == [which == 0, which == 1] and seen.count("[[") == 1
    whole = [message("user", "q"), message("assistant", "a"), message("user", "r")]
    text = small_tokenizer.apply_chat_template(
        [*whole, message("assistant", "b")], tokenize=False, enable_thinking=False
    )
    assert text.startswith(seen.replace("[[", "").replace("]]", ""))


def test_flags_that_cannot_be_heeded(tmp_path: Path) -> None:
    def of(user: dict[str, Any], assistant: dict[str, Any]) -> dict[str, Any]:
        return {"messages": [message("user", "q", **user), message("assistant", "a", **assistant)]}

    assert "no answer to learn" in refused(of({}, {"weight": 0}), tmp_path)
    assert "weight: 0.5; 0, 1, false or true" in refused(of({}, {"weight": 0.5}), tmp_path)
    assert "train: True of user: answers are learnt" in refused(of({"train": True}, {}), tmp_path)


def test_what_is_not_text_is_refused(tmp_path: Path) -> None:
    image = {"type": "image_url", "image_url": {"url": "x.png"}}
    record = {"messages": [message("user", [image]), message("assistant", "a")]}
    assert "content that is not text (a part of type 'image_url')" in refused(record, tmp_path)
    record["messages"][0] = message("user", [{"type": "text", "text": "q", "cache": 1}])
    assert "a part with cache" in refused(record, tmp_path)
    record["messages"][0] = share("human", "q")
    assert "expected from and value, found role, content" in refused(record, tmp_path)


SAID_OF_TOOLS = [
    share("human", "q"),
    share("function_call", json.dumps(CALL["function"])),
    share("observation", "2"),
    share("gpt", "two"),
]
IN_TEXT = {
    "type": "function",
    "id": "1",
    "function": {"name": "add", "arguments": json.dumps({"a": 1})},
}


@pytest.mark.parametrize("form", ["messages", "sharegpt", "in text", "parquet", "older"])
def test_tools_and_calls_as_the_template_has_them(
    form: str, tmp_path: Path, small_tokenizer: Any
) -> None:
    record: dict[str, Any] = {"messages": CHAT_OF_TOOLS, "tools": [TOOL]}
    if form == "sharegpt":
        record = {"conversations": SAID_OF_TOOLS, "tools": json.dumps([TOOL])}
    elif form == "in text":
        call = message("assistant", "", tool_calls=[IN_TEXT])
        record["messages"] = [CHAT_OF_TOOLS[0], call, *CHAT_OF_TOOLS[2:]]
    elif form == "older":
        call = message("assistant", None, function_call=IN_TEXT["function"])
        given = message("function", "2", name="add")
        record["messages"] = [CHAT_OF_TOOLS[0], call, given, CHAT_OF_TOOLS[3]]
    path = tmp_path / ("x.parquet" if form == "parquet" else "x.jsonl")
    if form == "parquet":
        other = {"type": "function", "function": {"name": "sub", "parameters": {"z": {"k": "v"}}}}
        more = {"messages": TALK, "tools": [other]}  # gives the first record's objects more keys
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record, more]), path)
    else:
        jsonl(path, record)
    seen = previews(Source(str(path)), small_tokenizer)[0]
    clean = [CHAT_OF_TOOLS[0], message("assistant", "", tool_calls=[CALL]),
             message("tool", "2"), message("assistant", "two")]  # fmt: skip
    expected = small_tokenizer.apply_chat_template(clean, tools=[TOOL], tokenize=False)
    plain = seen.replace("[[", "").replace("]]", "")
    assert expected.rstrip("\n") == plain.rstrip("\n")
    assert TOOLS_SEEN in seen
    assert seen.endswith(f"{BLOCK}[[two<|im_end|>]]")
    assert f"<|im_start|>assistant\n[[{CALL_SEEN}<|im_end|>]]\n<|im_start|>user\n<tool_re" in seen
    assert seen.count("[[") == 2


def test_a_conversation_that_ends_in_a_call(tmp_path: Path, small_tokenizer: Any) -> None:
    said = message("assistant", "Let me see.", tool_calls=[CALL, CALL])
    record = {"messages": [message("user", "q"), said], "tools": [TOOL]}
    seen = shown(record, tmp_path, small_tokenizer)
    assert seen.endswith(f"{BLOCK}[[Let me see.\n{CALL_SEEN}\n{CALL_SEEN}<|im_end|>]]")


def test_what_the_template_has_no_place_for_is_refused(
    tmp_path: Path, small_tokenizer: Any
) -> None:
    tokenizer = copy.copy(small_tokenizer)
    loop = "{% for m in messages if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n"
    loop += "{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer.chat_template = loop + (
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    told = {
        "tools": {"messages": TALK, "tools": [TOOL]},
        "tool_calls": {"messages": [TALK[0], message("assistant", "a", tool_calls=[CALL])]},
        "messages of a tool": {"messages": [*TALK, message("tool", "t"), TALK[1]]},
    }
    for what, record in told.items():
        path = jsonl(tmp_path / "x.jsonl", record)
        examples = list(read_examples(Source(str(path)), PLAIN, Reading()))
        (found,) = encode(examples, tokenizer, "masked", 512)
        assert str(found) == f"{path}:1: the chat template has no place for it ({what})"
        tokenizer_without = copy.copy(small_tokenizer)
        tokenizer_without.chat_template = None
        (found,) = encode(examples, tokenizer_without, "masked", 512)
        assert str(found) == f"{path}:1: the chat template has no place for it ({what})"


BAD_CALLS = [
    ({"tools": [1]}, {}, "tools: a list of objects is wanted"),
    ({"tools": "{oops"}, {}, "tools: text that is no JSON"),
    ({}, {"tool_calls": [{"name": "f", "arguments": "{oops"}]}, "arguments of f are no JSON"),
    ({}, {"tool_calls": [{"name": "f", "arguments": [1]}]}, "arguments of f: an object is wanted"),
    ({}, {"tool_calls": [{"arguments": {}}]}, "a function with a name is wanted"),
    ({}, {"tool_calls": "x"}, "tool_calls: text that is no JSON"),
    ({}, {"function_call": "f"}, "tool_calls: text that is no JSON"),
    ({}, {"tool_calls": [{"name": "f"}], "function_call": {"name": "f"}}, "(function_call; only"),
]


@pytest.mark.parametrize(("beside", "of_answer", "says"), BAD_CALLS, ids=lambda v: str(v)[:40])
def test_calls_that_cannot_be_used(
    beside: dict[str, Any], of_answer: dict[str, Any], says: str, tmp_path: Path
) -> None:
    messages = [message("user", "q"), message("assistant", "a", **of_answer)]
    assert says in refused({"messages": messages, **beside}, tmp_path)
