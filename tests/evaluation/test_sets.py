"""Test sets of other kinds than lines: documents, WMT24++ as distributed; terms."""

import json

import pytest

from xplus_fast.errors import UserError
from xplus_fast.evaluation import translation
from xplus_fast.evaluation.recipe import TestSet as Named
from xplus_fast.evaluation.recipe import TranslationConfig
from xplus_fast.evaluation.sets import Lines, read_sets, read_terms


def rows(*more, lp="en-de_DE"):
    """As huggingface.co/datasets/google/wmt24pp has them."""
    made = [
        {"lp": lp, "domain": d, "document_id": f"{d}_{n}", "segment_id": i, "is_bad_source": bad,
         "source": s, "target": t, "original_target": f"first {t}"}
        for i, (d, n, bad, s, t) in enumerate([
            ("canary", 0, False, "canary", "canary"), ("news", 1, False, "One.", "Eins."),
            ("news", 1, True, "@@", "@@"), ("news", 1, False, "Two\nlines.", "Zwei\nZeilen."),
            ("speech", 2, False, "Three.", "Drei."), *more,
        ])
    ]  # fmt: skip
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)


def test_wmt24pp_as_distributed(tmp_path):
    (tmp_path / "en-de_DE.jsonl").write_text(rows())
    (tmp_path / "en-zh_TW.jsonl").write_text(rows(lp="en-zh_TW"))
    files = str(tmp_path / "en-{lang}.jsonl")
    forth, back = read_sets([Named("w", files, ["en-de", "de-en"], languages={"de": "de_DE"})])
    assert forth.sources == ["One.", "Two\nlines.", "Three."]
    assert forth.references == ["Eins.", "Zwei\nZeilen.", "Drei."]  # the post-edited ones
    assert (back.sources, back.references) == (forth.references, forth.sources)
    assert forth.left_out == 2  # the canary and the bad source
    (whole,) = read_sets([Named("w", files, ["en-de_DE"], documents=True, limit=1)])
    assert whole.sources == ["One.\n\nTwo\nlines."] and whole.references[0].startswith("Eins.\n\n")
    (taiwan,) = read_sets([Named("w", files, ["en-zh_TW"])])
    assert taiwan.languages == ("en", "zh_TW") and len(taiwan.sources) == 3


@pytest.mark.parametrize(
    ("text", "direction", "message"),
    [
        (rows(lp="en-fr_FR"), "en-de", "its languages are en and fr (lp), not en and de"),
        (rows(lp="en"), "en-de", "de.jsonl:1: lp is not two languages: 'en'"),
        ('{"lp": "en-de_DE", "source": "x"}\n', "en-de", "de.jsonl:1: 'target' is missing"),
        ('{"lp": "en-de_DE"\n', "en-de", "de.jsonl:1"),
        (rows(), "en-fr", "en.jsonl nor fr.jsonl: no such file"),
        (rows().split("\n")[0], "en-de", "no usable row in it"),
    ],
)
def test_bad_rows_of_wmt24pp_are_one_line(tmp_path, text, direction, message):
    (tmp_path / "de.jsonl").write_text(text)
    with pytest.raises(UserError) as e:
        read_sets([Named("w", str(tmp_path / "{lang}.jsonl"), [direction])])
    assert message in str(e.value) and "\n" not in str(e.value)


def test_documents_stand_between_empty_lines(tmp_path):
    (tmp_path / "en.txt").write_text("\nOne.\nTwo.\n\n \nThree.\n")
    (tmp_path / "fr.txt").write_text("Un. Deux.\n\nTrois.\n\n")
    files = str(tmp_path / "{lang}.txt")
    (lines,) = read_sets([Named("d", files, ["en-fr"], documents=True)])
    assert lines.sources == ["One.\nTwo.", "Three."] and lines.references == ["Un. Deux.", "Trois."]
    (tmp_path / "fr.txt").write_text("Un. Deux.\nTrois.\n")
    with pytest.raises(UserError, match="d en-fr: 2 documents and 1: equally many are wanted"):
        read_sets([Named("d", files, ["en-fr"], documents=True)])


def test_terms_by_hand(tmp_path):
    file = tmp_path / "terms.tsv"
    file.write_text(
        "en\tfr_FR\tzh\nMachine learning|ML\tapprentissage automatique\t\n"
        "machine\tmachine | engin\t\u673a\u5668\n\nhouse\t\t\u623f\u5b50\n"
    )
    terms = read_terms(file, ("en", "fr"))
    assert terms == {
        "machine learning": ["apprentissage automatique"], "ml": ["apprentissage automatique"],
        "machine": ["machine", "engin"],
    }  # fmt: skip
    sources = ["Machine learning helps.", "A machine, a MACHINE!", "Machines and housework.", "ML"]
    texts = ["L'apprentissage\u00a0automatique aide.", "Un Engin.", "machine", "ML"]
    lines = Lines("m:en-fr", ("en", "fr"), sources, texts, terms)
    kept = translation.kept_terms(lines, texts)
    # any space is one; one of two machines; "Machines" is another word
    assert kept.tolist() == [[1, 1], [1, 2], [0, 0], [0, 1]]
    assert translation.measure("terms", lines, texts, TranslationConfig()).score == 50
    chinese = Lines("m:en-zh", ("en", "zh"), ["the house"], [""], read_terms(file, ("en", "zh")))
    assert translation.kept_terms(chinese, ["\u90a3\u623f\u5b50\u5927"]).tolist() == [[1, 1]]
    back = Lines("m:zh-en", ("zh", "en"), ["\u90a3\u623f\u5b50\u5927"], [""],
                 read_terms(file, ("zh", "en")))  # fmt: skip
    assert translation.kept_terms(back, ["The House."]).tolist() == [[1, 1]]


@pytest.mark.parametrize(
    "text",
    [
        "en\tfr\t\nhouse\tmaison\t\n", "English\tFrench\r\nhouse\tmaison\r\n",
        "\ufeffen-US\tfr-FR\nhouse\tmaison\t \t\n\t\n",
    ],
)  # fmt: skip
def test_terms_as_spreadsheets_leave_them(tmp_path, text):
    file = tmp_path / "terms.tsv"
    for encoding in ("utf-8", "utf-16"):
        file.write_bytes(text.encode(encoding))
        assert read_terms(file, ("en", "fr")) == {"house": ["maison"]}


def test_one_file_for_both_languages(tmp_path):
    (tmp_path / "en.txt").write_text("One.\n")
    test = Named("d", str(tmp_path / "{lang}.txt"), ["en-fr"], languages={"fr": "en"})
    with pytest.raises(UserError, match="d en-fr: .*en.txt: is the file of both languages"):
        read_sets([test])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\t\nhouse\tmaison\n", "terms.tsv:1: '' is no language"),
        ("en\t\tfr\nhouse\tx\tmaison\n", "terms.tsv:1: '' is no language"),
        ("en\tfr\t\nhouse\tmaison\tx\n", "terms.tsv:2: 3 cells, the first line has 2"),
        ("house\tmaison\n", "terms.tsv:1: 'house' is no language"),
        ("en\tsw\nhouse\tnyumba\n", "terms.tsv:1: no column of fr; there are en, sw"),
        ("en\tfr\nhouse\n", "terms.tsv:2: 1 cells, the first line has 2"),
        ("en\tfr\nhouse\t\n", "no term of en and fr in it"),
    ],
)
def test_bad_terms_are_one_line(tmp_path, text, message):
    file = tmp_path / "terms.tsv"
    file.write_text(text)
    with pytest.raises(UserError) as e:
        read_terms(file, ("en", "fr"))
    assert message in str(e.value) and "\n" not in str(e.value)
