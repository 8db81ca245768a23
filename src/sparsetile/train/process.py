"""Each arm in a process of its own: its memory is its own, and what it breaks stays with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from sparsetile import errors
from sparsetile.train.arms import Arm
from sparsetile.train.data import load_corpus
from sparsetile.train.loop import Settings, Trainer, train


class ArmFailed(errors.SparsetileError, RuntimeError):
    """An arm's process ended without a result, for want of memory as a rule."""


def measured(arms: list[Arm], settings: Settings, data: str | None) -> dict[str, float]:
    """Seconds that one step of each arm takes on this machine."""
    for event in _run(_measure, (arms, settings, data)):
        if event["event"] == "result":
            return dict(event["seconds"])
    raise AssertionError("a process that ends well ends with a result")


def trained(arm: Arm, settings: Settings, data: str | None) -> Iterator[dict[str, Any]]:
    """The events of :func:`sparsetile.train.loop.train` as they happen; the last is the result.

    Raises:
        ArmFailed: out of memory, or the process was killed.
        SparsetileError: what the arm itself raised.
    """
    yield from _run(_train, (arm, settings, data))


def _measure(send: Any, arms: list[Arm], settings: Settings, data: str | None) -> None:
    corpus = load_corpus(data)
    send({"event": "result", "seconds": {a.name: Trainer(a, settings, corpus).step_seconds() for a in arms}})


def _train(send: Any, arm: Arm, settings: Settings, data: str | None) -> None:
    result = train(arm, settings, load_corpus(data), send)
    send({"event": "result", "result": result})


def _run(task: Any, arguments: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    # Spawned, not forked: CUDA does not survive a fork, and a forked process starts with our memory.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, task, arguments), daemon=True)
    process.start()
    there.close()
    finished = False
    try:
        while not finished:
            event: dict[str, Any] = here.recv()
            if event["event"] == "failed":
                raise _error(event)
            finished = event["event"] == "result"
            yield event
    except EOFError:
        process.join()
        raise ArmFailed(_ended(process.exitcode)) from None
    finally:
        here.close()
        process.join(10 if finished else 0)
        if process.is_alive():
            process.terminate()
            process.join()


def _child(connection: Connection, task: Any, arguments: tuple[Any, ...]) -> None:
    # Ctrl-C reaches the whole group; the parent decides, and ends this process.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        task(connection.send, *arguments)
    except BrokenPipeError:
        return
    except Exception as error:
        connection.send(_failure(error))


def _failure(error: Exception) -> dict[str, Any]:
    memory = (
        isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error)
    )
    ours = isinstance(error, (errors.SparsetileError, FloatingPointError)) and not memory
    return {
        "event": "failed",
        "kind": type(error).__name__ if ours else "",
        "memory": memory,
        "text": str(error) if ours else "".join(traceback.format_exception(error)),
    }


def _error(event: dict[str, Any]) -> Exception:
    if event["memory"]:
        return ArmFailed("out of memory")
    kind = getattr(errors, event["kind"], None)
    if kind is not None:
        return kind(event["text"])  # type: ignore[no-any-return]
    if event["kind"]:
        return ArmFailed(event["text"])
    return RuntimeError("an arm's process failed:\n" + event["text"])


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"its process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"its process ended with exit code {code}"
