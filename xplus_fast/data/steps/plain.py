"""Texts without case, punctuation and white space: what tells one sentence from another."""

import re
import unicodedata
from functools import cache, lru_cache

# Scripts that do not set spaces between words: Thai, Lao, Burmese, Khmer, kana, Chinese
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003134f]"
)


@lru_cache(maxsize=1 << 13)  # several steps want it of the same few thousand texts
def plain(text: str) -> str:
    """In lower case, words set apart by single spaces, no punctuation."""
    return " ".join(_noise(" ").sub(" ", text.casefold()).split())


def words(text: str) -> list[str]:
    return plain(text).split()


def glued(text: str) -> str:
    """`plain` without spaces: the same for a text and its segmentation into words."""
    return _noise("").sub("", text.casefold())


@cache
def _noise(kept: str) -> re.Pattern[str]:
    """Whatever is no letter, mark or digit, nor one of `kept`. `re` has no class that counts the
    vowel signs of Indic scripts and of Thai as parts of words."""
    ranges, start = ["\U0001f000-\U0001fbff"], None  # emoji; more ranges as high would be slow
    for code in range(0x10001):
        character = chr(code)
        outside = unicodedata.category(character)[0] not in "LMN" and character not in kept
        if outside and code < 0x10000 and start is None:
            start = code
        elif not (outside and code < 0x10000) and start is not None:
            ranges.append(f"\\u{start:04x}-\\u{code - 1:04x}")
            start = None
    return re.compile(f"[{''.join(ranges)}]+")
