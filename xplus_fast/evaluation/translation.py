"""Translation quality: what is asked, and the metrics of sacrebleu, of others and our own."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xplus_fast.data.chat import prompt_text
from xplus_fast.data.languages import canonical, language_name
from xplus_fast.data.readers import Example
from xplus_fast.data.records import say
from xplus_fast.data.scripts import in_script
from xplus_fast.errors import UserError
from xplus_fast.evaluation.outputs import Answer, count, one_line, read
from xplus_fast.evaluation.recipe import TranslationConfig
from xplus_fast.evaluation.sets import Lines, folded
from xplus_fast.evaluation.verdict import corpus_scorer, mean_scorer
from xplus_fast.foreign import comet_scores, metricx_scores

# The SentencePiece models that sacrebleu downloads at first use; it trusts any file of the name
SPM = {
    "flores200": (
        "flores200sacrebleuspm",
        "14bb8dfb35c0ffdea7bc01e56cea38b9e3d5efcdcb9c251d6b40538e1aab555a",
    ),
    "flores101": ("sacrebleu_tokenizer_spm.model", None),
}
# of BLEU, else 13a
TOKENIZERS = {"zh": "zh", "yue": "zh", "wuu": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}
UNSPACED = {"zh", "yue", "wuu", "ja", "th", "lo", "km", "my", "bo", "dz"}


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


def read_answers(
    lines: Lines, made: Sequence[tuple[str, bool]], config: TranslationConfig
) -> list[Answer]:
    """What is scored of each (answer, whether it was cut off), and what is odd about it."""
    prompt = config.prompt if not config.system else f"{_literal(config.system)}\n{config.prompt}"
    return [
        read(text, cut, source=source, reference=reference, prompt=prompt,
             languages=lines.languages)
        for (text, cut), source, reference in zip(
            made, lines.sources, lines.references, strict=True
        )
    ]  # fmt: skip


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def score(lines: Lines, answers: Sequence[Answer], config: TranslationConfig) -> dict[str, Any]:
    """Scores of one direction, with what a confidence interval needs, and counts.

    Returns {"measured": {metric: Measured}, "missing": {metric: why}, "counts": {...}}: a metric
    that does not run after all costs that metric alone.
    """
    texts = [answer.text for answer in answers]
    found: dict[str, Any] = {"measured": {}, "missing": {}, "counts": count(answers)}
    for name in config.metrics:
        if name == "terms" and lines.terms is None:
            continue  # of another set
        try:
            found["measured"][name] = measure(name, lines, texts, config)
        except UserError as e:
            found["missing"][name] = str(e)
    return found


@dataclass(frozen=True)
class Measured:
    """A metric of one direction."""

    score: float
    of: Callable[[NDArray[np.intp]], float]  # the score of the sentences with these indices
    signature: str = ""  # sacrebleu's


def measure(name: str, lines: Lines, texts: Sequence[str], config: TranslationConfig) -> Measured:
    """Score answers, one line each, by a metric. Raises `UserError` where it does not run."""
    if name == "off_target":
        of = mean_scorer(off_target(lines, texts), 100)
    elif name == "xcomet":
        of = mean_scorer(xcomet(lines, texts, config), 100)
    elif name == "metricx":
        of = mean_scorer(metricx(lines, texts, config))
    elif name == "terms":
        of = _share_scorer(kept_terms(lines, texts))
    else:
        metric = make_metric(name, lines.languages[1], config)
        references = [one_line(text) for text in lines.references]
        result = metric.corpus_score(texts, [references])
        of = corpus_scorer(metric, texts, references)
        return Measured(result.score, of, str(metric.get_signature()))
    return Measured(of(np.arange(len(texts))), of)


def make_metric(name: str, target: str, config: TranslationConfig) -> Any:
    """sacrebleu's metric. Raises `UserError` where what it needs is missing or another."""
    from sacrebleu.metrics import CHRF

    if name == "chrf":
        return CHRF(word_order=2)
    if name == "spbleu":
        check_spm(config.spbleu)
        return _bleu("spbleu", config.spbleu)
    return _bleu("bleu", bleu_tokenizer(target))


def _bleu(name: str, tokenizer: str) -> Any:
    from sacrebleu.metrics import BLEU

    try:
        return BLEU(tokenize=tokenizer)
    except (ImportError, RuntimeError, OSError) as e:  # a package, its dictionary, its model
        said = " ".join(str(e).split())
        raise UserError(f"{name}: the tokenizer {tokenizer} is not there ({said})") from None


def bleu_tokenizer(target: str) -> str:
    """sacrebleu's tokenizer for a language: 13a, unless it is written without spaces and has one of
    its own."""
    return TOKENIZERS.get(_base(target), "13a")


def note(name: str, target: str) -> str:
    """What a reader of a score should know; empty where it is nothing."""
    if name == "bleu" and _base(target) in UNSPACED and bleu_tokenizer(target) == "13a":
        return (
            f"bleu of {language_name(target)} by 13a takes whole phrases for words, as it is"
            " written without spaces, and means little; spbleu and chrf are for it"
        )
    return ""


def _base(code: str) -> str:
    return canonical(code).partition("_")[0]


def check_spm(name: str) -> None:
    """See that sacrebleu's SentencePiece file is the one that its name says."""
    from sacrebleu.utils import SACREBLEU_DIR

    file, checksum = SPM[name]
    path = Path(os.environ.get("SACREBLEU", SACREBLEU_DIR)) / "models" / file
    if not path.is_file():
        raise UserError(
            f"spbleu: {path} is missing; sacrebleu downloads it, where there is a network: python"
            f" -c \"from sacrebleu.metrics import BLEU; BLEU(tokenize='{name}')\""
        )
    if checksum and hashlib.sha256(path.read_bytes()).hexdigest() != checksum:
        raise UserError(f"spbleu: {path} is not the model of {name} (its checksum is another)")


def off_target(lines: Lines, texts: Sequence[str]) -> NDArray[np.float64]:
    """1 where a text is of another language or script than it should be (or empty), else 0.

    A script counts where the reference is in the right one: a name in Latin letters is in order.
    """
    from xplus_fast.data.steps.identify import IdentifyOptions, advantage

    target = lines.languages[1]
    margin = IdentifyOptions().margin
    wrong = [
        not text
        or advantage(text, _base(target))[0] > margin
        or (in_script(reference, target) is not False and in_script(text, target) is False)
        for text, reference in zip(texts, lines.references, strict=True)
    ]
    return np.array(wrong, float)


def check_identifier(name: str, target: str, config: TranslationConfig) -> None:
    """See that `off_target` can tell a language. Raises `UserError`."""
    from xplus_fast.data.steps.identify import is_identified

    if not is_identified(_base(target)):
        raise UserError(f"{name}: py3langid does not know {language_name(target)} ({target})")


def xcomet(lines: Lines, texts: Sequence[str], config: TranslationConfig) -> NDArray[np.float64]:
    """Sentence scores of XCOMET, 0 to 1, by unbabel-comet in its own environment."""
    triples = zip(lines.sources, texts, lines.references, strict=True)
    rows = [{"src": s, "mt": t, "ref": r} for s, t, r in triples]
    found = np.array(
        comet_scores(
            rows, config.comet_python, config.comet_model, option="translation.comet_python"
        )
    )
    # models that average over a translation's tokens have no number for an empty one
    found[[i for i, text in enumerate(texts) if not text and not np.isfinite(found[i])]] = 0
    return _finite(found, config.comet_model)


def metricx(lines: Lines, texts: Sequence[str], config: TranslationConfig) -> NDArray[np.float64]:
    """Errors of each sentence by MetricX, 0 to 25, in its own environment."""
    triples = zip(lines.sources, texts, lines.references, strict=True)
    rows = [{"source": s, "hypothesis": t, "reference": r} for s, t, r in triples]
    found = metricx_scores(
        rows, config.metricx_python, config.metricx_model, config.metricx_tokenizer,
        option="translation.metricx_python",
    )  # fmt: skip
    return _finite(np.array(found), config.metricx_model)


def _finite(scores: NDArray[np.float64], model: str) -> NDArray[np.float64]:
    if bad := int((~np.isfinite(scores)).sum()):
        raise UserError(f"{model}: {bad} of {len(scores)} scores are no numbers")
    return scores


def kept_terms(lines: Lines, texts: Sequence[str]) -> NDArray[np.intp]:
    """[n, 2]: of each sentence, terms that its translation has, and those that its source has.

    Longer terms go first, and what is in one is no other. Case does not count; what is written with
    spaces is a word by itself.
    """
    forms = lines.terms or {}
    sources, targets = (_finder(code) for code in lines.languages)
    terms = sources(list(forms))
    wanted = {term: targets(kept) for term, kept in forms.items()}
    found = np.zeros((len(texts), 2), np.intp)
    for i, (source, text) in enumerate(zip(lines.sources, texts, strict=True)):
        asked = Counter(match.group() for match in terms.finditer(folded(source)))
        for term, times in asked.items():
            has = len(wanted[term].findall(folded(text)))
            found[i] += min(times, has), times
    return found


def _share_scorer(kept: NDArray[np.intp]) -> Callable[[NDArray[np.intp]], float]:
    """Per cent of the terms that sources have that their translations have; 0 of none."""

    def scored(chosen: NDArray[np.intp]) -> float:
        has, asked = kept[chosen].sum(0)
        return float(100 * has / asked) if asked else 0.0

    return scored


def _finder(code: str) -> Callable[[Sequence[str]], re.Pattern[str]]:
    """Terms of a language -> what finds them in a text that is folded."""
    before, behind = ("", "") if _base(code) in UNSPACED else (r"(?<!\w)", r"(?!\w)")

    def compiled(terms: Sequence[str]) -> re.Pattern[str]:
        longest = sorted(map(folded, terms), key=len, reverse=True)
        return re.compile(f"{before}(?:{'|'.join(map(re.escape, longest))}){behind}")

    return compiled
