"""The hub's own client against a hub of our own, on this machine: what is asked for and read."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.data.kinds import CARD, layout

REVISION = "a" * 40
# In another process: the client reads its settings when it is imported.
READ = """
import json, sys
from xplus_fast.config import DataConfig, Source
from xplus_fast.data.readers import Reading, read_examples
from xplus_fast.errors import UserError
for path, subset, split in json.loads(sys.argv[1]):
    source = Source(path, subset=subset, split=split)
    try:
        found = read_examples(source, DataConfig(), Reading())
        print(json.dumps([e.messages[-1]["content"] for e in found]))
    except UserError as e:
        print(json.dumps(str(e)))
"""


class Hub:
    """A server of one repository, which notes the files that are fetched from it."""

    def __init__(self, repository: Path) -> None:
        self.fetched: list[str] = []
        names = [p.relative_to(repository).as_posix() for p in sorted(repository.rglob("*"))]
        names = [name for name in names if (repository / name).is_file()]
        about = {"id": "org/pairs", "sha": REVISION, "siblings": [{"rfilename": n} for n in names]}
        tree = [{"type": "file", "path": n, "size": (repository / n).stat().st_size, "oid": "b"}
                for n in names]  # fmt: skip
        fetched = self.fetched

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                kind, _, rest = self.path.partition("?")[0].partition("/org/pairs")
                data, headers = b"{}", {"X-Error-Code": "RepoNotFound"}
                if kind == "/api/datasets":
                    data = json.dumps(tree if rest.startswith("/tree/") else about).encode()
                    headers = {"Content-Type": "application/json"}
                elif kind == "/datasets" and rest.startswith("/resolve/"):
                    name = rest.split("/", 3)[3]
                    data = (repository / name).read_bytes()
                    headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"',
                               "X-Repo-Commit": REVISION}  # fmt: skip
                    if body:
                        fetched.append(name)
                self.send_response(404 if "X-Error-Code" in headers else 200)
                for key, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if body:
                    self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Hub]:
    names = ("fr/part-1.jsonl", "sw/a.jsonl", "sw/b.jsonl", "sw/held.jsonl")
    hub = Hub(layout(tmp_path / "repository", *names, card=CARD))
    yield hub
    hub.close()


def test_the_client_fetches_what_is_asked_for(served: Hub, tmp_path: Path) -> None:
    def read(*asked: tuple[str, str | None, str | None]) -> list[object]:
        there = f"http://127.0.0.1:{served.server.server_port}"
        env = {**os.environ, "HF_ENDPOINT": there, "HF_HOME": str(tmp_path / "home"),
               "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
               "PYTHONPATH": os.pathsep.join(sys.path)}  # fmt: skip
        command = [sys.executable, "-c", READ, json.dumps(asked)]
        ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return [json.loads(line) for line in ran.stdout.splitlines()]

    held = ("org/pairs", "en-sw", "validation")
    found = read(held, ("org/pairs", None, None), ("org/none", None, None))
    assert found == [
        ["sw/held.jsonl"],
        "org/pairs: several subsets in its card: en-fr, en-sw; name one of these as `subset:`",
        "org/none: no such folder here, and no such repository on the hub (or a private one)",
    ]
    assert set(served.fetched) == {"README.md", "sw/held.jsonl"}
    assert read(("org/pairs", "en-sw", None)) == [["sw/a.jsonl", "sw/b.jsonl"]]
    served.close()  # what was had before is read without it
    assert read(held) == [["sw/held.jsonl"]]
    (file,) = (tmp_path / "home" / "hub").glob("datasets--*/snapshots/*/sw/held.jsonl")
    file.rename(file.with_name("held-00000-of-00002.jsonl"))  # of a download that was cut off
    for name in ("README.md", "sw/a.jsonl", "sw/b.jsonl"):
        (file.parents[1] / name).unlink()
    (file.parents[1] / "README.md").touch()
    (said,) = read(("org/pairs", None, None))
    assert said == "org/pairs: held-00001-of-00002 is not in the hub's cache; download it"
    assert "the hub cannot be reached" in str(read(("org/none", None, None)))
