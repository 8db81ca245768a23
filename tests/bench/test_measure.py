"""Timing and memory: what is counted, not how fast anything is."""

from __future__ import annotations

import torch

from sparsetile.bench.measure import ceilings, peak_memory, time_call

CPU = torch.device("cpu")


def test_time_call_warms_up_and_repeats():
    calls = []
    times = time_call(lambda: calls.append(1), CPU, budget_ms=1.0)
    assert 3 <= times.repeats <= 200
    assert len(calls) == times.repeats + 1
    assert 0 <= times.min_ms <= times.median_ms


def test_time_call_stops_early_for_slow_calls():
    calls = []

    def slow() -> None:
        calls.append(1)
        torch.randn(200, 200) @ torch.randn(200, 200)

    assert time_call(slow, CPU, budget_ms=1e-9).repeats == 1
    assert len(calls) == 2


def test_peak_memory_is_what_was_held_at_once():
    def allocate() -> torch.Tensor:
        first = torch.empty(1 << 20)
        kept = torch.empty(1 << 19)
        del first
        later = torch.empty(1 << 18)
        del later
        return kept

    assert 6 << 20 <= peak_memory(allocate, CPU) < (6 << 20) + 4096


def test_peak_memory_sees_temporaries_inside_operators():
    x = torch.randn(256, 256, requires_grad=True)
    size = x.numel() * 4
    assert peak_memory(lambda: torch.softmax(x + 1, 0).sum().backward(), CPU) >= 3 * size


def test_peak_memory_says_nothing_on_stderr(capfd):
    peak_memory(lambda: torch.empty(10), CPU)
    output = capfd.readouterr()
    assert (output.out, output.err) == ("", "")


def test_ceilings_are_a_gpu_s():
    assert ceilings(torch.device("cpu")) is None
