"""The cache: bounded, counted, safe between threads."""

from __future__ import annotations

import threading

import pytest
import torch

from sparsetile.errors import LayoutError, PatternError
from sparsetile.layout.cache import LayoutCache, cached_layout, layout_cache
from sparsetile.layout.schedule import schedule
from sparsetile.patterns import Causal, Documents, Local, Strided


def test_equal_requests_share_one_layout():
    cache = LayoutCache(1 << 20)
    first = cache.get(Local(3) & Causal(), 100)
    assert cache.get(Local(3, 3) & Causal(), 100, 100, (128, 128), "cpu") is first
    # Heads matter only to patterns that differ by head.
    assert cache.get(Local(3) & Causal(), 100, heads=4) is first
    assert cache.stats()[:3] == (2, 1, 0)
    others = [
        cache.get(Local(4) & Causal(), 100),
        cache.get(Local(3) & Causal(), 99),
        cache.get(Local(3) & Causal(), 100, 101),
        cache.get(Local(3) & Causal(), 100, block_size=64),
        cache.get(Local(3) & Causal(), 100, block_size=(128, 64)),
        cache.get(Local(3) & Causal(), 100, device="meta"),
        cache.get(Strided(64, 32, 32), 100, heads=2),
        cache.get(Strided(64, 32, 32), 100, heads=3),
    ]
    assert len({id(layout) for layout in (first, *others)}) == 9
    assert others[-1].heads == 3 and others[3].block_k == 64 and others[5].device.type == "meta"
    assert cache.stats().layouts == 9


def test_least_recently_used_goes_first():
    size = LayoutCache(1 << 20).get(Local(3), 5000).nbytes
    cache = LayoutCache(int(size * 2.5))
    a, b = cache.get(Local(3), 5000), cache.get(Local(4), 5000)
    assert cache.get(Local(3), 5000) is a
    cache.get(Local(5), 5000)
    assert cache.stats().evictions == 1
    assert cache.get(Local(3), 5000) is a
    assert cache.get(Local(4), 5000) is not b
    stats = cache.stats()
    assert stats.layouts == 2 and stats.nbytes <= stats.max_bytes and stats.evictions == 2


def test_schedules_that_kernels_derive_count_from_the_next_miss_on():
    cache = LayoutCache(1 << 20)
    layout = cache.get(Local(3), 5000)
    before = cache.stats().nbytes
    assert before == layout.nbytes
    for direction in ("rows", "columns"):
        schedule(layout, direction, 4)
    assert layout.footprint > before
    other = cache.get(Local(4), 5000)
    assert cache.stats().nbytes == layout.footprint + other.footprint
    tight = LayoutCache(layout.nbytes + 100)
    kept = tight.get(Local(3), 5000)
    schedule(kept, "rows", 4)
    assert kept.footprint > tight.stats().max_bytes
    tight.get(Local(3), 50)
    assert tight.stats().evictions == 1 and tight.stats().nbytes <= tight.stats().max_bytes


def test_what_is_too_large_is_not_kept():
    cache = LayoutCache(10)
    layout = cache.get(Local(3), 5000)
    layout.validate()
    assert cache.stats()[:5] == (0, 1, 0, 0, 0)
    assert cache.get(Local(3), 5000) is not layout


def test_clear_keeps_counts():
    cache = LayoutCache(1 << 20)
    first = cache.get(Local(3), 100)
    cache.clear()
    assert cache.stats()[:5] == (0, 1, 0, 0, 0)
    assert cache.get(Local(3), 100) is not first


def test_errors_are_not_kept():
    cache = LayoutCache(1 << 20)
    for _ in range(2):
        with pytest.raises(PatternError):
            cache.get(Documents([3]), 100)
        with pytest.raises(LayoutError):
            cache.get(Local(3), 100, block_size=24)
    assert cache.stats().layouts == 0
    for bad in (-1, 1.5, True):
        with pytest.raises(LayoutError):
            LayoutCache(bad)


def test_threads():
    cache = LayoutCache(60_000)
    wrong = []

    def work(number: int) -> None:
        for step in range(60):
            window = (number * 7 + step) % 9 + 1
            if cache.get(Local(window), 2000 + window).q_len != 2000 + window:
                wrong.append(window)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = cache.stats()
    assert not wrong and stats.hits + stats.misses == 240 and stats.nbytes <= 60_000


def test_the_process_has_one():
    before = layout_cache.stats()
    layout = cached_layout(Local(12345), 77)
    assert cached_layout(Local(12345), 77) is layout
    after = layout_cache.stats()
    assert after.hits - before.hits == 1 and after.misses - before.misses == 1


def test_layouts_made_in_inference_mode_serve_training_too():
    cache = LayoutCache(1 << 20)
    with torch.inference_mode():
        layout = cache.get(Local(3) & Causal(), 100)
    assert not any(x.is_inference() for x in layout.tensors())
