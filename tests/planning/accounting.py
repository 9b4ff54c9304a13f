"""Bytes of tensors alive while the engine runs, on a CPU."""

import sys
import weakref
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import xplus_kernels as ops
from xplus_kernels.attention_reference import _layout_of

LEAVES = (
    "rms_norm", "rms_norm_backward", "add_rms_norm_backward", "swiglu", "swiglu_backward",
    "qk_norm_rope", "qk_norm_rope_backward", "varlen_attention", "varlen_attention_backward",
    "merge_attention",
    "rms_norm_fp8", "swiglu_fp8", "swiglu_backward_fp8",
)  # fmt: skip
# Inside `frozen_linear`, whose own temporaries count: what it multiplies in FP8 is quantized first
FROZEN = ("quantize_fp8", "fp8_matmul", "dequantize_int8", "dequantize_nf4")


def computed_pairs(lengths, lengths_k=None, *, causal=True):
    """Pairs of a query and a key that the reference attention computes, more than it needs."""
    bounds = [
        None if n is None else torch.tensor([0, *n]).cumsum(0).int() for n in (lengths, lengths_k)
    ]
    q, k = torch.empty(sum(lengths), 1, 1), torch.empty(sum(lengths_k or lengths), 1, 1)
    blocks = _layout_of(q, k, *bounds, causal).blocks
    return sum(count * rows * keys for count, rows, keys in (b.size for b in blocks))


class Tracker(TorchDispatchMode):
    """Counts storages from their making to their end, and remembers the most."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves(args) if torch.is_tensor(t)}
        self.see(out, known)
        return out

    def see(self, out, known=frozenset()):
        for t in tree_leaves(out):
            if not torch.is_tensor(t):
                continue
            storage = t.untyped_storage()
            key = storage._cdata
            if key in self.live or key in known:
                continue
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key):
        self.now -= self.live.pop(key)


class Away:
    """`Offload` with a host of its own: what it holds does not count, what it brings back does.

    The device lets go of an input when the next one leaves, or the first comes back.
    """

    def __init__(self, tracker):
        self.tracker, self.sent, self.leaving = tracker, [], None

    def put(self, x):
        self.leaving = x
        with _disable_current_modes():
            self.sent.append(_Sent(self, x.detach().clone()))
        return self.sent[-1]


class _Sent:
    def __init__(self, home, host):
        self.home, self.host, self.back = home, host, None

    def fetch(self):
        if self.back is None:
            with _disable_current_modes():
                self.back = self.host.clone()
            self.home.tracker.see(self.back)

    def take(self):
        self.home.leaving = None
        self.fetch()
        at = self.home.sent.index(self)
        if at:
            self.home.sent[at - 1].fetch()  # the one below sets out
        back, self.back = self.back, None
        return back


@contextmanager
def tracked(monkeypatch, logits_rows=None):
    """Kernels as they are on a GPU: their outputs count, their references' temporaries do not."""
    tracker = Tracker()

    def leaf(function):
        def call(*args, **kwargs):
            with _disable_current_modes():
                out = function(*args, **kwargs)
            known = {t.untyped_storage()._cdata for t in tree_leaves(args) if torch.is_tensor(t)}
            tracker.see(out, known)
            return out

        return call

    head = ops.linear_cross_entropy

    def head_leaf(x, weight, targets, **kwargs):
        # in the order of the fused form: dx, one buffer of logits, both alive together
        with _disable_current_modes():
            out = head(x, weight, targets, **kwargs)
        tracker.see(out)
        logits = torch.empty(x.shape[0] if logits_rows is None else logits_rows, weight.shape[0])
        del logits
        return out

    with monkeypatch.context() as patch:
        for name in LEAVES:
            patch.setattr(ops, name, leaf(getattr(ops, name)))
        patch.setattr(ops, "linear_cross_entropy", head_leaf)
        frozen = sys.modules["xplus_kernels.frozen_linear"]  # in the package: the function
        for name in FROZEN:
            patch.setattr(frozen, name, leaf(getattr(frozen, name)))
        with tracker:
            yield tracker
