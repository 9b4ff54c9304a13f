"""What spares clean texts most of the work: no verdict is another than without it."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from tests.data.steps.noise import LANGUAGES, everyday_pairs
from xplus_fast.data.steps import bayes, identify
from xplus_fast.data.steps.batch import make_batch
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
    batch, options = odd_batch(1500, 0), IdentifyOptions(margin)

    def alone(row):
        for side in ("source", "target"):
            text, code = row[side], row[f"{side}_language"]
            try:
                identify._language(text, code.partition("_")[0], options)
                if code in ("zh", "zh_Hant"):
                    identify._chinese_script(text, code)
            except identify.Reject as e:
                return f"{side}: {e.reason}", e.detail or None
        return None, None

    found = verdicts(identify_pairs(batch, options))
    assert found == [alone(row) for row in batch.to_pylist()]
    reasons = {reason for reason, _ in found}
    assert reasons > {None, "source: wrong language", "target: wrong language"}


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
