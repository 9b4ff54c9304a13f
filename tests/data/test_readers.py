"""Every format, both directions, and the one line that each kind of bad input gets."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.assets import shared_data
from xplus_fast.config import DataConfig, Source
from xplus_fast.data.files import read_lines
from xplus_fast.data.languages import language_name
from xplus_fast.data.readers import Example, Reading, read_examples, read_text
from xplus_fast.errors import UserError

PLAIN = DataConfig(prompt="{src}>{tgt}: {text}")
SKIP = DataConfig(prompt="{src}>{tgt}: {text}", on_error="skip")


def read(path: Any, data: DataConfig = PLAIN, **options: Any) -> list[Example]:
    path = [str(p) for p in path] if isinstance(path, list) else str(path)
    return list(read_examples(Source(path, **options), data, Reading()))


def turns(example: Example) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in example.messages]


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path


def message(error: Any) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


MESSAGES = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
RECORDS = {
    "messages": MESSAGES,
    "prompt": {"prompt": "q", "completion": "a"},
    "prompt-lists": {
        "prompt": [{"role": "user", "content": "q"}],
        "completion": [{"role": "assistant", "content": "a"}],
    },
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
}


@pytest.mark.parametrize("form", RECORDS)
@pytest.mark.parametrize(
    "file", ["x.jsonl", "x.jsonl.gz", "x.json", "x.parquet", "saved", "folder"]
)
def test_one_record_in_every_form_and_file(form: str, file: str, tmp_path: Path) -> None:
    record, path = RECORDS[form], tmp_path / file
    if file == "x.jsonl":
        jsonl(path, record)
    elif file == "x.jsonl.gz":
        path.write_bytes(gzip.compress(json.dumps(record).encode()))
    elif file == "x.json":
        path.write_text(json.dumps([record], indent=1))
    elif file == "x.parquet":
        write_parquet(path, [record])
    elif file == "saved":
        import datasets

        datasets.Dataset.from_list([record]).save_to_disk(str(path))
    else:
        path.mkdir()
        write_parquet(path / "part.parquet", [record])
        (path / "README.md").write_text("no data")
    reading = Reading()
    (example,) = read_examples(Source(str(path)), PLAIN, reading)
    assert turns(example) == [("user", "q"), ("assistant", "a")]
    assert reading.formats == {str(path): form.partition("-")[0]}
    assert example.tag == ("x" if file.startswith("x") else file)
    place = path / "part.parquet" if file == "folder" else path
    assert example.where == (f"{path}: item 1" if file == "x.json" else f"{place}:1")


def write_parquet(path: Path, records: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)


def test_alpaca_input_and_system(tmp_path: Path) -> None:
    record = {"instruction": "do", "input": "this", "output": "done", "system": "be"}
    (example,) = read(jsonl(tmp_path / "x.jsonl", record))
    assert turns(example) == [("system", "be"), ("user", "do\nthis"), ("assistant", "done")]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("parquet", [True, False])
def test_translation_both_directions(nested: bool, parquet: bool, tmp_path: Path) -> None:
    pair = {"en": "Use {braces} {0}", "sw": "Tumia {mabano}"}
    record = {"translation": pair} if nested else {"score": 3, **pair}
    path = tmp_path / ("x.parquet" if parquet else "x.jsonl")
    write_parquet(path, [record]) if parquet else jsonl(path, record)
    there, back = read(path)
    assert turns(there) == [
        ("user", "English>Swahili: Use {braces} {0}"),
        ("assistant", "Tumia {mabano}"),
    ]
    assert turns(back) == [
        ("user", "Swahili>English: Tumia {mabano}"),
        ("assistant", "Use {braces} {0}"),
    ]
    assert (there.tag, back.tag) == ("en-sw", "sw-en")
    assert there.key == back.key and there.group == "en-sw"
    assert [e.tag for e in read(path, directions="forward")] == ["en-sw"]
    assert [e.tag for e in read(path, directions="backward")] == ["sw-en"]
    assert [e.tag for e in read(path, directions="forward", languages=["sw", "en"])] == ["sw-en"]
    assert read(path, languages=["sw", "en"])[0].key == there.key


def test_translation_of_several_pairs_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"  # where both records have all three columns
    write_parquet(
        path, [{"translation": {"en": "a", "fr": "b"}}, {"translation": {"en": "c", "de": "d"}}]
    )
    assert [e.tag for e in read(path, directions="forward")] == ["en-fr", "en-de"]


def test_system_message_stands_before_pairs(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"en": "a", "sw": "b"})
    example = read(path, DataConfig(system="be {exact}"))[0]
    assert turns(example)[0] == ("system", "be {exact}")


def test_lines_keep_their_alignment(tmp_path: Path) -> None:
    a, b = tmp_path / "c.en-fr.en.gz", tmp_path / "c.en-fr.fr"
    a.write_bytes(gzip.compress("one\u2028still one\x0bso\rso\ntwo\n".encode()))
    b.write_bytes(b"\xef\xbb\xbfun\r\ndeux")  # a byte order mark, Windows line ends, no last one
    examples = read([a, b], directions="forward")
    assert [turns(e)[1][1] for e in examples] == ["un", "deux"]
    assert turns(examples[0])[0][1] == "English>French: one\u2028still one\x0bso\rso"
    assert [e.where for e in examples] == [f"{a}:1", f"{a}:2"]
    assert len(read([a, b], limit=1)) == 2  # one pair, both directions


def test_lines_of_flores_need_their_languages() -> None:
    flores = shared_data("flores200")
    files = [flores / "eng_Latn.devtest", flores / "swh_Latn.devtest"]
    with pytest.raises(UserError, match=r"languages: \[en, sw\]"):
        read(files)
    examples = read(files, languages=["en", "sw"], directions="forward")
    assert len(examples) == 1012 and {e.tag for e in examples} == {"en-sw"}


PO = """msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8\\n"

msgid "Save {name}"
msgstr "Enregistrer {name}"

#, fuzzy
msgid "fuzzy"
msgstr "flou"

msgid "one"
msgid_plural "many"
msgstr[0] "un"
msgstr[1] "plusieurs"

msgid "not yet"
msgstr ""

#~ msgid "old"
#~ msgstr "vieux"
"""


def catalog(folder: Path, language: str, text: str = PO) -> Path:
    path = folder / "app" / "locale" / language / "LC_MESSAGES" / "django.po"
    path.parent.mkdir(parents=True)
    path.write_text(text, "utf-8")
    return path


def test_gettext_file_and_folder(tmp_path: Path) -> None:
    fr, sw = catalog(tmp_path, "fr"), catalog(tmp_path, "sw")
    there, back = read(fr)
    assert turns(there) == [
        ("user", "English>French: Save {name}"),
        ("assistant", "Enregistrer {name}"),
    ]
    assert there.where == f"{fr}:4 (fr)"
    assert [e.tag for e in read(tmp_path, directions="forward")] == ["en-fr", "en-sw"]
    (only,) = read(tmp_path, directions="forward", languages=["en", "sw"])
    assert only.where == f"{sw}:4 (sw)"
    with pytest.raises(UserError, match="no catalog in de; found fr, sw"):
        read(tmp_path, languages=["en", "de"])


def test_broken_catalogs(tmp_path: Path) -> None:
    path = catalog(tmp_path, "fr", 'msgid "a"\nmsgstr "b"\nnonsense\n')
    with pytest.raises(UserError, match="django.po: not a gettext catalog .*line 3") as e:
        read(path)
    message(e)
    path.write_bytes(b'msgid "a"\nmsgstr "caf\xe9"\n')
    with pytest.raises(UserError, match="django.po:2: not UTF-8"):
        read(path)


def test_text_is_split_into_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"a\r\nb\r\n  \r\n\r\n\r\nc\r\n")
    assert read_text([Source(str(path))]) == ["a\nb", "c"]
    assert read_text([Source(str(path), limit=1), Source(str(path))]) == ["a\nb", "a\nb", "c"]
    with pytest.raises(UserError, match="raw text is wanted here, not 'alpaca'"):
        read_text([Source(str(path), format="alpaca")])


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("zh", "Simplified Chinese"), ("zh_Hans", "Simplified Chinese"),
        ("zh-TW", "Traditional Chinese"), ("sr", "Serbian"), ("srp_Cyrl", "Serbian"),
        ("sr_Latn", "Serbian (Latin)"), ("bn", "Bengali"), ("sw", "Swahili"),
        ("swh_Latn", "Swahili"), ("arb_Arab", "Arabic"), ("pt_BR", "Portuguese (Brazil)"),
    ],
)  # fmt: skip
def test_language_names(code: str, name: str) -> None:
    assert language_name(code) == name


GOOD = json.dumps(MESSAGES).encode()
TOOL = {"role": "assistant", "content": "a", "tool_calls": [{"function": "f"}]}
BAD_LINES = [
    (b'{"messages": [', "malformed JSON"),
    (b'{"messages": "caf\xe9"}', "not UTF-8"),
    (b"[1]", "not a JSON object"),
    (b'{"text": "x"}', "missing or odd keys (expected messages, found text)"),
    (b'{"messages": 3}', "a value of the wrong type"),
    (b'{"messages": []}', "turns that do not alternate"),
    (b'{"messages": [{"from": "human", "value": "q"}]}', "expected role and content"),
    (b'{"messages": [{"role": "user", "content": null}]}', "content: text is wanted"),
    (b'{"messages": [{"role": "human", "content": "q"}]}', "an unknown role ('human'"),
    (GOOD.replace(b'"a"', b'" \\n"'), "the answer is empty"),
    (GOOD.replace(b'"q"', b'""'), "the text to answer is empty"),
    (GOOD.replace(b'"a"', b'"\\ud800"'), "a lone surrogate"),
    (
        json.dumps({"messages": [MESSAGES["messages"][0], TOOL]}).encode(),
        "a function with a name is wanted",
    ),
    (b'{"messages": ' + b"[" * 100_000, "malformed JSON"),
]


@pytest.mark.parametrize(("line", "says"), BAD_LINES, ids=[s for _, s in BAD_LINES])
def test_bad_record_stops_or_is_skipped_and_counted(line: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + b"\n\n" + line + b"\n" + GOOD + b"\n")
    with pytest.raises(UserError) as e:
        read(path)
    assert message(e).startswith(f"{path}:3: ") and says in message(e)
    reading = Reading()
    kept = list(read_examples(Source(str(path)), SKIP, reading))
    assert [k.where for k in kept] == [f"{path}:1", f"{path}:4"]
    assert sum(reading.skipped.values()) == 1
    assert list(reading.first.values()) == [[f"{path}:3"]]


def test_an_empty_side_rejects_the_pair_once(tmp_path: Path) -> None:
    a, b = tmp_path / "x.en", tmp_path / "x.sw"
    a.write_text("one\n\nthree\n")
    b.write_text("moja\nmbili\ntatu\n")
    with pytest.raises(UserError, match=r"x\.en:2: the text to answer is empty"):
        read([a, b])
    reading = Reading()
    assert len(list(read_examples(Source([str(a), str(b)]), SKIP, reading))) == 4
    assert reading.skipped.total() == 1


@pytest.mark.parametrize("data", [PLAIN, SKIP], ids=["stop", "skip"])
def test_a_fault_of_the_whole_file_always_stops(data: DataConfig, tmp_path: Path) -> None:
    def fails(path: Any, says: str, **options: Any) -> None:
        with pytest.raises(UserError) as e:
            read(path, data, **options)
        assert says in message(e)

    good, x = jsonl(tmp_path / "good.jsonl", MESSAGES), tmp_path / "x.jsonl"
    fails(x, "x.jsonl: no such file or folder")
    x.write_bytes(b"")
    fails(x, "x.jsonl: the file is empty")
    x.write_bytes(b"\n \n")
    fails(x, "x.jsonl: the file is empty")
    x.write_text('[{"messages": []},\n oops]')
    fails(x, "x.jsonl:2: malformed JSON")
    jsonl(x, {"title": "q", "body": "a"})
    fails(x, "x.jsonl:1: no known format has the keys title, body")
    fails(good, "good.jsonl:1: not of the format 'alpaca': expected instruction and output, "
          "found messages", format="alpaca")  # fmt: skip
    fails(good, "format 'gettext' wants .po catalogs, found .jsonl", format="gettext")
    fails(good, "format 'lines' wants a list of two files", format="lines")
    fails([good, good, good], "is the two files of a pair")
    fails(tmp_path / "none", "no such file")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "no data in this folder")
    fails(jsonl(tmp_path / "l.jsonl", {"translation": {"en": "a", "qq": "b"}}),
          "l.jsonl:1: 'qq': unknown language code")  # fmt: skip
    text = tmp_path / "t.txt"
    text.write_text("x")
    fails(text, "its name does not tell the format")
    parquet = tmp_path / "p.parquet"
    parquet.write_bytes(b"PAR1 no")
    fails(parquet, "p.parquet: not a valid Parquet file")
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "state.json").write_text("{}")
    fails(saved, "saved: not a whole folder of `datasets`")

    a, b = tmp_path / "c.en.gz", tmp_path / "c.sw"
    a.write_bytes(gzip.compress(b"one\n" * 5000))
    b.write_text("moja\n" * 4999)
    fails([a, b], "c.en.gz has 5000 lines and ")
    fails([a, b], "c.sw has 4999")
    a.write_bytes(a.read_bytes()[:-12])
    fails([a, b], "c.en.gz: not a whole gzip file")
    a.write_bytes(b"one\n" * 4999)
    fails([a, b], "c.en.gz: not a whole gzip file")
    fails([b, b], "two different languages are wanted, found sw, sw")
    fails([b, b], "two different languages are wanted, found en", languages=["en"])


def test_splits_are_not_mixed(tmp_path: Path) -> None:
    import datasets

    def of(answer: str) -> Any:
        return datasets.Dataset.from_list([{"prompt": "q", "completion": answer}])

    path = tmp_path / "d"
    datasets.DatasetDict({"train": of("a"), "test": of("b")}).save_to_disk(str(path))
    assert [turns(e)[1][1] for e in read(path)] == ["a"]
    assert [turns(e)[1][1] for e in read(path, split="test")] == ["b"]
    assert [turns(e)[1][1] for e in read(path / "test")] == ["b"]
    with pytest.raises(UserError, match="holds the splits train, test; name one of these"):
        read(path, split="more")


@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("broken", ["a\ud800b", "a\udc00"])
def test_broken_utf_16_is_told_as_broken_utf_8_is(broken, order, tmp_path):
    path = tmp_path / "x.txt"
    data = f"\ufeffOne.\n{broken}\n\U0001f600".encode(order, "surrogatepass")

    def said():
        return [str(line) for _, line in read_lines(path)]

    for lost, last in ((0, "\U0001f600"), (1, f"{path}:3: not UTF-8 (byte 1 of the line)"),
                       (2, f"{path}:3: not UTF-8 (byte 1 of the line)")):  # fmt: skip
        path.write_bytes(data[: len(data) - lost])  # a character, and parts of it
        assert said() == ["One.", f"{path}:2: not UTF-8 (byte 2 of the line)", last]


@pytest.mark.parametrize("key", ["data", "documents", "messages", "a.b"])
def test_what_keys_in_keys_are_read_from_is_not_unread(key, tmp_path):
    file = jsonl(tmp_path / "x.jsonl", {key: {"q": "Hi?", "a": "Ho."}, "id": 3})
    names = {"user": f"{key}.q", "assistant": f"{key}.a"}
    if key == "a.b":  # in no key "a"
        with pytest.raises(UserError, match="columns: no a.b.q and a.b.a in a.b, id"):
            read(file, columns=names)
        return
    reading = Reading()
    (example,) = read_examples(Source(str(file), columns=names), PLAIN, reading)
    assert turns(example) == [("user", "Hi?"), ("assistant", "Ho.")]
    assert reading.unread.keys() == {"id"}
