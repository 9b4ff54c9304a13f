"""The device's rate, which a step's work is held against."""

import torch

from tests.tiny import tiny_model
from xplus_fast.model.families import shape_of
from xplus_fast.training import throughput


def test_stages_of_a_run_are_held_against_one_rate(monkeypatch) -> None:
    rates = iter((1e12, 2e12, 3e12))
    monkeypatch.setattr(throughput, "gemm_rate", lambda *_: next(rates))
    throughput._rate.cache_clear()
    cpu, shape = torch.device("cpu"), shape_of(tiny_model().config)
    try:
        for dtype, rate in ((torch.float32, 1e12), (torch.float32, 1e12), (torch.bfloat16, 2e12)):
            meter = throughput.Meter(shape)
            meter.measure_peak(cpu, dtype)
            assert meter.peak == rate
    finally:
        throughput._rate.cache_clear()  # later tests measure their own
