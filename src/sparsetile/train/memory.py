"""Peak memory of one arm, measured where it can be, with words that say what was measured."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_PAUSE = 0.005


class PeakMemory:
    """Counts from its creation; on a CPU it means something only in a process that trains one arm.

    ``kind`` says what :meth:`read` returns: on CUDA the most that tensors took; on Linux how far the memory
    that the process allocated rose above where it stood at creation (before the model was made), looked at
    every 5 ms. Not resident memory as a whole: that also counts pages of libraries as they are first used,
    which are many and differ from run to run. Elsewhere the rise of the peak resident memory is all there is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self.peak = 0
        if device.type == "cuda":
            self.kind = "GPU memory in tensors"
            torch.cuda.init()  # type: ignore[no-untyped-call]  # Resetting before this is an error.
            torch.cuda.reset_peak_memory_stats(device)
        elif (allocated := _allocated()) is not None:
            self.kind = "rise of the memory that the process allocated"
            self.start = self.peak = allocated
            threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True).start()
        else:
            self.kind = "rise of the process's peak resident memory"
            self.start = _peak_resident() or 0

    def look(self) -> None:
        self.peak = max(self.peak, _allocated() or 0)

    def read(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.peak:
            return self.peak - self.start
        resident = _peak_resident()
        return None if resident is None else resident - self.start


def _watch(watched: weakref.ref[PeakMemory]) -> None:
    while (memory := watched()) is not None:
        memory.look()
        del memory
        time.sleep(_PAUSE)


def _allocated() -> int | None:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _peak_resident() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
