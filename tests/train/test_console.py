"""What a run says while it trains; the files it leaves are tested with the command."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from sparsetile.train.arms import Arm
from sparsetile.train.console import shown
from sparsetile.train.loop import Emit
from sparsetile.train.process import ArmFailed

ARM = Arm("pattern", "Local(16)")


def test_checks_are_said_and_the_result_returned() -> None:
    said = io.StringIO()

    def train(show: Emit) -> dict[str, Any]:
        step = {"event": "step", "step": 1, "progress": 0.5, "bits": 2.0, "tokens_per_second": 9.0}
        show({**step, "memory": None})
        show({"event": "checking", "step": 1})
        show({"event": "check", "step": 1, "text": 1.5, "copy": 0.25})
        return {"name": "pattern"}

    assert shown(Console(file=said, width=120), ARM, train) == {"name": "pattern"}
    assert "pattern: Local(16)" in said.getvalue()
    assert "step      1: held out 1.500 bits/byte, far repeats 0.250" in said.getvalue()


@pytest.mark.parametrize("error", [ArmFailed("out of memory"), FloatingPointError("no number")])
def test_an_arm_that_fails_is_a_result_that_says_so(error: Exception) -> None:
    def train(show: Emit) -> dict[str, Any]:
        raise error

    said = io.StringIO()
    found = shown(Console(file=said), ARM, train)
    assert found == {"name": "pattern", "attention": "Local(16)", "failed": str(error)}
    assert f"no result: {error}" in said.getvalue()
