"""Texts that were read in another encoding than they were written in.

UTF-8 that was read as a code page of one byte is ftfy's work, where the whole of a text does not
decode back at once. What ftfy leaves alone is one code page read as another: such a text has
letters that its language has not, and is mended where the right code page makes all its own.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from xplus_fast.data.steps.batch import Reject
from xplus_fast.data.steps.characters import has_foreign
from xplus_fast.errors import UserError

# Characters that UTF-8 shows side by side in a code page; few clean texts have two such in a row
_ODD = "\u0080-\u024f\u02c6-\u02dd\u03b1-\u03c9\u2013-\u2bff\ufb01\ufb02"
_PAIR = re.compile(
    f"[{_ODD}][{_ODD}\u0300-\u052f]|[\u0420\u0421\u0410-\u041f\u0430-\u043f]"
    f"[\u0080-\u00bf\u0401-\u040f\u0452-\u045f\u0490\u0491\u2013-\u2bff]"
    "|[\u0430-\u044f][\u2500-\u25a0\u0410-\u042f]"
)
# What each of the patterns needs: a class of characters is found in a fraction of the time
_PAIR_BEGINS = re.compile(f"[{_ODD}\u0410-\u044f]")
_LOST_HAS = re.compile("[\u00c2-\u00c5\u00d0\u00d1\u00d8-\u00db\u20ac\u0402]")
_LEFT_BEGINS = re.compile("[\u00c2-\u00ef]")
_ALONE = re.compile(r"(?<![^\0-\x7f])[^\0-\x7f\ufffd](?![^\0-\x7f])")  # U+FFFD is \x1a to ftfy
_WRITTEN = (
    "latin-1", "sloppy-windows-1252", "sloppy-windows-1250", "sloppy-windows-1251", "koi8-r",
    "mac-roman", "cp437", "cp850",
)  # fmt: skip
# What such sequences stand for where they are no accident, as "\u00c9\u00bb" ends a quotation
_LIKELY = re.compile(
    "[\u0000-\u007f\u00a0-\u017f\u01a0\u01a1\u01af\u01b0\u0218-\u021b\u0300-\u036f\u0370-\u058f"
    "\u0590-\u06ff\u0900-\u0dff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1e00-\u1eff\u2000-\u2122"
    "\u3000-\u30ff\u3400-\u9fff\uac00-\ud7af\ufb01\ufb02\uff00-\uffef]+"
)
# A capital of UTF-8's lead bytes within a word, its other byte lost; a quote that was cut
_LOST = re.compile(
    "[a-z][\u00c2-\u00c5\u00d0\u00d1\u00d8-\u00db](?![A-Z])|[\u00c3\u00c2][a-z]?[\u00a1-\u00bf]"
    "|\u00e2\u20ac|\u0432\u0402"
)
_HALF = re.compile("[\u00c2-\u00c6](?![a-z])|[\u00e1\u00c2][\u00bb\u00ba]")
_REST = "\u0080-\u00ba\u00bc-\u00bf\u0152-\u0192\u02c6\u02dc\u2020-\u2122"
# Of scripts that are not Latin, before whose letters and digits a 2\u00d7 may stand
_LEFT = re.compile(
    f"[\u00c2-\u00df][{_REST}]|[\u00cc-\u00df][\u2013-\u201f]"
    "|[\u00cc-\u00d6\u00d8-\u00df][\u0370-\u06ff]"
    f"|[\u00e0-\u00ef][{_REST}\u2013-\u201f]{{2}}|\u00e2\u20ac"
)
# The letters that a language has beside a to z, and the code pages that its texts were written in
_CENTRAL = ("cp1250", "iso8859-2")
_CZECH = "\u00e1\u010d\u010f\u00e9\u00ed\u0148\u00f3\u0161\u0165\u00fa\u00fd\u017e"
_CROATIAN = "\u010d\u0107\u0111\u0161\u017e"
OWN = {
    "cs": (_CZECH + "\u011b\u0159\u016f", _CENTRAL),
    "sk": (_CZECH + "\u00e4\u013a\u013e\u00f4\u0155", _CENTRAL),
    "pl": ("\u0105\u0107\u0119\u0142\u0144\u00f3\u015b\u017a\u017c", _CENTRAL),
    "hu": ("\u00e1\u00e9\u00ed\u00f3\u00f6\u0151\u00fa\u00fc\u0171", _CENTRAL),
    "ro": ("\u0103\u00e2\u00ee\u0219\u021b\u015f\u0163", _CENTRAL),
    "hr": (_CROATIAN, _CENTRAL), "sl": (_CROATIAN, _CENTRAL), "sr_Latn": (_CROATIAN, _CENTRAL),
    "tr": ("\u00e7\u011f\u0131\u00f6\u015f\u00fc\u00e2\u00ee\u00fb", ("cp1254",)),
    "lt": ("\u0105\u010d\u0119\u0117\u012f\u0161\u0173\u016b\u017e", ("cp1257",)),
    "lv": ("\u0101\u010d\u0113\u0123\u012b\u0137\u013c\u0146\u0161\u016b\u017e", ("cp1257",)),
    "et": ("\u00e4\u00f5\u00f6\u00fc\u0161\u017e", ("cp1257",)),
}  # fmt: skip
_LENT = frozenset("\u00e0\u00e8\u00ea\u00e7\u00f1\u00e3")
_WITH_A = {"fr", "it", "ca"}  # where it is a word
_A_WORD = re.compile("(?<!\\S)\u00c3 +(?=[a-z])")
_WORD = re.compile(r"[^\W\d_]+")
CYRILLIC = ("cp1251", "koi8-r", "iso8859-5", "cp866", "mac-cyrillic", "koi8-u")
# Letters of languages that some of these pages have not
_SERBIAN = "\u0459\u045a\u0458\u045f"
_NEEDED = {
    "sr": _SERBIAN + "\u0452\u045b", "mk": _SERBIAN + "\u0453\u0455\u045c",
    "uk": "\u0456\u0457\u0454", "be": "\u0456\u045e",
}  # fmt: skip
FEW = 8  # letters, at least, that may tell a code page: many a word has no frequent one
# KOI8 has small letters where others have capitals: in every word, not in an abbreviation alone
_TURNED = re.compile("\\b[\u0430-\u044f][\u0410-\u042f]{2}")
_CAPITALS = re.compile("^[\\0-\x7f\u0401-\u042f\u00ab\u00bb\u2010-\u203a\u2116]+$")
# Frequent letters of Russian, Serbian, Ukrainian, Bulgarian: more than half of any sentence's
_FREQUENT = "\u043e\u0435\u0430\u0438\u043d\u0442\u0441\u0440\u0432\u043b\u0456"


def mend_encoding(text: str, language: str, script: str) -> str:
    """The text as it was written; raises `Reject` where that cannot be told.

    language: a canonical code. script: the name that Unicode gives the language's letters.
    """
    mended = text
    if _PAIR_BEGINS.search(text) and _PAIR.search(text) and _may_be_mended(text):
        for _ in range(3):  # some texts went through it twice
            again = _from_utf8(mended, language)
            if again == mended:
                break
            mended = again
        half = mended != text and _HALF.search(mended)
        if half or "\ufffd" in mended or _PAIR.search(mended) and _ftfy().badness.is_bad(mended):
            raise Reject("mojibake", mended[:60])
    if language in _WITH_A:
        mended = _A_WORD.sub("\u00e0 ", mended)
    likely, left = (_LOST_HAS, _LOST) if script == "LATIN" else (_LEFT_BEGINS, _LEFT)
    if likely.search(mended) and left.search(mended):
        raise Reject("mojibake", mended[:60])
    if language in OWN:
        return _from_code_page(mended, *OWN[language])
    return _from_cyrillic(mended, language) if script == "CYRILLIC" else mended


def _may_be_mended(text: str) -> bool:
    """Whether `_from_utf8` would change it, or ought to."""
    return (
        "\u00c3 " in text
        or "\ufffd" in text
        or _ftfy().badness.is_bad(text)
        or _reading(text) is not None
    )


def _reading(text: str) -> str | None:
    """The whole of a text read again, as UTF-8."""
    if _ALONE.search(text):  # a character alone among those of ASCII is no UTF-8
        return None
    readings = _read_again(text, _WRITTEN, ("utf-8",))
    return next((made for made in readings if _LIKELY.fullmatch(made)), None)


def _from_utf8(text: str, language: str) -> str:
    if (made := _reading(text)) is not None:
        return made
    if "\u00c3 " in text:  # its no-break space became a space
        said = _A_WORD.sub("\u00e0 ", text) if language in _WITH_A else text
        raw = said.encode("sloppy-windows-1252", "replace").replace(b"\xc3 ", b"\xc3\xa0")
        try:
            made = raw.decode("utf-8")
        except UnicodeDecodeError:
            return _ftfy().fix_encoding(said)
        # after other spaces had become one, it cannot be told where words end
        return made if language in _WITH_A or "\u00c3  " in text else "\ufffd"
    return _ftfy().fix_encoding(text)


@cache
def _ftfy() -> Any:
    try:
        import ftfy.badness
    except ImportError:
        raise UserError(
            "mending texts read in another encoding needs ftfy: pip install 'xplus-fast[prepare]'"
        ) from None
    return ftfy


def _read_again(text: str, shown: tuple[str, ...], written: tuple[str, ...]) -> Iterator[str]:
    """The text's readings if it was written in one encoding and is shown in another."""
    _ftfy()  # brings the sloppy encodings
    for one in shown:
        try:
            raw = text.encode(one)
        except UnicodeEncodeError:
            continue
        for other in written:
            if other == one:
                continue
            try:
                yield raw.decode(other)
            except UnicodeDecodeError:
                continue


def _from_code_page(text: str, own: str, written: tuple[str, ...]) -> str:
    """Mend letters of Western Europe that stand where a language's own should."""
    if not any(character.isalnum() for character in set(text).difference(_usual(own))):
        return text
    found = _foreign(text, own)
    # a name may have one, and so may a word of French, Spanish or Portuguese
    small = [word for word in found if word[0].islower()]
    if not small or len(found) < 2 and _LENT.intersection(small[0]).difference(own):
        return text
    for made in _read_again(text, ("sloppy-windows-1252", "latin-1"), written):
        if not _foreign(made, own):
            return made
    return text


@cache
def _usual(own: str) -> frozenset[str]:
    return frozenset(map(chr, range(128))).union(own, own.upper())


def _foreign(text: str, own: str) -> list[str]:
    """The words with letters that a language has not."""
    words = [word for word in _WORD.findall(text) if not word.isascii()]
    return [word for word in words if any(c > "\x7f" and c not in own for c in word.lower())]


def _from_cyrillic(text: str, language: str) -> str:
    """Mend one Cyrillic code page shown as another, which makes rare letters of the frequent."""
    # a sentence in capitals stays one
    if _frequent(text, len(text)) > 0.2 or text.isupper() and _CAPITALS.search(text):
        return text
    if sum(c > "\x7f" for c in text) < FEW:
        return text
    usual = _usual_letters(text.lower())
    most = sum(map(str.isupper, text)) > 2 * sum(map(str.islower, text))
    turned = most and usual < 0.5 and bool(_TURNED.search(text))
    readings = {
        made: written
        for written in CYRILLIC
        for made in _read_again(text, CYRILLIC, (written,))
        if made.isprintable() and not _TURNED.search(made) and not has_foreign(made, language)
    }
    best = max(readings, key=_usual_letters, default=text)
    if _usual_letters(best) <= max(0.3 if turned else 0.5, usual):
        if turned:
            raise Reject("mojibake", text[:60])
        return text
    needed = _NEEDED.get(language, "")
    if needed.encode(readings[best], "ignore").decode(readings[best]) != needed:
        raise Reject("mojibake", f"{best[:60]}, without its other letters")
    least = _usual_letters(best) - 0.1
    if any(_usual_letters(made) >= least and _others(made, best) for made in readings):
        raise Reject("mojibake", text[:60])
    return best


def _others(text: str, best: str) -> bool:
    """Whether most letters are not the same."""
    return sum(a != b for a, b in zip(text, best, strict=False)) > len(best) / 2


def _usual_letters(text: str) -> float:
    return _frequent(text, sum(c > "\x7f" for c in text))


def _frequent(text: str, of: int) -> float:
    return sum(map(text.count, _FREQUENT)) / max(of, 1)
