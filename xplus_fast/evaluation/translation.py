"""Translation quality: test sets, answers, and the metrics of sacrebleu and of this project."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xplus_fast.data.chat import prompt_text
from xplus_fast.data.files import Rejected, read_lines
from xplus_fast.data.languages import canonical, language_name
from xplus_fast.data.readers import Example
from xplus_fast.data.records import say
from xplus_fast.data.steps.quality import comet_scores
from xplus_fast.errors import UserError
from xplus_fast.evaluation.recipe import TestSet, TranslationConfig
from xplus_fast.files import resolve

# The SentencePiece models that sacrebleu downloads at first use; it trusts any file of the name
SPM = {
    "flores200": (
        "flores200sacrebleuspm",
        "14bb8dfb35c0ffdea7bc01e56cea38b9e3d5efcdcb9c251d6b40538e1aab555a",
    ),
    "flores101": ("sacrebleu_tokenizer_spm.model", None),
}
TOKENIZERS = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}  # of BLEU, else 13a


@dataclass(frozen=True)
class Lines:
    """One direction of a test set."""

    name: str  # "flores200:en-sw"
    languages: tuple[str, str]
    sources: list[str]
    references: list[str]


def read_sets(sets: Sequence[TestSet]) -> list[Lines]:
    """Every direction of the test sets. Raises `UserError` for missing files and unequal lines."""
    found, files = [], {}
    for test in sets:
        for direction in test.directions:
            texts = []
            for code in direction.split("-"):
                path = resolve(test.files.format(lang=test.languages.get(code, code)))
                if path not in files:
                    files[path] = _read(path)
                texts.append(files[path])
            if len(texts[0]) != len(texts[1]):
                raise UserError(
                    f"translation.sets: {test.name} {direction}: {len(texts[0])} lines and"
                    f" {len(texts[1])}: equally many are wanted"
                )
            a, b = direction.split("-")
            cut = [side[: test.limit] for side in texts]
            found.append(Lines(f"{test.name}:{direction}", (a, b), cut[0], cut[1]))
    return found


def _read(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"translation.sets: {path}: no such file")
    lines = []
    for _, line in read_lines(path):
        if isinstance(line, Rejected):
            raise UserError(f"translation.sets: {line}")
        lines.append(line)
    return lines


def prompts(lines: Lines, config: TranslationConfig, tokenizer: Any) -> list[str]:
    """What the model is asked, in its chat template, thinking off."""
    src, tgt = map(language_name, lines.languages)
    made = []
    for text in lines.sources:
        asked = config.prompt.format(src=src, tgt=tgt, text=text)
        messages = [say("user", asked), say("assistant", "")]
        if config.system:
            messages.insert(0, say("system", config.system))
        example = Example(tuple(messages), lines.name, "", "")
        made.append(prompt_text(example, tokenizer, "masked"))
    return made


def score(
    lines: Lines, outputs: list[tuple[str, bool]], config: TranslationConfig
) -> dict[str, Any]:
    """Scores, sacrebleu's signatures, and counts, of one direction.

    Returns {"scores": {metric: value}, "signatures": {...}, "empty", "truncated", "missing":
    {metric: why}}: a metric whose model is absent costs that metric alone.
    """
    texts = [text for text, _ in outputs]
    found: dict[str, Any] = {
        "scores": {}, "signatures": {}, "missing": {}, "sentences": len(texts),
        "empty": texts.count(""), "truncated": sum(cut for _, cut in outputs),
    }  # fmt: skip
    for name in config.metrics:
        try:
            if name == "off_target":
                found["scores"][name] = 100 * float(np.mean(off_target(lines, texts)))
            elif name == "xcomet":
                found["scores"][name] = 100 * float(np.mean(xcomet(lines, texts, config)))
            else:
                metric = make_metric(name, lines.languages[1], config)
                result = metric.corpus_score(texts, [lines.references])
                found["scores"][name] = result.score
                found["signatures"][name] = str(metric.get_signature())
        except UserError as e:
            found["missing"][name] = str(e)
    return found


def make_metric(name: str, target: str, config: TranslationConfig) -> Any:
    """sacrebleu's metric. Raises `UserError` where what it needs is missing or another."""
    from sacrebleu.metrics import BLEU, CHRF

    if name == "chrf":
        return CHRF(word_order=2)
    if name == "spbleu":
        check_spm(config.spbleu)
        return BLEU(tokenize=config.spbleu)
    tokenizer = TOKENIZERS.get(canonical(target).partition("_")[0], "13a")
    try:
        return BLEU(tokenize=tokenizer)
    except (ImportError, RuntimeError) as e:
        said = " ".join(str(e).split())
        raise UserError(f"bleu: the tokenizer {tokenizer} is not there ({said})") from None


def check_spm(name: str) -> None:
    """See that sacrebleu's SentencePiece file is the one that its name says."""
    from sacrebleu.utils import SACREBLEU_DIR

    file, checksum = SPM[name]
    path = Path(os.environ.get("SACREBLEU", SACREBLEU_DIR)) / "models" / file
    if not path.is_file():
        raise UserError(
            f"spbleu: {path} is missing; sacrebleu downloads it at its first use of"
            f" tokenize={name}, where there is a network"
        )
    if checksum and hashlib.sha256(path.read_bytes()).hexdigest() != checksum:
        raise UserError(f"spbleu: {path} is not the model of {name} (its checksum is another)")


def off_target(lines: Lines, texts: Sequence[str]) -> NDArray[np.float64]:
    """1 where a text is of another language than it should be (or empty), 0 where it is not."""
    from xplus_fast.data.steps.identify import IdentifyOptions, advantage

    language = canonical(lines.languages[1]).partition("_")[0]
    margin = IdentifyOptions().margin
    wrong = [not text or advantage(text, language)[0] > margin for text in texts]
    return np.array(wrong, float)


def xcomet(lines: Lines, texts: Sequence[str], config: TranslationConfig) -> list[float]:
    """Sentence scores of XCOMET, 0 to 1, by unbabel-comet in its own environment."""
    triples = zip(lines.sources, texts, lines.references, strict=True)
    rows = [{"src": s, "mt": t, "ref": r} for s, t, r in triples]
    return comet_scores(
        rows, config.comet_python, config.comet_model, option="translation.comet_python"
    )
