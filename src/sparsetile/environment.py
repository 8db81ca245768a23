"""Where a result came from: the commit, the machine and the versions that every result file carries."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sparsetile._version import __version__

_PACKAGE = Path(__file__).resolve().parent


def provenance() -> dict[str, Any]:
    """What every result file records, as values that ``json`` can write.

    Keys: ``date`` (UTC, ISO 8601); ``commit`` and ``modified`` (see :func:`commit`); ``source`` (see
    :func:`source_digest`); ``versions`` (see :func:`versions`); ``machine`` (see :func:`machine`).
    """
    revision, modified = commit()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": revision,
        "modified": modified,
        "source": source_digest(),
        "versions": versions(),
        "machine": machine(),
    }


def commit() -> tuple[str | None, bool | None]:
    """The commit of the checkout that this package runs from, and whether the package differs from it.

    ``(None, None)`` where the package is not part of a git checkout (installed from a wheel, or copied to a
    machine without its history). There the environment variable ``SPARSETILE_COMMIT`` may name the commit;
    :func:`source_digest` then tells whether the claim is true.
    """
    revision = _git("rev-parse", "HEAD")
    # A checkout that merely contains the virtual environment is not ours: the file itself must be tracked.
    if revision is None or _git("ls-files", "--error-unmatch", "_version.py") is None:
        return os.environ.get("SPARSETILE_COMMIT") or None, None
    return revision, bool(_git("status", "--porcelain", "--", "."))


def source_digest() -> str:
    """SHA-256 over the names and contents of the package's ``.py`` and ``.json`` files: names the code, and
    the table that its kernels go by, without git."""
    digest = hashlib.sha256()
    for path in sorted((*_PACKAGE.rglob("*.py"), *_PACKAGE.rglob("*.json"))):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def versions() -> dict[str, str | None]:
    """Versions of sparsetile and of what decides its numbers; None for what is not installed."""
    return {
        "sparsetile": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": installed("triton"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "flash_attn_4": installed("flash-attn-4"),
    }


def installed(distribution: str) -> str | None:
    """Version of an installed distribution without importing it; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """The machine: system, processor, usable cores, memory in bytes, and the accelerators.

    Nothing that names a person or a host.
    """
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "memory": _memory_bytes(),
        "devices": devices(),
    }


def devices() -> list[dict[str, Any]]:
    """Accelerators that torch sees: name, compute capability, multiprocessors, memory in bytes."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory": properties.total_memory,
            }
        )
    return found


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_PACKAGE), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Hardware"):
            return value.strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
