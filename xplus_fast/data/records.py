"""Records -> conversations and translation pairs; how a record's keys tell its format."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from xplus_fast.data.languages import is_language, two_languages
from xplus_fast.errors import UserError

Messages = tuple[dict[str, str], ...]

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

_KEYS = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "translation": ("translation",),
}
_ROLES = ("system", "user", "assistant")
ODD_KEYS = "missing or odd keys"
_WRONG_TYPE = "a value of the wrong type"


class Unfit(Exception):
    """A record that is not of its format: (reason, detail)."""


def detect(record: dict[str, Any], where: str) -> str:
    """The format that has the record's keys; `UserError` if none has."""
    for name, keys in _KEYS.items():
        if all(k in record for k in keys):
            return name
    if len(_language_keys(record)) >= 2:
        return "translation"
    known = "; ".join(" and ".join(keys) for keys in _KEYS.values())
    raise UserError(
        f"{where}: no known format has the keys {_list(record)}; known: {known}; two language codes"
    )


def _list(record: dict[str, Any]) -> str:
    return ", ".join(map(str, record)) or "(none)"


def _fields(
    record: dict[str, Any], keys: Sequence[str], types: type | tuple[type, ...]
) -> list[Any]:
    if any(k not in record for k in keys):
        detail = f"expected {' and '.join(keys)}, found {_list(record)}"
        raise Unfit(ODD_KEYS, detail)
    for k in keys:
        if not isinstance(record[k], types):
            wanted = "text" if types is str else "a list" if types is list else "text or a list"
            raise Unfit(_WRONG_TYPE, f"{k}: {wanted} is wanted, found {record[k]!r:.60}")
    return [record[k] for k in keys]


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def is_empty(value: Any) -> bool:
    """Whether a key's value says nothing; tools and the like are often written as JSON in text."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return value is None or (isinstance(value, list | dict) and not value)


def without(record: dict[str, Any], ignore: Sequence[str]) -> dict[str, Any]:
    """The record without some keys, in its messages too."""

    def keep(item: Any) -> Any:
        return (
            {k: v for k, v in item.items() if k not in ignore} if isinstance(item, dict) else item
        )

    return {k: [*map(keep, v)] if isinstance(v, list) else v for k, v in keep(record).items()}


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


def _conversation(items: Sequence[Any]) -> Messages:
    messages = []
    for item in items:
        if not isinstance(item, dict):
            raise Unfit(_WRONG_TYPE, f"a message is an object, found {item!r:.60}")
        role, content = _fields(item, ("role", "content"), str)
        if role not in _ROLES:
            raise Unfit("an unknown role", f"'{role}'; known: {', '.join(_ROLES)}")
        # A tool call or a weight that went unheeded would train something else than was meant.
        others = {k: v for k, v in item.items() if k not in ("role", "content")}
        meant = meaningful(others)
        more = [k for k, v in others.items() if v and k not in _ABOUT and not _words(k) & _SWITCHES]
        if extra := [k for k in others if k in meant or k in more]:
            raise Unfit(
                "a message with other keys", f"{', '.join(extra)}; only role and content are read"
            )
        messages.append(say(role, content))
    turns = [m["role"] for m in messages]
    if turns[:1] == ["system"]:
        turns = turns[1:]
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        detail = f"found {', '.join(m['role'] for m in messages) or 'no message'}"
        raise Unfit("turns that do not alternate from user to a last assistant", detail)
    return tuple(messages)


def _messages(record: dict[str, Any]) -> Messages:
    return _conversation(_fields(record, _KEYS["messages"], list)[0])


def _prompt(record: dict[str, Any]) -> Messages:
    prompt, completion = _fields(record, _KEYS["prompt"], (str, list))
    if type(prompt) is not type(completion):
        raise Unfit(_WRONG_TYPE, "prompt and completion: one is text, one a list")
    if isinstance(prompt, str):
        return say("user", prompt), say("assistant", completion)
    return _conversation([*prompt, *completion])


def _alpaca(record: dict[str, Any]) -> Messages:
    instruction, output = _fields(record, _KEYS["alpaca"], str)
    optional = {k: record.get(k) or "" for k in ("input", "system")}
    _fields(optional, list(optional), str)
    if record.get("history"):
        raise Unfit("a history", "alpaca records of one turn are read; use messages for several")
    asked = f"{instruction}\n{optional['input']}" if optional["input"] else instruction
    turn = say("user", asked), say("assistant", output)
    return (say("system", optional["system"]), *turn) if optional["system"] else turn


def _language_keys(record: dict[str, Any]) -> list[str]:
    return [k for k, v in record.items() if isinstance(v, str) and is_language(k)]


def translation(
    record: dict[str, Any], languages: Sequence[str], where: str
) -> tuple[tuple[str, str], tuple[str, str]]:
    """The two language codes (`languages`, or the record's own if empty) and the two texts."""
    if "translation" in record:
        record = _fields(record, ("translation",), dict)[0]
        # Parquet fills the languages that a record lacks with nulls.
        record = {k: v for k, v in record.items() if v is not None}
        keys = list(record)
    else:
        keys = _language_keys(record)
    if not languages and len(keys) != 2:
        detail = f"expected two languages, or `languages` to choose them; found {_list(record)}"
        raise Unfit(ODD_KEYS, detail)
    codes = two_languages(languages or keys, where)
    first, second = _fields(record, codes, str)
    return codes, (first, second)


# Keys of each format that are read; of a pair written flat, its languages beside.
READ = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "translation": ("translation",),
}

CONVERSATIONS: dict[str, Callable[[dict[str, Any]], Messages]] = {
    "messages": _messages,
    "prompt": _prompt,
    "alpaca": _alpaca,
}
