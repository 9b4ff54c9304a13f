"""Each step on pairs made for it."""

import functools

import numpy as np
import pytest

from xplus_fast.data.steps.batch import SCHEMA, Reject, make_batch
from xplus_fast.data.steps.clean import CleanOptions, clean_pairs
from xplus_fast.data.steps.decontaminate import (
    DecontaminateOptions,
    build_index,
    decontaminate_pairs,
)
from xplus_fast.data.steps.dedup import (
    COLUMNS,
    REASONS,
    DedupOptions,
    fingerprints,
    simhash,
    survivors,
)
from xplus_fast.data.steps.format import FormatOptions, format_pairs, tidy
from xplus_fast.data.steps.identify import IdentifyOptions, chinese_scripts, identify_pairs
from xplus_fast.data.steps.instruct import InstructOptions, instruct_pairs
from xplus_fast.data.steps.quality import QualityOptions, judge, score_pairs
from xplus_fast.errors import UserError


def batch(*pairs, languages=("en", "fr"), **rest):
    return make_batch(
        {"source": s, "target": t, "source_language": languages[0],
         "target_language": languages[1], **rest}
        for s, t in pairs
    )  # fmt: skip


def reason(step, source, target, options, languages=("en", "fr")):
    found = step(batch((source, target), languages=languages), options)
    assert found.batch.num_rows == 1
    return found.reason[0].as_py()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("caf\u00c3\u00a9 cr\u00c3\u00a8me", "caf\u00e9 cr\u00e8me"),  # UTF-8 read as Latin-1
        ("\u00e2\u20ac\u0153Oui\u00e2\u20ac\u009d", "\u201cOui\u201d"),  # as cp1252
        ("\u0420\u045f\u0421\u0402\u0420\u0451\u0420\u0406\u0420\u00b5\u0421\u201a",
         "\u041f\u0440\u0438\u0432\u0435\u0442"),  # Cyrillic as cp1251
        ("\u00ab CAF\u00c9\u00bb", "\u00ab CAF\u00c9\u00bb"),  # and what only looks like it
        ("e\u0301te\u0301", "\u00e9t\u00e9"),
        ("a\u200b b\u00ad\ufeff  c\u00a0d\n", "a b c d"),
        ("&lt;b&gt;Tom &amp;amp; Jerry&lt;/b&gt;", "Tom & Jerry"),
        ("[[Paris|the capital]] of '''France'''", "the capital of France"),
        ("{\\an8}Hello <i>there</i><br/>", "Hello there"),
        ("3 < 5 and 7 > 2", "3 < 5 and 7 > 2"),
    ],
)  # fmt: skip
def test_texts_are_brought_into_form(text, expected):
    assert tidy(text, FormatOptions()) == expected


RUSSIAN = (
    "\u0421\u0442\u0430\u0440\u0430\u044f "
    "\u043c\u0435\u043b\u044c\u043d\u0438\u0446\u0430 "
    "\u043d\u0430 "
    "\u0440\u0435\u043a\u0435."
)
SERBIAN = (
    "\u0421\u0442\u0430\u0440\u0438 "
    "\u043c\u043b\u0438\u043d "
    "\u0458\u0435 "
    "\u043d\u0430 \u0440\u0435\u0446\u0438."
)
UKRAINIAN = (
    "\u0421\u0442\u0430\u0440\u0438\u0439 "
    "\u043c\u043b\u0438\u043d "
    "\u0456 \u0457\u0445 "
    "\u0440\u0456\u0447\u043a\u0430."
)
CAPITALS = (  # of few frequent letters
    "\u042f!",
    "\u0427\u041c\u041e.",
    "\u0428\u0410\u0425.",
    "\u041c\u042b \u0423\u0416\u0415 \u0423\u0415\u0414\u0415\u041c?",
)


def test_one_cyrillic_code_page_for_another() -> None:
    """Mended where all its letters can be told; what its page could not write is gone for good."""
    for language, text, written, shown in [
        ("ru", RUSSIAN, "koi8-r", "cp1251"), ("ru", RUSSIAN, "cp1251", "koi8-r"),
        ("ru", RUSSIAN, "iso8859-5", "cp1251"), ("sr", SERBIAN, "cp1251", "iso8859-5"),
        ("uk", UKRAINIAN, "koi8-u", "cp1251"),
    ]:  # fmt: skip
        garbled = text.encode(written).decode(shown)
        assert garbled != text and tidy(garbled, FormatOptions(), language) == text
    hebrew = "\u05d4\u05d0\u05d5\u05d5\u05d9\u05e8 \u05d9\u05e4\u05d4"  # "the weather is nice"
    lost = hebrew.encode().decode("cp1252", "ignore")  # without the bytes that cp1252 has not
    with pytest.raises(Reject, match="mojibake"):
        tidy(lost, FormatOptions(), "he")
    assert tidy(hebrew + " 3\u00d75", FormatOptions(), "he") == hebrew + " 3\u00d75"
    lost = SERBIAN.encode("koi8-r", "ignore").decode("cp1251")
    with pytest.raises(Reject, match="mojibake"):
        tidy(lost, FormatOptions(), "sr")
    for language in ("ru", "sr", "uk", "bg"):
        for text in CAPITALS:
            assert tidy(text, FormatOptions(), language) == text


def test_what_cannot_be_brought_into_form_goes():
    options = FormatOptions()
    assert reason(format_pairs, "a\ufffdb", "c", options) == "source: broken characters"
    assert reason(format_pairs, "a", " \u200b ", options) == "target: empty"
    assert reason(format_pairs, "a", "x {{cite", options) == "target: markup debris"
    assert reason(format_pairs, "%(n)s files", "fichiers", options) == "placeholders differ"
    assert reason(format_pairs, "%(n)s files", "%(n)s fichiers", options) is None
    assert reason(format_pairs, "5% of it", "5 % de cela", options) is None
    strict = FormatOptions(mojibake="reject", markup="reject", placeholders="reject")
    assert reason(format_pairs, "a", "caf\u00c3\u00a9", strict) == "target: mojibake"
    assert reason(format_pairs, "<b>a</b>", "b", strict) == "source: markup"
    assert reason(format_pairs, "{name}", "{name}", strict) == "placeholders"
    assert reason(format_pairs, "<b>a</b>", "b", FormatOptions(markup="keep")) is None


LONG = "This sentence is long enough for what it says to be measured by its length."


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("C'est la vie!", "C'est la vie !", "copy of the source"),
        ("We met in Paris, all four.", "We met in Paris, all 4", "copy of the source"),
        (LONG, "Trop court.", "target too short for its source"),
        ("Short.", LONG + " And so is it too.", "target too long for its source"),
        (LONG, "Cette phrase est assez longue pour que", "target breaks off"),
        ("In 1995 he left.", "En 1959 il est parti.", "numbers disagree"),
        ("In 1995 he left.", "Il partit en juin.", None),
        ("It cost 1,234.50 dollars.", "Cela a co\u00fbt\u00e9 1 234,50 dollars.", None),
        ("x", "\u041f\u0440\u0438\u0432\u0435\u0442", "target: wrong script"),
        ("?!", "!?", "source: too short"),
        ("Ha ha ha ha ha", "Ha", "source: repeated text"),
        ("12345 6789 a", "12345 6789 b", "source: mostly digits"),
        ("a ?!?!?!", "b", "source: mostly punctuation"),
        ("see https://a.example/b/c/d", "voir ici", "source: mostly links"),
        ("x" * 2000, "y" * 2000, "source: too long"),
    ],
)
def test_what_characters_give_away(source, target, expected):
    assert reason(clean_pairs, source, target, CleanOptions()) == expected


def test_languages_and_scripts():
    pytest.importorskip("py3langid", reason="identifies languages")
    german = "Das ist ein deutscher Satz, kein franz\u00f6sischer."
    assert (
        reason(identify_pairs, "A sentence.", german, IdentifyOptions()) == "target: wrong language"
    )
    assert reason(identify_pairs, "A sentence.", "Une phrase.", IdentifyOptions()) is None
    # a language that the identifier does not know is not judged
    assert reason(identify_pairs, "A sentence.", german, IdentifyOptions(), ("en", "tlh")) is None
    traditional = "\u9019\u662f\u570b\u5bb6\u5716\u66f8\u9928\u3002"
    simplified = "\u8fd9\u662f\u56fd\u5bb6\u56fe\u4e66\u9986\u3002"
    assert chinese_scripts(traditional)[1] > 2 and chinese_scripts(simplified)[0] > 2
    for text, code, wrong in (
        (traditional, "zh", True), (simplified, "zh", False),
        (traditional, "zh_Hant", False), (simplified, "zh_Hant", True),
    ):  # fmt: skip
        found = reason(identify_pairs, "A sentence.", text, IdentifyOptions(), ("en", code))
        assert found == ("target: wrong Chinese script" if wrong else None)


def test_letters_that_a_language_has_not() -> None:
    options, serbian = IdentifyOptions(), "\u0408\u0435\u0434\u0430\u043d, \u0434\u0432\u0430."
    said = "target: wrong language"
    for language, wanted in (("ru", said), ("bg", said), ("sr", None)):
        assert reason(identify_pairs, "One, two.", serbian, options, ("en", language)) == wanted
    # only some languages open a question: no short English text does
    for text, language, wanted in (
        ("\u00bfHay?", "en", "source: wrong language"), ("Hay?", "en", None),
        ("\u00bfHay?", "es", None), ("\u00bfHai?", "gl", None),
        ("He wrote \u00bfHay? on the door of the mill.", "en", None),
    ):  # fmt: skip
        assert reason(identify_pairs, text, "Nini?", options, (language, "sw")) == wanted, text
    # a name in a text that is surely Russian
    text = RUSSIAN + " \u0411\u0430\u0458\u0438\u043d\u0430 \u0411\u0430\u0448\u0442\u0430."
    source = "The old mill on the river. Bajina Basta."
    assert reason(identify_pairs, source, text, options, ("en", "ru")) is None


def test_nothing_is_judged_of_an_empty_batch() -> None:
    for step, options in (
        (format_pairs, FormatOptions()), (clean_pairs, CleanOptions()),
        (identify_pairs, IdentifyOptions()),
    ):  # fmt: skip
        judged = step(batch(), options)
        assert judged.batch.num_rows == len(judged.reason) == len(judged.detail) == 0
    index = build_index(["A line of an evaluation set, that nothing here repeats."])
    assert decontaminate_pairs(batch(), DecontaminateOptions(), index).kept.num_rows == 0
    assert fingerprints(batch(), DedupOptions()).num_rows == 0


def test_a_short_pair_the_other_way_round() -> None:
    pairs = (
        ("Mange !", "Eat!", "fr"), ("Vergiss es.", "Never mind.", "de"),
        ("\u00c9chec.", "Check.", "fr"), ("Meglepi!", "Surprise!", "hu"), ("Ki?", "Who?", "hu"),
    )  # fmt: skip
    for other, english, code in pairs:
        judge = functools.partial(reason, identify_pairs)
        assert judge(english, other, IdentifyOptions(), ("en", code)) is None
        assert judge(other, english, IdentifyOptions(), (code, "en")) is None
        for swapped in ((other, english, ("en", code)), (english, other, (code, "en"))):
            assert judge(*swapped[:2], IdentifyOptions(), swapped[2]) == "source: wrong language"
    same = (("Hallo.", "Hallo.", "de"), ("Taxi!", "Taxi !", "fr"))  # as likely either way
    for other, english, code in same:
        assert reason(identify_pairs, english, other, IdentifyOptions(), ("en", code)) is None


def test_a_doubtful_language_beside_doubtful_lengths() -> None:
    serbian = "\u041d\u0435 \u0431\u0440\u0438\u043d\u0438\u0442\u0435!"  # "Do not worry!"
    for source, wanted in (
        ("Do not worry!", None), ("Find out what happened to Tom.", "target: wrong language")
    ):  # fmt: skip
        found = reason(identify_pairs, source, serbian, IdentifyOptions(), ("en", "ru"))
        assert found == wanted
    # a language whose lengths are not measured says nothing; nor do names
    long = "He went home because it was getting late and dark."
    for text, code, wanted in (
        ("Mi dormas.", "cs", "source: wrong language"), ("Mi dormas.", "eo", None),
        ("Jean Dupont", "cs", None),
    ):  # fmt: skip
        assert reason(identify_pairs, text, long, IdentifyOptions(), (code, "en")) == wanted


def hashes(*pairs):
    made = fingerprints(batch(*pairs), DedupOptions())
    assert made.schema.names == list(COLUMNS)
    return {name: made.column(name).to_numpy() for name in COLUMNS}


def duplicates(*pairs, score=None, priority=None, languages=None, options=None):
    n = len(pairs)
    found = survivors(
        hashes(*pairs), np.zeros(n, int) if languages is None else np.array(languages),
        np.zeros(n, int) if priority is None else np.array(priority),
        np.full(n, np.nan) if score is None else np.array(score, float), options or DedupOptions(),
    )  # fmt: skip
    return [REASONS[code] for code in found]


def test_a_simhash_is_the_majority_of_its_shingles_bits():
    from xplus_fast.data.steps.grams import mix

    def alone(text):
        total = np.zeros(64, int)
        padded = f" {text} "
        for i in range(len(padded) - 2):
            gram = np.zeros(1, np.uint64)
            for c in padded[i : i + 3]:
                gram = mix(gram ^ np.uint64(ord(c)))
            bits = [(int(gram[0]) >> b) & 1 for b in range(64)]
            total += 2 * np.array(bits) - 1
        return sum(1 << b for b in range(64) if total[b] > 0)

    texts = ["a", "Hello there.", "\u0628\u0633\u0645", "x" * 300]
    assert simhash(texts).tolist() == [alone(t) for t in texts]
    assert simhash(texts[::-1]).tolist() == simhash(texts).tolist()[::-1]
    assert len(simhash([])) == 0


def test_the_survivor_does_not_depend_on_the_order():
    pair, other = ("The house is red.", "La maison est rouge."), ("It rains.", "Il pleut.")
    shouted = ("THE HOUSE IS RED", "la maison est rouge!")
    assert duplicates(pair, other, shouted)[1] == ""
    assert duplicates(pair, other, shouted).count("exact duplicate") == 1
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        pairs = [(pair, other, shouted)[i] for i in order]
        scores = [(0.5, 0.1, 0.9)[i] for i in order]
        kept = [p for p, r in zip(pairs, duplicates(*pairs, score=scores), strict=True) if not r]
        assert set(kept) == {shouted, other}  # the better score
        priority = [(0, 0, 1)[i] for i in order]
        found = duplicates(*pairs, score=scores, priority=priority)
        assert {p for p, r in zip(pairs, found, strict=True) if not r} == {pair, other}


def test_of_two_spellings_the_plain_one_stays():
    plain = ("The house is red.", "La maison est rouge.")
    for other in (("THE HOUSE IS RED.", "LA MAISON EST ROUGE."), ("THE HOUSE IS RED", plain[1])):
        assert duplicates(plain, other) == ["", "exact duplicate"]
        assert duplicates(other, plain) == ["exact duplicate", ""]
    others = [(f"The house is red{mark}", plain[1]) for mark in ("!", "", ";")]
    kept = {
        pairs[duplicates(*pairs).index("")]
        for pairs in (others, others[::-1], others[1:] + others[:1])
    }
    assert len(kept) == 1  # whatever the order
    chinese = "\u6211\u4eec\u73b0\u5728\u6709\u56db\u4e2a\u6708\u5927\u7684\u8001\u9f20\u3002"
    assert duplicates(("Mice.", chinese), ("Mice.", " ".join(chinese))).count("") == 1
    # vowel signs are parts of words: these differ in nothing else
    assert duplicates(("Meat.", "\u0915\u093f"), ("Meat.", "\u0915\u0941"))[1] != "exact duplicate"


def test_variants_of_one_side_and_other_languages():
    a = ("The quick brown fox jumps over it.", "Le rapide renard brun saute par-dessus.")
    b = (a[0], "Le rapide renard brun saute par-dessous.")
    c = (a[0], "Voici tout autre chose, sans aucun rapport.")
    assert sorted(duplicates(a, b, c)) == ["", "", "near duplicate: same source"]
    assert duplicates(a, a, languages=[0, 1]) == ["", ""]
    only_exact = DedupOptions(near=-1)
    assert duplicates(a, b, c, options=only_exact) == ["", "", ""]


def test_evaluation_sets_are_found_whole_and_in_parts():
    line = "We now have four month old mice that are non diabetic that used to be diabetic he added"
    chinese = (
        "\u201c\u6211\u4eec\u73b0\u5728\u6709\u56db\u4e2a\u6708\u5927\u6ca1\u6709"
        "\u7cd6\u5c3f\u75c5\u7684\u8001\u9f20\u3002\u201d"
    )
    index = build_index([line + ".\n", chinese])

    def found(source, target):
        made = decontaminate_pairs(batch((source, target)), DecontaminateOptions(), index)
        return made.reason[0].as_py()

    said = "in an evaluation set"
    assert found(line.upper() + "!", "x") == found("x", chinese) == said
    assert found("And then: " + line, "x") == said  # most of its n-grams
    assert found("x", chinese[1:20]) == said
    assert found("We now have four month old cats.", "Nous avons des chats.") is None
    assert found(line[:30], "x") is None  # too little to tell


def test_conversations_in_both_directions():
    pairs = batch(("Good day.", "Bonjour."), ("Yes.", "Oui."), corpus="c", where="f:1")
    options = InstructOptions(prompts=["{src}>{tgt}: {text}", "Say in {tgt}: {text}"], system="S")
    there = instruct_pairs(pairs, options, direction="forward", seed=0).to_pylist()
    back = instruct_pairs(pairs, options, direction="backward", seed=0).to_pylist()
    assert [m["role"] for m in there[0]["messages"]] == ["system", "user", "assistant"]
    assert there[0]["messages"][1]["content"] in (
        "English>French: Good day.",
        "Say in French: Good day.",
    )
    assert back[0]["messages"][2]["content"] == "Good day."
    assert (there[0]["src"], there[0]["tgt"], back[0]["src"]) == ("en", "fr", "fr")
    assert there[0]["pair"] == back[0]["pair"] != there[1]["pair"]
    assert there[0]["corpus"] == "c" and there[0]["where"] == "f:1"
    # the template is the pair's, wherever it stands
    alone = instruct_pairs(pairs.slice(1), options, direction="forward", seed=0).to_pylist()
    assert alone == there[1:]
    many = batch(*((f"Sentence {i}.", f"Phrase {i}.") for i in range(200)))
    made = instruct_pairs(many, options, direction="forward", seed=0).to_pylist()
    first = sum(row["messages"][1]["content"].startswith("English>") for row in made)
    assert 70 < first < 130


def test_quality_by_score_threshold_and_best():
    pairs = make_batch(
        {"source": "a", "target": "b", "source_language": "en", "target_language": t, "score": s}
        for t, s in (("fr", 1.2), ("fr", 1.0), ("fr", None), ("sw", 1.1))
    )
    options = QualityOptions(method="score", threshold=1.06, best=1)
    scored = score_pairs(pairs, options)
    assert scored.schema.names == [*SCHEMA.names, "quality", "margin", "least"]
    quality = scored.column("quality").to_numpy(False).astype(float)
    languages, tie = np.array([0, 0, 0, 1]), np.arange(4)
    unknown = np.full(4, np.nan)
    found = judge(quality, unknown, unknown, languages, tie, options)
    assert found == [None, "low quality", "not among the best", None]
    options = QualityOptions(method="score")
    unbounded = judge(quality, unknown, unknown, languages, tie, options)
    assert unbounded == [None] * 4


def test_cometkiwi_runs_in_its_own_environment(tmp_path):
    """A Python that has a `comet` of ours: what is asked of it, and what it answers."""
    import sys

    fake = tmp_path / "comet.py"
    fake.write_text(
        "def download_model(name):\n    assert name == 'a/model'\n    return 'path'\n"
        "class Model:\n    def predict(self, data, **options):\n"
        "        return {'scores': [len(d['src']) / len(d['mt']) for d in data]}\n"
        "def load_from_checkpoint(path):\n    return Model()\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    options = QualityOptions(method="cometkiwi", python=str(python), model="a/model")
    scored = score_pairs(batch(("four", "xx"), ("a", "b")), options)
    assert scored.column("quality").to_pylist() == [2.0, 1.0]
    fake.unlink()
    with pytest.raises(UserError, match="a/model does not run in .* No module named 'comet'"):
        score_pairs(batch(("a", "b")), options)
