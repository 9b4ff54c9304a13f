"""Lists of messages, as people write them, in the form in which chat templates take them.

| written | becomes |
|---|---|
| {"role", "content"}, {"from", "value"} | role, content |
| content of [{"type": "text", "text": ...}, ...] | the texts, one after the other |
| tool_calls, function_call; arguments maybe as text | {"function": {"name", "arguments"}}, ... |
| from: function_call, value: JSON of a call or a list of them | an answer with tool_calls |
| weight: 0, train: false, loss: false of an answer | learn: false |
"""

import json
import re
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]  # role, content; maybe tool_calls, name, tool_call_id, learn
Messages = tuple[Message, ...]

# What names of keys speak of that changes what is asked, answered or learnt.
_MEANT = frozenset(
    "tool tools function functions document documents context contexts history system developer"
    " template kwargs thinking thought thoughts think reasoning image images audio audios video"
    " videos weight weights train trainable learn loss mask masks".split()
)
# Of these, 0 and false say something, and 1 and true are what is done anyway.
_SWITCHES = frozenset("weight weights train trainable learn loss mask masks".split())
# What messages carry that says nothing to a model.
_ABOUT = frozenset(
    "id message_id parent_id uuid index turn timestamp created_at create_time date source model"
    " lang language tokens token_count score".split()
)
_LEARN = ("weight", "train", "loss")  # switches of a message that are heeded
_READ = "only role, content, tool_calls, weight, train and loss are read"
_ROLES = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "function": "tool",
}  # fmt: skip
_SHAREGPT = {
    **_ROLES, "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "bot": "assistant", "observation": "tool", "function_response": "tool", "tool_response": "tool",
    "function_call": "call", "tool_call": "call",
}  # fmt: skip
# What may follow what: an answer a prompt or what a tool gave, a tool an answer (its call)
_FOLLOWS = {
    ("user", "assistant"), ("assistant", "user"), ("assistant", "tool"), ("tool", "tool"),
    ("tool", "assistant"),
}  # fmt: skip
ODD_KEYS = "missing or odd keys"
WRONG_TYPE = "a value of the wrong type"
ODD_MESSAGE = "a message with other keys"


class Unfit(Exception):
    """A record that is not of its format: (reason, detail)."""


def say(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def is_empty(value: Any) -> bool:
    """Whether a key's value says nothing; tools and the like are often written as JSON in text."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return value is None or (isinstance(value, list | dict) and not value)


def _words(key: str) -> set[str]:
    return set(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", str(key)).lower()))


def meaningful(others: dict[str, Any]) -> list[str]:
    """Those of a record's or message's further keys that change what is meant by it.

    One without a value does not. "label", as preference data have it, marks an unwanted answer
    where it is false.
    """
    found = []
    for key, value in others.items():
        words = _words(key)
        if (
            value is None
            or value in ("", "[]", "{}", "null")
            or isinstance(value, list | dict)
            and not value
        ):
            continue
        if words & _SWITCHES:
            is_on = isinstance(value, int | float) and value == 1
            found += [] if is_on else [key]
        elif (words & _MEANT and value) or (key == "label" and value is False):
            found.append(key)
    return found


def conversation(items: Sequence[Any], sharegpt: bool = False) -> Messages:
    """Messages that begin with a user's, or a system message before it, and end with an answer.

    sharegpt: {"from": "human", "value": ...}. Raises `Unfit`.
    """
    messages = tuple(_message(item, sharegpt) for item in items)
    turns = [m["role"] for m in messages]
    if turns[:1] == ["system"]:
        turns = turns[1:]
    alternate = all(pair in _FOLLOWS for pair in zip(turns, turns[1:], strict=False))
    if not turns or turns[0] != "user" or turns[-1] != "assistant" or not alternate:
        detail = f"found {', '.join(m['role'] for m in messages) or 'no message'}"
        raise Unfit("turns that do not alternate from user to a last assistant", detail)
    if not any(m["role"] == "assistant" and m.get("learn", True) for m in messages):
        raise Unfit("no answer to learn", "all have weight 0, or train or loss false")
    return messages


def _message(item: Any, sharegpt: bool) -> Message:
    if not isinstance(item, dict):
        raise Unfit(WRONG_TYPE, f"a message is an object, found {item!r:.60}")
    roles, speaker, said = (_SHAREGPT, "from", "value") if sharegpt else (_ROLES, "role", "content")
    called = [k for k in ("tool_calls", "function_call") if not is_empty(item.get(k))]
    calls = item[called[0]] if called else None
    if speaker not in item or (said not in item and calls is None):
        found = ", ".join(map(str, item)) or "(none)"
        raise Unfit(ODD_KEYS, f"expected {speaker} and {said}, found {found}")
    role = item[speaker]
    if not isinstance(role, str):
        raise Unfit(WRONG_TYPE, f"{speaker}: text is wanted, found {role!r:.60}")
    role = role.lower() if sharegpt else role
    if role not in roles:
        raise Unfit("an unknown role", f"'{role}'; known: {', '.join(roles)}")
    content = _text(item.get(said), said, calls is not None)
    if roles[role] == "call":
        calls, content, role = content, "", "assistant"
    message = say(roles[role], content)
    if calls is not None:
        if message["role"] != "assistant":
            raise Unfit(ODD_MESSAGE, f"tool_calls of {role}: only an assistant calls tools")
        message["tool_calls"] = [_call(call) for call in listed(calls, "tool_calls")]
    others = {k: v for k, v in item.items() if k not in (speaker, said, *called[:1])}
    if message["role"] == "tool":
        for key in ("name", "tool_call_id"):
            if isinstance(others.get(key), str):
                message[key] = others.pop(key)
    _heed(message, others)
    # Thoughts or a mask that went unheeded would train something else than was meant.
    meant = meaningful(others)
    more = [k for k, v in others.items() if v and k not in _ABOUT and not _words(k) & _SWITCHES]
    if extra := [k for k in others if k in meant or k in more]:
        raise Unfit(ODD_MESSAGE, f"{', '.join(extra)}; {_READ}")
    return message


def _text(content: Any, key: str, calls: bool) -> str:
    """What a message says; a list of parts of text is their concatenation, as templates make it."""
    if content is None and calls:
        return ""
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise Unfit("content that is not text", f"a part of type {kind!r:.40}")
            if extra := [k for k, v in part.items() if k not in ("type", "text") and v]:
                raise Unfit("content that is not text", f"a part with {', '.join(extra)}")
            texts.append(part["text"])
        return "".join(texts)
    if not isinstance(content, str):
        raise Unfit(WRONG_TYPE, f"{key}: text is wanted, found {content!r:.60}")
    return content


def _heed(message: Message, others: dict[str, Any]) -> None:
    """Take from a message's further keys what says whether it is learnt."""
    for key in _LEARN:
        value = others.pop(key, None)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            raise Unfit(ODD_MESSAGE, f"{key}: {value!r:.40}; 0, 1, false or true is wanted")
        if message["role"] == "assistant":
            if not value:
                message["learn"] = False
        elif value:
            raise Unfit(ODD_MESSAGE, f"{key}: {value!r} of {message['role']}: answers are learnt")


def listed(value: Any, key: str) -> list[Any]:
    """A list of objects, or one as JSON in text. Raises `Unfit`."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise Unfit(WRONG_TYPE, f"{key}: text that is no JSON ({e})") from None
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Unfit(WRONG_TYPE, f"{key}: a list of objects is wanted, found {value!r:.60}")
    return value


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call as templates take it: arguments as an object, not as text."""
    function = call.get("function", call)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise Unfit(WRONG_TYPE, f"tool_calls: a function with a name is wanted, found {call!r:.60}")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as e:
            raise Unfit(WRONG_TYPE, f"tool_calls: arguments of {name} are no JSON ({e})") from None
    if not isinstance(arguments, dict):
        raise Unfit(WRONG_TYPE, f"tool_calls: arguments of {name}: an object is wanted")
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) else made


def tools_of(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The tools that a record offers the model; None: none. Raises `Unfit`."""
    tools = record.get("tools")
    return None if is_empty(tools) else listed(tools, "tools")
