"""Checkpoints that are whole or not there: whoever is killed while saving leaves the last good file."""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from sparsetile.errors import CheckpointError, explain

FORMAT = "sparsetile training checkpoint 1"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes ``state`` (tensors and plain values) so that ``path`` is at every moment absent or complete.

    Raises:
        CheckpointError: the file cannot be written; what was there before still is.
    """
    # One name for what is not finished: what a killed process leaves behind, the next save overwrites.
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            # The bytes must be on the disk before the name is, or a power cut could leave the name alone.
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise CheckpointError(
            explain(
                "checkpoint",
                expected=f"to write {path}",
                got=str(error),
                fix="Choose a place with room that you may write to, with --checkpoint.",
            )
        ) from error


def _sync_folder(folder: Path) -> None:
    # Not every system lets a folder be opened; there the rename is as durable as that system makes it.
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what :func:`save_checkpoint` wrote, onto the CPU. Nothing in the file is executed.

    Raises:
        CheckpointError: no such file, damaged, or something else.
    """
    try:
        # torch.load does not compare the check sums that torch.save writes.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else "damaged or no checkpoint"
        raise CheckpointError(
            explain(
                "checkpoint",
                expected="a file that sparsetile train wrote",
                got=f"{path}: {what}",
                fix="Name another file; to train anew, leave out --resume.",
            )
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            explain(
                "checkpoint",
                expected=f"a file that says {FORMAT!r}",
                got=f"{path}, which does not",
                fix="Name a file that this version of sparsetile train wrote.",
            )
        )
    return state


def require_same(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises CheckpointError naming each setting in which the checkpoint differs from this run."""
    different = [name for name in now if saved.get(name) != now[name]]
    if different:
        raise CheckpointError(
            explain(
                f"checkpoint {path}",
                expected=", ".join(f"{name} {now[name]}" for name in different),
                got=", ".join(f"{name} {saved.get(name)}" for name in different),
                fix="Resume with the settings that it was saved with, or start anew without --resume.",
            )
        )
