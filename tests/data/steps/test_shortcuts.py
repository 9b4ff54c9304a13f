"""What spares clean texts most of the work: no verdict is another than without it."""

import json
import random
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.data.steps.noise import LANGUAGES, everyday_pairs
from xplus_fast.data.steps import bayes, clean, format, identify, letters, markup, mojibake, plain
from xplus_fast.data.steps.batch import make_batch
from xplus_fast.data.steps.characters import QUOTES, census
from xplus_fast.data.steps.clean import CleanOptions, clean_pairs
from xplus_fast.data.steps.format import FormatOptions, format_pairs
from xplus_fast.data.steps.identify import IdentifyOptions, identify_pairs

CASES = json.loads((Path(__file__).parent / "text_cases.json").read_text())
ODD = [
    "\u00e2\u20ac\u2122", "\u00c3\u00a9", "\u00d0\u00b0", "\u0420\u00b5", "\ufffd", "\u200b",
    "\u200d", "\u00a0", "\u3000", "\u2028", "\u0085", "\u001c", "\u0000", "\ufeff", "\u00ad",
    "e\u0301", "\u0301", "\ufb01", "\ufe8d", "\ufdfa", "a\u0435b", "\u0430bc", "&amp;", "<b>",
    "</b>", "<i x=1>", "{\\b x}", "''", "[b]x[/b]", "|| [[", "%(name)s", "{x}", "{0}", "%d",
    "% s", "?", "??", "a?b", "?\u0430", "1,234", "\u0661\u0669", "\u00b2", "\u0e51", "5.30pm",
    "3\u4e07", "http://a.org/x", "a@b.org", "a.com", "\uff21", "\uff11", "\U0001d400",
    "\U0001f600", "\U00020000", "\u2581a", "a@@ b", "  ", "\t", "\n", ".", "\u3002", "\"",
    "'", "\u201d", "ha ha ha ha ha", "-", "\u0130", "\u00df", "\u0345", "\u1e9e", "\u03a3\u03c2",
    "\ud7b0", "\u1100\u1161", "\u2126", "\u212b", "aaaa", "\u00c2\u00bb", "\u00c3 la",
    "\u0432\u0402", "\ufb1d", "\u09c7\u09be", "\u0374", "\u0f43", "", " ", "=", "\\n",
]  # fmt: skip


def odd_texts(count, seed):
    """Clean sentences, pieces of them, and odd characters between and within them: (text, code)."""
    generator = random.Random(seed)
    clean = [
        (text, code)
        for language in LANGUAGES
        for pair in everyday_pairs(language)[:40]
        for text, code in zip(pair, ("en", language), strict=True)
    ]
    for case in CASES:
        clean += zip((case["source"], case["target"]), case["languages"].split("-"), strict=True)
    for _ in range(count):
        text, code = generator.choice(clean)
        kind = generator.randrange(8)
        if kind == 1:
            text = text.upper()
        elif kind == 2:
            text = text[: generator.randrange(len(text) + 1)]
        elif kind == 3:
            text = "".join(generator.choice(ODD) for _ in range(generator.randrange(12)))
        elif kind == 4:
            text = " ".join([text] * generator.randrange(6))
        elif kind >= 5:
            for _ in range(generator.randrange(1, 4)):
                at = generator.randrange(len(text) + 1)
                text = text[:at] + generator.choice(ODD) + text[at:]
        if generator.random() < 0.1:
            code = generator.choice([*LANGUAGES, "tlh", "zh_Hant", "sr_Latn", "en", "uk", "fa"])
        yield text, code


def odd_batch(count, seed):
    made = list(odd_texts(2 * count, seed))
    return make_batch(
        {"source": s, "target": t, "source_language": a, "target_language": b}
        for (s, a), (t, b) in zip(made[::2], made[1::2], strict=True)
    )


def verdicts(judged):
    return list(zip(judged.reason.to_pylist(), judged.detail.to_pylist(), strict=True))


@pytest.mark.parametrize("margin", [0.0, 1.0, 7.0])
def test_languages_of_many_texts_are_those_of_each(margin):
    pytest.importorskip("py3langid", reason="identifies languages")
    traditional = "\u9019\u662f\u570b\u5bb6\u5716\u66f8\u9928\u3002"
    sure = make_batch(
        [{"source": "A library.", "target": traditional, "source_language": "en",
          "target_language": "zh"}]
    )  # fmt: skip
    batch, options = pa.concat_batches([odd_batch(1000, 0), sure]), IdentifyOptions(margin)

    def alone(row):
        texts, codes = (
            (row["source"], row["target"]),
            (row["source_language"], row["target_language"]),
        )
        exact = [
            identify.advantage(text, code.partition("_")[0])[0]
            for text, code in zip(texts, codes, strict=True)
        ]
        try:
            identify.judge(texts, codes, exact, options)
        except identify.Reject as e:
            return e.reason, e.detail or None
        return None, None

    found = verdicts(identify_pairs(batch, options))
    assert found == [alone(row) for row in batch.to_pylist()]
    reasons = {reason for reason, _ in found}
    assert reasons >= {None, "source: wrong language", "target: wrong language"}
    # at no margin it is of another language first
    assert margin == 0 or "target: wrong Chinese script" in reasons


def test_scores_of_many_texts_are_py3langids(monkeypatch):
    langid = pytest.importorskip("py3langid.langid", reason="identifies languages")
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)
    monkeypatch.setattr(bayes, "AT_ONCE", 10_000)  # bytes: in several pieces
    texts = [text for text, _ in odd_texts(600, 1)] + ["", "\u4e00", "long " * 2000]
    made = bayes.label_scores(texts, identifier)
    for text, scores in zip(texts, made, strict=True):
        theirs = identifier._raw_score(identifier._encode(text))
        if theirs.max() == langid.RAW_FLOOR:  # nothing known is in it
            assert not scores.any()
        else:
            assert np.abs(theirs - scores).max() < bayes.ROUNDING / 5


ANYTHING, NOTHING = re.compile(""), re.compile("(?!)")


@pytest.mark.parametrize("markup", ["strip", "keep"])
def test_texts_that_are_spared_searches_would_pass_them(monkeypatch, markup):
    pytest.importorskip("ftfy", reason="mends mojibake")
    batch, options = odd_batch(2500, 2), FormatOptions(markup=markup)
    found = format_pairs(batch, options)
    with monkeypatch.context() as unspared:
        for module, name in (
            (mojibake, "_PAIR_BEGINS"), (mojibake, "_LOST_HAS"), (mojibake, "_LEFT_BEGINS"),
            (letters, "_RARE"), (letters, "_MARKED"),
        ):  # fmt: skip
            unspared.setattr(module, name, ANYTHING)
        unspared.setattr(mojibake, "_ALONE", NOTHING)
        unspared.setattr(mojibake, "_may_be_mended", lambda text: True)
        unspared.setattr(mojibake, "_usual", lambda own: frozenset())
        wanted = format_pairs(batch, options)
    assert found.batch.equals(wanted.batch) and verdicts(found) == verdicts(wanted)
    reasons = {reason.partition(": ")[2] for reason, _ in verdicts(found) if reason}
    assert reasons >= {"mojibake", "empty", "broken characters", "lost characters"}
    texts = found.kept["source"].to_pylist() + found.kept["target"].to_pylist()
    assert texts == [format._SPACE.sub(" ", format._INVISIBLE.sub("", t)).strip() for t in texts]


MARKUP = [
    *"abz019_ @#<>/=-[]{}()|\\&;:.!?'\"\n", "@@", "##", "##a", " ##b", "\u2581", "\u0120a",
    "\uffed", "</", "<br", "<script", "<h1", "<!--", "-->", "[[", "]]", "{{", "}}", "||",
    "\\u00e9", "\\n", "&lt;", "&#1;", "&#xa;", "[url=", "[/b]", "style=", "href='", 'class="',
    "function", "document.", "window.",
]  # fmt: skip


@pytest.mark.parametrize("name", ["SUBWORDS", "DEBRIS", "DOUBTFUL"])
def test_any_markup_has_what_is_looked_for_first(name):
    pattern = getattr(markup, f"_{name}")
    first = getattr(markup, f"_{name}_HAVE" if name == "SUBWORDS" else f"_{name}_HAS")
    generator, needed = random.Random(6), set()
    for _ in range(40_000):
        text = "".join(generator.choices(MARKUP, k=generator.randrange(1, 9)))
        if pattern.search(text):
            having = [part for part in first if part in text]
            assert having, text
            needed |= {*having} if len(having) == 1 else set()
    assert needed == {*first}  # there is none too many


def test_a_list_of_lists_on_one_side_alone_is_doubtful():
    assert markup.doubtful_markup("The matrix [[1, 2], [3, 4]] has two rows.") == "[["
    assert markup.doubtful_markup("See ]] there.") == "]]"


def test_every_character_that_goes_is_told_by_isprintable():
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if character != " " and format._INVISIBLE.match(character) or character.isspace():
            assert character == " " or not character.isprintable(), hex(code)


def counted(text, scripts):
    """A census, character by character."""
    letters = wrong = digits = punctuation = solid = asks = quotes = 0
    for character, n in Counter(text).items():
        if character == " ":
            continue
        solid += n
        category = unicodedata.category(character)
        if category == "Nd":
            digits += n
        elif category[0] in "PS":
            punctuation += n
            asks += n * (character in "?\u061f\uff1f\u055e\u1367\u2e2e\u203d\u2047\u2048\u2049")
            quotes += n * (character in QUOTES)
        elif category[0] == "L":
            letters += n
            name = unicodedata.name(character, "OTHER").split()[0].split("-")[0]
            wrong += n * (name not in (*scripts, "FULLWIDTH", "HALFWIDTH"))
    return [letters, wrong, digits, punctuation, solid, asks, quotes]


def test_a_census_of_many_texts_is_that_of_each():
    texts = [text for text, _ in odd_texts(2000, 3)] + ["", "".join(map(chr, range(0x3000)))]
    for scripts in (("LATIN",), ("HIRAGANA", "KATAKANA", "CJK"), ("ARABIC",)):
        assert census(texts, scripts).tolist() == [counted(text, scripts) for text in texts]
    assert census([], ("LATIN",)).shape == (0, 7)


def test_plain_texts_are_what_one_search_for_noise_leaves():
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]))
    noise = plain._noise("")
    for text in [everything, *(text for text, _ in odd_texts(2000, 4))]:
        wanted = noise.sub(" ", text.casefold()).strip()
        assert plain.plain(text) == wanted and plain.words(text) == wanted.split()
        assert plain.glued(text) == wanted.replace(" ", "")
    assert noise.sub("", "a\u0903 \u0e33,\u4e00!") == "a\u0903\u0e33\u4e00"


@pytest.mark.parametrize("options", [CleanOptions(), CleanOptions(max_repeated=9, ratio=3.0)])
def test_texts_are_cleaned_as_one_by_one_and_whole(monkeypatch, options):
    """Without the tests that spare a text the look at its numbers, repetitions and whole length."""
    batch = format_pairs(odd_batch(1500, 5), FormatOptions()).kept
    found = verdicts(clean_pairs(batch, options))
    monkeypatch.setattr(clean, "END", 10_000)
    wanted = [verdicts(clean_pairs(batch.slice(i, 1), options))[0] for i in range(batch.num_rows)]
    assert found == wanted
    kept = clean_pairs(batch, options).kept.to_pylist()
    for row in kept:
        languages = row["source_language"], row["target_language"]
        assert clean.contradiction(row["source"], row["target"], languages) is None
        for side in ("source", "target"):
            words = row[side].casefold().split()
            runs = [words[i : i + options.max_repeated + 1] for i in range(len(words))]
            assert not any(len(r) > options.max_repeated and len(set(r)) == 1 for r in runs)
            assert len(words) < 10 or len(set(words)) >= 0.4 * len(words)
    assert len({reason for reason, _ in found}) > 8
