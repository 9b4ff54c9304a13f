"""`xplus-fast evaluate` on tiny models: scores, cache, verdict, and what goes wrong."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from tests.assets import load_tokenizer
from tests.evaluation.conftest import SENTENCES
from xplus_fast import cli
from xplus_fast.errors import UserError
from xplus_fast.evaluation import generate, reasoning, sets, translation, verdict
from xplus_fast.evaluation.recipe import (
    EvaluateRecipe,
    ReasoningConfig,
    TestSet,
    TranslationConfig,
)
from xplus_fast.files import append_lines

ROOT = Path(__file__).parents[2]


def recipe(place, out, **options):
    tree = {
        "output": str(out),
        "translation": {
            "sets": [{"name": "mine", "files": str(place / "{lang}.devtest"),
                      "directions": ["en-fr", "fr-en"]}],
            "metrics": ["chrf", "bleu"], "max_new_tokens": 6,
        },
        "bootstrap": 50,
    }  # fmt: skip
    for key, value in options.items():
        if isinstance(value, dict) and key in tree:
            tree[key] = {**tree[key], **value}
        else:
            tree[key] = value
    path = Path(out).parent / f"{Path(out).name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def subject(folder):
    return generate.subject_of(folder, "auto", "cpu")


def run(capsys, *arguments):
    code = cli.main(["evaluate", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_side_by_side_and_again_from_the_cache(place, tmp_path, capsys, monkeypatch):
    path = recipe(place, tmp_path / "out")
    arguments = (place / "tuned", path, "--base", place / "base")
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    result = json.loads(out)
    rows = {(r["name"], r["metric"]): r for r in result["rows"]}
    assert set(rows) == {(f"mine:{d}", m) for d in ("en-fr", "fr-en") for m in ("chrf", "bleu")}
    for r in rows.values():
        assert r["change"] == pytest.approx(r["tuned"] - r["base"])
        assert r["low"] <= r["high"] and r["verdict"] in ("better", "same", "worse")
    assert result["counts"]["tuned mine:en-fr"]["truncated"] == 4  # 6 tokens end no sentence
    texts = (tmp_path / "out/tuned.mine.en-fr.txt").read_text().splitlines()
    assert len(texts) == 4
    for name in ("verdict.md", "verdict.csv", "verdict.json", "verdict.png"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    assert "| mine:en-fr | chrf |" in (tmp_path / "out/verdict.md").read_text()
    # again: nothing is loaded, nothing generated
    monkeypatch.setattr(generate, "load", lambda *a: pytest.fail("a model was loaded"))
    assert json.loads(run(capsys, *arguments, "--json")[1]) == result
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "mine:en-fr chrf" in out and "verdict.md" in out


# chrF++ and BLEU of SmolLM2-135M-Instruct, of the run that made tests/evaluation/flores-generations
FLORES = {
    "en-fr": (18.3557, 1.6667),
    "fr-en": (23.5684, 2.4730),
    "en-sw": (6.6465, 0.2480),
    "sw-en": (15.5296, 1.4369),
}
# what its chat template makes of a conversation without a system message
TEMPLATE = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_flores_with_the_cached_answers_of_a_real_model(place, tmp_path, capsys, monkeypatch):
    """recipes/evaluate-demo.yaml, 200 sentences and four directions, without the model."""
    data = ROOT.parent / "shared/data/flores200"
    if not data.is_dir():
        pytest.skip("FLORES-200 is not beside the checkout, and cannot be shipped with it")
    folder = tmp_path / "model"
    tokenizer = load_tokenizer(place / "tokenizer")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr("xplus_fast.evaluation.evaluate.check_model", lambda *a, **k: None)
    monkeypatch.setattr(generate, "model_digest", lambda folder: "smollm2")
    monkeypatch.setattr(generate, "load", lambda *a: pytest.fail("an answer is not in the cache"))
    options = dict(engine="auto", batch_size=32, max_new_tokens=96, dtype="auto")
    cache = tmp_path / "out/generations"
    cache.mkdir(parents=True)
    file = generate.Generator(subject(folder), cache, show=False, **options)._file
    shutil.copy(ROOT / "tests/evaluation/flores-generations.jsonl", file)
    code, out, err = run(
        capsys, folder, ROOT / "recipes/evaluate-demo.yaml", f"output={tmp_path / 'out'}",
        f"translation.sets.0.files={data}/{{lang}}.devtest", "translation.metrics=[chrf,bleu]",
        "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    found = {(r["name"], r["metric"]): r["tuned"] for r in result["rows"]}
    for direction, (chrf, bleu) in FLORES.items():
        name = f"flores200:{direction}"
        assert found[name, "chrf"] == pytest.approx(chrf, abs=1e-4)
        assert found[name, "bleu"] == pytest.approx(bleu, abs=1e-4)
        assert result["counts"][f"tuned {name}"]["sentences"] == 200


def test_scores_are_those_of_sacrebleus_command_line(place, tmp_path, capsys):
    path = recipe(place, tmp_path / "out", translation={"max_new_tokens": 24})
    code, out, _ = run(capsys, place / "tuned", path, "--json")
    result = json.loads(out)
    for r in result["rows"]:
        direction = r["name"].partition(":")[2]
        reference = place / f"{direction.partition('-')[2]}.devtest"
        hypothesis = tmp_path / f"out/tuned.mine.{direction}.txt"
        options = ["-m", r["metric"]] + ["--chrf-word-order", "2"] * (r["metric"] == "chrf")
        ran = subprocess.run(
            [sys.executable, "-m", "sacrebleu", str(reference), "-i", str(hypothesis), *options,
             "-w", "4"], capture_output=True, text=True, check=True,
        )  # fmt: skip
        theirs = json.loads(ran.stdout)
        assert f"{theirs['score']:.4f}" == f"{r['tuned']:.4f}"
        assert r["base"] is None and r["verdict"] == ""
        # the command line names its one corpus; all else of the signature is equal
        assert theirs["signature"] in result["signatures"][f"{r['metric']} {r['name']}"]


def test_a_killed_run_generates_nothing_twice(place, tmp_path):
    tokenizer_folder = place / "tuned"
    options = dict(engine="generate", batch_size=1, max_new_tokens=4, dtype="auto")
    asked = [f"prompt {i}" for i in range(4)]
    first = generate.Generator(subject(tokenizer_folder), tmp_path, show=False, **options)
    whole = first.answer(asked, "x")
    assert first.made == 4
    (file,) = tmp_path.glob("*.jsonl")
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:2]) + "\n" + lines[2][:9])  # killed while it wrote
    again = generate.Generator(subject(tokenizer_folder), tmp_path, show=False, **options)
    assert again.answer([*asked, asked[0]], "x") == [*whole, whole[0]] and again.made == 2
    third = generate.Generator(subject(tokenizer_folder), tmp_path, show=False, **options)
    assert third.answer(asked, "x") == whole and third.made == 0
    other = generate.Generator(subject(place / "base"), tmp_path, show=False, **options)
    other.answer(asked[:1], "x")
    assert other.made == 1  # another model's answers are its own


def test_answers_that_a_kill_cut_off_inside_a_character(place, tmp_path):
    """Whatever line separators Unicode knows stand inside of an answer, and are kept."""
    options = dict(engine="generate", batch_size=2, max_new_tokens=4, dtype="auto")
    made = generate.Generator(subject(place / "tuned"), tmp_path, show=False, **options)
    prompts = ["one", "two", "three"]
    keys = [hashlib.sha256(p.encode()).hexdigest() for p in prompts]
    texts = ["a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\r\nh", "é 象", "cut 象"]
    append_lines(made._file, [json.dumps([k, t, True], ensure_ascii=False)
                              for k, t in zip(keys, texts, strict=True)])  # fmt: skip
    whole = made._file.read_bytes()
    for end in range(1, 12):
        made._file.write_bytes(whole[:-end])
        again = generate.Generator(subject(place / "tuned"), tmp_path, show=False, **options)
        assert again.answer(prompts[:2], "x") == [(t, True) for t in texts[:2]]
        again._batches = lambda asked: iter([[(i, f"{p}!", False) for i, p in enumerate(asked)]])
        assert again.answer(prompts, "x")[2] == ("three!", False)  # made again, on its own line
        after = generate.Generator(subject(place / "tuned"), tmp_path, show=False, **options)
        assert after.answer(prompts, "x")[2] == ("three!", False)
    # a line that the disk damaged is an answer to be made again, the others are there
    lines = whole.split(b"\n")
    for damaged in (
        b"",
        b"\0\0",
        lines[0][:-9] + b"\xff" + lines[0][-8:],
        b"1",
        b"[1]",
        b"[[],1,2]",
    ):
        made._file.write_bytes(b"\n".join([damaged, *lines[1:]]))
        after = generate.Generator(subject(place / "tuned"), tmp_path, show=False, **options)
        assert keys[0] not in after._known and len(after._known) == 2


def test_samples_with_line_separators_inside(tmp_path):
    rows = [{"doc_id": i, "resps": [["a\u2028b\x85"]], "acc": i / 2} for i in range(3)]
    file = tmp_path / "samples_sums_2026.jsonl"
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    found = reasoning.sample_scores([str(file)], "acc")
    assert found is not None and found.tolist() == [0, 0.5, 1]


def test_a_model_that_emits_nothing_is_one_line(place, tmp_path, capsys, monkeypatch):
    def silent(self, prompts, what):
        return [("" if "fr" in what[-3:] or all_of_them else "a", False) for _ in prompts]

    monkeypatch.setattr(generate.Generator, "answer", silent)
    path, all_of_them = recipe(place, tmp_path / "out"), True
    code, _, err = run(capsys, place / "tuned", path)
    assert code == 2 and "emits nothing: every answer is empty" in err and err.count("\n") == 1
    all_of_them = False  # in one direction alone
    code, out, _ = run(capsys, place / "tuned", path)
    assert code == 0 and "tuned mine:en-fr: every answer is empty" in out
    assert "fr-en: every" not in out and "mine:en-fr chrf" in out


def test_batches_sorted_by_length_answer_in_order(place):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "tuned")
    tokenizer = load_tokenizer(place / "tokenizer")
    asked = ["a", "a much longer prompt than the others are", "two words", "x y z"]
    with generate.greedy(model, tokenizer, 5):
        alone = [next(generate.answers(model, tokenizer, [p], 1))[0][1:] for p in asked]
        together = {}
        for batch in generate.answers(model, tokenizer, asked, 3):
            together |= {i: (text, cut) for i, text, cut in batch}
    assert [together[i] for i in range(4)] == alone


def test_lm_evaluation_harness_says_the_same_itself(place, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="runs the tasks: pip install 'xplus-fast[reasoning]'")
    path = recipe(
        place, tmp_path / "out", translation={"sets": []}, batch_size=2, on_missing="skip",
        reasoning={"tasks": ["sums", "humaneval", "nonsense"], "chat": False,
                   "include_path": str(place / "tasks")},
    )  # fmt: skip
    # against itself: one run of the harness takes ten seconds, and a model is run once
    both = (place / "tuned", path, "--base", place / "tuned")
    code, out, _ = run(capsys, *both, "--json")
    assert code == 0
    result = json.loads(out)
    (row,) = result["rows"]
    assert (row["kind"], row["name"], row["metric"]) == ("reasoning", "sums", "acc")
    assert (row["low"], row["change"], row["high"], row["verdict"]) == (0, 0, 0, "same")
    assert result["missing"]["humaneval"].startswith("it executes what the model writes")
    assert "nonsense" in result["missing"]["nonsense"]
    ran = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args",
         f"pretrained={place / 'tuned'},dtype=float32", "--tasks", "sums", "--include_path",
         str(place / "tasks"), "--output_path", str(tmp_path / "theirs"), "--batch_size", "2"],
        capture_output=True, text=True, env=os.environ,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    (file,) = (tmp_path / "theirs").glob("**/results_*.json")
    theirs = json.loads(file.read_text())["results"]["sums"]["acc,none"]
    assert row["tuned"] == 100 * theirs
    tree = yaml.safe_load(Path(path).read_text())
    tree["reasoning"]["tasks"] = ["sums"]  # there already
    Path(path).write_text(yaml.safe_dump(tree))
    assert run(capsys, *both, "--fail-if", "reasoning > -1")[0] == 1
    assert run(capsys, *both, "--fail-if", "reasoning < -1")[0] == 0


def test_intervals_by_hand():
    a, b = np.array([0.0, 1.0, 0.0, 1.0]), np.array([1.0, 1.0, 1.0, 1.0])
    found = verdict.difference(
        verdict.mean_scorer(a), verdict.mean_scorer(b), 4, samples=2000, confidence=0.95, seed=0
    )
    assert (found.change, found.low, found.high) == (0.5, 0.0, 1.0)
    assert verdict.judge(found.change, found.low, found.high) == "same"
    assert verdict.judge(1.0, 0.5, 1.5) == "better" and verdict.judge(-1.0, -2, -0.5) == "worse"
    assert verdict.judge(1.0, 0.5, 1.5, lower_is_better=True) == "worse"
    same = verdict.difference(verdict.mean_scorer(a), verdict.mean_scorer(a), 4, samples=10,
                              confidence=0.9, seed=0)  # fmt: skip
    assert (same.change, same.low, same.high) == (0.0, 0.0, 0.0)


def test_resampled_corpus_scores_are_sacrebleus():
    from sacrebleu.metrics import BLEU, CHRF

    outputs, references = SENTENCES["en"], [s.replace("is", "was") for s in SENTENCES["en"]]
    for metric in (CHRF(word_order=2), BLEU()):
        scored = verdict.corpus_scorer(metric, outputs, references)
        for chosen in ([0, 1, 2, 3], [2, 2, 0, 1]):
            right = metric.corpus_score([outputs[i] for i in chosen],
                                        [[references[i] for i in chosen]]).score  # fmt: skip
            assert scored(np.array(chosen)) == pytest.approx(right, abs=1e-9)


def test_conditions():
    changes = {"reasoning": -2.5, "translation": 3.0, "mine:en-fr:chrf": 1.0}
    assert verdict.failed("reasoning < -2", changes)
    assert not verdict.failed("translation<=2.9", changes)
    assert verdict.failed("mine:en-fr:chrf > 0.5", changes)
    with pytest.raises(UserError, match="does not read like"):
        verdict.failed("reasoning is bad", changes)
    with pytest.raises(UserError, match="no change of 'speed' was measured; there is reasoning"):
        verdict.failed("speed < 0", changes)


def test_off_target_and_empty_answers_are_counted():
    pytest.importorskip("py3langid", reason="identifies languages")
    lines = translation.Lines("x:en-fr", ("en", "fr"), ["a", "b", "c"], ["r", "r", "r"])
    french = "Ceci est une phrase fran\u00e7aise assez longue."
    english = "This is rather a long English sentence, clearly."
    assert translation.off_target(lines, [french, english, ""]).tolist() == [0, 1, 1]


def test_spbleu_trusts_no_file_but_the_right_one(tmp_path, monkeypatch):
    monkeypatch.setenv("SACREBLEU", str(tmp_path))
    with pytest.raises(UserError, match="flores200sacrebleuspm is missing; sacrebleu downloads it"):
        translation.check_spm("flores200")
    (tmp_path / "models").mkdir()
    (tmp_path / "models/flores200sacrebleuspm").write_bytes(b"another model")
    with pytest.raises(UserError, match="is not the model of flores200"):
        translation.check_spm("flores200")


def test_a_metric_without_its_model_costs_that_metric(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SACREBLEU", str(tmp_path / "nothing"))
    path = recipe(
        place, tmp_path / "out", on_missing="skip",
        translation={"metrics": ["chrf", "spbleu", "xcomet"], "comet_python": "no-such-python"},
    )  # fmt: skip
    code, out, err = run(capsys, place / "tuned", path, "--json")
    assert "left out: spbleu: " in err and "left out: translation.comet_python: no-such-" in err
    result = json.loads(out)
    assert code == 0 and {r["metric"] for r in result["rows"]} == {"chrf"}
    assert "is missing" in result["missing"]["mine:en-fr spbleu"]
    assert "no-such-python" in result["missing"]["mine:en-fr xcomet"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"translation": {"sets": []}}, "something to evaluate is wanted"),
        ({"translation": {"sets": [{"name": "m", "files": "x.en", "directions": ["en-fr"]}]}},
         "translation.sets.0.files: {lang} is wanted"),
        ({"translation": {"sets": [{"name": "m", "files": "no/{lang}", "directions": ["en-fr"]}]}},
         "no/en: no such file"),
        ({"translation": {"sets": [{"name": "m", "files": "{lang}", "directions": ["en-xx1"]}]}},
         "'en-xx1' is not two languages"),
        ({"translation": {"sets": [{"name": "m", "files": "{lang}", "directions": ["en-eng"]}]}},
         "'en-eng' is not two languages"),
        ({"translation": {"sets": [{"name": "m", "files": "{lang}",
                                  "directions": ["en-fr", "en-fr"]}]}},
         "translation.sets.0.directions: 'en-fr' is there twice"),
        ({"translation": {"sets": [{"name": "m", "files": "{split}/{lang}",
                                  "directions": ["en-fr"]}]}},
         "translation.sets.0.files: only {lang} may stand in braces ('split')"),
        ({"translation": {"prompt": "Say {text} in {language}"}},
         "translation.prompt: only {src}, {tgt} and {text} may stand in braces ('language')"),
        ({"translation": {"prompt": "Translate from {src} to {tgt}"}},
         "translation.prompt: {text} is wanted, where the sentence goes"),
        ({"translation": {"prompt": "{text"}}, "translation.prompt: only {src}, {tgt} and {text}"),
        ({"translation": {"prompt": "{{text}}"}}, "translation.prompt: {text} is wanted"),
        ({"translation": {"metrics": []}}, "translation.metrics: at least one is wanted"),
        ({"translation": {"metrics": ["rouge"]}}, "translation.metrics.0: one of chrf, bleu"),
        ({"engine": "tgi"}, "engine: one of auto, vllm, generate"),
        ({"confidence": 2.0}, "confidence: from 0.5 to below 1"),
    ],
)  # fmt: skip
def test_bad_recipes_are_one_line(place, tmp_path, capsys, options, message):
    code, _, err = run(capsys, place / "tuned", recipe(place, tmp_path / "out", **options))
    assert code == 2 and message in err and err.count("\n") == 1


def test_bad_files_models_and_conditions_are_one_line(place, tmp_path, capsys):
    short = tmp_path / "short"
    short.mkdir()
    (short / "en.devtest").write_text("one\n")
    (short / "fr.devtest").write_text("un\ndeux\n")
    path = recipe(short, tmp_path / "out")
    code, _, err = run(capsys, place / "tuned", path)
    assert code == 2 and "mine en-fr: 1 lines and 2: equally many are wanted" in err
    path = recipe(place, tmp_path / "out")
    code, _, err = run(capsys, tmp_path / "nowhere", path)
    assert code == 2 and "nowhere" in err and err.count("\n") == 1
    code, _, err = run(capsys, place / "tuned", path, "--fail-if", "reasoning < 1")
    assert code == 2 and "it goes with --base" in err
    code, _, err = run(
        capsys, place / "tuned", path, "--base", place / "base", "--fail-if", "reasoning"
    )
    assert code == 2 and "does not read like" in err


def test_prompts_are_the_trainings_own_with_thinking_off(place):
    tokenizer = load_tokenizer(place / "tokenizer")
    named = [TestSet("m", str(place / "{lang}.devtest"), ["en-fr"], limit=1)]
    (lines,) = sets.read_sets(named)
    (prompt,) = translation.prompts(lines, TranslationConfig(), tokenizer)
    assert "Translate the following text from English to French." in prompt
    assert "English source: Good morning." in prompt
    assert prompt.endswith("<think>\n\n</think>\n\n")


def test_no_code_of_a_model_runs_and_nobody_is_asked(place, tmp_path, capsys, monkeypatch):
    """A model with `auto_map` is the stock one of its type; of another type it is refused."""
    model = shutil.copytree(place / "tuned", tmp_path / "model")
    mark = tmp_path / "mark"
    for name in ("modeling_x", "configuration_x", "tokenization_x"):
        (model / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\nclass X: pass\n")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    (model / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("somebody is asked"))
    stock = run(capsys, place / "tuned", recipe(place, tmp_path / "stock"), "--json")
    code, out, err = run(capsys, model, recipe(place, tmp_path / "out"), "--json")
    assert code == 0 and not mark.exists(), err
    assert json.loads(out)["rows"] == json.loads(stock[1])["rows"]
    config["model_type"] = "x"
    (model / "config.json").write_text(json.dumps(config))
    code, _, err = run(capsys, model, recipe(place, tmp_path / "other"))
    assert code == 2 and err.count("\n") == 1 and not mark.exists()


def test_what_loads_models_by_itself_is_told_to_run_none_of_their_code(
    place, tmp_path, monkeypatch
):
    for engine, kind in (("generate", "hf"), ("vllm", "vllm")):
        options = EvaluateRecipe(str(tmp_path), engine=engine, reasoning=ReasoningConfig(["x"]))
        line = reasoning.command_line(
            generate.Subject(tmp_path, "", None), "x", options, tmp_path, tmp_path
        )
        told = dict(zip(line, line[1:], strict=False))
        assert told["--model"] == kind and "--trust_remote_code" not in line
        assert "trust_remote_code=False" in told["--model_args"].split(",")
    made = []
    tokenizer = load_tokenizer(place / "tuned")

    class LLM:
        def __init__(self, folder, **options):
            if "base" in folder:
                raise RuntimeError("Engine core initialization failed.\nSee above")
            made.append((folder, options))
            self.llm_engine = SimpleNamespace(
                engine_core=SimpleNamespace(shutdown=lambda: made.append("over"))
            )

        def generate(self, prompts, options, use_tqdm):
            if any(len(p["prompt_token_ids"]) > 100 for p in prompts):
                raise ValueError("longer than the maximum model length")
            ids = tokenizer(" yes \u00e9")["input_ids"]
            answer = SimpleNamespace(text=" yes ", token_ids=tuple(ids), finish_reason="length")
            return [SimpleNamespace(outputs=[answer]) for _ in prompts]

    fake = SimpleNamespace(LLM=LLM, SamplingParams=dict, __spec__=object())
    monkeypatch.setitem(sys.modules, "vllm", fake)
    generator = generate.Generator(
        subject(place / "tuned"), tmp_path / "cache", engine="vllm", batch_size=1,
        max_new_tokens=1, dtype="auto", show=False,
    )  # fmt: skip
    assert generator.answer(["x", "y"], "") == [("yes \u00e9", True)] * 2  # decoded as ours are
    with pytest.raises(UserError, match="vllm refuses a prompt .longer than the maximum"):
        generator.answer(["x " * 200], "")
    generator.close()  # its processes go before another model comes
    generator.close()
    assert made == [(str(place / "tuned"), {"dtype": "auto", "trust_remote_code": False}), "over"]
    other = generate.Generator(
        subject(place / "base"), tmp_path / "cache", engine="vllm", batch_size=1,
        max_new_tokens=1, dtype="auto", show=False,
    )  # fmt: skip
    with pytest.raises(UserError, match="vllm does not start .* initialization failed. See above"):
        other.answer(["x"], "")
