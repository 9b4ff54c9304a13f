"""Step 3, language identification: could either text be of the language that it should be?

py3langid (Heafield-style naive Bayes over byte n-grams) scores a text in 140 languages. The
expected language is known, so a short text need not look most like it: it goes only if another
language is likelier by more than `margin` nats. Dialects and mutually close standards count as one.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xplus_fast.data.steps.batch import Judged, Reject, by_code, judged
from xplus_fast.data.steps.bayes import NO_CONTENT, ROUNDING, gaps
from xplus_fast.data.steps.characters import has_foreign
from xplus_fast.errors import UserError
from xplus_fast.options import AtLeast0


@dataclass(frozen=True)
class IdentifyOptions:
    margin: Annotated[float, AtLeast0] = 7.0  # nats by which another language must be likelier
    scripts: bool = True  # tell Simplified from Traditional Chinese


_WORDS = re.compile(r"[\x21-\x26\x28-\x2c\x2e-\x40\u00a0-\u00bf\u2010-\u2bff]+")
# What the identifier tells apart and a corpus does not
SAME = {
    "wuu": "zh", "yue": "zh", "lzh": "zh", "bs": "sr", "hr": "sr", "sh": "sr", "arz": "ar",
    "ary": "ar", "nn": "no", "nb": "no", "uzs": "uz",
}  # fmt: skip


def identify_pairs(batch: pa.RecordBatch, options: IdentifyOptions) -> Judged:
    """Judge both texts of every pair. Raises `UserError` where py3langid is not installed."""
    reasons: list[str | None] = [None] * batch.num_rows
    details: list[str | None] = [None] * batch.num_rows
    for side in ("target", "source"):  # the source's reason stands
        texts, codes = (batch.column(name).to_pylist() for name in (side, f"{side}_language"))
        doubtful = _doubtful(texts, codes, options)
        for i, (text, code) in enumerate(zip(texts, codes, strict=True)):
            try:
                if doubtful[i]:
                    _language(text, code.partition("_")[0], options)
                if options.scripts and code.partition("_")[0] == "zh":
                    _chinese_script(text, code)
            except Reject as e:
                reasons[i], details[i] = f"{side}: {e.reason}", e.detail or None
    return judged(batch, reasons, details)


def _doubtful(texts: list[str], codes: list[str], options: IdentifyOptions) -> NDArray[np.bool_]:
    """Which texts may be of another language: few, and all that are."""
    found = np.zeros(len(texts), bool)
    for code, at in by_code(codes):
        base = code.partition("_")[0]
        found[at] = (
            gaps([texts[i] for i in at], base, _identifier(), SAME)
            > _margins([texts[i] for i in at], base, options) - ROUNDING
        )
    return found


def _margins(texts: list[str], base: str, options: IdentifyOptions) -> NDArray[np.floating]:
    """By how much another language must be likelier than each text's own, at least."""
    return np.where([has_foreign(text, base) for text in texts], 0.0, options.margin)


def _language(text: str, base: str, options: IdentifyOptions) -> None:
    gap, other = advantage(text, base)
    if gap > 0 and has_foreign(text, base) and not has_foreign(text, other):
        raise Reject("wrong language", f"{other}, by its letters and {gap:.0f} nats")
    # symbols say nothing of a language, and names little of the one that they stand in
    if gap > options.margin:
        plain = _WORDS.sub(" ", text).strip()
        gap = min(gap, advantage(plain, base)[0])
        said = dict.fromkeys(plain.lower().split())
        if 3 * len(said) <= len(plain.split()):  # what is said again is no more evidence
            gap = min(gap, advantage(" ".join(said), base)[0])
    if gap > options.margin * (4 if gap <= 4 * options.margin and _names(text) else 1):
        raise Reject("wrong language", f"{other}, by {gap:.0f} nats")


def _chinese_script(text: str, language: str) -> None:
    simplified, traditional = chinese_scripts(text)
    wrong, right = (traditional, simplified)
    if language == "zh_Hant":
        wrong, right = right, wrong
    if wrong > right:
        raise Reject("wrong Chinese script", f"{wrong} characters against {right}")


def _names(text: str) -> bool:
    """Whether most words are written as names are."""
    words = [word for word in re.findall(r"[^\W\d_]+", text) if not word.isupper()]
    return sum(word[0].isupper() for word in words) > 2 * len(words) / 3


def advantage(text: str, language: str) -> tuple[float, str]:
    """By how many nats the likeliest other language is likelier, and which that is.

    0 for a language that the identifier does not know.
    """
    identifier = _identifier()
    language = SAME.get(language, language)
    own, best, other = None, None, ""
    for label, score in identifier.rank(text):  # best first
        label = SAME.get(label, label)
        if label == language:
            own = score if own is None else own
        elif best is None and label != NO_CONTENT:
            best, other = score, label
        if own is not None and best is not None:
            return best - own, other
    return 0.0, ""


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
