"""What of an answer is scored, and what is odd about it."""

import pytest

from xplus_fast.config import PROMPT
from xplus_fast.evaluation import outputs

SOURCE, REFERENCE = "The house is red and old.", "La maison est rouge et ancienne."


def read(text, source=SOURCE, reference=REFERENCE, languages=("en", "fr"), cut=False):
    return outputs.read(
        text, cut, source=source, reference=reference, prompt=PROMPT, languages=languages
    )


@pytest.mark.parametrize(
    ("text", "scored"),
    [
        ("<think>\n\n</think>\n\nBonjour", "Bonjour"),
        ("<think>a <b> c</think>Bonjour", "Bonjour"),
        ("I should say hello.\n</think>\n\nBonjour", "Bonjour"),  # it began in the prompt
        ("Bonjour<think>or salut?", "Bonjour"),
        ("<think>it goes on and on", ""),
        ("<THINK>a</THINK><think>b</think> Bonjour", "Bonjour"),
        ("<thinking>x</thinking>Bonjour", "Bonjour"),
        ("<think>a <think>b</think> Bonjour", "Bonjour"),
    ],
)
def test_a_think_block_is_left_out(text, scored):
    answer = read(text)
    assert answer.text == scored and "thoughts" in answer.odd
    assert ("empty" in answer.odd) == (not scored)


def test_a_text_about_think_tags_keeps_them():
    answer = read("Le <think> ouvre.", source="The <think> tag opens.")
    assert answer.text == "Le <think> ouvre." and not answer.odd


@pytest.mark.parametrize(
    ("text", "scored"),
    [
        ("-\n", "-"),
        ("a-\nb", "a- b"),
        ("a\r\nb\rc\n\nd", "a b c  d"),
        ("\ta\tb \u2028c\x85d\x0b\x0ce ", "a\tb \u2028c\x85d\x0b\x0ce"),
        ("\u00a0a\u00a0b\u3000", "a\u00a0b"),
        ("a\0b", "a\0b"),
        ("a\ud800", "a\\ud800"),
        ("\n \u2029", ""),
    ],
)
def test_what_is_scored_is_one_line(text, scored):
    assert outputs.one_line(text) == scored
    assert len(f"{scored}\n".encode().split(b"\n")) == 2


@pytest.mark.parametrize(
    "text",
    [
        "Here is the translation: La maison est rouge.",
        "Here is the French version:\n\nLa maison est rouge.",
        "Sure! La maison est rouge.",
        "Certainly, here you go:\nLa maison est rouge.",
        "**Translation:** La maison est rouge.",
        "French: La maison est rouge.",
        "Fran\u00e7ais : La maison est rouge.",
        "Voici la traduction :\nLa maison est rouge.",
        "Hier ist die \u00dcbersetzung: La maison est rouge.",
        "\u4ee5\u4e0b\u662f\u7ffb\u8bd1\uff1aLa maison est rouge.",
        "I'm sorry, but I cannot do that.",
        "Assistant: La maison est rouge.",
        "fr: La maison est rouge.",
        "FR: La maison est rouge.",
        "[French] La maison est rouge.",
        "<fr>La maison est rouge.</fr>",
        "```\nLa maison est rouge.\n```",
        "La maison est rouge.\n\nNote: I kept it literal.",
        "La maison est rouge.\n(Note : rouge = red)",
        "La maison est rouge.\n\n**Explanation**\n- maison: house",
        "La maison est rouge.\n\nLet me know if you need more.",
    ],
)
def test_words_around_the_translation(text):
    assert "chatter" in read(text).odd


@pytest.mark.parametrize(
    ("source", "text", "languages"),
    [
        (SOURCE, REFERENCE, ("en", "fr")),
        (SOURCE, "C'est vrai : la maison est rouge.", ("en", "fr")),
        ("Translation: an art", "Traduction : un art", ("en", "fr")),
        ("French: a language of many.", "Fran\u00e7ais : une langue parmi d'autres", ("en", "fr")),
        ("Bien s\u00fbr, je viens.", "Of course, I will come.", ("fr", "en")),
        ("Okay, let us go.", "Okay, gehen wir.", ("en", "de")),
        ("Voici les faits : il pleut.", "Here are the facts: it rains.", ("fr", "en")),
        ("Voici la maison.", "Here is the house.", ("fr", "en")),
        ("One:\n\nTwo", "Un :\n\nDeux", ("en", "fr")),
        ("One.\nNote: two.", "Un.\nNote : deux.", ("en", "fr")),
        ("Note: two.", "Note : deux.", ("en", "fr")),
        ("It is not true.", "No: det er ikke sant.", ("en", "no")),
        ("[laughs] Come in.", "[rires] Entre.", ("en", "fr")),
        ("Use ```x``` here.", "Utilisez ```x``` ici.", ("en", "fr")),
    ],
)
def test_a_plain_translation_is_not_odd(source, text, languages):
    assert not read(text, source, text, languages).odd


@pytest.mark.parametrize(
    ("text", "source", "odd"),
    [
        ("non " * 20, SOURCE, True),
        ("La maison est rouge. " * 3, SOURCE, True),
        ("La maison est rouge. " * 2, SOURCE, False),
        ("La " + "rouge et ancienne, " * 8 + "roug", SOURCE, True),  # cut off inside of a turn
        ("La maison " + "\u6211" * 30 + " est l\u00e0.", SOURCE, True),  # not at its end
        ("ha " * 20, "ha " * 20, False),  # as its source does
        ("x" * 500, "-" * 400, False),
        ("a b c d e f g h i j k l m n o p", SOURCE, False),
        ("", SOURCE, False),
    ],
)
def test_loops(text, source, odd):
    assert ("loops" in read(text, source, "r").odd) == odd


@pytest.mark.parametrize(
    ("text", "odd"),
    [
        (f"English source: {SOURCE}", True),
        ("Translate the following text from English to French.\nLa maison", True),
        ("La maison est rouge.\n\nFrench translation: La maison", True),
        (f"{SOURCE} La maison est rouge.", True),
        (SOURCE, True),
        (REFERENCE, False),
    ],
)
def test_the_prompt_again(text, odd):
    assert ("echoes" in read(text).odd) == odd


def test_what_need_not_be_translated_is_no_echo():
    name = "https://example.org/a-rather-long-address"
    assert not read(name, name, name).odd


def test_counts_in_words():
    answers = [read(""), read("non " * 20, cut=True), read(REFERENCE)]
    counts = outputs.count(answers)
    assert counts == {
        "sentences": 3, "empty": 1, "truncated": 1, "thoughts": 0, "chatter": 0, "loops": 1,
        "echoes": 0,
    }  # fmt: skip
    said = "1 empty, 1 cut off at the token limit, 1 that repeat themselves"
    assert outputs.describe(counts) == said
