"""LiveCodeBench (Jain et al. 2024, arXiv 2403.07974): our answers, its own questions and judge.

Its runner knows hosted models and its own list of local ones; its `custom_evaluator` judges answers
made elsewhere. So its checkout is asked for the questions, the model answers them here, greedily
and out of the cache where they were answered before, and its evaluator runs what was answered, in
limits and without model or network.
"""

import json
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

from xplus_fast.data.chat import prompt_text
from xplus_fast.data.readers import Example, say
from xplus_fast.errors import UserError
from xplus_fast.evaluation.generate import Generator, Subject
from xplus_fast.evaluation.recipe import EvaluateRecipe
from xplus_fast.evaluation.sandbox import last_error, permitted, readable, run_limited
from xplus_fast.files import make_folder, remove, resolve, write_json, write_text
from xplus_fast.foreign import check_packages
from xplus_fast.options import parse_bytes

NAME = "livecodebench"
BRIDGE = Path(__file__).with_name("livecodebench_bridge.py").absolute()
WANTED = "a checkout of github.com/LiveCodeBench/LiveCodeBench"


def measure(
    subject: Subject,
    recipe: EvaluateRecipe,
    folder: Path,
    *,
    generations: Path,
    show: bool,
    what: str,
) -> dict[str, Any]:  # fmt: skip
    """pass@1 of one greedy answer a question, as `reasoning.run_tasks` returns it.

    folder: where its files lie, by the model and the options; a finished one is read again.
    """
    results = folder / "results.json"
    if not results.exists():
        try:
            _run(subject, recipe, folder, generations, show, what)
        except UserError as e:
            return {"missing": str(e)}
    return {**json.loads(results.read_text(encoding="utf-8")), "falling": []}


def check(recipe: EvaluateRecipe) -> None:
    """See that it is allowed and that its checkout is there. Raises `UserError`."""
    r, own = recipe.reasoning, recipe.reasoning.livecodebench
    if not r.allow_code:
        raise UserError("it executes what the model writes; reasoning.allow_code=true lets it")
    if r.limit is not None:
        raise UserError(
            "its evaluator judges all questions: reasoning.limit does not go with it; start_date"
            " and end_date of reasoning.livecodebench narrow them"
        )
    if own.folder is None:
        raise UserError(f"reasoning.livecodebench.folder: {WANTED} is wanted")
    permitted(r.code_isolation)
    if not (resolve(own.folder) / "lcb_runner").is_dir():
        raise UserError(f"reasoning.livecodebench.folder: {resolve(own.folder)} is not {WANTED}")
    check_packages(own.python, (), option="reasoning.livecodebench.python")


def _run(
    subject: Subject, recipe: EvaluateRecipe, folder: Path, generations: Path, show: bool,
    what: str,
) -> None:  # fmt: skip
    check(recipe)  # before the model answers
    r, own = recipe.reasoning, recipe.reasoning.livecodebench
    assert own.folder is not None
    checkout, reads = resolve(own.folder), readable(r.code_reads)
    options = ["--scenario", "codegeneration", "--release_version", own.release]
    for name in ("start_date", "end_date"):
        if value := getattr(own, name):
            options += [f"--{name}", value]
    said = _ask(own.python, checkout, "questions", *options)
    questions = json.loads(said.splitlines()[-1])
    if not questions:
        raise UserError("reasoning.livecodebench: no question of its release is in these dates")

    generator = Generator(
        subject, generations, engine=recipe.engine, batch_size=recipe.batch_size,
        max_new_tokens=own.max_new_tokens, dtype=recipe.dtype, show=show,
    )  # fmt: skip
    prompts = []
    for q in questions:
        messages = tuple(say(m["role"], m["content"]) for m in q["messages"])
        example = Example((*messages, say("assistant", "")), NAME, "", "")
        prompts.append(prompt_text(example, generator.tokenizer, "masked"))
    with closing(generator):
        answers = [text for text, _ in generator.answer(prompts, f"{what} {NAME}")]

    make_folder(folder)
    judge = folder.absolute() / "judge"  # it writes beside the codes
    remove(judge)
    make_folder(judge)
    written, codes = folder.absolute() / "answers.json", judge / "codes.json"
    write_json(written, answers)
    _ask(own.python, checkout, "codes", str(written), str(codes))
    code, said = run_limited(
        [own.python, "-m", "lcb_runner.runner.custom_evaluator", "--custom_output_file",
         str(codes), "--num_process_evaluate", "1", *options],
        seconds=r.code_seconds, memory=parse_bytes(r.code_memory, "code_memory"), folder=checkout,
        reads=[codes, *reads], out=judge, least=r.code_isolation,
    )  # fmt: skip
    judged = codes.with_name("codes_codegeneration_output_eval.json")
    each = codes.with_name("codes_codegeneration_output_eval_all.json")
    if code or not judged.exists() or not each.exists():
        raise UserError(f"its evaluator: {last_error(said)}")
    score = json.loads(judged.read_text())[0]["pass@1"]
    samples = folder / f"samples_{NAME}_{own.release}.jsonl"
    rows = json.loads(each.read_text(encoding="utf-8"))
    write_text(
        samples,
        "".join(
            json.dumps({"doc_id": i, "question_id": q["id"], "pass@1": row["pass@1"],
                        "answer": answer}, ensure_ascii=False) + "\n"
            for i, (q, row, answer) in enumerate(zip(questions, rows, answers, strict=True))
        ),
    )  # fmt: skip
    found = {"scores": {"pass@1": score}, "samples": [str(samples)], "results": str(judged)}
    write_json(folder / "results.json", found)  # last: all else is there


def _ask(python: str, checkout: Path, *arguments: str) -> str:
    try:
        ran = subprocess.run(
            [python, str(BRIDGE), *arguments],
            cwd=checkout,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    except OSError as e:
        raise UserError(f"reasoning.livecodebench.python: {python}: {e.strerror}") from None
    if ran.returncode:
        raise UserError(f"reasoning.livecodebench: {last_error(ran.stderr + ran.stdout)}")
    return ran.stdout
