"""Sources -> examples: one conversation each, in the forms that people keep their data in.

| format | what a record is |
|---|---|
| messages | {"messages": [{"role": ..., "content": ...}, ...]}, or {"conversations": ...} |
| sharegpt | {"conversations": [{"from": "human", "value": ...}, ...]} |
| prompt | {"prompt": ..., "completion": ...}: two strings or two lists of messages |
| alpaca | {"instruction": ..., "input": ..., "output": ...}, `input` and `system` optional |
| translation | {"translation": {"en": ..., "sw": ...}}, {"en": ..., "sw": ...}, {"src", "tgt"} |
| lines | line i of one file and line i of another |
| gettext | an entry of a .po catalog |
| text | {"text": ...}, or a paragraph of a plain file: all of it is learnt, nobody asks |
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from xplus_fast.config import DataConfig, Source
from xplus_fast.data.compressed import bare, kind, stem
from xplus_fast.data.conversations import (
    ODD_KEYS,
    Unfit,
    is_empty,
    meaningful,
    say,
    tools_of,
)
from xplus_fast.data.examples import Example, Pair, Reading
from xplus_fast.data.files import (
    TEXT_LIMIT,
    WHOLE_LIMIT,
    Rejected,
    read_lines,
    read_records,
    require,
)
from xplus_fast.data.folders import RECORDS, saved_dataset
from xplus_fast.data.languages import is_language, language_name, languages_of_name, two_languages
from xplus_fast.data.records import (
    CONVERSATIONS,
    TEXT,
    Form,
    detect,
    has_header,
    languages_in,
    translation,
    without,
)
from xplus_fast.data.sources import chosen_files, located
from xplus_fast.errors import UserError
from xplus_fast.files import resolve

_NAMED = ("src", "tgt", "pair")  # what `xplus-fast prepare` writes beside messages
_UNREAD = 100  # keys that are noted as unread at most


def read_examples(source: Source, data: DataConfig, reading: Reading) -> Iterator[Example]:
    """Stream a source's examples; what was chosen and left out goes into `reading`.

    A pair gives one example per direction of `source.directions`. Raises `UserError` for a source
    that is missing, unreadable or unfit and, with `data.on_error: stop`, for the first bad record.
    """
    name, chosen = _name(source), file_format(source)
    items: Iterator[Pair | Example | Rejected]
    _check_options(source, chosen)
    if chosen == "lines":
        items = line_pairs(source)
    elif chosen == "gettext":
        items = catalog_pairs(source)
    elif chosen == "text" and not has_records(source):
        items = paragraphs(source)
    else:
        items = _from_records(source, chosen, reading)
    if chosen != "auto":
        reading.formats[name] = chosen
    for item in islice(items, source.limit):
        if isinstance(item, Rejected):
            reading.skip(item, data)
            continue
        for example in _directed(item, source, data) if isinstance(item, Pair) else [item]:
            if isinstance(bad := _check(example), Rejected):
                reading.skip(bad, data)
                break
            yield example


def read_text(sources: Sequence[Source]) -> list[str]:
    """Read raw text: documents, of plain files the paragraphs, which blank lines separate.

    Raises `UserError` for another format, a missing or empty file, or a line that is not UTF-8.
    """
    texts: list[str] = []
    for source in sources:
        if source.format not in ("auto", "text"):
            raise UserError(f"{_name(source)}: raw text is wanted here, not '{source.format}'")
        source = replace(source, format="text")
        _check_options(source, "text")
        items = _from_records(source, "text", Reading()) if has_records(source) else None
        of_source = []
        for item in islice(items or paragraphs(source), source.limit):
            if not isinstance(item, Example):
                raise UserError(str(item))
            of_source.append(item.messages[0]["content"])
        if not of_source:
            raise UserError(f"{_name(source)}: no text in it")
        texts += of_source
    return texts


def _check_options(source: Source, chosen: str) -> None:
    """See that what only records have is asked of records alone. Raises `UserError`."""
    if chosen in ("lines", "gettext") or (chosen == "text" and not has_records(source)):
        for option in ("split", "subset", "columns"):
            if getattr(source, option):
                raise UserError(f"{_name(source)}: {option}: format {chosen} has none")


def paragraphs(source: Source) -> Iterator[Example | Rejected]:
    """The paragraphs of plain files, which blank lines separate; a long one in parts."""
    for path in [source.path] if isinstance(source.path, str) else source.path:
        found = require(path)
        lines: list[str] = []
        begin, size = "", 0
        for where, line in chain(read_lines(found), [("", "")]):
            if isinstance(line, Rejected):
                yield line
                continue
            if lines and (not line.strip() or size > TEXT_LIMIT // 4):
                text = "\n".join(lines)
                yield Example((say(TEXT, text),), begin, stem(found), f"\0{text}")
                lines, size = [], 0
            if line.strip():
                begin = begin if lines else where
                lines.append(line)
                size += len(line)


def file_format(source: Source) -> str:
    """The format that is pinned or that the files' names tell; "auto": the records' keys will.

    Raises `UserError` where the path is missing or cannot be of the pinned format.
    """
    pinned = source.format
    if not isinstance(source.path, str):
        if pinned not in ("auto", "lines") or len(source.path) != 2:
            raise UserError(
                f"{_name(source)}: a list of paths is the two files of a pair (format lines),"
                f" found {len(source.path)} and format {pinned}"
            )
        for each in source.path:
            require(each)
        return "lines"
    path = located(source)
    if pinned == "lines":
        raise UserError(f"{path}: format 'lines' wants a list of two files, found one path")
    if path.is_dir():
        saved = saved_dataset(path, source.split, source.subset)
        catalogs = not saved and any(path.glob("**/LC_MESSAGES/*.po"))
        found = "gettext" if catalogs else "records"
    else:
        for option in ("split", "subset"):
            if getattr(source, option) is not None:
                raise UserError(f"{path}: a file has no {option}; folders and data of the hub do")
        found = {".po": "gettext", **dict.fromkeys(RECORDS, "records")}.get(kind(path), "text")
    if pinned == "auto" and found == "text":
        raise UserError(
            f"{path}: its name does not tell the format; {', '.join(RECORDS)}, .po, a folder of"
            " them, or a list of two line-aligned files are known; format: text trains on raw text"
        )
    if pinned == "auto":
        return "auto" if found == "records" else found
    wanted = pinned if pinned in ("gettext", "text") else "records"
    if wanted != found and (pinned, found) != ("text", "records"):
        says = {"gettext": ".po catalogs", "records": f"{', '.join(RECORDS)}", "text": "plain text"}
        raise UserError(f"{path}: format '{pinned}' wants {says[wanted]}, found {says[found]}")
    return pinned


def has_records(source: Source) -> bool:
    """Whether a source's files hold records, each with its keys."""
    if not isinstance(source.path, str):
        return False
    path = located(source)
    return path.is_dir() or kind(path) in RECORDS


def source_files(source: Source) -> list[Path]:
    """Every file that reading the source reads."""
    chosen = file_format(source)
    if not isinstance(source.path, str):
        return [resolve(p) for p in source.path]
    path = located(source)
    if chosen == "gettext":
        return [p for p, _ in catalogs(path, source)]
    return chosen_files(source).files


def _name(source: Source) -> str:
    return source.path if isinstance(source.path, str) else " + ".join(source.path)


# --- translation pairs ---


def line_pairs(source: Source) -> Iterator[Pair | Rejected]:
    a, b = (resolve(p) for p in source.path)
    codes = source.languages or [_suffix_language(p) for p in (a, b)]
    languages = two_languages(codes, _name(source))
    if a.resolve() == b.resolve():
        raise UserError(f"{a}: is both files of the pair")
    # Counted before any work: a pair of files that slipped must not train for an hour first.
    counts = [sum(1 for _ in read_lines(p)) for p in (a, b)]
    if counts[0] != counts[1]:
        raise UserError(
            f"{a} has {counts[0]} lines and {b} has {counts[1]}: equally many are wanted, as line i"
            " of one translates line i of the other"
        )
    for (where, x), (_, y) in zip(read_lines(a), read_lines(b), strict=True):
        if isinstance(x, Rejected):
            yield x
        elif isinstance(y, Rejected):
            yield y
        else:
            yield Pair(where, languages, (x, y))


def _suffix_language(path: Path) -> str:
    code = bare(path.name).removesuffix(".txt").rpartition(".")[2]
    if not is_language(code):
        raise UserError(
            f"{path}: its name does not end in a language code; give the two files' languages,"
            " such as languages: [en, sw]"
        )
    return code


def catalogs(path: Path, source: Source) -> list[tuple[Path, str]]:
    """The (.po file, language) pairs to read."""
    origin = source.languages[0] if source.languages else "en"
    wanted = set(source.languages[1:])
    if path.is_dir():
        found = [(p, p.parent.parent.name) for p in sorted(path.glob("**/LC_MESSAGES/*.po"))]
    elif path.parent.name == "LC_MESSAGES":
        found = [(path, path.parent.parent.name)]
    elif len(wanted) == 1:
        found = [(path, next(iter(wanted)))]
    else:
        raise UserError(
            f"{path}: its folder does not tell its language; give languages: [{origin}, ...]"
        )
    if missing := wanted - {language for _, language in found}:
        raise UserError(
            f"{path}: no catalog in {', '.join(sorted(missing))};"
            f" found {', '.join(sorted({language for _, language in found}))}"
        )
    return [(p, lang) for p, lang in found if (lang in wanted if wanted else lang != origin)]


_OPEN = re.compile(r'^\s*(?:msg\w+(?:\[\d+\])?\s*)?"(?:[^"\\]|\\.)*$')


def catalog_pairs(source: Source) -> Iterator[Pair | Rejected]:
    import polib

    assert isinstance(source.path, str)
    origin = source.languages[0] if source.languages else "en"
    for path, language in catalogs(resolve(source.path), source):
        languages = two_languages([origin, language], str(path))
        try:
            if (size := path.stat().st_size) > WHOLE_LIMIT:
                raise UserError(f"a catalog of {size:,} bytes; {WHOLE_LIMIT:,} are read at most")
            entries = polib.pofile(str(path), encoding="utf-8")
        except UnicodeDecodeError:
            bad = next((x for _, x in read_lines(path) if isinstance(x, Rejected)), path)
            raise UserError(f"{bad}: a catalog in UTF-8 is wanted") from None
        except UserError as e:
            raise UserError(f"{path}: {e}") from None
        except (OSError, ValueError) as e:
            raise UserError(f"{path}: not a gettext catalog ({' '.join(str(e).split())})") from None
        with path.open(encoding="utf-8") as f:  # which polib would cut short
            if number := next((i for i, line in enumerate(f, 1) if _OPEN.search(line)), 0):
                raise UserError(f"{path}:{number}: a text without its closing quotation mark")
        for entry in entries:
            if entry.obsolete or entry.fuzzy or entry.msgid_plural or not entry.msgstr.strip():
                continue
            where = f"{path}:{entry.linenum} ({language})"
            yield Pair(where, languages, (entry.msgid, entry.msgstr))


def _directed(pair: Pair, source: Source, data: DataConfig) -> Iterator[Example]:
    """One pair -> its examples, in the directions that the source asks for."""
    sides = [
        (code.replace("-", "_"), language_name(code), text.strip())
        for code, text in zip(pair.languages, pair.texts, strict=True)
    ]
    # The key does not depend on the order in which the source names its languages.
    (a, _, text), (b, _, other) = sorted(sides)
    key, mirror = f"{a}-{b}\0{text}", f"{b}-{a}\0{other}"
    both = [(sides[0], sides[1]), (sides[1], sides[0])]
    chosen = {"both": both, "forward": both[:1], "backward": both[1:]}[source.directions]
    for (x, src, question), (y, tgt, answer) in chosen:
        prompt = data.prompt.format(src=src, tgt=tgt, text=question) if question else ""
        messages = [say("user", prompt), say("assistant", answer)]
        if data.system:
            messages.insert(0, say("system", data.system))
        yield Example(tuple(messages), pair.where, f"{x}-{y}", key, mirror)


# --- records ---


def _from_records(
    source: Source, chosen: str, reading: Reading
) -> Iterator[Pair | Example | Rejected]:
    assert isinstance(source.path, str)
    path, tag = located(source), stem(Path(source.path))
    form: Form | None = None
    if path.is_dir():
        files = chosen_files(source)
        reading.files[source.path] = [str(f.relative_to(path)) for f in files.files]
        reading.left[source.path] = [str(f.relative_to(path)) for f in files.left]
    named = languages_of_name(source.subset or "") or languages_of_name(path.name)
    records = read_records(
        path, source.split, source.subset, header=has_header(source.columns)
    )  # fmt: skip
    for where, record in records:
        if isinstance(record, Rejected):
            yield record
            continue
        if source.ignore:
            record = without(record, source.ignore)
        first = form is None
        if form is None:
            form = detect(record, where, source.columns, chosen)
            reading.formats[source.path] = form.format
        try:
            record = form.renamed(record)
            _look_beside(record, form, where, reading)
            if form.format == "translation":
                yield Pair(where, *translation(record, source.languages, where, named))
            else:
                messages = CONVERSATIONS[form.format](record)
                # a document is its own key, a conversation's is what is asked
                said = messages if form.format == TEXT else messages[:-1]
                asked = "\0".join(f"{m['role']}:{m['content']}" for m in said)
                tools = tools_of(record)
                yield Example(messages, where, *_named(record, tag, asked), tools=tools)
        except Unfit as e:
            reason, detail = e.args
            if first and chosen != "auto" and reason == ODD_KEYS:
                raise UserError(f"{where}: not of the format '{chosen}': {detail}") from None
            yield Rejected(where, reason, detail)


def _look_beside(record: dict[str, Any], form: Form, where: str, reading: Reading) -> None:
    """Note the keys that are not read. Raises `Unfit` for those that change what is meant."""
    read = {*form.read, *_NAMED}
    if form.format == "translation" and not {"translation", "src"} & set(record):
        read |= {*languages_in(record).values()} | {k for k in record if is_language(k)}
    others = {k: v for k, v in record.items() if k not in read and not is_empty(v)}
    if meant := meaningful(others):
        raise Unfit(
            "keys that are not read",
            f"{', '.join(meant)}: they change what is meant; `ignore: [{', '.join(meant)}]` of the"
            " source leaves them unread",
        )
    for key in list(others)[: _UNREAD - len(reading.unread)]:
        reading.unread.setdefault(key, where)


def _named(record: dict[str, Any], tag: str, asked: str) -> tuple[str, str]:
    """Tag and key: what `xplus-fast prepare` wrote of the direction and the pair, if it did."""
    src, tgt, pair = (record.get(name) for name in _NAMED)
    if isinstance(src, str) and isinstance(tgt, str) and isinstance(pair, str):
        return f"{src}-{tgt}", f"{'-'.join(sorted((src, tgt)))}\0{pair}"
    return tag, f"\0{asked}"


def _check(example: Example) -> Example | Rejected:
    """What holds for an example of any format."""
    size = sum(len(m["content"]) for m in example.messages)
    if size > TEXT_LIMIT and not example.is_text:
        detail = f"{size:,} characters, {TEXT_LIMIT:,} are read at most"
        return Rejected(example.where, "a text that is too long", detail)
    for message in example.messages:
        role, content = message["role"], message["content"]
        # an answer may be a call alone, and what a tool gives may be nothing
        may_be_empty = role in ("system", "tool") or "tool_calls" in message
        if not may_be_empty and not content.strip():
            what = {"assistant": "the answer", TEXT: "the text"}.get(role, "the text to answer")
            return Rejected(example.where, f"{what} is empty")
        try:
            content.encode("utf-8")
        except UnicodeEncodeError as e:
            return Rejected(example.where, "a lone surrogate", f"character {e.start + 1} of a text")
    return example
