"""Time and peak memory of one call, on CPU and CUDA. Medians; nothing is timed that was not warmed up."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MEMORY_KIND = {
    "cuda": "peak of torch's CUDA allocator above what was held before the call",
    "cpu": "peak of torch's CPU allocator above what was held before the call (profiler events; "
    "memory that libraries take themselves is not seen)",
}
_FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call: the median and the best of ``repeats``."""

    median_ms: float
    min_ms: float
    repeats: int


def time_call(call: Callable[[], object], device: torch.device, budget_ms: float = 150.0) -> Times:
    """Median time of ``call`` after a warm-up, repeated for about ``budget_ms`` (3 to 200 times).

    On CUDA each repeat is timed by events after the L2 cache was overwritten; on CPU by ``perf_counter``. A
    CPU call longer than 20 budgets is timed once.
    """
    if device.type == "cuda":
        return _time_cuda(call, device, budget_ms)
    call()
    samples: list[float] = []
    while len(samples) < 3 or (sum(samples) < budget_ms and len(samples) < 200):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e3)
        if samples[0] > 20 * budget_ms:
            break
    return Times(statistics.median(samples), min(samples), len(samples))


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes that ``call`` held at once beyond what was held before it; see ``MEMORY_KIND``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept = call()
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    # The profiler's library announces every start on stderr unless it is told, before its first use, not to.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.autograd.profiler.profile(profile_memory=True, record_shapes=True) as profile:
        kept = call()
    del kept
    allocations: list[tuple[int, int]] = []
    pending = list(profile.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            allocations.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = peak = 0
    for _, size in sorted(allocations, key=lambda pair: pair[0]):
        held += size
        peak = max(peak, held)
    return peak


def ceilings(device: torch.device) -> dict[str, float] | None:
    """What the GPU reaches here: ``flops`` a second of a bf16 product 8192³ of random numbers, and
    ``bytes`` a second, read and written, of a copy of 2 GiB. None on CPU."""
    if device.type != "cuda":
        return None
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = _time_cuda(lambda: a @ b, device, 40.0).median_ms
    source = torch.empty(2**31, dtype=torch.uint8, device=device)
    into = torch.empty_like(source)
    copied = _time_cuda(lambda: into.copy_(source), device, 40.0).median_ms
    return {"flops": 2 * 8192**3 / product * 1e3, "bytes": 2 * source.nbytes / copied * 1e3}


def _time_cuda(call: Callable[[], object], device: torch.device, budget_ms: float) -> Times:
    flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    call()
    estimate = max(_events(call, flush, 2)[1:])
    for _ in range(min(50, int(0.25 * budget_ms / estimate))):
        call()
    repeats = max(3, min(200, int(budget_ms / estimate)))
    samples = _events(call, flush, repeats)
    return Times(statistics.median(samples), min(samples), repeats)


def _events(call: Callable[[], object], flush: Tensor, repeats: int) -> list[float]:
    pairs = [(_event(), _event()) for _ in range(repeats)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(flush.device)
    return [max(start.elapsed_time(end), 1e-6) for start, end in pairs]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
