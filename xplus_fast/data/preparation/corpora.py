"""Parallel corpora as they are distributed -> a stream of pairs, each with its place.

| format | what it is |
|---|---|
| lines | two line-aligned files, plain or compressed, with or without a file of scores |
| moses | a zip of OPUS: line-aligned members named by language, and maybe one of scores |
| nllb | mined bitext, a TSV: source, target, LASER score, or score, source, target |
| translation | records, tables: {"translation": {...}}, {"en": ..., "sw": ...}, {"src", "tgt"} |
| tmx | translation memories |
| xliff | translators' files |
| gettext | .po catalogs |
| hub | a data set by its id, streamed |

Nothing is read whole but a catalog and an XLIFF file. Faults of a record come back in its place as
`Rejected`; those of a file raise `UserError`.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from xplus_fast.config import Source
from xplus_fast.data.compressed import COMPRESSED, kind
from xplus_fast.data.conversations import Unfit
from xplus_fast.data.files import WHOLE_LIMIT, Rejected, read_lines, read_records, require
from xplus_fast.data.folders import RECORDS, Chosen, choose_files
from xplus_fast.data.languages import canonical, code_of, languages_of_name, two_languages
from xplus_fast.data.preparation.archives import read_archive
from xplus_fast.data.preparation.memories import read_tmx, read_xliff
from xplus_fast.data.preparation.recipe import Corpus, corpus_name
from xplus_fast.data.preparation.scripts import converter
from xplus_fast.data.readers import Pair, catalog_pairs, catalogs, line_pairs
from xplus_fast.data.records import Form, detect, has_header, translation
from xplus_fast.errors import UserError
from xplus_fast.files import resolve

Row = dict[str, Any]  # a row of `steps.batch.SCHEMA`
_SCORES = ("score", "laser_score")  # keys of records
_ONLY = {  # options -> the formats that have such a thing
    "columns": ("translation", "hub"), "subset": ("translation", "hub", "moses"),
    "scores": ("lines",),
}  # fmt: skip
_TELLING = 100  # lines of a TSV without a header, at most, that tell its columns
_XLIFF = (".xlf", ".xliff", ".sdlxliff", ".mqxliff")


def read_corpus(corpus: Corpus) -> Iterator[Row | Rejected]:
    """Stream a corpus's pairs, languages in their canonical codes."""
    name = corpus_name(corpus)
    chosen = corpus_format(corpus)
    for option, formats in _ONLY.items():
        if getattr(corpus, option) and chosen not in formats:
            raise UserError(f"{name}: {option}: goes with {', '.join(formats)}, not with {chosen}")
    items: Iterator[Pair | tuple[Pair, float | None] | Rejected]
    if chosen == "lines":
        items = _lines(corpus)
    elif chosen == "moses":
        items = _moses(corpus)
    elif chosen == "nllb":
        items = _mined(corpus)
    elif chosen in ("tmx", "xliff"):
        items = _units(corpus, chosen)
    elif chosen == "gettext":
        items = catalog_pairs(_source(corpus))
    elif chosen == "hub":
        items = _records(_hub(corpus), corpus)
    else:
        path = resolve(str(corpus.path))
        split = None if corpus.split == "train" else corpus.split
        records = read_records(path, split, corpus.subset, header=has_header(corpus.columns))
        items = _records(records, corpus)
    convert = {canonical(code): canonical(into) for code, into in corpus.convert.items()}
    converters = {code: converter(into) for code, into in convert.items()}
    for item in islice(items, corpus.limit):
        if isinstance(item, Rejected):
            yield item
            continue
        pair, score = item if isinstance(item, tuple) else (item, None)
        told = [canonical(code) for code in pair.languages]
        codes = [convert.get(code, code) for code in told]
        if codes[0] == codes[1]:
            yield Rejected(pair.where, "one language twice", codes[0])
            continue
        try:
            "".join(pair.texts).encode()
        except UnicodeEncodeError:
            yield Rejected(pair.where, "a lone surrogate")
            continue
        texts = [
            converters[code](text) if code in converters else text
            for code, text in zip(told, pair.texts, strict=True)
        ]
        yield {
            "source": texts[0], "target": texts[1], "source_language": codes[0],
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
            raise UserError(f"{corpus.path}: no such file; a data set of the hub needs format: hub")
        require(corpus.path)
    if path.is_dir():
        return "gettext" if any(path.glob("**/LC_MESSAGES/*.po")) else "translation"
    suffix = kind(path)
    known = dict.fromkeys(RECORDS, "translation") | dict.fromkeys(_XLIFF, "xliff")
    known |= {".zip": "moses", ".tmx": "tmx", ".po": "gettext"}
    if suffix == ".tsv" and not corpus.columns and not _has_header(path):
        return "nllb"
    if suffix in known:
        return known[suffix]
    if path.suffix in COMPRESSED and languages_of_name(path.name):
        return "nllb"
    raise UserError(
        f"{path}: its name does not tell the format; .zip, .tsv.gz, {', '.join(RECORDS)}, .tmx,"
        " .xlf, .po, a list of two line-aligned files, or `format:` are known"
    )


def _has_header(path: Path) -> bool:
    """Whether a TSV's first line names columns: languages, or source and target."""
    _, line = next(read_lines(path))
    cells = [] if isinstance(line, Rejected) else [c.strip().strip('"') for c in line.split("\t")]
    named = sum(code_of(cell) is not None for cell in cells)
    try:
        form = detect(dict.fromkeys(cells, ""), str(path), {}, "translation")
    except UserError:
        return False
    return named >= 2 or bool(form.columns) or {"src", "tgt"} <= {*cells}


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
    return _chosen(corpus).files if path.is_dir() else [path]


def files_left(corpus: Corpus) -> list[Path]:
    """The files of records in the corpus's folder that are not read: other splits, notes."""
    if corpus_format(corpus) != "translation" or not resolve(str(corpus.path)).is_dir():
        return []
    return _chosen(corpus).left


def _chosen(corpus: Corpus) -> Chosen:
    split = None if corpus.split == "train" else corpus.split
    return choose_files(resolve(str(corpus.path)), split, corpus.subset)


def _source(corpus: Corpus) -> Source:
    return Source(corpus.path, languages=corpus.languages)


def _lines(corpus: Corpus) -> Iterator[tuple[Pair, float | None] | Rejected]:
    pairs = line_pairs(_source(corpus))
    if corpus.scores is None:
        for pair in pairs:
            yield pair if isinstance(pair, Rejected) else (pair, None)
        return
    # Counted before any work, as the lines are: which pair lacks a score is not known.
    paths = require(corpus.scores), require(corpus.path[0])
    counts = [sum(1 for _ in read_lines(path)) for path in paths]
    if counts[0] != counts[1]:
        fewer = "fewer" if counts[0] < counts[1] else "more"
        raise UserError(
            f"{corpus.scores}: {fewer} scores than there are pairs: {counts[0]:,} and {counts[1]:,}"
        )
    for pair, (where, text) in zip(pairs, read_lines(require(corpus.scores)), strict=True):
        yield pair if isinstance(pair, Rejected) else _scored(pair, text, where)


def _scored(pair: Pair, text: Any, where: str) -> tuple[Pair, float] | Rejected:
    try:
        score = math.nan if isinstance(text, bool) else float(text)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        return Rejected(where, "not a score", str(text)[:40])
    return pair, score


def _moses(corpus: Corpus) -> Iterator[tuple[Pair, float | None] | Rejected]:
    path = resolve(str(corpus.path))
    for item in read_archive(path, corpus.languages, corpus.subset):
        if isinstance(item, Rejected):
            yield item
        else:
            pair, score = item
            yield (pair, None) if score is None else _scored(pair, score[1], score[0])


def _mined(corpus: Corpus) -> Iterator[tuple[Pair, float | None] | Rejected]:
    """Columns as allenai/nllb has them, or as WikiMatrix and CCMatrix, or as Tatoeba, with numbers
    of sentences: the first lines tell.

    Languages are as in the name, eng_Latn-swh_Latn.gz or WikiMatrix.en-sw.tsv.gz.
    """
    path = resolve(str(corpus.path))
    codes = corpus.languages or languages_of_name(path.name)
    if not codes:
        raise UserError(f"{path}: its name tells no languages; give languages: [en, sw]")
    languages = two_languages(codes, str(path))
    order: tuple[int, ...] = ()  # of source, target, score among the columns
    columns = 0
    for _, line in islice(read_lines(path), _TELLING):
        cells = [] if isinstance(line, Rejected) else line.split("\t")
        order, columns = order or _order(cells), max(columns, len(cells))
    if not order and columns > 3:
        raise UserError(
            f"{path}: {columns} columns, and neither the first nor the third has scores; `columns:"
            " {en: 3, sw: 4, score: 5}` numbers them"
        )
    for where, line in read_lines(path):
        if isinstance(line, Rejected):
            yield line
            continue
        cells = line.split("\t")
        order = order or (0, 1, 2)
        if len(cells) <= max(order):
            wanted = "source, target" if len(order) == 2 else "source, target, score"
            detail = f"{wanted} are wanted, found {len(cells)}"
            yield Rejected(where, "missing columns", detail)
            continue
        source, target, *score = (cells[i] for i in order)
        pair = Pair(where, languages, (source, target))
        yield _scored(pair, score[0], where) if score else (pair, None)


def _order(cells: Sequence[str]) -> tuple[int, ...]:
    """Where source, target and score stand; empty for a line that does not tell."""

    def is_number(text: str) -> bool:
        return text.replace(".", "", 1).replace("-", "", 1).strip().isdecimal()

    if len(cells) == 2:
        return (0, 1)
    if len(cells) == 4 and cells[0].isdecimal() and cells[2].isdecimal():
        return (1, 3)
    if len(cells) < 2 or is_number(cells[0]) and is_number(cells[2]):
        return ()
    if is_number(cells[0]):
        return (1, 2, 0)
    return (0, 1, 2) if is_number(cells[2]) else ()


def _units(corpus: Corpus, chosen: str) -> Iterator[Pair | Rejected]:
    path = resolve(str(corpus.path))
    wanted = [canonical(code) for code in corpus.languages]
    if chosen == "tmx":
        units = read_tmx(path, WHOLE_LIMIT)
    else:
        units = read_xliff(path, WHOLE_LIMIT, wanted)
    for where, texts in units:
        if isinstance(texts, Rejected):
            yield texts
            continue
        codes = wanted or list(texts)
        if len(codes) != 2 or any(code not in texts for code in codes):
            yield Rejected(where, "not two languages", f"found {', '.join(texts) or 'none'}")
            continue
        yield Pair(where, (codes[0], codes[1]), (texts[codes[0]], texts[codes[1]]))


def _records(
    records: Iterator[tuple[str, dict[str, Any] | Rejected]], corpus: Corpus
) -> Iterator[tuple[Pair, float | None] | Rejected]:
    named = languages_of_name(corpus.subset or "") or languages_of_name(Path(str(corpus.path)).name)
    form: Form | None = None
    for where, record in records:
        if isinstance(record, Rejected):
            yield record
            continue
        form = form or detect(record, where, corpus.columns, "translation")
        try:
            record = form.renamed(record)
            pair = Pair(where, *translation(record, corpus.languages, where, named))
        except Unfit as e:
            yield Rejected(where, *e.args)
            continue
        except UserError as e:  # of the record, unless the recipe names the languages
            if corpus.languages:
                raise
            yield Rejected(where, "odd languages", str(e).removeprefix(f"{where}: "))
            continue
        score = next((record[k] for k in _SCORES if record.get(k) not in (None, "")), None)
        yield (pair, None) if score is None else _scored(pair, score, where)


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
