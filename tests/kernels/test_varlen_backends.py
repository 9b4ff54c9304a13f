"""Which attention library is chosen and what exactly it is handed, without a GPU.

The libraries are stood in for by functions with their own argument names that compute the
reference, so that a wrong argument is a wrong value or an error.
"""

import inspect
import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import xplus_kernels as ops

# the module: in the package its name is the function
ATTENTION = sys.modules["xplus_kernels.varlen_attention"]
NAMES = ("flash-attn 3", "flash-attn 4", "flash-attn 2")
EVERY_BACKEND = (*NAMES, "PyTorch flash")
OPTIONS = {"max_seqlen": 9, "scale": 0.25}


def forward_reference(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What a library's forward computes from its arguments, by their names in flash-attn."""
    return ATTENTION.varlen_attention_ref(*(call[name] for name in "qkv"), **sequences(call))


def backward_reference(call: dict[str, Any], lse: Tensor) -> None:
    tensors = (call[name] for name in ("dout", "q", "k", "v", "out"))
    made = ATTENTION.varlen_attention_backward_ref(*tensors, lse, **sequences(call))
    for name, value in zip(("dq", "dk", "dv"), made, strict=True):
        call[name].copy_(value)


def sequences(call: dict[str, Any]) -> dict[str, Any]:
    """A library's arguments as the reference's."""
    return {
        "cu_seqlens": call["cu_seqlens_q"],
        "max_seqlen": call["max_seqlen_q"],
        "cu_seqlens_k": call["cu_seqlens_k"],
        "max_seqlen_k": call["max_seqlen_k"],
        "scale": call["softmax_scale"],
        "causal": call["causal"],
    }


def fake_libraries() -> tuple[dict[str, ModuleType], list[dict[str, Any]]]:
    """The three libraries, with the parts of their signatures that matter, and a list of calls."""
    calls: list[dict[str, Any]] = []

    def flash3_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, softmax_scale=None, causal=False, window_size_left=-1,
        window_size_right=-1, num_splits=1,
    ):  # fmt: skip
        calls.append(call := dict(locals()))
        out, lse = forward_reference(call)
        return out, lse, torch.tensor([]), torch.tensor([])

    def flash3_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None,
        sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None,
        softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        calls.append(call := dict(locals()) | {"causal": is_causal})
        backward_reference(call, softmax_lse)
        return torch.empty(0)

    def flash4_forward(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, page_table=None, softmax_scale=None, causal=False,
        softcap=None, window_size_left=None, window_size_right=None, return_lse=False, out=None,
        lse=None,
    ):  # fmt: skip
        calls.append(call := dict(locals()))
        out, lse = forward_reference(call)
        return out, lse if return_lse else None, None, None, None

    def flash4_backward(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0,
        window_size_left=None, window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
    ):  # fmt: skip
        calls.append(call := dict(locals()))
        backward_reference(call, lse)
        return dq, dk, dv

    def flash2_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        calls.append(call := dict(locals()))
        out, lse = forward_reference(call)
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    def flash2_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        calls.append(call := dict(locals()))
        backward_reference(call, softmax_lse)
        return torch.empty(0)

    functions = (
        (flash3_forward, flash3_backward),
        (flash4_forward, flash4_backward),
        (flash2_forward, flash2_backward),
    )
    modules = {}
    for name, (forward, backward) in zip(NAMES, functions, strict=True):
        library = ATTENTION.LIBRARIES[name]
        module = modules[library.module] = ModuleType(library.module)
        setattr(module, library.forward, forward)
        setattr(module, library.backward, backward)
    return modules, calls


def fake_pytorch(monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any]]) -> None:
    """Stand in for PyTorch's two operators; arguments are taken by their real schemas."""

    def bind(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        arguments = operator.default._schema.arguments
        named = dict(zip([a.name for a in arguments if not a.kwarg_only], args, strict=True))
        assert set(kwargs) <= {a.name for a in arguments if a.kwarg_only}
        calls.append(call := named | kwargs)
        return call | {
            "asked": {
                "cu_seqlens": call["cum_seq_q"],
                "max_seqlen": call["max_q"],
                "cu_seqlens_k": call["cum_seq_k"],
                "max_seqlen_k": call["max_k"],
                "scale": call["scale"],
                "causal": call["is_causal"],
            }
        }

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        c = bind(real_forward, args, kwargs)
        assert (c["dropout_p"], c["return_debug_mask"]) == (0.0, False)
        out, lse = ATTENTION.varlen_attention_ref(c["query"], c["key"], c["value"], **c["asked"])
        return out, lse, torch.empty(2), torch.empty(()), torch.empty(0)

    def backward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        c = bind(real_backward, args, kwargs)
        assert c["dropout_p"] == 0.0
        assert c["rng_state"].dtype == torch.uint64 and c["rng_state"].tolist() == [0, 0]
        return ATTENTION.varlen_attention_backward_ref(
            c["grad_out"], c["query"], c["key"], c["value"], c["out"], c["logsumexp"], **c["asked"]
        )

    real_forward = torch.ops.aten._flash_attention_forward
    real_backward = torch.ops.aten._flash_attention_backward
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """All libraries installed, as fakes."""
    modules, calls = fake_libraries()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    fake_pytorch(monkeypatch, calls)
    ATTENTION._choose.cache_clear()
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    yield calls
    ATTENTION._choose.cache_clear()


def inputs(lengths=(1, 9, 3), n=10, k=2, d=16, dtype=torch.float16):
    """q, k and v (a view of a wider row, as in a block), cu_seqlens, dout."""
    t, seed = sum(lengths), torch.Generator().manual_seed(0)
    qkv = torch.randn(t, (n + 2 * k) * d, generator=seed).to(dtype)
    q, key, v = qkv.view(t, -1, d).split((n, k, k), 1)
    dout = torch.randn(t, n, d, generator=seed).to(dtype)
    return q.contiguous(), key.contiguous(), v, torch.tensor([0, *lengths]).cumsum(0).int(), dout


@pytest.mark.parametrize("name", EVERY_BACKEND)
def test_values_pass_through_every_backend(name, calls, monkeypatch):
    monkeypatch.setattr(ATTENTION, "attention_backend", lambda q: name)
    q, k, v, cu, dout = inputs()
    truth = ATTENTION.varlen_attention_ref(q, k, v, cu, **OPTIONS)
    out, lse = ops.varlen_attention(q, k, v, cu, **OPTIONS)
    assert torch.equal(out, truth[0]) and torch.equal(lse, truth[1])
    assert lse.shape == (10, 13) and lse.dtype == torch.float32 and out.is_contiguous()
    rows = (dout, q, k, v, out, lse, cu)
    grads = ATTENTION.varlen_attention_backward_ref(*rows, **OPTIONS)
    for _ in range(2):  # a second backward finds its inputs as they were
        for mine, true in zip(ops.varlen_attention_backward(*rows, **OPTIONS), grads, strict=True):
            assert torch.equal(mine, true) and mine.is_contiguous()
    assert len(calls) == 3
    for call in calls:
        handed = call.get("v", call.get("value"))
        assert handed.data_ptr() == v.data_ptr()  # a view of qkv goes without a copy
        assert call.get("causal", call.get("is_causal")) is True


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", EVERY_BACKEND)
def test_other_keys_pass_through_every_backend(name, causal, calls, monkeypatch):
    monkeypatch.setattr(ATTENTION, "attention_backend", lambda q: name)
    q, _, _, cu, dout = inputs((3, 0, 5))
    _, k, v, cu_k, _ = inputs((3, 4, 9))
    options = {"max_seqlen": 5, "scale": 0.25, "causal": causal}
    options |= {"cu_seqlens_k": cu_k, "max_seqlen_k": 9}
    out, lse = ops.varlen_attention(q, k, v, cu, **options)
    truth = ATTENTION.varlen_attention_ref(q, k, v, cu, **options)
    assert torch.equal(out, truth[0]) and torch.equal(lse, truth[1])
    rows = (dout, q, k, v, out, lse, cu)
    made = ops.varlen_attention_backward(*rows, **options)
    grads = ATTENTION.varlen_attention_backward_ref(*rows, **options)
    assert all(torch.equal(mine, true) for mine, true in zip(made, grads, strict=True))
    for call in calls:
        bounds = [call.get(f"cu_seqlens_{x}", call.get(f"cum_seq_{x}")) for x in "qk"]
        assert bounds[0] is cu and bounds[1] is cu_k
        assert [call.get(f"max_seqlen_{x}", call.get(f"max_{x}")) for x in "qk"] == [5, 9]
        assert call.get("causal", call.get("is_causal")) is causal


@pytest.mark.parametrize("name", EVERY_BACKEND)
def test_gradients_of_any_strides_are_laid_out_for_the_kernels(name, calls, monkeypatch):
    monkeypatch.setattr(ATTENTION, "attention_backend", lambda q: name)
    q, k, v, cu, dout = inputs()
    out, lse = ops.varlen_attention(q, k, v, cu, **OPTIONS)
    for strange in (dout[:1, :1, :1].expand_as(dout), dout.transpose(1, 2).contiguous().mT):
        wanted = ATTENTION.varlen_attention_backward_ref(
            strange.contiguous(), q, k, v, out, lse, cu, **OPTIONS
        )
        made = ops.varlen_attention_backward(strange, q, k, v, out, lse, cu, **OPTIONS)
        assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
        assert calls[-1].get("dout", calls[-1].get("grad_out")).is_contiguous()


@pytest.mark.parametrize("name", EVERY_BACKEND)
def test_rows_that_do_not_start_at_16_bytes_are_copied(name, calls, monkeypatch):
    monkeypatch.setattr(ATTENTION, "attention_backend", lambda q: name)
    q, k, v, cu, _ = inputs()
    wide = torch.zeros(*v.shape[:2], v.shape[2] + 3, dtype=v.dtype)
    wide[..., 1:-2] = v
    out, _ = ops.varlen_attention(q, k, wide[..., 1:-2], cu, **OPTIONS)
    assert calls[-1].get("v", calls[-1].get("value")).stride() == (32, 16, 1)
    assert torch.equal(out, ATTENTION.varlen_attention_ref(q, k, v, cu, **OPTIONS)[0])


@pytest.mark.parametrize("name", EVERY_BACKEND)
def test_sequences_of_one_token_do_not_take_the_decoding_path(name, calls, monkeypatch):
    monkeypatch.setattr(ATTENTION, "attention_backend", lambda q: name)
    q, k, v, cu, dout = inputs(lengths=(1, 0, 1))
    options = OPTIONS | {"max_seqlen": 1}
    out, lse = ops.varlen_attention(q, k, v, cu, **options)
    ops.varlen_attention_backward(dout, q, k, v, out, lse, cu, **options)
    assert [call.get("max_seqlen_q", call.get("max_q")) for call in calls] == [2, 2]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wanted", [False, True])
def test_deterministic_backward_where_pytorch_is_told_so(name, wanted, calls, monkeypatch):
    monkeypatch.setattr(ATTENTION, "attention_backend", lambda q: name)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: wanted)
    q, k, v, cu, dout = inputs()
    out, lse = ops.varlen_attention(q, k, v, cu, **OPTIONS)
    ops.varlen_attention_backward(dout, q, k, v, out, lse, cu, **OPTIONS)
    assert calls[-1]["deterministic"] is wanted


@pytest.mark.parametrize(("n", "k"), [(16, 8), (32, 8), (40, 8)])
def test_pytorch_operators_take_what_they_are_handed(n, k, monkeypatch):
    """On the meta device: the real operators' schemas and shapes, grouped heads included."""
    monkeypatch.setattr(ATTENTION, "attention_backend", lambda q: "PyTorch flash")
    q, key, v, cu, dout = (
        x.to("meta") for x in inputs(n=n, k=k, d=128, dtype=torch.bfloat16)
    )  # fmt: skip
    out, lse = ops.varlen_attention(q, key, v, cu, **OPTIONS)
    assert out.shape == q.shape and out.dtype == torch.bfloat16
    assert lse.shape == (n, 13) and lse.dtype == torch.float32
    grads = ops.varlen_attention_backward(dout, q, key, v, out, lse, cu, **OPTIONS)
    assert [g.shape for g in grads] == [q.shape, key.shape, v.shape]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "major", "name"),
    [
        (torch.bfloat16, 128, 8, "flash-attn 2"),
        (torch.float16, 128, 9, "flash-attn 3"),
        (torch.bfloat16, 128, 10, "flash-attn 4"),
        (torch.bfloat16, 256, 10, "flash-attn 2"),
        (torch.bfloat16, 128, 12, "flash-attn 2"),
        (torch.bfloat16, 128, 11, "PyTorch flash"),
        (torch.bfloat16, 128, 7, "reference"),
        (torch.bfloat16, 12, 9, "reference"),
        (torch.bfloat16, 264, 9, "reference"),
        (torch.float32, 128, 9, "reference"),
        (torch.float64, 128, 9, "reference"),
    ],
)
def test_the_best_that_can_is_chosen(dtype, head_dim, major, name, calls):
    assert ATTENTION._choose(dtype, head_dim, major) == name


def test_without_a_library_pytorch_itself_is_chosen_and_said_once(calls, monkeypatch, caplog):
    caplog.set_level(logging.INFO, ATTENTION.__name__)
    for name in NAMES:  # None in sys.modules: the import fails
        monkeypatch.setitem(sys.modules, ATTENTION.LIBRARIES[name].module, None)
    for _ in range(3):
        assert ATTENTION._choose(torch.bfloat16, 128, 9) == "PyTorch flash"
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "varlen attention: PyTorch flash (flash-attn 3: cannot be imported" in caplog.text
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert ATTENTION._choose(torch.bfloat16, 64, 9) == "reference"
    assert caplog.records[-1].levelname == "WARNING" and "not in this build" in caplog.text


def test_another_version_of_a_library_is_passed_over_with_the_reason(calls, monkeypatch, caplog):
    caplog.set_level(logging.INFO, ATTENTION.__name__)
    library = ATTENTION.LIBRARIES["flash-attn 3"]
    module = sys.modules[library.module]
    backward = getattr(module, library.backward)
    monkeypatch.setattr(module, library.backward, lambda dout, q, k, v, out, softmax_lse: None)
    assert ATTENTION._choose(torch.bfloat16, 128, 9) == "flash-attn 4"
    assert "flash-attn 3: another version than the one known (got an unexpected" in caplog.text
    monkeypatch.setattr(module, library.backward, lambda sink, **others: None)
    assert "missing a required argument: 'sink'" in ATTENTION._missing(library)
    monkeypatch.delattr(module, library.backward)
    assert ATTENTION._missing(library).startswith("another version")
    monkeypatch.setattr(module, library.backward, backward, raising=False)
    assert ATTENTION._missing(library) == ""


def test_arguments_of_a_custom_operator_are_seen(calls, monkeypatch):
    """flash-attn 2 and 3 wrap their functions so; the wrapper itself takes *args, **kwargs."""
    library = ATTENTION.LIBRARIES["flash-attn 2"]
    module = sys.modules[library.module]

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
        dq: Tensor, dk: Tensor, dv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float,
        causal: bool, window_size_left: int, window_size_right: int, softcap: float,
        alibi_slopes: Tensor | None, deterministic: bool,
    ) -> Tensor:  # fmt: skip
        backward_reference(dict(locals()), softmax_lse)
        return torch.empty(0)

    wrapped = torch.library.custom_op("xplus_test::backward", mutates_args=("dq", "dk", "dv"))
    operator = wrapped(backward)
    assert "dout" not in inspect.signature(operator).parameters
    monkeypatch.setattr(module, library.backward, operator)
    assert ATTENTION._missing(library) == ""
    monkeypatch.setattr(ATTENTION, "attention_backend", lambda q: "flash-attn 2")
    q, k, v, cu, dout = inputs()
    out, lse = ops.varlen_attention(q, k, v, cu, **OPTIONS)
    rows = (dout, q, k, v, out, lse, cu)
    made = ops.varlen_attention_backward(*rows, **OPTIONS)
    wanted = ATTENTION.varlen_attention_backward_ref(*rows, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))


def test_a_cpu_takes_the_reference(calls):
    q, k, v, cu, _ = inputs()
    assert ATTENTION.attention_backend(q) == "reference"
    ops.varlen_attention(q, k, v, cu, **OPTIONS)
    assert calls == []


GOOD = inputs()
OTHER = {"cu_seqlens_k": GOOD[3], "max_seqlen_k": 9}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": GOOD[0][0]}, ValueError, "q: shape [10, 16]"),
        ({"q": GOOD[0].int()}, ValueError, "q: shape [13, 10, 16], torch.int32"),
        ({"k": GOOD[0][:, :3]}, ValueError, "k: shape [13, 3, 16]"),
        ({"k": GOOD[1][:5]}, ValueError, "k: shape [5, 2, 16], torch.float16; [13, 2, 16]"),
        ({"k": GOOD[1].float()}, TypeError, "k: shape [13, 2, 16], torch.float32"),
        ({"v": GOOD[2][..., :8]}, ValueError, "v: shape [13, 2, 8]"),
        ({"v": GOOD[2].to("meta")}, ValueError, "v: on meta; q is on cpu"),
        ({"q": GOOD[0].transpose(1, 2).contiguous().mT}, ValueError, "q: strides (160, 1, 10)"),
        ({"cu_seqlens": GOOD[3].long()}, TypeError, "cu_seqlens: shape [4], torch.int64"),
        ({"cu_seqlens": GOOD[3][:1]}, ValueError, "cu_seqlens: shape [1]"),
        ({"max_seqlen": torch.tensor(9)}, TypeError, "max_seqlen: Tensor; an int"),
        ({"max_seqlen": -1}, ValueError, "max_seqlen: -1"),
        ({"cu_seqlens_k": GOOD[3]}, ValueError, "cu_seqlens_k, max_seqlen_k: one of them is None"),
        ({"max_seqlen_k": 9}, ValueError, "cu_seqlens_k, max_seqlen_k: one of them is None"),
        (OTHER | {"cu_seqlens_k": GOOD[3][:3]}, ValueError, "cu_seqlens_k: shape [3]"),
        (OTHER | {"cu_seqlens_k": GOOD[3].long()}, TypeError, "cu_seqlens_k: shape [4], torch.int"),
        (OTHER | {"max_seqlen_k": -1}, ValueError, "max_seqlen_k: -1"),
        (OTHER | {"k": GOOD[1][:5]}, ValueError, "v: shape [13, 2, 16], torch.float16; [5, 2, 16]"),
    ],
)
def test_bad_input_is_named(change, error, words):
    arguments = dict(zip(("q", "k", "v", "cu_seqlens"), GOOD, strict=False)) | OPTIONS | change
    with pytest.raises(error) as raised:
        ops.varlen_attention(**arguments)
    assert str(raised.value).startswith(words)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"dout": GOOD[4][:, :5]}, ValueError, "dout: shape [13, 5, 16]"),
        ({"dout": GOOD[4].float()}, TypeError, "dout: shape [13, 10, 16], torch.float32"),
        ({"out": GOOD[4][:5]}, ValueError, "out: shape [5, 10, 16]"),
        ({"lse": torch.zeros(13, 10)}, ValueError, "lse: shape [13, 10]"),
        ({"lse": torch.zeros(10, 13).half()}, TypeError, "lse: shape [10, 13], torch.float16"),
    ],
)
def test_bad_input_to_the_backward_is_named(change, error, words):
    q, k, v, cu, dout = GOOD
    arguments = {"dout": dout, "q": q, "k": k, "v": v, "out": dout, "lse": torch.zeros(10, 13)}
    with pytest.raises(error) as raised:
        ops.varlen_attention_backward(**(arguments | change), cu_seqlens=cu, **OPTIONS)
    assert str(raised.value).startswith(words)


def test_what_stands_for_a_generators_state_is_made_once():
    """Two fills a layer otherwise, of what nothing reads."""
    cpu = torch.device("cpu")
    state, unused = ATTENTION._no_dropout(cpu)
    assert (state.dtype, state.shape, unused.shape) == (torch.uint64, (2,), ())
    assert all(a is b for a, b in zip(ATTENTION._no_dropout(cpu), (state, unused), strict=True))
