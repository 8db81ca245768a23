"""Layouts of patterns, kept between calls: the only process state of sparsetile, but for the few tensors of
``adaptive/lasting.py``.

Learned layouts depend on data and never come here.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

import torch

from sparsetile.errors import LayoutError, explain
from sparsetile.layout.blocks import BlockLayout
from sparsetile.patterns.base import Pattern

_Name = tuple[Pattern, int, int, int, int, int | None, torch.device]


class CacheStats(NamedTuple):
    """Counts since the cache was made (``clear()`` keeps them), and what it holds now."""

    hits: int
    misses: int
    evictions: int
    layouts: int
    nbytes: int
    max_bytes: int


class LayoutCache:
    """Layouts by (pattern, lengths, block sizes, heads, device), least recently used out first.

    The bound counts the bytes of the layouts' tensors and of what was derived from them since (schedules),
    as far as it was known at the last miss. A layout larger than the bound is built and returned, not kept.
    Safe to use from several threads; two threads that miss the same layout
    at once both build it, and one of the two results is kept.
    """

    def __init__(self, max_bytes: int) -> None:
        if type(max_bytes) is not int or max_bytes < 0:
            raise LayoutError(
                explain(
                    "LayoutCache(max_bytes)",
                    expected="an integer ≥ 0",
                    got=repr(max_bytes),
                    fix="0 keeps nothing.",
                )
            )
        self._max_bytes = max_bytes
        self._kept: OrderedDict[_Name, tuple[BlockLayout, int]] = OrderedDict()
        # Names used since the last miss: their schedules may have grown, and only theirs.
        self._used: set[_Name] = set()
        self._latest: tuple[BlockLayout, int] | None = None
        self._lock = threading.Lock()
        self._nbytes = self._hits = self._misses = self._evictions = 0

    def get(
        self,
        pattern: Pattern,
        q_len: int,
        k_len: int | None = None,
        block_size: int | tuple[int, int] = 128,
        device: torch.device | str = "cpu",
        heads: int | None = None,
    ) -> BlockLayout:
        """The layout, built by :meth:`BlockLayout.from_pattern` (whose arguments and errors these are) at
        need."""
        k_len = q_len if k_len is None else k_len
        block_q, block_k = block_size if isinstance(block_size, tuple) else (block_size, block_size)
        place = device if isinstance(device, torch.device) else torch.device(device)
        if place.index is None and place.type == "cuda":
            place = torch.device("cuda", torch.cuda.current_device())
        by_head = heads if isinstance(pattern, Pattern) and pattern.needs_heads else None
        name = (pattern, q_len, k_len, block_q, block_k, by_head, place)
        with self._lock:
            found = self._kept.get(name)
            if found is not None:
                if found is not self._latest:  # else it is in its place already
                    self._kept.move_to_end(name)
                    self._used.add(name)
                    self._latest = found
                self._hits += 1
                return found[0]
            self._misses += 1
        # Others will use it too: made in inference mode, autograd could not keep it for backward.
        with torch.inference_mode(False):
            layout = BlockLayout.from_pattern(pattern, q_len, k_len, (block_q, block_k), place, heads)
        with self._lock:
            for used in self._used & self._kept.keys():
                self._weigh(used, self._kept[used][0])
            self._used.clear()
            self._latest = None
            if layout.footprint <= self._max_bytes and name not in self._kept:
                self._weigh(name, layout)
                self._used.add(name)
            while self._nbytes > self._max_bytes:
                _, (_, freed) = self._kept.popitem(last=False)
                self._nbytes -= freed
                self._evictions += 1
        return layout

    def _weigh(self, name: _Name, layout: BlockLayout) -> None:
        """Keep a layout under its present size; its place in the order stays."""
        known = self._kept.get(name)
        size = layout.footprint
        self._kept[name] = (layout, size)
        self._nbytes += size - (0 if known is None else known[1])

    def stats(self) -> CacheStats:
        with self._lock:
            return CacheStats(
                self._hits, self._misses, self._evictions, len(self._kept), self._nbytes, self._max_bytes
            )

    def clear(self) -> None:
        """Drops all layouts; counts stay."""
        with self._lock:
            self._kept.clear()
            self._used.clear()
            self._latest = None
            self._nbytes = 0


layout_cache = LayoutCache(1 << 30)
"""The process's own cache, 1 GiB: a 16M-token window pattern takes about 80 MiB, a 1M-token one 6 MiB."""


def cached_layout(
    pattern: Pattern,
    q_len: int,
    k_len: int | None = None,
    block_size: int | tuple[int, int] = 128,
    device: torch.device | str = "cpu",
    heads: int | None = None,
) -> BlockLayout:
    """The layout of a pattern from :data:`layout_cache`."""
    return layout_cache.get(pattern, q_len, k_len, block_size, device, heads)
