"""What happens in an arm's process arrives here, its end included."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

from sparsetile.errors import CheckpointError, DataError
from sparsetile.train.process import ArmFailed, _error, _failure, _run


def fail(send: Any, how: str) -> None:
    send({"event": "step", "how": how})
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise DataError("no such data")


@pytest.mark.parametrize(
    ("how", "kind", "text"), [("data", DataError, "no such"), ("killed", ArmFailed, "SIGKILL")]
)
def test_the_end_of_a_process_arrives(how: str, kind: type[Exception], text: str) -> None:
    events = _run(fail, (how,))
    assert next(events) == {"event": "step", "how": how}
    with pytest.raises(kind, match=text):
        next(events)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (CheckpointError("a file"), CheckpointError, "^a file$"),
        (RuntimeError("[enforce fail] can't allocate memory: 10 bytes"), ArmFailed, "^out of memory$"),
        (torch.OutOfMemoryError("CUDA out of memory."), ArmFailed, "^out of memory$"),
        (FloatingPointError("no number"), ArmFailed, "^no number$"),
        (KeyError("a mistake"), RuntimeError, r"KeyError: 'a mistake'"),
    ],
)
def test_errors_arrive_as_what_they_are(error: Exception, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        raise _error(_failure(error))
