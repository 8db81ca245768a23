"""Runs a function in several processes that form a gloo group, with a deadline."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing as mp
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist

_PATIENCE, _STUCK = 120, 50
"""Seconds: gloo's deadline of a collective, and when a rank that still runs writes where it is."""


def _one(
    function: Callable[..., Any], rank: int, world: int, store: str, queue: Any, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    stacks = open(f"{store}.{rank}", "w")  # noqa: SIM115  faulthandler writes to it from another thread
    faulthandler.dump_traceback_later(_STUCK, file=stacks)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=_PATIENCE),
        )
        # If a rank left at once, those that still connect to it would fail.
        dist.barrier()
        # As bytes: tensors would else be shared memory, which goes with this process.
        queue.put(pickle.dumps((rank, function(rank, world, *args), None)))
        dist.destroy_process_group()
    except BaseException:
        queue.put(pickle.dumps((rank, None, traceback.format_exc())))


def run_ranks(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    seconds: float = 240.0,
    killed: Collection[int] = (),
) -> list[Any]:
    """What ``function(rank, world, *args)`` returns on each rank, in the order of ranks; values must pickle.
    Ranks that are ``killed`` return nothing: None.

    The processes are forks, so functions need no module of their own and torch is imported already.
    """
    context = mp.get_context("fork")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        each = [
            context.Process(target=_one, args=(function, rank, world, store, queue, args), daemon=True)
            for rank in range(world)
        ]
        # A fork has its parent's objects and one of its threads. An object that its collector meets and that
        # owns another thread, as an old process group does, would wait for that for ever, or abort.
        gc.freeze()
        for process in each:
            process.start()
        gc.unfreeze()
        found: dict[int, Any] = {}
        end = time.monotonic() + seconds
        try:
            while len(found) < world - len(killed):
                try:
                    told = queue.get(timeout=max(0.1, end - time.monotonic()))
                except Empty:
                    raise AssertionError(f"{len(found)} of {world} told{_places(store, world)}") from None
                rank, value, problem = pickle.loads(told)
                assert problem is None, f"rank {rank} of {world}:\n{problem}{_places(store, world)}"
                found[rank] = value
        finally:
            for process in each:
                process.join(timeout=5 if len(found) == world - len(killed) else 0.1)
                if process.is_alive():
                    process.kill()
    return [found.get(rank) for rank in range(world)]


def _places(store: str, world: int) -> str:
    """Where ranks were that ran for long: the one that complains seldom is the one that is stuck."""
    files = [Path(f"{store}.{rank}") for rank in range(world)]
    written = [each.read_text() if each.exists() else "" for each in files]
    return "".join(f"\nrank {rank} after {_STUCK} s:\n{text}" for rank, text in enumerate(written) if text)


def torchrun(processes: int, script: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """``script``, a file or ``-m module`` and its arguments, as torchrun starts it; 1 process without it."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    # A session of its own, so that a deadline ends the ranks with their launcher.
    process = subprocess.Popen(
        [sys.executable, *(launch if processes > 1 else ()), *script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **paths},
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


NO_THREAD_LEFT = """
import os
from pathlib import Path
assert "pt_gloo_runloop\\n" not in [(each / "comm").read_text() for each in Path("/proc/self/task").iterdir()]
"""
"""For the end of a script: gloo's threads are gone. One that lives on can abort a Python that shuts down."""
