"""Peak memory sees a peak that is gone again."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time

import pytest
import torch

from sparsetile.train import memory
from sparsetile.train.memory import PeakMemory

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the peak of the whole process is known")
def test_a_peak_is_seen_after_it_is_gone_and_one_of_the_past_is_not() -> None:
    # In a process of its own: one that ran other tests may have memory to reuse, which is no rise.
    script = "import runpy, sys; runpy.run_path(sys.argv[1])['peaks']()"
    subprocess.run([sys.executable, "-c", script, __file__], check=True, timeout=120)


def peaks() -> None:
    torch.ones(160 << 18).sum()
    peak = PeakMemory(CPU)
    before = peak.read()
    held = torch.ones(96 << 18)
    # A busy machine may keep the watching thread waiting.
    patience = time.monotonic() + 10
    while (peak.read() or 0) < 90 << 20 and time.monotonic() < patience:
        time.sleep(0.05)
    del held
    after = peak.read()
    assert before is not None and after is not None
    assert before < 32 << 20
    assert 90 << 20 < after < 130 << 20
    assert "allocated" in peak.kind
    watchers = threading.active_count()
    del peak
    gc.collect()
    time.sleep(0.2)
    assert threading.active_count() < watchers


def test_without_proc_the_resident_peak_is_told_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_allocated", lambda: None)
    peak = PeakMemory(CPU)
    assert "resident" in peak.kind and peak.read() is not None
