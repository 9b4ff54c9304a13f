"""What computing prompts once saves on real sentences in the recipe's languages."""

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest

from tests.assets import shared_data
from xplus_fast.config import DataConfig, Source
from xplus_fast.data.collate import PackCollator, split_batch
from xplus_fast.data.corpus import load_corpus
from xplus_fast.data.languages import language_name
from xplus_fast.data.packed import look_at_work
from xplus_fast.planning.flops import work_of

STEP = 16384  # tokens


@pytest.fixture(scope="module")
def corpus(qwen_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """16 language pairs in both directions, 400 pairs of each at most."""
    folder = shared_data("parallel")
    sources = []
    for file in sorted(folder.glob("tatoeba.en-*.en.gz")):
        code = file.name.split(".")[1].removeprefix("en-")
        paths = [str(file), str(file).replace(".en.gz", f".{code}.gz")]
        sources.append(Source(paths, languages=["en", code], limit=400))
    assert len(sources) == 16
    data = DataConfig(cache=str(tmp_path_factory.mktemp("cache")))
    return load_corpus(sources, data, qwen_tokenizer, seed=0, show=False)


@pytest.mark.parametrize("micro_batch", [4096, 16384])
def test_nearly_all_that_directions_share_is_saved(corpus, qwen_tokenizer, micro_batch):
    """Against one group a direction and step, each in one place, in whatever parts it is run."""
    saved = could = total = 0
    for row in corpus.train.packed(STEP):
        first = np.cumsum([0, *row["lengths"]])[:-1]
        ids, labels = row["input_ids"].numpy(), row["labels"].numpy()
        by_direction: dict[str, list[bytes]] = defaultdict(list)
        for a, n in zip(first, row["lengths"], strict=True):
            own = a + int(np.argmax(labels[a : a + n] != -100)) - 1
            direction = asked(qwen_tokenizer, row["input_ids"][a : a + n])
            by_direction[direction].append(ids[a:own].astype(">u4").tobytes())
        for texts in by_direction.values():
            could += (len(texts) - 1) * common(texts)
        batch = PackCollator(shared_prefixes=True)([row])
        parts = split_batch(batch, micro_batch)
        assert all(p["input_ids"].shape[1] <= micro_batch for p in parts)
        works = [work_of(p["layout"]) for p in parts]
        assert sum(w.data_tokens for w in works) == sum(row["lengths"])
        saved += sum(w.data_tokens - w.tokens for w in works)
        total += sum(row["lengths"])
    print(f"saved {saved / total:.1%} of {total:,} tokens, {saved / could:.1%} of what could be")
    assert saved > 0.98 * could and 0.26 < saved / total < 0.28


def asked(tokenizer: Any, ids: Any) -> str:
    """ "English to Swahili": the direction in a conversation's first line."""
    line = tokenizer.decode(ids).split("\n")[1]
    return line.removeprefix("Translate the following text from ").removesuffix(".")


def common(texts: list[bytes]) -> int:
    n = min(map(len, texts)) // 4
    table = np.array([np.frombuffer(t, ">u4", n) for t in texts])
    same = (table == table[0]).all(0)
    return n if same.all() else int(np.argmin(same))


def test_every_step_has_the_mix_of_the_corpus(corpus, qwen_tokenizer):
    rows = corpus.train.packed(STEP)
    tags, n = corpus.summary["tags"], corpus.summary["sequences"]
    share = {
        " to ".join(map(language_name, tag.split("-"))): count / n for tag, count in tags.items()
    }
    assert len(share) == 32 and len(rows) > 20
    for row in rows:
        counts = Counter(asked(qwen_tokenizer, i) for i in row["input_ids"].split(row["lengths"]))
        assert counts.keys() <= share.keys()
        off = [counts[tag] - len(row["lengths"]) * share[tag] for tag in share]
        assert max(map(abs, off)) <= 2, off


def test_what_a_corpus_saves_is_measured(corpus):
    rows = corpus.train.packed(STEP)
    shared, apart = (look_at_work(rows, 4096, shared=on) for on in (True, False))
    assert apart.saved == 0 and 0.2 < shared.saved < 0.4
    whole = look_at_work(rows, 4096, shared=True, most=len(rows))
    assert shared.saved == pytest.approx(whole.saved, abs=0.02)
