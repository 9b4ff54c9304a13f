"""Tasks that execute what a model writes: only when allowed, in limits, and judged by their own."""

import json
import socket
import sys
from pathlib import Path

import pytest
import yaml

from tests.evaluation.test_evaluate import recipe, run
from xplus_fast.evaluation import sandbox

CODE = {  # what a task executes -> whether it may succeed
    "assert 1 + 1 == 2": True,
    "import os; assert 'HF_TOKEN' in os.environ": False,
    "open('big', 'wb').truncate(2 << 30)": False,
    "bytearray(64 << 30)": False,
    "import socket; socket.create_connection(('127.0.0.1', PORT), 2)": False,
}
LEVEL = sandbox.permitted("limits")  # the strictest that this machine permits
JUDGE = """
def passes(references, predictions):
    try:
        exec(references[0], {})
    except (Exception, MemoryError):
        return 0.0
    return 1.0
"""


@pytest.fixture
def server():
    """A port that answers whoever has a network."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def test_a_task_that_executes_code_does_so_in_limits(
    place, tmp_path, capsys, monkeypatch, server  # noqa: F811
):  # fmt: skip
    pytest.importorskip("lm_eval", reason="runs the tasks: pip install 'xplus-fast[reasoning]'")
    monkeypatch.setenv("HF_TOKEN", "secret")
    codes = {code.replace("PORT", str(server)): right for code, right in CODE.items()}
    if LEVEL == "limits":  # which leaves the network open
        codes = {code: right for code, right in codes.items() if "socket" not in code}
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "judge.py").write_text(JUDGE)
    (tasks / "codes.jsonl").write_text("".join(json.dumps({"code": c}) + "\n" for c in codes))
    task = {
        "task": "codes", "dataset_path": "json", "test_split": "test", "unsafe_code": True,
        "dataset_kwargs": {"data_files": {"test": str(tasks / "codes.jsonl")}},
        "output_type": "generate_until", "doc_to_text": "Write code.", "doc_to_target": "{{code}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
        "metric_list": [{"metric": "PASSES", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }  # fmt: skip
    text = yaml.safe_dump(task).replace("PASSES", "!function judge.passes")
    (tasks / "codes.yaml").write_text(text)
    told = {"tasks": ["codes"], "chat": False, "include_path": str(tasks), "code_isolation": LEVEL}
    path = recipe(place, tmp_path / "out", translation={"sets": []}, batch_size=2, reasoning=told)
    code, _, err = run(capsys, place / "tuned", path)
    assert code == 2 and "it executes what the model writes; reasoning.allow_code=true" in err

    (tmp_path / "out").mkdir(exist_ok=True)
    code, out, err = run(capsys, place / "tuned", path, "reasoning.allow_code=true", "--json")
    assert code == 0, err
    (row,) = json.loads(out)["rows"]
    assert row["metric"] == "passes"
    assert row["tuned"] == pytest.approx(100 * sum(codes.values()) / len(codes))
    (samples,) = (tmp_path / "out").glob("reasoning/codes-*/**/samples_codes_*.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda x: x["doc_id"])
    assert [line["passes"] for line in lines] == [float(right) for right in codes.values()]
    assert all(isinstance(line["resps"][0][0], str) for line in lines)  # the model's own answers
    assert not (tasks / "big").exists() and not Path("big").exists()


STAND_IN = {
    "lm_styles.py": """
from enum import Enum
class LMStyle(Enum):
    OpenAIChat = "OpenAIChat"
""",
    "runner/parser.py": """
import argparse
def get_args():
    parser = argparse.ArgumentParser()
    for name in ("scenario", "release_version", "start_date", "end_date", "custom_output_file"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--num_process_evaluate", type=int, default=12)
    return parser.parse_args()
""",
    "runner/scenario_router.py": """
from types import SimpleNamespace
from lcb_runner.lm_styles import LMStyle
def build_prompt_benchmark(args):
    assert args.scenario == "codegeneration" and args.release_version == "release_v1"
    print("Loaded 2 problems")
    def ask(problem, style):
        assert style == LMStyle.OpenAIChat
        return [{"role": "system", "content": "You program."},
                {"role": "user", "content": f"Question {problem.question_id}"}]
    return [SimpleNamespace(question_id=name) for name in ("1_a", "2_b")], ask
""",
    "utils/extraction_utils.py": """
def extract_code(answer, style):
    return "code of " + answer
""",
    "runner/custom_evaluator.py": """
import json, os
from lcb_runner.runner.parser import get_args
args = get_args()
with open(args.custom_output_file) as f:
    outputs = json.load(f)
assert [len(each) for each in outputs] == [1, 1] and outputs[0][0].startswith("code of ")
assert "HF_TOKEN" not in os.environ
path = args.custom_output_file[:-5] + "_codegeneration_output.json"
graded = [{"question_id": "1_a", "graded_list": [True], "pass@1": 1.0},
          {"question_id": "2_b", "graded_list": [False], "pass@1": 0.0}]
metrics = [{"pass@1": 0.5, "detail": {}}, {}, []]
for end, what in (("_eval.json", metrics), ("_eval_all.json", graded)):
    with open(path.replace(".json", end), "w") as f:
        json.dump(what, f)
""",
}


def test_livecodebench_is_asked_and_judges_by_its_own_runner(
    place, tmp_path, capsys, monkeypatch  # noqa: F811
):  # fmt: skip
    """Against a stand-in for its checkout, of its commands and file formats."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    checkout = tmp_path / "LiveCodeBench"
    for name, text in STAND_IN.items():
        file = checkout / "lcb_runner" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    own = {"folder": str(checkout), "python": sys.executable, "release": "release_v1",
           "max_new_tokens": 4}  # fmt: skip
    told = {"tasks": ["livecodebench"], "allow_code": True, "livecodebench": own,
            "code_isolation": LEVEL}  # fmt: skip
    path = recipe(place, tmp_path / "out", translation={"sets": []}, reasoning=told)
    both = (place / "tuned", path, "--base", place / "base")
    code, out, err = run(capsys, *both, "--json")
    assert code == 0, err
    (row,) = json.loads(out)["rows"]
    assert (row["name"], row["metric"], row["tuned"]) == ("livecodebench", "pass@1", 50.0)
    assert row["verdict"] == "same" and row["low"] == row["high"] == 0  # the same two judgements
    samples = list((tmp_path / "out").glob("reasoning/livecodebench-*/samples_*.jsonl"))
    assert len(samples) == 2
    lines = [json.loads(line) for line in samples[0].read_text().splitlines()]
    assert [line["question_id"] for line in lines] == ["1_a", "2_b"]
    # again: neither answered nor judged
    (checkout / "lcb_runner/runner/custom_evaluator.py").write_text("raise SystemExit('asked')")
    assert json.loads(run(capsys, *both, "--json")[1])["rows"] == [row]

    for options, message in (
        (["reasoning.allow_code=false"], "it executes what the model writes"),
        (["reasoning.code_reads=[no-such]"], "reasoning.code_reads: "),
        (["reasoning.limit=5"], "reasoning.limit does not go with it"),
        ([f"reasoning.livecodebench.folder={tmp_path / 'tasks'}"], "is not a checkout of github"),
        (["reasoning.livecodebench.python=no-such"], "no-such: No such file"),
        (["reasoning.livecodebench.release=release_v2"], "AssertionError"),
        (["reasoning.livecodebench.max_new_tokens=3"], "its evaluator: asked"),
    ):
        fresh = f"output={tmp_path / 'fresh'}"
        code, _, err = run(capsys, place / "tuned", path, fresh, *options)
        assert code == 2 and message in err and err.count("\n") == 1, (options, err)
