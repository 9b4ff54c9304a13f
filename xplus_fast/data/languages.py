"""Language codes -> the English names that prompts use ("sw" -> "Swahili")."""

import functools
import re
from collections.abc import Sequence

from xplus_fast.errors import UserError

# Where the usual name in translation work is not CLDR's.
_NAMES = {"bn": "Bengali"}
# Individual languages that a corpus of the larger one is tagged with
_UNITED = {"arb": "ar", "cmn": "zh", "nob": "no", "nb": "no", "swh": "sw", "pes": "fa"}


@functools.cache
def language_name(code: str) -> str:
    """Name the language of a code such as "sw", "zh_Hans", "pt_BR" or "arb_Arab".

    A bare "zh" is Simplified Chinese. A script is named only where it is not the language's usual
    one: "sr" and "sr_Cyrl" are Serbian, "sr_Latn" is Serbian (Latin). Raises `UserError` for an
    unknown code.
    """
    from langcodes import Language
    from langcodes.tag_parser import LanguageTagError

    try:
        language = Language.get(code).prefer_macrolanguage()
    except LanguageTagError:
        language = None
    if language is None or not language.language or not language.is_valid():
        raise UserError(
            f"'{code}': unknown language code; known are ISO codes such as en, sw, zh_Hans or pt_BR"
        )
    if language.language == "zh":
        traditional = language.maximize().script == "Hant"
        return "Traditional Chinese" if traditional else "Simplified Chinese"
    usual = Language.make(language=language.language).maximize().script
    script = language.script if language.script != usual else None
    if not script and not language.territory and language.language in _NAMES:
        return _NAMES[language.language]
    return Language.make(
        language=language.language, script=script, territory=language.territory
    ).display_name()


@functools.cache
def canonical(code: str) -> str:
    """One code for all spellings of a language: "sw" for swh_Latn, swa and SW.

    A script is kept only where it is not the usual one of the language: "sr" is Cyrillic, "sr_Latn"
    is not; "zh" is Simplified, zh_Hant and zh-TW are "zh_Hant". Territories go otherwise. Raises
    `UserError` for an unknown code.
    """
    from langcodes import Language

    language_name(code)  # that it is one
    language = Language.get(code).prefer_macrolanguage()
    if (base := _UNITED.get(language.language or "")) is not None:
        language = Language.make(base, script=language.script, territory=language.territory)
    usual = Language.make(language.language).maximize().script
    script = language.maximize().script
    return f"{language.language}_{script}" if script != usual else str(language.language)


@functools.cache
def is_language(code: str) -> bool:
    """Whether `language_name` knows the code."""
    try:
        language_name(code)
    except UserError:
        return False
    return True


@functools.cache
def code_of(name: str) -> str | None:
    """The code that a name is or whose language it names in English ("Swahili"); None: neither."""
    from langcodes import Language

    if is_language(name):
        return name
    try:
        found = Language.find(name)
    except (LookupError, UnicodeError):  # the second where names hold control characters
        return None
    return found.to_tag() if found.display_name().lower() == name.lower() else None


# en-sw, eng_Latn-swh_Latn, en-zh_TW, en_sw: parted from what stands around by no letter or digit
_CODE = r"([a-z]{2,3}(?:_(?:[A-Z][a-z]{3}|[A-Z]{2}|[a-z]{2}))?)"
_TWO_CODES = re.compile(
    rf"(?<![A-Za-z0-9])(?:{_CODE}-{_CODE}|([a-z]{{2,3}})_([a-z]{{2,3}}))(?![A-Za-z0-9])"
)


def languages_of_name(name: str) -> list[str]:
    """The two codes in a file's name (en-sw of "WikiMatrix.en-sw.tsv.gz"); none where unclear.

    A code of three letters without a script is a word as often: it needs English beside it.
    """

    def sure(code: str, other: str) -> bool:
        return len(code) != 3 or other in ("en", "eng")

    pairs = [(a or c, b or d) for a, b, c, d in _TWO_CODES.findall(name)]
    found = {
        (a, b)
        for a, b in pairs
        if is_language(a) and is_language(b) and sure(a, b) and sure(b, a)
        if canonical(a) != canonical(b)
    }
    return list(found.pop()) if len(found) == 1 else []


def codes_of(direction: str) -> list[str]:
    """The codes of "en-sw" or "zh-Hant-en"; not two where it is not clear which these are."""
    pieces = direction.split("-")
    pairs = [["-".join(pieces[:i]), "-".join(pieces[i:])] for i in range(1, len(pieces))]

    def is_code(text: str) -> bool:
        # behind a language stand capitals, or a script: sw-fr is no Swahili of France
        first, *more = text.split("-")
        return (
            first.islower()
            and is_language(text)
            and not any(piece.islower() and len(piece) < 4 for piece in more)
        )

    found = [pair for pair in pairs if all(map(is_code, pair))]
    return found[0] if len(found) == 1 else pieces


def two_languages(codes: Sequence[str], where: str) -> tuple[str, str]:
    """The codes as a pair; `UserError` unless they are two, known and different."""
    if len(codes) != 2 or codes[0] == codes[1]:
        raise UserError(f"{where}: two different languages are wanted, found {', '.join(codes)}")
    for code in codes:
        try:
            language_name(code)
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
    return codes[0], codes[1]
