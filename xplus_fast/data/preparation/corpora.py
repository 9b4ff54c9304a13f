"""Parallel corpora as they are distributed -> a stream of pairs, each with its place.

| format | what it is |
|---|---|
| lines | two line-aligned files, plain or gzip, with or without a file of scores |
| moses | a zip of OPUS: two line-aligned members named by language, and maybe one of scores |
| nllb | the gzip TSV of mined bitext: source, target, LASER score, and more |
| translation | JSONL or Parquet of {"translation": {...}} or {"en": ..., "sw": ...} |
| tmx | translation memories |
| gettext | .po catalogs |
| hub | a data set by its id, streamed |

Nothing is read whole but a catalog. Faults of a record come back in its place as `Rejected`; those
of a file raise `UserError`.
"""

import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from xplus_fast.config import Source
from xplus_fast.data.compressed import kind
from xplus_fast.data.files import (
    WHOLE_LIMIT,
    Rejected,
    decoded,
    read_lines,
    read_records,
    require,
)
from xplus_fast.data.folders import RECORDS
from xplus_fast.data.languages import canonical, is_language, two_languages
from xplus_fast.data.preparation.recipe import Corpus, corpus_name
from xplus_fast.data.readers import Pair, catalog_pairs, catalogs, line_pairs
from xplus_fast.data.records import Unfit, translation
from xplus_fast.errors import UserError
from xplus_fast.files import resolve

Row = dict[str, Any]  # a row of `steps.batch.SCHEMA`
NLLB_COLUMNS = 3  # source, target, LASER score; probabilities of the languages and origins follow
_NLLB_NAME = re.compile(r"([a-z]{3}_[A-Z][a-z]{3})-([a-z]{3}_[A-Z][a-z]{3})")
XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"


def read_corpus(corpus: Corpus) -> Iterator[Row | Rejected]:
    """Stream a corpus's pairs, languages in their canonical codes."""
    name = corpus_name(corpus)
    chosen = corpus_format(corpus)
    items: Iterator[Pair | tuple[Pair, float | None] | Rejected]
    if chosen == "lines":
        items = _lines(corpus)
    elif chosen == "moses":
        items = _moses(corpus)
    elif chosen == "nllb":
        items = _nllb(corpus)
    elif chosen == "tmx":
        items = _tmx(corpus)
    elif chosen == "gettext":
        items = catalog_pairs(_source(corpus))
    elif chosen == "hub":
        items = _records(_hub(corpus), corpus)
    else:
        items = _records(read_records(resolve(str(corpus.path))), corpus)
    for item in islice(items, corpus.limit):
        if isinstance(item, Rejected):
            yield item
            continue
        pair, score = item if isinstance(item, tuple) else (item, None)
        codes = [canonical(code) for code in pair.languages]
        if codes[0] == codes[1]:
            yield Rejected(pair.where, "one language twice", codes[0])
            continue
        try:
            "".join(pair.texts).encode()
        except UnicodeEncodeError:
            yield Rejected(pair.where, "a lone surrogate")
            continue
        yield {
            "source": pair.texts[0], "target": pair.texts[1], "source_language": codes[0],
            "target_language": codes[1], "corpus": name, "where": pair.where, "score": score,
        }  # fmt: skip


def corpus_format(corpus: Corpus) -> str:
    """The format that is pinned or that the files' names tell. Raises `UserError`."""
    if corpus.format == "hub":
        return "hub"
    if not isinstance(corpus.path, str):
        if len(corpus.path) != 2 or corpus.format not in ("auto", "lines"):
            raise UserError(f"{corpus_name(corpus)}: a list of paths is the two files of a pair")
        for each in corpus.path:
            require(each)
        return "lines"
    if corpus.format == "lines":
        raise UserError(f"{corpus.path}: format 'lines' wants a list of two files, found one path")
    path = resolve(corpus.path)
    if corpus.format != "auto":
        require(corpus.path)
        return corpus.format
    if not path.exists():
        if corpus.path.count("/") == 1 and not path.suffix:
            raise UserError(f"{corpus.path}: no such file; a data set of the hub is format: hub")
        require(corpus.path)
    if path.is_dir():
        return "gettext" if any(path.glob("**/LC_MESSAGES/*.po")) else "translation"
    suffix = kind(path)
    known = dict.fromkeys(RECORDS, "translation")
    known |= {".zip": "moses", ".tmx": "tmx", ".po": "gettext", ".tsv": "nllb"}
    if suffix in known:
        return known[suffix]
    if path.suffix == ".gz" and _NLLB_NAME.search(path.name):
        return "nllb"
    raise UserError(
        f"{path}: its name does not tell the format; .zip, .tsv.gz, .jsonl, .parquet, .tmx, .po, a"
        " list of two line-aligned files, or `format:` are known"
    )


def corpus_files(corpus: Corpus) -> list[Path]:
    """Every local file that reading the corpus reads."""
    chosen = corpus_format(corpus)
    if chosen == "hub":
        return []
    if not isinstance(corpus.path, str):
        return [resolve(p) for p in [*corpus.path, *filter(None, [corpus.scores])]]
    path = resolve(corpus.path)
    if chosen == "gettext":
        return [p for p, _ in catalogs(path, _source(corpus))]
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _source(corpus: Corpus) -> Source:
    return Source(corpus.path, languages=corpus.languages)


def _lines(corpus: Corpus) -> Iterator[tuple[Pair, float | None] | Rejected]:
    pairs = line_pairs(_source(corpus))
    if corpus.scores is None:
        for pair in pairs:
            yield pair if isinstance(pair, Rejected) else (pair, None)
        return
    scores = read_lines(require(corpus.scores))
    for pair in pairs:
        where, text = next(scores, (corpus.scores, None))
        if text is None:
            raise UserError(f"{corpus.scores}: fewer scores than there are pairs")
        yield pair if isinstance(pair, Rejected) else _scored(pair, text, where)
    if next(scores, None) is not None:
        raise UserError(f"{corpus.scores}: more scores than there are pairs")


def _scored(pair: Pair, text: str | Rejected, where: str) -> tuple[Pair, float] | Rejected:
    try:
        return pair, float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return Rejected(where, "not a score", str(text)[:40])


def _moses(corpus: Corpus) -> Iterator[tuple[Pair, float | None] | Rejected]:
    """OPUS: Corpus.en-sw.en, Corpus.en-sw.sw, maybe Corpus.en-sw.scores, README, LICENSE."""
    path = resolve(str(corpus.path))
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.rpartition(".")[2]: name for name in archive.namelist()}
            found = [code for code in members if is_language(code) and "." in members[code]]
            codes = corpus.languages or found
            languages = two_languages(codes, str(path))
            if missing := [code for code in languages if code not in members]:
                raise UserError(f"{path}: no member in '{missing[0]}'; found {', '.join(found)}")
            streams = [_member(archive, path, members[code]) for code in languages]
            scores = _member(archive, path, members["scores"]) if "scores" in members else None
            while True:
                (where, a), (there, b) = (next(s, ("", None)) for s in streams)
                if a is None and b is None:
                    return
                if a is None or b is None:
                    short = members[languages[0] if a is None else languages[1]]
                    raise UserError(
                        f"{path}: {short} is shorter than the other, which has {where or there}"
                    )
                score = next(scores, None) if scores else None
                bad = next((x for x in (a, b) if isinstance(x, Rejected)), None)
                if bad is not None:
                    yield bad
                    continue
                pair = Pair(where, languages, (a, b))  # type: ignore[arg-type]
                yield _scored(pair, score[1], score[0]) if score else (pair, None)  # type: ignore[arg-type]
    except (zipfile.BadZipFile, zlib.error, EOFError) as e:
        raise UserError(f"{path}: not a whole zip file ({e})") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from None


def _member(
    archive: zipfile.ZipFile, path: Path, name: str
) -> Iterator[tuple[str, str | Rejected | None]]:
    with archive.open(name) as stream:
        yield from decoded(stream, f"{path}/{name}")


def _nllb(corpus: Corpus) -> Iterator[tuple[Pair, float | None] | Rejected]:
    """Columns as allenai/nllb has them; languages as in the name, eng_Latn-swh_Latn.gz."""
    path = resolve(str(corpus.path))
    named = _NLLB_NAME.search(path.name)
    codes = corpus.languages or (list(named.groups()) if named else [])
    if not codes:
        raise UserError(f"{path}: its name tells no languages; give languages: [en, sw]")
    languages = two_languages(codes, str(path))
    for where, line in read_lines(path):
        if isinstance(line, Rejected):
            yield line
            continue
        columns = line.split("\t")
        if len(columns) < NLLB_COLUMNS:
            yield Rejected(
                where, "missing columns", f"source, target, score are wanted, found {len(columns)}"
            )
            continue
        pair = Pair(where, languages, (columns[0], columns[1]))
        yield _scored(pair, columns[2], where)


def _records(
    records: Iterator[tuple[str, dict[str, Any] | Rejected]], corpus: Corpus
) -> Iterator[tuple[Pair, float | None] | Rejected]:
    for where, record in records:
        if isinstance(record, Rejected):
            yield record
            continue
        try:
            pair = Pair(where, *translation(record, corpus.languages, where))
        except Unfit as e:
            yield Rejected(where, *e.args)
            continue
        except UserError as e:  # of the record, unless the recipe names the languages
            if corpus.languages:
                raise
            yield Rejected(where, "odd languages", str(e).removeprefix(f"{where}: "))
            continue
        score = next((record[k] for k in ("score", "laser_score") if k in record), None)
        yield pair, float(score) if isinstance(score, int | float) else None


def _hub(corpus: Corpus) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    i = 0
    try:
        stream = datasets.load_dataset(
            str(corpus.path), corpus.subset, split=corpus.split, streaming=True
        )
        for i, record in enumerate(stream, 1):
            yield f"{corpus.path}:{i}", record
    except Exception as e:  # of many kinds: network, names, formats
        said = " ".join(str(e).split())[:200]
        place = f"{corpus.path}:{i + 1}" if i else corpus.path
        raise UserError(f"{place}: cannot be loaded from the hub ({said})") from None


def _tmx(corpus: Corpus) -> Iterator[Pair | Rejected]:
    path = resolve(str(corpus.path))
    wanted = [canonical(code) for code in corpus.languages]
    unit = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as raw:
            if re.search(rb"<!ENTITY", head := raw.read(4096)):
                raise UserError(f"{path}: declares entities, which are not read")
            rest = _Rest(head, raw, path)
            for _, element in ElementTree.iterparse(io.BufferedReader(rest)):
                if element.tag != "tu":
                    continue
                unit += 1
                rest.left = WHOLE_LIMIT
                where = f"{path}: unit {unit}"
                texts: dict[str, str] = {}
                for variant in element.iter("tuv"):
                    code = variant.get(XML_LANG) or variant.get("lang") or ""
                    segment = variant.find("seg")
                    if is_language(code) and segment is not None:
                        texts[canonical(code)] = "".join(segment.itertext())
                element.clear()
                chosen = wanted or list(texts)
                if len(chosen) != 2 or any(code not in texts for code in chosen):
                    found = ", ".join(texts) or "none"
                    yield Rejected(where, "not two languages", f"found {found}")
                    continue
                yield Pair(where, (chosen[0], chosen[1]), (texts[chosen[0]], texts[chosen[1]]))
    except ElementTree.ParseError as e:
        raise UserError(f"{path}:{e.position[0]}: not valid TMX ({e})") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise UserError(f"{path}: not a whole gzip file ({e})") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None


class _Rest(io.RawIOBase):
    """What was read already, then the stream, up to `left` bytes of it."""

    def __init__(self, head: bytes, stream: Any, path: Path) -> None:
        self._head, self._stream, self._path = head, stream, path
        self.left = WHOLE_LIMIT

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] or self._stream.read(len(buffer))
        self._head = self._head[len(buffer) :]
        self.left -= len(data)
        if self.left < 0:
            raise UserError(f"{self._path}: a unit of more than {WHOLE_LIMIT:,} bytes")
        buffer[: len(data)] = data
        return len(data)
