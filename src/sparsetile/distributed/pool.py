"""Memory for messages: lent, given back, and lent again.

Messages of sequences of varying length have varying sizes. Taken from PyTorch's caching allocator they cut
up its blocks between those of activations, which outlive them. Here a buffer is taken once for sizes up to a
class and lent out in slices. Buffers are ordinary tensors and not in a ``torch.cuda.MemPool``: what is
trimmed must be of use to activations at once, and memory of a MemPool is not.
"""

from __future__ import annotations

import math
import threading
import weakref
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import TracebackType

import torch
from torch import Tensor

from sparsetile.errors import ArgumentError, PoolError, explain

_LEAST = 512
_STEPS = 4
"""Size classes of an octave: a buffer is at most a quarter larger than what it was made for."""

_MOST_WASTE = 2
"""A buffer is lent for no less than its size divided by this."""


@dataclass(frozen=True)
class PoolStatistics:
    """Counts since the pool was made, and bytes.

    Attributes:
        leases: times that memory was lent.
        allocations: times that a buffer had to be made for it.
        live_bytes: of buffers that are lent.
        idle_bytes: of buffers that wait to be lent again.
        peak_bytes: the most that both were together.
        trimmed_bytes: of buffers given up under pressure, or by :meth:`BufferPool.trim`.
    """

    leases: int = 0
    allocations: int = 0
    live_bytes: int = 0
    idle_bytes: int = 0
    peak_bytes: int = 0
    trimmed_bytes: int = 0


@dataclass(frozen=True, eq=False)
class _Buffer:
    memory: Tensor
    ready: torch.Event | None = None
    stream: torch.Stream | None = None

    @property
    def size(self) -> int:
        return self.memory.numel()

    def used_on(self, stream: torch.Stream) -> None:
        """Should the buffer be given up, PyTorch must not hand its memory on before this stream is done."""
        self.memory.record_stream(stream)


def _size_of(buffer: _Buffer) -> int:
    return buffer.size


class Lease:
    """Memory that is lent until :meth:`release`, or the end of a ``with`` block.

    What autograd saves of it is found out: after ``release`` it counts as changed in place, so a backward
    that asks for it raises.
    """

    def __init__(self, pool: BufferPool, buffer: _Buffer, tensor: Tensor) -> None:
        self._pool, self._buffer, self._tensor = pool, buffer, tensor
        # One that is dropped takes its buffer with it: nobody knows whether it is still in use.
        self._dropped = weakref.finalize(self, pool._forget, buffer.size)

    @property
    def tensor(self) -> Tensor:
        """What was asked for, with any content.

        Raises:
            PoolError: it has been released.
        """
        if not self._dropped.alive:
            raise PoolError("a lease was used after its release: ask the pool for another one.")
        return self._tensor

    def release(self) -> None:
        """Gives the memory back. On a device the next borrower waits, on its own stream, for what this one
        has begun on the current stream.

        Raises:
            PoolError: it has been released before.
        """
        torch.autograd.graph.increment_version(self.tensor)
        self._dropped.detach()
        self._pool._take_back(self._buffer)

    def __enter__(self) -> Tensor:
        return self.tensor

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._dropped.alive:
            self.release()


class BufferPool:
    """Lends memory of one device. Never for what autograd saves: see :class:`Lease`.

    Buffers that wait are given up, the largest first, when a new one would not fit: on a CUDA device when
    the driver and PyTorch's allocator have less free (``torch.cuda.mem_get_info``), and on any device
    beyond ``cap_bytes``.

    Args:
        device: of the memory.
        cap_bytes: most bytes that lent and waiting buffers may have together before waiting ones are given
            up; None: no bound of its own. What is asked for is lent, even if it alone exceeds the bound.

    Raises:
        ArgumentError: ``cap_bytes`` is below 1.

    Example:
        >>> pool = BufferPool("cpu")
        >>> with pool.lease((2, 3)) as x:
        ...     _ = x.zero_()
        >>> with pool.lease((5,)) as y:
        ...     pool.statistics().allocations
        1
    """

    def __init__(self, device: torch.device | str, cap_bytes: int | None = None) -> None:
        if cap_bytes is not None and (type(cap_bytes) is not int or cap_bytes < 1):
            raise ArgumentError(
                explain("cap_bytes", expected="bytes from 1 on", got=repr(cap_bytes), fix="None: no bound.")
            )
        self.device, self.cap_bytes = torch.device(device), cap_bytes
        # Ascending in size. Backward runs in threads of its own.
        self._idle: list[_Buffer] = []
        self._lock = threading.RLock()
        self._counts = PoolStatistics()

    def lease(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Lease:
        """A contiguous tensor of this shape, for the current stream.

        Raises:
            ArgumentError: a size is negative.
            torch.OutOfMemoryError: it does not fit, though nothing waits any more.
        """
        if any(type(size) is not int or size < 0 for size in shape):
            raise ArgumentError(
                explain("shape", expected="sizes from 0 on", got=list(shape), fix="Pass a tensor's shape.")
            )
        wanted = math.prod(shape) * dtype.itemsize
        with self._lock, torch.no_grad():
            buffer = self._waiting_for(wanted) or self._new(size_class(wanted))
            now, size = self._counts, buffer.size
            self._counts = replace(now, leases=now.leases + 1, live_bytes=now.live_bytes + size)
            tensor = buffer.memory[:wanted].view(dtype).view(list(shape))
            return Lease(self, buffer, tensor)

    def statistics(self) -> PoolStatistics:
        """Counts and bytes as of now."""
        with self._lock:
            return self._counts

    def trim(self, at_most: int = 0) -> None:
        """Gives up waiting buffers, the largest first, until they have at most so many bytes."""
        with self._lock:
            while self._idle and self._counts.idle_bytes > at_most:
                size = self._idle.pop().size
                now = self._counts
                trimmed = now.trimmed_bytes + size
                self._counts = replace(now, idle_bytes=now.idle_bytes - size, trimmed_bytes=trimmed)

    def _waiting_for(self, wanted: int) -> _Buffer | None:
        place = bisect_left(self._idle, wanted, key=_size_of)
        if place == len(self._idle) or self._idle[place].size > max(_LEAST, _MOST_WASTE * wanted):
            return None
        buffer = self._idle.pop(place)
        self._counts = replace(self._counts, idle_bytes=self._counts.idle_bytes - buffer.size)
        if buffer.ready is not None:
            here = torch.accelerator.current_stream(self.device)
            if here != buffer.stream:
                here.wait_event(buffer.ready)
                buffer.used_on(here)
        return buffer

    def _new(self, size: int) -> _Buffer:
        held = self._counts.live_bytes + self._counts.idle_bytes
        lacking = 0 if self.cap_bytes is None else held + size - self.cap_bytes
        if self._idle and self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            lacking = max(lacking, size - free)
        if lacking > 0:
            self.trim(max(0, self._counts.idle_bytes - lacking))
        try:
            memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            self.trim()
            memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        now = self._counts
        peak = max(now.peak_bytes, now.live_bytes + now.idle_bytes + size)
        self._counts = replace(now, allocations=now.allocations + 1, peak_bytes=peak)
        return _Buffer(memory)

    def _take_back(self, buffer: _Buffer) -> None:
        if self.device.type != "cpu":
            stream = torch.accelerator.current_stream(self.device)
            buffer.used_on(stream)
            buffer = _Buffer(buffer.memory, stream.record_event(), stream)
        with self._lock:
            insort(self._idle, buffer, key=_size_of)
            now, size = self._counts, buffer.size
            idle = now.idle_bytes + size
            self._counts = replace(now, live_bytes=now.live_bytes - size, idle_bytes=idle)

    def _forget(self, size: int) -> None:
        with self._lock:
            self._counts = replace(self._counts, live_bytes=self._counts.live_bytes - size)


@cache
def pool_of(device: torch.device) -> BufferPool:
    """The pool that exchanges on this device share."""
    return BufferPool(device)


def size_class(size: int) -> int:
    """The smallest of ``512·2^n·(1, 1.25, 1.5, 1.75)`` that holds ``size`` bytes."""
    if size <= _LEAST:
        return _LEAST
    octave = 1 << (size - 1).bit_length() - 1
    step = octave // _STEPS
    return octave + step * -(-(size - octave) // step)
