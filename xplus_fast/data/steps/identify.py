"""Step 3, language identification: could either text be of the language that it should be?

py3langid (Heafield-style naive Bayes over byte n-grams) scores a text in 140 languages. The
expected language is known, so a short text need not look most like it: it goes only if another
language is likelier by more than `margin` nats. Dialects and mutually close standards count as one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xplus_fast.data.steps.batch import Judged, Reject, by_code, judged
from xplus_fast.data.steps.bayes import NO_CONTENT, ROUNDING, gaps
from xplus_fast.data.steps.characters import has_foreign
from xplus_fast.data.steps.lengths import compare, deviations
from xplus_fast.errors import UserError
from xplus_fast.options import AtLeast0


@dataclass(frozen=True)
class IdentifyOptions:
    margin: Annotated[float, AtLeast0] = 7.0  # nats by which another language must be likelier
    scripts: bool = True  # tell Simplified from Traditional Chinese


# Sentences alone are judged by less than the margin: labels and terms are written alike in many
# languages. Their last mark tells; a full stop behind a few letters is an abbreviation's.
_SENTENCE = re.compile(
    "(?:[!?\uff01\uff1f\u061f\u3002\u0964]|\\w{5}.*\\.|\\w\\s+\\w.*\\.)[\"'\u201d\u00bb)]*$",
    re.DOTALL,
)
ORDER = 1.0  # nats by which both together must be likelier the other way round
APART = 2.5  # `deviations` of the lengths, from which on a text need only be likelier another one's
_WORDS = re.compile(r"[\x21-\x26\x28-\x2c\x2e-\x40\u00a0-\u00bf\u2010-\u2bff]+")
# What the identifier tells apart and a corpus does not
SAME = {
    "wuu": "zh", "yue": "zh", "lzh": "zh", "bs": "sr", "hr": "sr", "sh": "sr", "arz": "ar",
    "ary": "ar", "nn": "no", "nb": "no", "uzs": "uz",
}  # fmt: skip


def identify_pairs(batch: pa.RecordBatch, options: IdentifyOptions) -> Judged:
    """Judge both texts of every pair. Raises `UserError` where py3langid is not installed."""
    pairs, languages = (
        list(zip(*(batch.column(name).to_pylist() for name in names), strict=True))
        for names in (("source", "target"), ("source_language", "target_language"))
    )
    found = [
        _gaps([texts[side] for texts in pairs], [codes[side] for codes in languages])
        for side in (0, 1)
    ]
    chinese = [any(code.startswith("zh") for code in codes) for codes in languages]
    reasons: list[str | None] = [None] * batch.num_rows
    details: list[str | None] = [None] * batch.num_rows
    doubtful = (np.maximum(*found) > -ROUNDING) | np.array(chinese, bool)
    for i in np.flatnonzero(doubtful).tolist():
        try:
            judge(pairs[i], languages[i], (found[0][i], found[1][i]), options)
        except Reject as e:
            reasons[i], details[i] = e.reason, e.detail or None
    return judged(batch, reasons, details)


def judge(
    texts: Sequence[str], codes: Sequence[str], gaps: Sequence[float], options: IdentifyOptions
) -> None:
    """Judge a pair: source and target each. Raises `Reject`.

    gaps: by how many nats another language is likelier than each text's own, within `ROUNDING`.
    """
    bases = [code.partition("_")[0] for code in codes]
    if min(gaps) > -ROUNDING:
        _order(texts, bases)
    sides = list(zip(("source", "target"), texts, codes, bases, gaps, strict=True))
    for side, text, code, base, gap in sides:
        if gap > options.margin - ROUNDING or (gap > -ROUNDING and has_foreign(text, base)):
            _language(side, text, base, options)
        if options.scripts and base == "zh":
            _chinese_script(side, text, code)
    doubtful = [
        (side, text, base)
        for side, text, _, base, gap in sides
        if gap > -ROUNDING and _is_sentence(text) and not _names(text)
    ]
    if doubtful and _apart(texts, bases):
        for side, text, base in doubtful:
            nats, other = _evidence(text, base)
            if nats > 0:
                why = f"{other}, by its length and {nats:.1f} nats"
                raise Reject(f"{side}: wrong language", why)


def _gaps(texts: list[str], codes: list[str]) -> NDArray[np.float32]:
    found = np.full(len(texts), -np.inf, np.float32)
    for code, at in by_code(codes):
        base = code.partition("_")[0]
        if is_identified(base):
            found[at] = gaps([texts[i] for i in at], base, _identifier(), SAME)
    return found


def _order(texts: Sequence[str], bases: Sequence[str]) -> None:
    """Two sentences which are both likelier another language's, and together each other's."""
    if not all(map(_is_sentence, texts)):
        return
    a, b = (SAME.get(base, base) for base in bases)
    source, target = map(_scores, texts)
    if a == b or not {a, b} <= {*source} or next(iter(source)) == a or next(iter(target)) == b:
        return
    other = source[b] - source[a] + target[a] - target[b]
    if other > ORDER:
        raise Reject("source: wrong language", f"likelier the other way round, by {other:.1f} nats")


def _apart(texts: Sequence[str], bases: Sequence[str]) -> bool:
    """Whether lengths make it doubtful that the texts belong together."""
    if not all(texts):
        return False
    digits = [sum(map(str.isdigit, text)) for text in texts]
    lengths = compare(texts[0], texts[1], bases, digits)
    return lengths.spare == 0 and deviations(lengths) > APART


def _language(side: str, text: str, base: str, options: IdentifyOptions) -> None:
    nats, other = advantage(text, base)
    if nats > 0 and has_foreign(text, base) and not has_foreign(text, other):
        raise Reject(f"{side}: wrong language", f"{other}, by its letters and {nats:.0f} nats")
    if nats > options.margin:
        nats, _ = _evidence(text, base)
    if nats > options.margin * (4 if nats <= 4 * options.margin and _names(text) else 1):
        raise Reject(f"{side}: wrong language", f"{other}, by {nats:.0f} nats")


def _evidence(text: str, base: str) -> tuple[float, str]:
    """`advantage` of what tells a language: symbols say nothing of it, and names little."""
    nats, other = advantage(text, base)
    plain = _WORDS.sub(" ", text).strip()
    nats = min(nats, advantage(plain, base)[0])
    said = dict.fromkeys(plain.lower().split())
    if 3 * len(said) <= len(plain.split()):  # what is said again is no more evidence
        nats = min(nats, advantage(" ".join(said), base)[0])
    return nats, other


def _chinese_script(side: str, text: str, language: str) -> None:
    simplified, traditional = chinese_scripts(text)
    wrong, right = (traditional, simplified)
    if language == "zh_Hant":
        wrong, right = right, wrong
    if wrong > right:
        raise Reject(f"{side}: wrong Chinese script", f"{wrong} characters against {right}")


def _is_sentence(text: str) -> bool:
    return _SENTENCE.search(text[-40:]) is not None


def _names(text: str) -> bool:
    """Whether most words are written as names are."""
    words = [word for word in re.findall(r"[^\W\d_]+", text) if not word.isupper()]
    return sum(word[0].isupper() for word in words) > 2 * len(words) / 3


def advantage(text: str, language: str) -> tuple[float, str]:
    """By how many nats the likeliest other language is likelier, and which that is.

    0 for a language that the identifier does not know.
    """
    scores = _scores(text)
    own = scores.pop(SAME.get(language, language), None)
    other = next(iter(scores))
    return (0.0, "") if own is None else (scores[other] - own, other)


def _scores(text: str) -> dict[str, float]:
    """Log-likelihood of each language, the likeliest first."""
    found: dict[str, float] = {}
    for label, score in _identifier().rank(text):  # best first
        if label != NO_CONTENT:
            found.setdefault(SAME.get(label, label), score)
    return found


def is_identified(language: str) -> bool:
    """Whether the identifier knows a language, or one that counts as the same."""
    known = {SAME.get(label, label) for label in _identifier().labels}
    return SAME.get(language, language) in known


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError(
            "language identification needs py3langid: pip install 'xplus-fast[prepare]'"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE)


def chinese_scripts(text: str) -> tuple[int, int]:
    """How many characters are Simplified only, and Traditional only."""
    kinds = [_chinese(c) for c in text if "\u4e00" <= c <= "\u9fff"]
    return kinds.count("Hans"), kinds.count("Hant")


@cache
def _chinese(character: str) -> str:
    """What national standards know a character: GB 2312 of Simplified, Big5 of Traditional text.

    Of Big5 only the frequent characters (its first level): the rare ones, of names and slang, are
    written alike in both.
    """
    simplified, traditional = (
        character.encode(standard, "ignore") for standard in ("gb2312", "big5")
    )
    if simplified:
        return "" if traditional else "Hans"
    return "Hant" if b"" < traditional < b"\xc9\x40" else ""
