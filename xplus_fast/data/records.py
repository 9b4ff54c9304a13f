"""Records -> conversations and translation pairs; how a record's keys tell its format."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from xplus_fast.data.conversations import (
    ODD_KEYS,
    WRONG_TYPE,
    Messages,
    Unfit,
    conversation,
    listed,
    say,
)
from xplus_fast.data.languages import code_of, is_language, two_languages
from xplus_fast.errors import UserError

TEXT = "text"  # the role of a document's only message: nobody asks, all of it is learnt
Columns = dict[str, str]  # our name of a key -> that of the records

# A format's keys, and by what other names records have them; the first that fits is taken.
_QUESTION = ("question", "query", "prompt", "user", "human", "input")
_ANSWER = ("completion", "answer", "response", "assistant", "output")
_SRC = ("src", "source", "source_text", "src_text", "source_sentence")
_TGT = ("tgt", "target", "target_text", "tgt_text", "target_sentence", "trg")
_SRC_LANG = ("src_lang", "source_lang", "source_language", "src_language")
_TGT_LANG = ("tgt_lang", "target_lang", "target_language", "tgt_language", "trg_lang")
_FORMS: tuple[tuple[str, dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]], ...] = (
    ("messages", {"messages": ("conversations", "conversation")}, {}),
    ("alpaca", {"instruction": (), "output": ()}, {}),
    ("alpaca", {"instruction": (), "output": ("response",)}, {"input": ("context",)}),  # Dolly's
    ("translation", {"translation": ()}, {}),
    ("translation", {"src": _SRC, "tgt": _TGT}, {"src_lang": _SRC_LANG, "tgt_lang": _TGT_LANG}),
    ("prompt", {"prompt": _QUESTION, "completion": _ANSWER}, {}),
    ("text", {"text": ()}, {}),
)  # fmt: skip
# What `columns` may name, beside codes of languages
COLUMNS = (
    "src", "tgt", "src_lang", "tgt_lang", "score", "user", "assistant", "system", "messages",
    "tools", "prompt", "completion", "instruction", "input", "output", "translation",
    "text",
)  # fmt: skip
_NUMBER = re.compile(r"[\w.:-]*\d[\w.:-]*")
_OPTIONAL = ("system", "tools", "input", "src_lang", "tgt_lang", "score")  # of a record
_SAME = {"user": "prompt", "assistant": "completion"}
# Keys of each format that are read; of a pair written flat, its languages beside.
READ = {
    "messages": ("messages", "tools"),
    "sharegpt": ("messages", "tools", "system"),
    "prompt": ("prompt", "completion", "tools"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "translation": ("translation", "src", "tgt", "src_lang", "tgt_lang"),
    "text": ("text",),
}


@dataclass(frozen=True)
class Form:
    """How the records of a source are read."""

    format: str
    columns: Columns
    read: tuple[str, ...]  # keys

    def renamed(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record by our names of its keys. Raises `Unfit` where one is not there."""
        if not self.columns:
            return record
        found = {ours: _under(theirs, record) for ours, theirs in self.columns.items()}
        there = {ours: value for ours, value in found.items() if value is not _NOWHERE}
        if missing := [v for k, v in self.columns.items() if k not in {*there, *_OPTIONAL}]:
            raise Unfit(ODD_KEYS, f"expected {' and '.join(missing)}, found {_list(record)}")
        taken = {*self.columns.values(), *self.columns}
        # what "data.en" was read from is no key that goes unread
        taken |= {v.partition(".")[0] for v in self.columns.values() if v not in record}
        rest = {k: v for k, v in record.items() if k not in taken}
        return there | rest


_NOWHERE = object()


def _under(name: str, record: Any) -> Any:
    """What a record has under a key, or under keys in each other, "data.en"."""
    if isinstance(record, dict) and name in record:
        return record[name]
    first, dot, rest = name.partition(".")
    if dot and isinstance(record, dict) and first in record:
        return _under(rest, record[first])
    return _NOWHERE


def check_columns(columns: dict[str, Any], at: str) -> None:
    """See that `columns` of a recipe names what there is. Raises `UserError`."""
    for key in columns:
        if key not in COLUMNS and not is_language(key):
            raise UserError(
                f"{at}.{key:.60}: unknown; a code of a language or one of {', '.join(COLUMNS)} is"
                " wanted, with the name that it has in the records"
            )
    twice = [value for value, n in Counter(columns.values()).items() if n > 1]
    if twice:
        raise UserError(f"{at}: {twice[0]} is named twice; each is one column")
    numbers = [isinstance(value, int) for value in columns.values()]
    if any(numbers) and not all(numbers):
        raise UserError(f"{at}: names and numbers; numbers are for tables without a header")


def has_header(columns: dict[str, Any]) -> bool:
    return not any(isinstance(value, int) for value in columns.values())


def detect(
    record: dict[str, Any], where: str, columns: dict[str, Any], pinned: str = "auto"
) -> Form:
    """The form that has the record's keys; `UserError` if none has.

    columns: as the recipe names them. pinned: a format, or "auto".
    """
    given = {_SAME.get(ours, ours): str(theirs) for ours, theirs in columns.items()}
    if missing := [theirs for theirs in given.values() if _under(theirs, record) is _NOWHERE]:
        raise UserError(f"{where}: columns: no {' and '.join(missing)} in {_list(record)}")
    record = Form("", given, ()).renamed(record)
    lower = {str(k).lower().replace(" ", "_"): k for k in reversed(record)}

    def called(names: Iterable[str]) -> Any:
        return next((lower[name] for name in names if name in lower), None)

    wanted = {"sharegpt": "messages"}.get(pinned, pinned)
    flat = wanted in ("auto", "translation") and len(languages_in(record)) >= 2
    for name, keys, more in _FORMS:
        # beside two languages "text" is one of many notes
        if wanted not in ("auto", name) or (flat and name == "text"):
            continue
        found = {ours: called((ours, *theirs)) for ours, theirs in keys.items()}
        if None in found.values() or len({*found.values()}) < len(found):
            continue
        found |= {ours: key for ours, names in more.items() if (key := called((ours, *names)))}
        return _form(name, record, found, given)
    if flat:
        return _form("translation", record, {}, given)
    if pinned != "auto":  # reading will say what it lacks
        return Form(pinned, given, READ[pinned])
    known = "; ".join(dict.fromkeys(" and ".join(keys) for _, keys, _ in _FORMS))
    raise UserError(
        f"{where}: no known format has the keys {_list(record)}; known: {known}; two languages;"
        " `columns:` of the source says which is what, such as {user: question, assistant: answer}"
    )


def _form(name: str, record: dict[str, Any], found: Columns, given: Columns) -> Form:
    if name == "messages":
        items = record[found["messages"]]
        if isinstance(items, str):
            try:
                items = json.loads(items)
            except (ValueError, RecursionError):  # reading will say so
                items = None
        first = items[0] if isinstance(items, list) and items else None
        if isinstance(first, dict) and "from" in first:
            name = "sharegpt"
    read = READ[name]
    if "system" in given:
        read = (*read, "system")
    # of those that detection found, the ones that `columns` has not renamed already
    columns = {ours: given.get(theirs, theirs) for ours, theirs in found.items() if ours != theirs}
    return Form(name, {**given, **columns}, read)


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
            wanted = "text" if types is str else "a list" if k == "messages" else "text or a list"
            raise Unfit(WRONG_TYPE, f"{k}: {wanted} is wanted, found {record[k]!r:.60}")
    return [record[k] for k in keys]


def without(record: dict[str, Any], ignore: Sequence[str]) -> dict[str, Any]:
    """The record without some keys, in its messages too."""

    def keep(item: Any) -> Any:
        return (
            {k: v for k, v in item.items() if k not in ignore} if isinstance(item, dict) else item
        )

    return {k: [*map(keep, v)] if isinstance(v, list) else v for k, v in keep(record).items()}


def _after_system(record: dict[str, Any], messages: Messages) -> Messages:
    """The messages, after the record's own system message where it has one."""
    (system,) = _fields({"system": record.get("system") or ""}, ("system",), str)
    if system and messages[0]["role"] == "system":
        raise Unfit("two system messages", "one of the record, one of its messages")
    return (say("system", system), *messages) if system else messages


def _messages(record: dict[str, Any]) -> Messages:
    return _after_system(record, conversation(_items(record)))


def _sharegpt(record: dict[str, Any]) -> Messages:
    return _after_system(record, conversation(_items(record), sharegpt=True))


def _items(record: dict[str, Any]) -> list[Any]:
    """The messages, which tables have as JSON in text."""
    (items,) = _fields(record, ("messages",), (list, str))
    return listed(items, "messages") if isinstance(items, str) else items


def _prompt(record: dict[str, Any]) -> Messages:
    prompt, completion = _fields(record, ("prompt", "completion"), (str, list))
    if type(prompt) is not type(completion):
        raise Unfit(WRONG_TYPE, "prompt and completion: one is text, one a list")
    if isinstance(prompt, str):
        return _after_system(record, (say("user", prompt), say("assistant", completion)))
    return _after_system(record, conversation([*prompt, *completion]))


def _alpaca(record: dict[str, Any]) -> Messages:
    instruction, output = _fields(record, ("instruction", "output"), str)
    (more,) = _fields({"input": record.get("input") or ""}, ("input",), str)
    if record.get("history"):
        raise Unfit("a history", "alpaca records of one turn are read; use messages for several")
    asked = f"{instruction}\n{more}" if more else instruction
    return _after_system(record, (say("user", asked), say("assistant", output)))


def languages_in(record: dict[str, Any]) -> dict[str, str]:
    """code -> key, of the keys that are codes of languages or, if these are none, their names."""
    texts = [k for k, v in record.items() if isinstance(v, str)]
    codes = {k: k for k in texts if is_language(k)}
    for name in ("id", "no"):  # numbers of records as often as Indonesian and Norwegian
        if len(codes) > 2 and _NUMBER.fullmatch(codes.get(name) and record[name] or ""):
            del codes[name]
    if len(codes) >= 2:
        return codes
    return {code: k for k in texts if (code := code_of(k)) is not None}


def translation(
    record: dict[str, Any], languages: Sequence[str], where: str, named: Sequence[str] = ()
) -> tuple[tuple[str, str], tuple[str, str]]:
    """The two language codes (`languages`, or the record's own if empty) and the two texts.

    named: the languages that the file's name tells, for records that do not.
    """
    if "src" in record and "tgt" in record:
        first, second = _fields(record, ("src", "tgt"), str)
        own = [record[k] for k in ("src_lang", "tgt_lang") if isinstance(record.get(k), str)]
        codes = languages or own or named
        if not codes:
            raise UserError(
                f"{where}: nothing tells the languages of src and tgt; `languages: [en, sw]` of the"
                " source does; for prompts and answers, `columns: {user: ..., assistant: ...}`"
            )
        return two_languages(codes, where), (first, second)
    if "translation" in record:
        record = _fields(record, ("translation",), dict)[0]
        # Parquet fills the languages that a record lacks with nulls.
        record = {k: v for k, v in record.items() if v is not None}
        keys = {k: k for k in record}
    else:
        keys = languages_in(record)
    told = [k for k in record if is_language(str(k))]
    if not languages and len(keys) < 2 <= len(told):
        _fields(record, told, str)  # says which is no text
    if not languages and len(keys) != 2:
        detail = f"expected two languages, or `languages` to choose them; found {_list(record)}"
        raise Unfit(ODD_KEYS, detail)
    codes = two_languages(languages or list(keys), where)
    first, second = _fields(record, [keys.get(code, code) for code in codes], str)
    return codes, (first, second)


def _text(record: dict[str, Any]) -> Messages:
    return (say(TEXT, _fields(record, ("text",), str)[0]),)


CONVERSATIONS: dict[str, Callable[[dict[str, Any]], Messages]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt": _prompt,
    "alpaca": _alpaca,
    "text": _text,
}
