"""Every option of `xplus-fast evaluate`, in one dataclass tree."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from xplus_fast.config import PROMPT, Path_, Seed
from xplus_fast.data.languages import canonical, codes_of, is_language
from xplus_fast.errors import UserError
from xplus_fast.files import program, resolve
from xplus_fast.options import (
    FOLDER_NAME,
    Amount,
    Count,
    Range,
    check_fields,
    load_options,
    parse_bytes,
)

Metric = Literal["chrf", "bleu", "spbleu", "off_target", "terms", "xcomet", "metricx"]


@dataclass(frozen=True)
class TestSet:
    """Line-aligned files of several languages, such as FLORES, or those of WMT24++ (.jsonl)."""

    name: Annotated[str, FOLDER_NAME]
    files: Path_  # {lang} stands for a language: data/flores200/{lang}.devtest
    directions: list[str]  # "en-sw", in the codes of `languages` or of the files
    languages: dict[str, str] = field(default_factory=dict)  # en: eng_Latn, as files are named
    limit: Count | None = None  # first sentences only
    documents: bool = False  # a text is what stands between empty lines, or shares a document_id
    terms: Path_ | None = None  # a TSV, for the metric "terms": docs/evaluation.md


@dataclass(frozen=True)
class TranslationConfig:
    sets: list[TestSet] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=lambda: ["chrf", "bleu", "off_target"])  # type: ignore[arg-type]
    prompt: str = PROMPT
    system: str | None = None
    max_new_tokens: Count = 512
    # whose SentencePiece model spBLEU splits by; figures of the two do not compare
    spbleu: Literal["flores200", "flores101"] = "flores200"
    comet_python: str = "python"  # of the environment that has unbabel-comet
    comet_model: str = "Unbabel/XCOMET-XL"  # a name on the hub, or a checkpoint file
    metricx_python: str = "python"  # of an environment that has torch, transformers, sentencepiece
    metricx_model: str = "google/metricx-24-hybrid-xl-v2p6"  # a name on the hub, or a folder
    metricx_tokenizer: str = "google/mt5-xl"


@dataclass(frozen=True)
class LiveCodeBenchConfig:
    """Its own runner, which the task "livecodebench" asks for questions and judgement."""

    folder: Path_ | None = None  # a checkout of it
    python: str = "python"  # of the environment that has what it needs
    release: str = "release_latest"
    start_date: str | None = None  # of a question's contest, 2025-01-31
    end_date: str | None = None
    max_new_tokens: Count = 2048


@dataclass(frozen=True)
class ReasoningConfig:
    """Tasks of lm-evaluation-harness, run by its own command line, and LiveCodeBench."""

    tasks: list[str] = field(default_factory=list)
    include_path: Path_ | None = None  # a folder of task files of one's own
    limit: Count | None = None  # documents of a task
    fewshot: Amount | None = None
    chat: bool = True  # apply the model's chat template, thinking off
    allow_code: bool = False  # tasks that execute what the model writes
    code_seconds: Count = 1800  # that judging such a task may take
    code_memory: str = "16GB"  # of address space, each process; resident, all together
    code_reads: list[Path_] = field(default_factory=list)  # that judging needs, beside Python's own
    # what the system must permit, or code is not executed: docs/evaluation.md
    code_isolation: Literal["namespaces", "landlock", "limits"] = "namespaces"
    python: str | None = None  # of an environment with lm-eval; None: this one
    livecodebench: LiveCodeBenchConfig = field(default_factory=LiveCodeBenchConfig)


@dataclass(frozen=True)
class EvaluateRecipe:
    output: Path_
    translation: TranslationConfig = field(default_factory=TranslationConfig)
    reasoning: ReasoningConfig = field(default_factory=ReasoningConfig)
    engine: Literal["auto", "vllm", "generate"] = "auto"  # auto: vLLM where it is installed
    # a metric or task that lacks something is told before anything is made; skip: and left out
    on_missing: Literal["stop", "skip"] = "stop"
    batch_size: Count = 16
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    bootstrap: Annotated[int, Range(1, 1_000_000)] = 1000  # resamplings of each confidence interval
    confidence: Annotated[float, Range(0.5, 1, below=True)] = 0.95
    seed: Annotated[int, Seed] = 0


def load_evaluate_recipe(path: str | Path, overrides: Sequence[str] = ()) -> EvaluateRecipe:
    """Read a YAML recipe with `key=value` overrides. Raises `UserError` for what is wrong in it."""
    recipe = load_options(EvaluateRecipe, path, overrides)
    if not recipe.translation.sets and not recipe.reasoning.tasks:
        raise UserError("translation.sets or reasoning.tasks: something to evaluate is wanted")
    if recipe.translation.sets and not recipe.translation.metrics:
        raise UserError("translation.metrics: at least one is wanted, such as chrf")
    names = [s.name.casefold() for s in recipe.translation.sets]  # of files, see `RESERVED`
    for i, test in enumerate(recipe.translation.sets):
        at = f"translation.sets.{i}"
        if names.count(test.name.casefold()) > 1 or not test.name:
            raise UserError(f"{at}.name: '{test.name}' is taken already or no name of a folder")
        check_fields(test.files, f"{at}.files", ("lang",), "lang")
        if not test.directions:
            raise UserError(f"{at}.directions: at least one is wanted, such as en-sw")
        for direction in test.directions:
            ends = codes_of(direction)
            if (
                len(ends) != 2
                or not all(map(is_language, ends))
                or canonical(ends[0]) == canonical(ends[1])
            ):
                raise UserError(f"{at}.directions: {direction!r} is not two languages, as en-sw is")
            if test.directions.count(direction) > 1:
                raise UserError(f"{at}.directions: {direction!r} is there twice")
    check_fields(recipe.translation.prompt, "translation.prompt", ("src", "tgt", "text"), "text")
    if recipe.reasoning.code_memory:
        parse_bytes(recipe.reasoning.code_memory, "reasoning.code_memory")
    return _resolved(recipe)


def _resolved(recipe: EvaluateRecipe) -> EvaluateRecipe:
    """The recipe with absolute paths: some are opened by processes that run elsewhere."""
    tasks, code = recipe.reasoning, recipe.reasoning.livecodebench
    return replace(
        recipe,
        output=str(resolve(recipe.output)),
        translation=replace(
            recipe.translation,
            sets=[
                replace(s, files=str(resolve(s.files)), terms=s.terms and str(resolve(s.terms)))
                for s in recipe.translation.sets
            ],
            comet_python=program(recipe.translation.comet_python),
            metricx_python=program(recipe.translation.metricx_python),
        ),
        reasoning=replace(
            tasks,
            include_path=tasks.include_path and str(resolve(tasks.include_path)),
            python=tasks.python and program(tasks.python),
            livecodebench=replace(
                code, folder=code.folder and str(resolve(code.folder)), python=program(code.python)
            ),
        ),
    )
