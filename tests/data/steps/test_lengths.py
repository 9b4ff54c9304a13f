"""Lengths and marks of the texts of a pair, and texts that break off."""

import pytest

from xplus_fast.data.steps.batch import make_batch
from xplus_fast.data.steps.clean import CleanOptions, clean_pairs
from xplus_fast.data.steps.lengths import RELATIVE_LENGTH


def reason(source, target, options, languages):
    row = {"source": source, "target": target}
    row |= dict(zip(("source_language", "target_language"), languages, strict=True))
    return clean_pairs(make_batch([row]), options).reason[0].as_py()


def test_lengths_are_those_of_the_languages():
    """Chinese takes a third of the characters, and names in it stay Latin."""
    assert RELATIVE_LENGTH["zh"] < 0.4 < RELATIVE_LENGTH["en"]
    source = "The World Health Organization declared it a pandemic in March."
    chinese = (
        "\u4e16\u754c\u536b\u751f\u7ec4\u7ec7\u4e09\u6708\u5ba3\u5e03"
        "\u5176\u4e3a\u5927\u6d41\u884c\u75c5\u3002"
    )
    assert reason(source, chinese, CleanOptions(), ("en", "zh")) is None
    assert reason(chinese, source, CleanOptions(), ("zh", "en")) is None
    named = "Janssen \u5236\u836f\u516c\u53f8\u7684 Hanneke \u5ba3\u5e03\u4e86\u3002"
    assert reason("Hanneke of Janssen said so.", named, CleanOptions(), ("en", "zh")) is None
    digits = "\u09ea\u09e8"  # Bengali 42
    bengali = f"\u09a4\u09be\u09b0 \u09ac\u09af\u09bc\u09b8 {digits}\u0964"
    assert reason("He is 42.", bengali, CleanOptions(), ("en", "bn")) is None
    assert reason("He is 24.", bengali, CleanOptions(), ("en", "bn")) == "numbers disagree"


def test_lengths_and_marks_that_disagree() -> None:
    """Lengths may differ, or marks, but not both."""
    said = "lengths and marks disagree"
    asked = "Will the council close the old mill in spring?"
    told = "Le conseil fermera le vieux moulin au printemps, le maire l'a dit aux habitants hier."
    dated = "Le vieux moulin, qui date de 1834, sera bient\u00f4t ferm\u00e9."
    longer = dated[:-1] + ", et la commune entend vendre les pierres."
    quoted = "\u00abC'est le maire qui fermera le vieux moulin au printemps\u00bb, dit-on."
    title = "On donne le \u00abVieux moulin\u00bb de demain soir jusqu'au printemps, et puis rien."
    temple = "People there call this place the Hall of Prayer, and it stands in the south."
    cases = [
        (asked, "Le conseil fermera le vieux moulin au printemps.", "en", "fr", None),
        (asked[:-1] + ".", told, "en", "fr", None),
        (asked, told, "en", "fr", said),
        (asked[:-1] + ".", dated, "en", "fr", None),  # a year alone
        (asked, dated, "en", "fr", None),
        (asked, longer, "en", "fr", said),
        (longer, asked, "fr", "en", said),
        # direct speech: a sentence between quotes, and no other sign of it
        ("The old mill will close in spring.", quoted, "en", "fr", said),
        ("The old mill will close in the spring, or so he said.", quoted, "en", "fr", None),
        ("- The old mill will close in spring.", quoted, "en", "fr", None),
        ("The 'old mill' will close in spring.", quoted, "en", "fr", None),
        ("The old mill will close in spring.", title, "en", "fr", None),
        ("The old mill.", "\u300c\u53e4\u3044\u6c34\u8eca\u5c0f\u5c4b\u3092\u6625\u306b\u9589"
         "\u3081\u308b\u300d\u3068\u8a00\u3063\u305f\u3002", "en", "ja", said),
        ("The old mill.", "\u300c\u6c34\u8eca\u300d\u3068\u8a00\u3063\u305f\u306e\u306f\u6751\u9577"
         "\u306e\u53cb\u4eba\u305f\u3061\u3060\u3063\u305f\u3002", "en", "ja", None),
        # Chinese quotes names, too, which have no pauses
        (temple, "\u201c\u5929\u575b\u7948\u5e74\u6bbf\u201d\u5728\u5317\u4eac\u7684\u5357\u8fb9"
         "\u3002", "en", "zh", None),
        (temple, "\u201c\u4f60\u53bb\u5929\u575b\uff0c\u5feb\u53bb\u3002\u201d\u4ed6\u8bf4\u3002",
         "en", "zh", said),
        (told, asked, "fr", "en", said),
        # no marks that would tell: of Thai, of Greek, a Japanese particle
        (asked, told, "en", "th", None),
        (asked, told, "en", "el", None),
        ("How old is he, and when was the house built?",
         "\u5f7c\u306f\u3044\u304f\u3064\u3067\u3001\u5bb6\u306f\u3044\u3064\u5efa\u3066"
         "\u3089\u308c\u307e\u3057\u305f\u304b\u3002", "en", "ja", None),
        # numbers written out
        ("It was on December 30, 2019.", "\u90a3\u662f\u4e8c\u3007\u4e00\u4e5d\u5e74"
         "\u5341\u4e8c\u6708\u4e09\u5341\u65e5\u7684\u4e8b\u60c5\u4e86\u3002",
         "en", "zh", None),
    ]  # fmt: skip
    for source, target, a, b, wanted in cases:
        row = {"source": source, "target": target, "source_language": a, "target_language": b}
        # Latin letters stand for those of other scripts here
        options = CleanOptions(min_script=0, truncated=False)
        assert clean_pairs(make_batch([row]), options).reason.to_pylist() == [wanted], row
        off = CleanOptions(min_script=0, truncated=False, max_apart=99)
        assert clean_pairs(make_batch([row]), off).reason.to_pylist() == [None], row


@pytest.mark.parametrize(
    ("whole", "cut"),
    [
        ("\u0e42\u0e23\u0e07\u0e2a\u0e35\u0e40\u0e01\u0e48\u0e32", "\u0e41"),  # an e
        ("\u0e40\u0e02\u0e32\u0e01\u0e25", "\u0e31"),  # a, which a consonant follows
        ("\u0e40\u0e02\u0e32\u0e0a", "\u0e37\u0e48"),  # ue with a tone
        ("\u0e40\u0e02\u0e32\u0e21\u0e32\u0e17\u0e33", "\u0e01"),  # am, and one consonant more
        ("\u0e40\u0e02\u0e32\u0e44\u0e21\u0e48", "\u0e1e"),  # ai, and one consonant more
    ],
)  # fmt: skip
def test_a_thai_syllable_that_is_not_whole_breaks_off(whole: str, cut: str) -> None:
    options, pair = CleanOptions(), ("en", "th")
    assert reason("The old mill.", whole, options, pair) is None
    assert reason("The old mill.", whole + cut, options, pair) == "target breaks off"


@pytest.mark.parametrize(
    "text",
    [
        "\u0e41\u0e15\u0e48\u0e40\u0e02\u0e32\u0e01\u0e47",  # a word that ends in a short e
        "\u0e1b\u0e23\u0e30\u0e15\u0e39",  # door: a, and a consonant with its vowel below
        "\u0e44\u0e21\u0e48\u0e14\u0e35!",  # not good: ai, and a consonant with its vowel above
        "\u0e25\u0e2d\u0e07\u0e17\u0e33\u0e14\u0e39",  # try it
    ],
)
def test_thai_words_that_look_cut_are_whole(text: str) -> None:
    assert reason("Not he.", text, CleanOptions(), ("en", "th")) is None
