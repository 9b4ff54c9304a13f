"""What an evaluation lacks is told in a line each, before a model is loaded or asked."""

import importlib.util
import json
import sys
import time

import numpy as np
import pytest

from tests.evaluation.foreign import COMET, python_with
from tests.evaluation.test_evaluate import recipe, run
from xplus_fast.errors import UserError
from xplus_fast.evaluation import evaluate, generate, ready, sets, translation
from xplus_fast.evaluation.recipe import TranslationConfig, load_evaluate_recipe
from xplus_fast.foreign import metricx_scores

SPBLEU = "spbleu: {tmp}/nothing/models/flores200sacrebleuspm is missing; sacrebleu downloads it"


@pytest.fixture
def nothing_is_made(monkeypatch, tmp_path):
    """No weight is hashed or read, no answer is asked for, no run exported."""
    for name in ("load", "model_digest"):
        monkeypatch.setattr(generate, name, lambda *a: pytest.fail("a model is read"))
    for name in ("check_model", "run_tasks"):
        monkeypatch.setattr(evaluate, name, lambda *a, **k: pytest.fail("a model is looked at"))
    monkeypatch.setenv("SACREBLEU", str(tmp_path / "nothing"))
    (tmp_path / "no").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "no").chmod(0o755)


def languages(place, *codes):
    """A copy of the test set for other languages; its recipe."""
    for code in codes:
        (place / f"{code}.devtest").write_text((place / "fr.devtest").read_text())
    named = {"name": "m", "files": str(place / "{lang}.devtest")}
    return [{**named, "directions": [f"en-{code}" for code in codes]}]


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({"translation": {"metrics": ["spbleu"]}}, [SPBLEU]),
        ({"translation": {"metrics": ["xcomet"], "comet_python": "no-such-python"}},
         ["translation.comet_python: no-such-python: No such file or directory"]),
        ({"translation": {"metrics": ["xcomet"], "comet_python": "{tmp}/no"}},
         ["translation.comet_python: {tmp}/no is no Python that runs (no reason given)"]),
        ({"translation": {"metrics": ["xcomet"], "comet_python": sys.executable}},
         ["translation.comet_python: unbabel-comet is not installed in the environment of"]),
        ({"translation": {"metrics": ["metricx"], "metricx_python": "{tmp}/nobody"}},
         ["translation.metricx_python: {tmp}/nobody: No such file"]),
        ({"translation": {"metrics": ["terms"]}}, ["terms: no set names a file of them"]),
        ({"reasoning": {"tasks": ["x"], "python": "no-such-python"}},
         ["reasoning.python: no-such-python: No such file or directory"]),
        ({"reasoning": {"tasks": ["x"], "include_path": "{tmp}/nowhere"}},
         ["reasoning.include_path: {tmp}/nowhere: no such folder"]),
        ({"reasoning": {"tasks": ["x"], "code_reads": ["{tmp}/nowhere"]}},
         ["reasoning.code_reads: {tmp}/nowhere: no such file or folder"]),
        ({"reasoning": {"tasks": ["livecodebench"]}},
         ["livecodebench: it executes what the model writes; reasoning.allow_code=true"]),
        ({"reasoning": {"tasks": ["livecodebench"], "allow_code": True, "limit": 3}},
         ["livecodebench: its evaluator judges all questions"]),
        ({"device": "cuda:77"}, ["device: 'cuda:77' is not there"]),
        ({"device": "banana"}, ["device: 'banana' is not there"]),
        ({"device": "meta"}, ["device: 'meta' is not there"]),
        # all at once, a line each
        ({"translation": {"metrics": ["spbleu", "xcomet", "terms"], "comet_python": "nobody"},
          "reasoning": {"tasks": ["x"], "python": "no-such-python"}, "device": "banana"},
         ["device: 'banana'", "translation.metrics: terms: no set", SPBLEU,
          "translation.comet_python: nobody", "reasoning.python: no-such-python"]),
    ],
)  # fmt: skip
def test_what_is_missing_is_told_first(
    place, tmp_path, capsys, nothing_is_made, options, messages
):  # fmt: skip
    options = json.loads(json.dumps(options).replace("{tmp}", str(tmp_path)))
    path = recipe(place, tmp_path / "out", **options)
    began = time.process_time()
    code, _, err = run(capsys, place / "tuned", path, "--base", place / "base")
    assert time.process_time() - began < 1
    lines = err.splitlines()
    assert code == 2 and len(lines) == len(messages), err
    for line, message in zip(lines, messages, strict=True):
        assert line.startswith("xplus-fast: ") and message.replace("{tmp}", str(tmp_path)) in line
    assert not (tmp_path / "out").exists()


def test_tokenizers_and_identifiers_are_asked_of_every_target(
    place, tmp_path, capsys, nothing_is_made
):  # fmt: skip
    pytest.importorskip("py3langid", reason="identifies languages")
    test_sets = languages(place, "ja", "fon", "zh")
    path = recipe(place, tmp_path / "out", translation={"sets": test_sets, "metrics": ["bleu"]})
    if importlib.util.find_spec("MeCab") is None:
        code, _, err = run(capsys, place / "tuned", path)
        assert code == 2 and "bleu: the tokenizer ja-mecab is not there" in err
    code, _, err = run(capsys, place / "tuned", path, "translation.metrics=[off_target]")
    assert code == 2 and "off_target: py3langid does not know Fon (fon)" in err


def test_sentencepiece_and_its_model(tmp_path, monkeypatch):
    """Missing, or a file that is none: a line, never a trace."""
    from sacrebleu.tokenizers import tokenizer_spm

    monkeypatch.setattr(translation, "check_spm", lambda name: None)
    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models/sacrebleu_tokenizer_spm.model").write_bytes(b"no model")
    config = TranslationConfig(spbleu="flores101")
    with pytest.raises(UserError, match="spbleu: the tokenizer flores101 is not there"):
        translation.make_metric("spbleu", "fr", config)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="spbleu: the tokenizer flores101 .*sentencepiece"):
        translation.make_metric("spbleu", "fr", config)


def test_a_broken_environment_or_checkpoint_is_found_by_trying(
    place, tmp_path, capsys, nothing_is_made
):  # fmt: skip
    python = python_with(tmp_path, unbabel_comet="import pkg_resources_of_old")
    checkpoint = tmp_path / "comet/checkpoints/model.ckpt"
    options = {"metrics": ["xcomet"], "comet_python": str(python), "comet_model": str(checkpoint)}
    path = recipe(place, tmp_path / "out", translation=options)
    code, _, err = run(capsys, place / "tuned", path)
    assert code == 2 and "translation.comet_model: " in err and "model.ckpt: no such file" in err
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    code, _, err = run(capsys, place / "tuned", path)
    assert code == 2 and "hparams.yaml: no such file" in err
    (tmp_path / "comet/hparams.yaml").touch()
    code, _, err = run(capsys, place / "tuned", path)
    assert code == 2 and "cannot import comet" in err and "pkg_resources_of_old" in err
    # a name on the hub that is neither in its cache nor can be asked for
    code, _, err = run(capsys, place / "tuned", path, "translation.comet_model=Unbabel/XCOMET-XL")
    assert code == 2 and "translation.comet_model: Unbabel/XCOMET-XL: no such folder here" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("condition", "there"),
    [
        ("speed < 0", "there will be translation, mine:en-fr:chrf"),
        ("reasoning < 0", "there will be translation, mine:en-fr:chrf"),
        ("mine:en-sw:chrf < 0", "mine:fr-en:bleu"),
        ("mine:en-fr:spbleu < 0", "mine:fr-en:bleu"),
    ],
)
def test_a_condition_that_nothing_will_meet(
    place, tmp_path, capsys, nothing_is_made, condition, there
):  # fmt: skip
    path = recipe(place, tmp_path / "out")
    both = (place / "tuned", path, "--base", place / "base")
    code, _, err = run(capsys, *both, "--fail-if", condition)
    assert code == 2 and "no change of" in err and there in err and err.count("\n") == 1


def test_unknown_tasks_and_code_are_found_before_a_model_answers(
    place, tmp_path, capsys, nothing_is_made
):  # fmt: skip
    pytest.importorskip("lm_eval", reason="knows the tasks: pip install 'xplus-fast[reasoning]'")
    path = recipe(place, tmp_path / "out", reasoning={"tasks": ["nonsense", "humaneval", "mmlu"]})
    code, _, err = run(capsys, place / "tuned", path)
    first, second = err.splitlines()
    assert code == 2 and "nonsense: lm-evaluation-harness has no task 'nonsense'" in first
    assert "humaneval: it executes what the model writes; reasoning.allow_code=true" in second


def test_a_template_that_refuses_is_found_before_the_other_model_answers(
    place, tmp_path, capsys, monkeypatch
):  # fmt: skip
    import shutil

    base = shutil.copytree(place / "base", tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ raise_exception('no system, no user') }}")
    monkeypatch.setattr(generate, "load", lambda *a: pytest.fail("a model is read"))
    path = recipe(place, tmp_path / "out")
    code, _, err = run(capsys, place / "tuned", path, "--base", base)
    assert code == 2 and "no system, no user" in err and err.count("\n") == 1


def test_comet_in_an_environment_of_its_own(place, tmp_path, capsys):
    """With a stand-in of its interface; the real one is run by hand: docs/evaluation.md."""
    python = python_with(tmp_path, unbabel_comet=COMET)
    checkpoint = tmp_path / "comet/checkpoints/model.ckpt"
    checkpoint.parent.mkdir(parents=True)
    for file in (checkpoint, tmp_path / "comet/hparams.yaml"):
        file.touch()
    options = {"metrics": ["xcomet"], "comet_python": str(python), "comet_model": str(checkpoint)}
    path = recipe(place, tmp_path / "out", translation=options)
    code, out, err = run(capsys, place / "tuned", path, "--base", place / "base", "--json")
    assert code == 0, err
    rows = {r["name"]: r for r in json.loads(out)["rows"]}
    texts = (tmp_path / "out/tuned.mine.en-fr.txt").read_text().split("\n")[:-1]
    references = (place / "fr.devtest").read_text().splitlines()
    share = [
        np.mean([w in t.split() for w in r.split()]) for t, r in zip(texts, references, strict=True)
    ]
    assert rows["mine:en-fr"]["tuned"] == pytest.approx(100 * np.mean(share))
    assert rows["mine:en-fr"]["low"] is not None  # it has a score of each sentence, so an interval
    config = load_evaluate_recipe(path).translation
    (lines, _) = sets.read_sets(load_evaluate_recipe(path).translation.sets)
    scores = translation.xcomet(lines, [references[0], "", references[2], "no"], config)
    assert scores.tolist() == [1, 0, 1, 0]  # an empty one, of which the model says NaN, is 0
    broken = python_with(tmp_path / "b", unbabel_comet=COMET.replace('if row["mt"]', "if 0"))
    with pytest.raises(UserError, match="3 of 4 scores are no numbers"):
        translation.xcomet(lines, ["a", "", "b", "c"], TranslationConfig(comet_python=str(broken)))


def test_metricx_on_the_classes_of_transformers(tmp_path):
    """A tiny mT5 with MetricX's vocabulary: batches of padded texts say what one alone does."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import MT5Config, MT5ForConditionalGeneration, PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *"source: candidate: reference: a b c d e f".split()]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = MT5Config(
        vocab_size=250112, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2,
        num_decoder_layers=1,
    )  # fmt: skip
    config.tie_word_embeddings = False  # as MetricX is
    model = MT5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # so that what is read makes a difference
            p.copy_(torch.randn_like(p) if p.dim() > 1 else torch.ones_like(p))
        model.lm_head.weight[250089] *= -15
    for stack in (model.encoder, model.decoder):
        stack.set_input_embeddings(model.shared)
    model.config.save_pretrained(tmp_path)
    weights = {k: v for k, v in model.state_dict().items() if "embed_tokens" not in k}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    texts = ["", "a", "b c", "d e f a", "c " * 40]
    rows = [
        {"source": texts[i], "hypothesis": texts[j], "reference": texts[(i + j) % 5]}
        for i in range(5) for j in range(5)
    ]  # fmt: skip
    found = metricx_scores(rows, sys.executable, str(tmp_path), str(tmp_path), option="x")
    for row, score in zip(rows, found, strict=True):
        text = f"source: {row['source']} candidate: {row['hypothesis']}"
        text += f" reference: {row['reference']}"
        ids = torch.tensor([core.encode(text, add_special_tokens=False).ids])
        with torch.no_grad():
            logits = model(input_ids=ids, decoder_input_ids=torch.zeros((1, 1), dtype=torch.long))
        right = float(logits.logits[0, 0, 250089])
        assert score == pytest.approx(min(max(right, 0), 25), abs=1e-3)
    assert 0 < sum(0 < score < 25 for score in found) < len(found)  # some beyond the ends
    save_file({"shared.weight": weights["shared.weight"]}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(UserError, match="it lacks .* no MetricX model"):
        metricx_scores(rows, sys.executable, str(tmp_path), str(tmp_path), option="x")


def test_missing_things_do_not_stop_where_the_recipe_says_so(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SACREBLEU", str(tmp_path / "nothing"))
    options = {"translation": {"metrics": ["spbleu", "chrf"]}, "on_missing": "skip"}
    path = recipe(place, tmp_path / "out", **options)
    lines = ready.check(load_evaluate_recipe(path))
    assert [each.name for each in lines] == ["mine:en-fr", "mine:fr-en"]
    assert "left out: spbleu: " in capsys.readouterr().err
    # where nothing is left to be measured, and where something is wrong, it stops all the same
    code, _, err = run(capsys, place / "tuned", path, "translation.metrics=[spbleu]")
    assert code == 2 and "spbleu: " in err and err.count("\n") == 1
    code, _, err = run(capsys, place / "tuned", path, "device=banana")
    assert code == 2 and "device: 'banana'" in err


def test_off_target_by_script():
    pytest.importorskip("py3langid", reason="identifies languages")
    latin = "Ku\u0107a je crvena i stara."
    cyrillic = "\u041a\u0443\u045b\u0430 \u0458\u0435 \u0441\u0442\u0430\u0440\u0430."
    simple = "\u8fd9\u4e2a\u56fd\u5bb6\u7684\u7ecf\u6d4e\u53d1\u5c55\u5f88\u5feb\u3002"
    full = "\u9019\u500b\u570b\u5bb6\u7684\u7d93\u6fdf\u767c\u5c55\u5f88\u5feb\u3002"
    for code, reference, texts, wrong in [
        ("sr", cyrillic, [cyrillic, latin], [0, 1]), ("sr_Latn", latin, [cyrillic, latin], [1, 0]),
        ("srp_Cyrl", cyrillic, [cyrillic, latin], [0, 1]),
        ("zh", simple, [simple, full], [0, 1]), ("zh_TW", full, [simple, full], [1, 0]),
        ("zho_Hans", simple, [simple, full], [0, 1]),
        ("sr", "iPhone 15 Pro", ["iPhone 15 Pro", "2024."], [0, 0]),  # as the reference has it
    ]:  # fmt: skip
        lines = sets.Lines("m", ("en", code), ["s"] * 2, [reference] * 2)
        assert translation.off_target(lines, texts).tolist() == wrong, code


def test_what_a_score_of_unspaced_languages_means():
    assert "bleu of Thai by 13a" in translation.note("bleu", "tha_Thai")
    assert "spbleu" in translation.note("bleu", "km")
    for name, code in (("bleu", "zh"), ("bleu", "ja"), ("bleu", "fr"), ("chrf", "th")):
        assert translation.note(name, code) == ""
    assert translation.bleu_tokenizer("yue") == translation.bleu_tokenizer("zho_Hant") == "zh"
