"""Clean texts that look like noise, and stay as they are."""

import json
from pathlib import Path

import pytest

from xplus_fast.data.steps.batch import make_batch
from xplus_fast.data.steps.clean import CleanOptions, clean_pairs
from xplus_fast.data.steps.format import FormatOptions, tidy

# Kind, language, English, the other: numbers written out on a side, questions without a mark
GOOD = json.loads((Path(__file__).parent / "good_pairs.json").read_text())


@pytest.mark.parametrize(
    ("language", "text"),
    [
        # a sign of multiplication right before a digit or a letter
        ("ar", "\u0645\u0633\u0627\u062d\u0629 \u0663\u00d7\u0664"),
        ("fa", "\u06f3\u00d7\u06f4 \u0645\u062a\u0631"),
        ("he", "\u05d2\u05d5\u05d1\u05d4 3\u00d7\u05d2\u05d5\u05d1\u05d4"),
        ("ru", "\u0431\u043e\u043b\u044c\u0448\u0435 \u0432 3\u00d7\u0440\u0430\u0437\u0430"),
        ("el", "2\u00d7\u03c0"),
        # dB(A), mRNA: an abbreviation in words of rare letters
        ("ru", "\u0428\u0443\u043c 35 \u0434\u0411\u0410"),
        ("ru", "\u0424\u0443\u0437\u0437 \u043c\u0420\u041d\u041a"),
        # without a frequent letter: breathe (twice, too), wait, search, shoo, soul
        ("ru", "\u0414\u044b\u0448\u0443."),
        ("ru", "\u0414\u044b\u0448\u0443, \u0434\u044b\u0448\u0443."),
        ("ru", "\u0416\u0434\u0443!"),
        ("ru", "\u0418\u0449\u0443"),
        ("ru", "\u041c\u044b\u0448, \u043a\u044b\u0448!"),
        ("ru", "\u0414\u0443\u0448"),
    ],
)
def test_no_code_page_is_seen_in_it(language: str, text: str) -> None:
    assert tidy(text, FormatOptions(), language) == text


@pytest.mark.parametrize(
    ("source", "target", "language"),
    [
        # a mark that is repeated asks once
        ("You sold the mill?????", "Mliuza kinu?", "sw"),
        ("Really???", "Kweli, ndugu yangu?", "sw"),
        # centuries in Roman numbers, on either side
        ("The old mill was built between the 18th and the 19th century.",
         "Le vieux moulin, lui, a \u00e9t\u00e9 construit par la commune entre le"
         " XVIIIe et le XIXe si\u00e8cle.", "fr"),
        # ten, a hundred, ten thousand in one character
        ("There are 10000 of them here.", "\u8fd9\u91cc\u6709\u4e07\u4e2a\u3002", "zh"),
        # asked without a mark
        ("Will the council close the old mill in spring?",
         "\u0f0b".join(map(chr, range(0xF40, 0xF68))) + "\u0f0d", "bo"),
    ],
)  # fmt: skip
def test_lengths_and_marks_go_together(source: str, target: str, language: str) -> None:
    options = CleanOptions(min_script=0, truncated=False)
    for a, b in ((source, target), (target, source)):
        codes = ("en", language) if a is source else (language, "en")
        row = {"source": a, "target": b, "source_language": codes[0], "target_language": codes[1]}
        assert clean_pairs(make_batch([row]), options).reason.to_pylist() == [None], row


@pytest.mark.parametrize(("language", "kind"), sorted({(one[1], one[0]) for one in GOOD}))
def test_good_short_pairs_stay(language: str, kind: str) -> None:
    """In both directions."""
    chosen = [(a, b) for what, code, a, b in GOOD if (code, what) == (language, kind)]
    rows = [
        {"source": a, "target": b, "source_language": "en", "target_language": language}
        for a, b in chosen
    ]
    turned = [
        {"source": b, "target": a, "source_language": language, "target_language": "en"}
        for a, b in chosen
    ]
    for numbers in (True, False):
        found = clean_pairs(make_batch(rows + turned), CleanOptions(numbers=numbers))
        assert found.reason.to_pylist() == [None] * 2 * len(rows), found.detail.to_pylist()


@pytest.mark.parametrize(
    ("language", "text"),
    [
        # units and differences, of which a Latin letter looks like a Greek one, or is like none
        (
            "el",
            "\u03a4\u03bf \u0394x \u03ba\u03b1\u03b9 \u03c4\u03bf x: 10 k\u03a9, 5 \u03bcA.",
        ),
        ("el", "\u03bc\u03b5 \u0394v = a, i \u03ae k"),
        # Python's formats, beside MicroDVD's {c:$0000ff}
        ("en", "Price: {p:.2f} of {c:>10} and {s:,} or {f:+d} ({y:%d})"),
    ],
)
def test_signs_and_formats_stay(language: str, text: str) -> None:
    assert tidy(text, FormatOptions(), language) == text


@pytest.mark.parametrize(
    "code", ["{y:i}", "{Y:b,u}", "{c:$0000ff}", "{f:Arial}", "{s:12}", "{P:0,1}"]
)
def test_styles_of_subtitles_go(code: str) -> None:
    assert tidy(f"{code}The mill is closed.", FormatOptions()) == "The mill is closed."


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("ii", "\ua188\ua0c5\ua071\ua2aa\ua188\ua2c7"),  # Yi
        ("ff_Adlm", "\U0001e900\U0001e923\U0001e924\U0001e922\U0001e925\U0001e923"),
        ("jv_Java", "\ua98f\ua992\ua9a7\ua9b1\ua992\ua99f"),
        ("ko_Hang", "\ubb3c\ub808\ubc29\uc544\uac00 \ubb38\uc744 \ub2eb\uc558\ub2e4"),
        ("ja_Hira", "\u307f\u305a\u3050\u308b\u307e\u304c\u3068\u307e\u3063\u305f"),
        ("ur_Aran", "\u0686\u06a9\u06cc \u0628\u0646\u062f \u06c1\u06d2"),
        # names in Latin letters, and digits, weigh as little in each of the Chinese scripts
        ("zh_Hant", "\u6211\u5011\u4eca\u5929\u7528 PyTorch Keras"),
        ("zh", "\u6211\u4eec\u4eca\u5929\u7528 PyTorch Keras"),
        ("zh_Hant", "\u96fb\u8a71\u662f\uff1a02-27"),
        ("zh_Hant", "2026\u5e7411\u670826\u65e5"),
    ],
)
def test_what_a_text_is_made_of_is_right_in_every_script(language: str, text: str) -> None:
    options = CleanOptions(ratio=9, truncated=False, numbers=False, max_apart=99)
    row = {"source": "We met him: that day we had it all.", "target": text}
    batch = make_batch([{**row, "source_language": "en", "target_language": language}])
    assert clean_pairs(batch, options).reason.to_pylist() == [None]
