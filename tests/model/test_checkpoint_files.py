"""Reading a model folder: right values from whole files, one line for every kind of damage."""

import json
import math
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from xplus_fast.errors import UserError
from xplus_fast.model import headers
from xplus_fast.model.checkpoint_files import (
    INDEX,
    SINGLE,
    CheckpointFiles,
    check_against,
    read_header,
    resolve_model,
)
from xplus_fast.planning.from_recipe import read_shape


def model(tied: bool = False) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=24,
        tie_word_embeddings=tied,
    )
    return Qwen3ForCausalLM(config).to(torch.bfloat16)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    model().save_pretrained(tmp_path / "model", max_shard_size="4KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) >= 3
    return tmp_path / "model"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    model().save_pretrained(tmp_path / "one")
    return tmp_path / "one"


def refused(folder: Path) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(UserError) as caught:
        CheckpointFiles.open(folder)
    line = str(caught.value)
    assert "\n" not in line and str(folder) in line
    return line


@pytest.mark.parametrize("shards", ["4KB", "1GB"])
@pytest.mark.parametrize("tied", [False, True])
def test_names_shapes_dtypes_and_bytes_are_those_of_the_model(tmp_path, shards, tied, monkeypatch):
    monkeypatch.setattr(headers, "CHUNK", 100)  # several pieces and a rest
    stock = model(tied)
    stock.save_pretrained(tmp_path, max_shard_size=shards)
    files = CheckpointFiles.open(tmp_path)
    state = stock.state_dict()
    if tied:
        del state["lm_head.weight"]
    assert set(files.names) == set(state)
    for name, value in state.items():
        assert files.dtype(name) == torch.bfloat16 and files.shape(name) == tuple(value.shape)
        assert torch.equal(files.tensor(name), value)
        assert b"".join(files.raw(name)) == value.view(torch.uint8).numpy().tobytes()
    assert files.config["hidden_size"] == 16


def test_every_dtype_scalars_and_empty_tensors(tmp_path):
    dtypes = {code: getattr(torch, name) for code, (name, _) in headers.CODES.items()}
    tensors = {code: torch.ones(3, 5).to(dtype) for code, dtype in dtypes.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / SINGLE)
    files = CheckpointFiles(tmp_path, {}, headers.read_header(tmp_path / SINGLE))
    assert set(files.names) == set(tensors)
    for name, value in tensors.items():
        assert files.dtype(name) == value.dtype and files.shape(name) == tuple(value.shape)
        assert torch.equal(files.tensor(name).double(), value.double())
        assert name not in dtypes or files.entries[name].code == name
    assert files.entries["scalar"].numel == 1 and list(files.raw("empty")) == []


def test_check_against_names_the_first_offender_and_the_count(sharded):
    files = CheckpointFiles.open(sharded)
    expected = {name: files.shape(name) for name in files.names}
    assert check_against(files, expected) == []
    head = expected.pop("lm_head.weight")
    assert check_against(files, expected) == ["lm_head.weight"]  # a tied one may be stored
    with pytest.raises(UserError, match=r"no tensor 'a' \(2 missing in all\)"):
        check_against(files, {"lm_head.weight": head, "a": (1,), "b": (1,)})
    with pytest.raises(UserError, match=r"'lm_head.weight' has shape \[64, 16\].*\[64, 32\]"):
        check_against(files, {"lm_head.weight": (64, 32)})
    del expected["model.norm.weight"], expected["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=r"_proj.weight' is nothing that.*\(2 such tensors in all"):
        check_against(files, expected)


# what is missing


def test_folders_that_hold_no_model(tmp_path):
    assert "no such model folder" in refused(tmp_path / "nowhere")
    assert "no config.json" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "neither model.safetensors nor" in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert "pickled" in refused(tmp_path) and "convert" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1,')
    assert "config.json: not a valid JSON object" in refused(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "config.json: not a valid JSON object: found a list" in refused(tmp_path)


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_index_and_shards_that_disagree(sharded):
    whole = (sharded / INDEX).read_text()
    shards = sorted(p.name for p in sharded.glob("*.safetensors"))
    where = json.loads(whole)["weight_map"]
    name = "model.layers.1.mlp.up_proj.weight"

    edit_index(sharded, lambda m: m.update({name: "model-9.safetensors"}))
    assert "names 'model-9.safetensors', which is not in the folder" in refused(sharded)
    edit_index(sharded, lambda m: m.update({name: "../model.safetensors"}))
    assert "is not the name of a file in the folder" in refused(sharded)
    other = next(s for s in shards if s != where[name])
    edit_index(sharded, lambda m: m.update({name: other}))
    assert f"places {name!r} in {other}, which does not hold it" in refused(sharded)
    (sharded / INDEX).write_text(whole)
    edit_index(sharded, lambda m: m.update({"model.ghost": shards[0]}))
    assert "places 'model.ghost'" in refused(sharded)
    (sharded / INDEX).write_text(whole)
    edit_index(sharded, lambda m: m.pop(name))
    assert f"{name!r} is not in {INDEX}" in refused(sharded)
    (sharded / INDEX).write_text("{}")
    assert "no weight_map" in refused(sharded)
    (sharded / INDEX).write_text(whole)
    CheckpointFiles.open(sharded)

    save_file({name: torch.zeros(1)}, sharded / SINGLE)
    assert f"{SINGLE}: not part of the model in {INDEX}" in refused(sharded)
    (sharded / SINGLE).rename(sharded / "model-00001-of-00001.safetensors")
    assert "model-00001-of-00001.safetensors: not part of" in refused(sharded)


def test_tensor_in_two_shards(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = load_file(second)
    name = next(iter(load_file(first)))
    save_file(tensors | {name: torch.zeros(1)}, second)
    assert f"{second}: {name!r} is also in {first.name}" in refused(sharded)


# a header that lies


def lie(folder: Path, change=None, *, text: bytes | None = None, data: bytes = b"") -> str:
    """Rewrite model.safetensors' header and return the refusal."""
    file = folder / SINGLE
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    if text is None:
        header = json.loads(whole[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :] + data)
    try:
        return refused(folder)
    finally:
        file.write_bytes(whole)


def test_headers_that_lie(single):
    name = "model.layers.1.mlp.up_proj.weight"  # [24, 16] bf16, 768 bytes

    def put(**item):
        return lambda header: header[name].update(item)

    def shift(by):
        def change(header):
            header[name]["data_offsets"] = [o + by for o in header[name]["data_offsets"]]

        return change

    assert "takes 1536 bytes" in lie(single, put(dtype="F32"))
    assert "takes 864 bytes" in lie(single, put(shape=[27, 16]))
    assert "no valid shape" in lie(single, put(shape=[-24, -16]))
    assert "no valid shape" in lie(single, put(shape=[24.0, 16]))
    assert "no valid data_offsets" in lie(single, put(data_offsets=[True, "x"]))
    assert "its offsets are [0]" in lie(single, put(data_offsets=[0]))
    assert "stored as 'F4'" in lie(single, put(dtype="F4"))
    assert "leaves a gap before it" in lie(single, shift(2))
    assert "overlaps the tensor before it" in lie(single, shift(-2))
    assert "overlaps" in lie(single, lambda h: h.update(twin=h[name]))
    assert "no valid shape" in lie(single, lambda h: h.update({name: 3}))
    assert "leaves a gap" in lie(single, shift(10**12))
    assert "leaves a gap" in lie(single, lambda h: h.pop(name))
    assert "header is damaged" in lie(single, text=b'{"a": ')
    assert "'a' occurs twice" in lie(single, text=b'{"a": {}, "a": {}}')
    assert "longer than its tensors" in lie(single, lambda h: None, data=b"\0")
    CheckpointFiles.open(single)


def test_files_that_are_no_whole_safetensors(single):
    file = single / SINGLE
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for cut in (0, 7, 8, 8 + length - 1):
        file.write_bytes(whole[:cut])
        assert "not a whole safetensors file" in refused(single)
    for cut in (8 + length, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert "truncated" in refused(single)
    file.write_bytes((2**63).to_bytes(8, "little") + whole[8:])
    assert "not a whole safetensors file" in refused(single)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refused(single)


def test_file_cut_after_it_was_opened(single):
    files = CheckpointFiles.open(single)
    name = max(files.names, key=lambda n: files.entries[n].end)
    with (single / SINGLE).open("r+b") as handle:
        handle.truncate(files.entries[name].end - 3)
    with pytest.raises(UserError, match="3 bytes too early"):
        list(files.raw(name))


def test_header_order_is_the_order_of_the_data(single):
    entries = read_header(single / SINGLE)
    starts = [entry.start for entry in entries.values()]
    assert starts == sorted(starts)
    assert all(e.end - e.start == 2 * math.prod(e.shape) for e in entries.values())


# local folder or hub id


def test_resolve_local(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("asked the hub for a local path")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models" / "q").mkdir(parents=True)
    assert resolve_model("models/q") == tmp_path / "models" / "q"
    assert resolve_model("~/models/q") == tmp_path / "models" / "q"
    for missing in ("models/r", "./q", "/q/r", "~/x", "a/b/c", "q", "../x"):
        with pytest.raises(UserError, match="no such model folder"):
            resolve_model(missing)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a model folder is wanted"):
        resolve_model("file")


# The hub's HTTP client, whichever this release has: its errors are the bases of the hub's own.
CLIENT_ERROR = errors.HfHubHTTPError.__bases__[0]


def http_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    raised = kind.__new__(kind)  # its __init__ wants the client's response
    Exception.__init__(raised, "x\ny")
    return raised


@pytest.mark.parametrize(
    "raised, said",
    [
        (http_error(errors.GatedRepoError), "gated"),
        (http_error(errors.RepositoryNotFoundError), "no such repository on the hub"),
        (errors.LocalEntryNotFoundError("long\nstory"), "cannot be reached"),
        (errors.OfflineModeIsEnabled("off"), "may not be asked (offline)"),
        (CLIENT_ERROR("slow\nline"), "cannot be downloaded from the hub: slow line"),
        (
            errors.CorruptedCacheException("odd\nfile"),
            "cannot be downloaded from the hub: odd file",
        ),
        (errors.HFValidationError("no\nid"), "not a hub id"),
        (ConnectionResetError("gone"), "cannot be reached"),
        (TimeoutError("late"), "cannot be reached"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
@pytest.mark.parametrize("what", ["snapshot_download", "hf_hub_download"])
def test_hub_failures_are_one_line(tmp_path, monkeypatch, raised, said, what):
    def fail(*_, **__):
        raise raised

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, what, fail)
    monkeypatch.setattr("xplus_fast.model.hub._reach", lambda url: None)
    with pytest.raises(UserError) as caught:
        resolve_model("Qwen/Nowhere") if what[0] == "s" else read_shape("Qwen/Nowhere")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("Qwen/Nowhere: ")


def test_resolve_hub_downloads_what_is_needed(tmp_path, monkeypatch):
    asked = []

    def download(repo, allow_patterns):
        asked.append((repo, "*.safetensors" in allow_patterns, "*.bin" in allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("Qwen/Qwen3-8B") == tmp_path / "snapshot"
    assert asked == [("Qwen/Qwen3-8B", True, False)]
