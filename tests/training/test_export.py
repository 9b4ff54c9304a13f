"""Export gives a stock folder whose other bytes are the base's; verify finds every single bit."""

import errno
import json
import os
import signal
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from xplus_fast.errors import UserError
from xplus_fast.files import new_folder
from xplus_fast.locks import locked
from xplus_fast.model import headers
from xplus_fast.model.checkpoint_files import SINGLE, CheckpointFiles
from xplus_fast.training.export import describe, export, layer_of, verify

UP0, UP2 = "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
NORM0 = "model.layers.0.input_layernorm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def make_base(folder: Path, *, tied=False, family=Qwen3Config, shards="4KB") -> Path:
    torch.manual_seed(0)
    config = family(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=24,
        tie_word_embeddings=tied,
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shards)
    (folder / "tokenizer_config.json").write_text('{"a": 1}')
    (folder / "merges.txt").write_text("a b")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ y }}")
    (folder / "LICENSE").write_text("free")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    (folder / "README.md").write_text("the base's own card")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def changes(base: Path, names=(UP0, NORM0)) -> dict[str, Tensor]:
    files = CheckpointFiles.open(base)
    return {name: files.tensor(name).float() + 0.5 for name in names}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def edit(folder: Path, name: str, change) -> None:
    """Change a tensor's stored bytes in place: change(bytearray)."""
    entry = CheckpointFiles.open(folder).entries[name]
    content = bytearray(entry.file.read_bytes())
    data = content[entry.start : entry.end]
    change(data)
    content[entry.start : entry.end] = data
    entry.file.write_bytes(content)


def flip(at: int, bit: int):
    def change(data: bytearray) -> None:
        data[at] ^= 1 << bit

    return change


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [Qwen3Config, LlamaConfig])
@pytest.mark.parametrize("shards", ["4KB", "1GB"])
def test_round_trip_through_stock_transformers(tmp_path, tied, family, shards, monkeypatch):
    monkeypatch.setattr(headers, "CHUNK", 1000)
    base = make_base(tmp_path / "base", tied=tied, family=family, shards=shards)
    changed = changes(base)
    changed[UP0] = changed[UP0].t().contiguous().t()  # strides of its own
    export(base, changed, tmp_path / "new" / "out", {"layers": [0], "base": "tiny"})
    out = tmp_path / "new" / "out"
    expected = AutoModelForCausalLM.from_pretrained(base).state_dict()
    expected |= {name: value.to(torch.bfloat16) for name, value in changed.items()}
    got = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    assert got.keys() == expected.keys() and (HEAD in got)
    for name, value in expected.items():
        assert got[name].dtype == torch.bfloat16 and torch.equal(got[name], value), name

    result = verify(base, out)
    assert result.ok and set(result.changed) == set(changed)
    assert result.changed_parameters == 24 * 16 + 16
    total = len(CheckpointFiles.open(base).names)
    assert result.identical == total - 2 and result.notes == []
    size = sum(e.end - e.start for e in CheckpointFiles.open(base).entries.values())
    assert result.identical_bytes == size - 2 * result.changed_parameters
    text = describe(result)
    assert f"changed: 2 tensors ({24 * 16 + 16} parameters) in layer 0\n" in text
    assert f"all others bit-identical: {total - 2} tensors" in text and "\nOK: " in text


def test_only_the_changed_bytes_differ_and_only_model_files_are_taken(base, tmp_path):
    export(base, changes(base), tmp_path / "out", {"layers": [0], "version": "1"})
    before, after = contents(base), contents(tmp_path / "out")
    left = {"modeling_evil.py", "pytorch_model.bin.index.json", "README.md"}
    assert after.keys() == (before.keys() - left) | {"xplus_fast.json"}
    changed_files = {f for f in before.keys() & after.keys() if before[f] != after[f]}
    entries = CheckpointFiles.open(base).entries
    assert changed_files == {entries[UP0].file.name, entries[NORM0].file.name}
    for name in changed_files:
        a, b = before[name], after[name]
        assert len(a) == len(b)
        for entry in (entries[UP0], entries[NORM0]):
            if entry.file.name == name:
                a = a[: entry.start] + a[entry.end :]
                b = b[: entry.start] + b[entry.end :]
        assert a == b  # header, metadata and every other tensor
    record = json.loads(after["xplus_fast.json"])
    assert record == {"layers": [0], "version": "1", "tensors": sorted([UP0, NORM0])}


def test_tied_head_that_the_base_stores_too_follows_the_embedding(tmp_path):
    base = make_base(tmp_path / "base", tied=True, shards="1GB")
    tensors = load_file(base / SINGLE)
    save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, base / SINGLE, {"format": "pt"})
    changed = changes(base, [EMBEDDING])
    export(base, changed, tmp_path / "out", {})
    files = CheckpointFiles.open(tmp_path / "out")
    assert torch.equal(files.tensor(HEAD), changed[EMBEDDING].bfloat16())
    assert verify(base, tmp_path / "out").ok

    # and a result that leaves the tied head out holds the same model
    saved = load_file(tmp_path / "out" / SINGLE)
    del saved[HEAD]
    save_file(saved, tmp_path / "out" / SINGLE, {"format": "pt"})
    result = verify(base, tmp_path / "out")
    assert result.ok and set(result.changed) == {EMBEDDING, HEAD}
    result = verify(base, tmp_path / "out", {0, 1})
    assert result.outside == [name for name in files.names if name in (EMBEDDING, HEAD)]
    result = verify(tmp_path / "out", base, {0, 1})  # missing on the other side
    assert not result.ok and set(result.outside) == {EMBEDDING, HEAD} and not result.extra


def test_export_refuses(base, tmp_path):
    out = tmp_path / "out"
    good = changes(base)
    before = contents(base)
    bad = {
        "no tensor 'model.layers.9.x' to replace": {"model.layers.9.x": torch.zeros(1)},
        r"shape \[24, 16\], the trained one \[16, 24\]": {UP0: good[UP0].t()},
        f"'{NORM0}': the trained tensor is not finite": {NORM0: good[NORM0] * float("nan")},
        "not finite in BF16": {NORM0: good[NORM0].double() * 1e300},
    }
    for line, changed in bad.items():
        with pytest.raises(UserError, match=line.replace(".", r"\.")):
            export(base, changed, out, {})
        assert not out.exists()
    with pytest.raises(UserError, match="exists already"):
        export(base, good, base, {})
    out.mkdir()
    (out / ".hidden").write_text("")
    with pytest.raises(UserError, match="exists already"):
        export(base, good, out, {})
    with pytest.raises(UserError, match="exists already"):
        export(base, good, out / ".hidden", {})
    assert contents(base) == before
    (out / ".hidden").unlink()
    export(base, good, out, {})  # empty is as good as new
    assert verify(base, out).ok


def test_full_disk_leaves_nothing(base, tmp_path, monkeypatch):
    before, real = contents(tmp_path), os.fsync
    for nth in (0, 3, 7):
        calls = iter(range(1000))

        def fail(fd, calls=calls, nth=nth):
            if next(calls) == nth:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(fd)

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(UserError, match="out: cannot be written .No space left on device.: "):
            export(base, changes(base), tmp_path / "out", {})
        assert contents(tmp_path) == before and not (tmp_path / "out").exists()


# verify


def exported(base: Path) -> Path:
    out = base.parent / "out"
    export(base, changes(base), out, {"layers": [0]})
    return out


@pytest.mark.parametrize("at, bit", [(0, 0), (-1, 7), (500, 3)])
def test_one_flipped_bit_in_a_frozen_tensor(base, at, bit, monkeypatch):
    monkeypatch.setattr(headers, "CHUNK", 100)
    out = exported(base)
    edit(out, UP2, flip(at, bit))
    result = verify(base, out)
    assert not result.ok and result.outside == [UP2]
    assert set(result.changed) == {UP0, NORM0, UP2}
    text = describe(result)
    assert f"changed, though frozen: 1 tensor\n  {UP2}\n" in text and "NOT OK" in text
    assert "in layers 0, 2\n" in text and "all others" not in text


def test_bytes_count_not_values(base):
    def set_first(value: int):
        def change(data: bytearray) -> None:
            data[:2] = struct.pack("<H", value)

        return change

    out = exported(base)
    for there, here in ((0x0000, 0x8000), (0x7FC0, 0x7FC1)):  # 0.0, -0.0; NaN, another NaN
        edit(base, UP2, set_first(there))
        edit(out, UP2, set_first(here))
        assert verify(base, out).outside == [UP2]
        edit(out, UP2, set_first(there))  # NaN is not equal to itself, its bytes are
        assert verify(base, out).ok


def test_allowed_layers_on_the_command_line(base):
    out = exported(base)
    assert verify(base, out, {0}).ok and verify(base, out, {0, 3}).ok
    assert set(verify(base, out, {1, 2, 3}).outside) == {UP0, NORM0}
    for text in ("{", "[]", "{}", '{"tensors": "all"}', '{"tensors": [1]}'):
        (out / "xplus_fast.json").write_text(text)
        with pytest.raises(UserError, match="xplus_fast.json: "):
            verify(base, out)


def test_embedding_is_in_no_layer(base):
    out = base.parent / "out"
    export(base, changes(base, [EMBEDDING, UP0]), out, {})
    assert verify(base, out).ok
    assert verify(base, out, {0, 1, 2, 3}).outside == [EMBEDDING]
    assert "in layer 0, model.embed_tokens.weight\n" in describe(verify(base, out))
    assert [layer_of(n) for n in (UP2, "model.layers.12.x", EMBEDDING, "x.layers.1.y")] == [
        2,
        12,
        None,
        None,
    ]


def rewritten(base: Path, change) -> Path:
    """The exported model saved as one file, its tensors changed on the way: change(dict)."""
    out = exported(base)
    tensors = {name: CheckpointFiles.open(out).tensor(name).clone() for name in names(out)}
    for file in [*out.glob("*.safetensors"), *out.glob("*.index.json")]:
        file.unlink()
    change(tensors)
    save_file(tensors, out / SINGLE, {"format": "pt"})
    return out


def names(folder: Path) -> list[str]:
    return CheckpointFiles.open(folder).names


def test_other_sharding_is_the_same_model(base):
    out = rewritten(base, lambda tensors: None)
    assert len(list(base.glob("*.safetensors"))) > 1
    result = verify(base, out)
    assert result.ok and set(result.changed) == {UP0, NORM0}


def test_missing_extra_and_reshaped_tensors(base):
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[UP2], tensors[HEAD]  # the head is not tied: it is missed
        tensors["model.layers.4.new"] = torch.zeros(2)
        tensors[NORM0] = tensors[NORM0].float()  # trained, but not in the base's dtype
        tensors["model.norm.weight"] = tensors["model.norm.weight"].reshape(2, 8)

    result = verify(base, rewritten(base, change))
    assert not result.ok and result.outside == [] and result.changed == [UP0]
    assert set(result.missing) == {UP2, HEAD} and result.extra == ["model.layers.4.new"]
    assert set(result.reshaped) == {
        f"{NORM0} (BF16 [16] in the base, F32 [16] in the result)",
        "model.norm.weight (BF16 [16] in the base, BF16 [2, 8] in the result)",
    }
    assert result.identical == len(names(base)) - 5
    text = describe(result)
    for line in (
        "missing in the result: 2 tensors",
        "in the result only: 1 tensor\n  model.layers.4.new",
        "of another shape or dtype: 2 tensors",
    ):
        assert line in text


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop(UP2),
        lambda t: t.update(extra=torch.zeros(1)),
        lambda t: t.update({UP2: t[UP2].half()}),
    ],
    ids=["missing", "extra", "dtype"],
)
def test_each_fault_alone_is_not_ok(base, change):
    assert not verify(base, rewritten(base, change)).ok


def test_without_a_record_it_lists_what_changed_by_layer(base):
    out = exported(base)
    edit(out, UP2, flip(0, 0))
    (out / "xplus_fast.json").unlink()
    assert verify(base, out, {0, 2}).ok and not verify(base, out, {0}).ok
    result = verify(base, out)
    assert result.ok and not result.outside and set(result.changed) == {UP0, NORM0, UP2}
    text = describe(result)
    assert f"  layer 0: 2 tensors ({24 * 16 + 16} parameters)\n" in text
    assert f"  layer 2: 1 tensor ({24 * 16} parameters)\n" in text
    assert "no xplus_fast.json says what was to change" in text


def test_notes(base):
    out = exported(base)
    edit(out, NORM0, lambda data: data.__setitem__(slice(None), raw(base, NORM0)))
    result = verify(base, out)
    assert result.ok and result.changed == [UP0]
    assert f"note: trained, but unchanged: 1 tensor, first {NORM0}" in describe(result)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("tokenizer.json", '{"model": 2}', "differs in model"),
        ("tokenizer.json", None, "missing"),
        ("tokenizer.json", "not JSON", "another"),
        ("merges.txt", "b a", "another"),
        ("tokenizer.model", "\0\2", "another"),
        ("chat_template.jinja", "{{ evil }}", "another"),
        ("additional_chat_templates/tools.jinja", "{{ evil }}", "another"),
        ("additional_chat_templates/tools.jinja", None, "missing"),
        ("additional_chat_templates/new.jinja", "", "in the result only"),
        ("generation_config.json", '{"temperature": 9}', "differs in temperature"),
        ("config.json", "+rope_theta", "differs in rope_theta"),
        ("config.json", "+auto_map", "differs in auto_map"),
        ("adapter_config.json", "{}", "in the result only"),
        ("special_tokens_map.json", "{}", "in the result only"),
        ("pytorch_model.bin", "", "in the result only"),
        ("weights.pt", "", "in the result only"),
        ("scores.pickle", "", "in the result only"),
        ("modeling_evil.py", "import os", "in the result only"),
        ("deep/inside/run.py", "import os", "in the result only"),
        ("extra.safetensors", "", "in the result only"),
    ],
)
def test_a_file_beside_the_weights_that_is_not_as_it_was(base, name, content, said):
    beside = {
        "tokenizer.json": '{"model": 1}', "merges.txt": "a b", "tokenizer.model": "\0\1",
        "chat_template.jinja": "{{ x }}", "additional_chat_templates/tools.jinja": "{{ y }}",
        "generation_config.json": '{"temperature": 1}',
    }  # fmt: skip
    for file, text in beside.items():
        (base / file).write_text(text)
    (base / "modeling_evil.py").unlink()
    out = exported(base)
    assert verify(base, out).ok
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        (out / name).unlink()
    elif content[:1] == "+":
        config = json.loads((out / name).read_text())
        (out / name).write_text(json.dumps(config | {content[1:]: 5.0}))
    else:
        (out / name).write_text(content)
    for result in (verify(base, out), verify(base, out, {0})):
        assert not result.ok and result.files == [f"{name}: {said}"]
    text = describe(result)
    assert f"beside the weights: 1 file\n  {name}: {said}\n" in text and "NOT OK" in text


def test_what_may_lie_beside_the_weights(base):
    out = exported(base)
    for name in ("README.md", "LICENSE", ".gitattributes", ".cache/huggingface/x.lock"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    for name in ("config.json", "generation_config.json"):  # as another version would save them
        if (out / name).is_file():
            config = json.loads((out / name).read_text()) | {"transformers_version": "0"}
            (out / name).write_text(json.dumps(dict(reversed(config.items())), indent=7))
    assert verify(base, out).ok


def test_leftovers_of_killed_exports_go_and_a_living_one_is_left_alone(base, tmp_path):
    out, read, write = tmp_path / "out", *os.pipe()
    child = os.fork()
    if not child:
        with locked(out), new_folder(out) as temporary:
            (temporary / "half").write_text("")
            os.write(write, b"x")
            time.sleep(60)
    os.read(read, 1)
    with pytest.raises(UserError, match="out: in use by another process"):
        export(base, changes(base), out, {})
    assert (tmp_path / ".out.tmp/half").exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    export(base, changes(base), out, {})
    assert {p.name for p in tmp_path.iterdir()} == {"base", "out"}
    (tmp_path / ".out.old").mkdir()  # killed when the new one was in its place
    with pytest.raises(UserError, match="exists already"):
        export(base, changes(base), out, {})
    assert {p.name for p in tmp_path.iterdir()} == {"base", "out"}


def raw(folder: Path, name: str) -> bytes:
    return b"".join(CheckpointFiles.open(folder).raw(name))


def test_same_folder_twice(base):
    result = verify(base, base, set())
    assert result.ok and result.changed == [] and "changed: no tensor" in describe(result)
