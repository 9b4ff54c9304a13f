"""Step 6, instruction reformatting: a pair becomes one conversation a direction.

The prompt's template and whether a direction is taken depend on the pair alone (a hash of its
texts and the seed), never on the order of the rows.
"""

from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa

from xplus_fast.config import PROMPT
from xplus_fast.data.languages import language_name
from xplus_fast.data.steps.dedup import text_hash

SCHEMA = pa.schema(
    [
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("src", pa.string()),
        ("tgt", pa.string()),
        ("pair", pa.string()),  # the same of both directions of one pair
        ("corpus", pa.string()),
        ("where", pa.string()),
    ]
)


@dataclass(frozen=True)
class InstructOptions:
    # templates, of which each pair gets one: {src} and {tgt} are languages' names, {text} the text
    prompts: list[str] = field(default_factory=lambda: [PROMPT])
    system: str | None = None  # a system message before every pair


Direction = Literal["forward", "backward"]


def instruct_pairs(
    batch: pa.RecordBatch, options: InstructOptions, *, direction: Direction, seed: int
) -> pa.RecordBatch:
    """Conversations of `SCHEMA`: "forward" asks for the target, "backward" for the source."""
    ends = ("source", "target") if direction == "forward" else ("target", "source")
    texts = [batch.column(e).to_pylist() for e in ends]
    codes = [batch.column(f"{e}_language").to_pylist() for e in ends]
    messages = []
    for text, answer, src, tgt in zip(*texts, *codes, strict=True):
        chosen = text_hash(f"{seed}|{src}|{tgt}|{text}") % len(options.prompts)
        prompt = options.prompts[chosen].format(
            src=language_name(src), tgt=language_name(tgt), text=text
        )
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        if options.system:
            turns.insert(0, {"role": "system", "content": options.system})
        messages.append(turns)
    pairs = [f"{text_hash(chr(0).join(sorted(both))):016x}" for both in zip(*texts, strict=True)]
    columns = {"messages": messages, "src": codes[0], "tgt": codes[1], "pair": pairs}
    columns |= {name: batch.column(name).to_pylist() for name in ("corpus", "where")}
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)
