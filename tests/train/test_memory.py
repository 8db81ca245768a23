"""Peak memory sees a peak that is gone again."""

from __future__ import annotations

import sys

import pytest
import torch

from sparsetile.train.memory import PeakMemory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets the peak of the past")
def test_a_peak_is_seen_after_it_is_gone_and_one_of_the_past_is_not() -> None:
    torch.ones(160 << 18).sum()
    peak = PeakMemory(torch.device("cpu"))
    before = peak.read()
    torch.ones(96 << 18).sum()
    after = peak.read()
    assert before is not None and after is not None
    assert before < 32 << 20
    assert 90 << 20 < after < 130 << 20
    assert "resident" in peak.kind
