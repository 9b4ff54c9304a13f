"""What tests of kinds of files share: records, what is shown of them, a stand-in of the hub."""

import json
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from xplus_fast.config import DataConfig, Source
from xplus_fast.data.chat import Encoded, encode, preview
from xplus_fast.data.readers import Reading, read_examples

BLOCK = "<think>\n\n</think>\n\n"
PLAIN = DataConfig(prompt="{src}>{tgt}: {text}", pack_tokens=512)
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def turn(question: str, answer: str, system: str = "") -> str:
    """What the preview shows of one turn."""
    said = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return (
        f"{said}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{BLOCK}"
        f"[[{answer}<|im_end|>]]"
    )


def previews(source: Source, tokenizer: Any, data: DataConfig = PLAIN) -> list[str]:
    examples = list(read_examples(source, data, Reading()))
    encoded = encode(examples, tokenizer, "masked", data.pack_tokens)
    assert all(isinstance(e, Encoded) for e in encoded), encoded
    return [preview(e, tokenizer, colour=False) for e in encoded if isinstance(e, Encoded)]


def jsonl(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def share(speaker: str, value: Any, **more: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value, **more}


TALK = [message("user", "q"), message("assistant", "a")]

CHAT_OF_TOOLS: list[dict[str, Any]] = [
    message("user", "q"),
    message("assistant", None, tool_calls=[CALL]),
    message("tool", "2", tool_call_id="1", name="add"),
    message("assistant", "two"),
]

CARD = """---
license: cc0-1.0
configs:
- config_name: en-fr
  data_files:
  - split: train
    path: fr/part-*.jsonl
- config_name: en-sw
  data_files:
  - split: train
    path: [sw/a.jsonl, sw/b.jsonl]
  - split: validation
    path: sw/held.jsonl
---
# About
"""


def layout(root: Path, *names: str, card: str = "") -> Path:
    for name in names:
        jsonl(root / name, {"prompt": "q", "completion": name})
    if card:
        (root / "README.md").write_text(card)
    return root


class StandIn:
    """What the functions of huggingface_hub do, with a repository in a folder."""

    def __init__(self, repository: Path, local: Path) -> None:
        self.repository, self.local = repository, local
        self.downloaded: list[str] = []

    def dataset_info(self, name: str) -> Any:
        assert name == "org/pairs"
        files = [p for p in sorted(self.repository.rglob("*")) if p.is_file()]
        names = [p.relative_to(self.repository).as_posix() for p in files]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n) for n in names])

    def hf_hub_download(self, name: str, file: str, repo_type: str) -> str:
        assert (name, repo_type) == ("org/pairs", "dataset")
        return str(self.repository / file)

    def snapshot_download(
        self, name: str, repo_type: str, allow_patterns: Any = None, local_files_only: bool = False
    ) -> str:
        assert (name, repo_type) == ("org/pairs", "dataset")
        for path in sorted(self.repository.rglob("*")):
            file = path.relative_to(self.repository).as_posix()
            if local_files_only or not path.is_file():
                continue
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                self.downloaded.append(file)
                (self.local / file).parent.mkdir(parents=True, exist_ok=True)
                (self.local / file).write_bytes(path.read_bytes())
        return str(self.local)
