"""Meetings: everyone who comes in time learns the same, everyone else that it was too late."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from processes import run_ranks
from sparsetile.distributed.meeting import Meeting, Report
from sparsetile.errors import MismatchError, RankLostError


def held(store: Any, size: int, present: list[int], timeout: float) -> dict[int, dict[int, Report]]:
    """What each of those who are present learns."""
    found: dict[int, dict[int, Report]] = {}

    def one(rank: int) -> None:
        report = Report("lost", f"from {rank}", 7, [4, rank], [[1, 2, 3, True], None], rank)
        found[rank] = Meeting(store, 1, rank, size, timeout).hold(report)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in present]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


@pytest.fixture(params=["HashStore", "FileStore"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return dist.HashStore() if request.param == "HashStore" else dist.FileStore(str(tmp_path / "store"), 3)


def test_all_learn_the_same(store: Any) -> None:
    assert not Meeting(store, 1, 0, 3, 60.0).begun
    found = held(store, 3, [0, 1, 2], 60.0)
    assert Meeting(store, 1, 0, 3, 60.0).begun
    wanted = {r: Report("lost", f"from {r}", 7, [4, r], [[1, 2, 3, True], None], r) for r in range(3)}
    assert found == {0: wanted, 1: wanted, 2: wanted}


def test_who_does_not_come_is_left_out(store: Any) -> None:
    found = held(store, 3, [0, 2], 0.3)
    assert [sorted(told) for told in found.values()] == [[0, 2], [0, 2]]
    with pytest.raises(RankLostError, match="gone on without it: rank 0, rank 2"):
        Meeting(store, 1, 1, 3, 0.3).hold(Report("lost", ""))


def without_a_store(rank: int, world: int, how: str) -> None:
    """Rank 0 hosts the store, and closes it or freezes."""
    port = [0]
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = [store.port]
    dist.broadcast_object_list(port, src=0)
    if rank:
        store = dist.TCPStore("127.0.0.1", port[0], is_master=False, timeout=timedelta(seconds=20))
    dist.barrier()
    if rank == 0 and how == "close":
        del store
    if rank == 0 and how == "freeze":
        subprocess.Popen(["sh", "-c", f"sleep 8; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank:
        time.sleep(1)
        start = time.monotonic()
        with pytest.raises(RankLostError, match="a store that outlives any rank"):
            Meeting(store, 1, rank, world, 1.0).hold(Report("lost", ""))
        assert time.monotonic() - start < 6


@pytest.mark.parametrize("how", ["close", "freeze"])
def test_a_store_that_is_gone(how: str) -> None:
    run_ranks(without_a_store, 2, how)


def test_kinds() -> None:
    memory = MismatchError("others cannot tell")
    memory.__cause__ = torch.OutOfMemoryError("no memory")
    cases = [
        (torch.OutOfMemoryError("x"), "memory"),
        (memory, "memory"),
        (MismatchError("x"), "mismatch"),
        (RankLostError("x"), "lost"),
        (dist.DistNetworkError("x"), "lost"),
        (RuntimeError("x"), "error"),
        (ValueError("x\nmore"), "error"),
    ]
    for error, kind in cases:
        assert Report.of(error).kind == kind
    assert Report.of(ValueError("x\nmore")).text == "ValueError: x"
