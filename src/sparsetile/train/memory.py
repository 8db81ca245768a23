"""Peak memory of one arm, measured where it can be, with words that say what was measured."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Counts from its creation; on a CPU it means something only in a process that trains one arm.

    ``kind`` says what :meth:`read` returns: on CUDA the most that tensors took; elsewhere how far the
    process's resident memory rose above where it stood at creation (before the model was made).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.kind = "GPU memory in tensors"
            torch.cuda.init()  # type: ignore[no-untyped-call]  # Resetting before this is an error.
            torch.cuda.reset_peak_memory_stats(device)
            return
        self.kind = "rise of the process's resident memory"
        # Linux forgets the peak of the past (imports, reading the data) when told so; elsewhere it stays in.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.start = _resident("VmRSS")

    def read(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = _resident("VmHWM")
        return None if peak is None or self.start is None else peak - self.start


def _resident(field: str) -> int | None:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    # The peak in both cases: all that systems without /proc tell.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
