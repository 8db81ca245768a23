"""How long layouts take to build, and what they hold: a table here, JSON in ``benchmarks/results``.

    python benchmarks/layout_build.py [--repeats 7] [--out FILE]

Times are the least of the repeats, single-threaded. ``peak`` is how far the process's high-water mark of
resident memory rises while the first build of a row runs, each row in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from sparsetile.environment import provenance
from sparsetile.layout import BlockLayout
from sparsetile.layout.cache import LayoutCache
from sparsetile.patterns import Causal, Documents, Pattern, parse_pattern

BLOCK = 128
M = 1 << 20
USUAL = "(Local(4096) | Global(128)) & Causal()"
DOCUMENTS = "Documents(64 new lengths each time) & Causal()"

# (pattern, tokens, heads, most milliseconds that the project allows itself, None where it says nothing)
ROWS: list[tuple[str, int, int | None, float | None]] = [
    (USUAL, M, None, 150.0),
    (USUAL, 16 * M, None, 3000.0),
    (DOCUMENTS, 131_072, None, 5.0),
    ("Local(4096).block_aligned() & Causal()", M, None, None),
    ("Dilated(65536, 16)", M, None, None),
    ("Strided(65536) & Causal()", M, None, None),
    ("Local(2048) | Strided(65536, head_shift=128)", M, 8, None),
    ("LogStrided() & Causal()", M, None, None),
    ("Random(0.002) & Causal()", M, None, None),
    ("(Local(1024) | Random(0.001, by_head=True)) & Causal()", M, 4, None),
]


def new_documents(tokens: int, count: int = 64) -> Pattern:
    borders = [0, *sorted(random.sample(range(1, tokens), count - 1)), tokens]
    return Documents([b - a for a, b in pairwise(borders)]) & Causal()


def least(call: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of the quickest call."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def measure(row: tuple[str, int, int | None, float | None], repeats: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    text, tokens, heads, allowed = row
    fixed = None if text == DOCUMENTS else parse_pattern(text)

    def build(length: int = tokens) -> BlockLayout:
        return BlockLayout.from_pattern(fixed or new_documents(length), length, block_size=BLOCK, heads=heads)

    build(4096 * 32)  # the first call of an operation pays for its dispatch
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layout = build()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    result = {
        "pattern": text,
        "tokens": tokens,
        "heads": heads,
        "block": BLOCK,
        "ms": least(build, repeats if layout.nnz > 10**5 else 10 * repeats),
        "ms_allowed": allowed,
        "tiles": layout.nnz,
        "masks": layout.masks.shape[0],
        "layout_bytes": layout.nbytes,
        "peak_bytes": peak,
    }
    if fixed is not None:
        cache = LayoutCache(1 << 40)
        cache.get(fixed, tokens, block_size=BLOCK, heads=heads)
        hit = least(lambda: cache.get(parse_pattern(text), tokens, block_size=BLOCK, heads=heads), 50)
        parse = least(lambda: parse_pattern(text), 50)
        same = least(lambda: cache.get(fixed, tokens, block_size=BLOCK, heads=heads), 200)
        result |= {"cached_us": 1e3 * same, "cached_equal_pattern_us": 1e3 * max(hit - parse, same)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "layout_build_cpu.json"
    )
    options = parser.parse_args()
    heading = f"{'pattern':56} {'tokens':>9} {'ms':>8} {'limit':>6} {'tiles':>8} {'ns/tile':>8}"
    print(f"{heading} {'peak MB':>8} {'hit µs':>7}")
    rows = []
    context = multiprocessing.get_context("spawn")
    for row in ROWS:
        with context.Pool(1) as pool:
            r = pool.apply(measure, (row, options.repeats))
        rows.append(r)
        limit = "" if r["ms_allowed"] is None else f"{r['ms_allowed']:.0f}"
        hit = f"{r['cached_us']:.1f}" if "cached_us" in r else "new"
        print(
            f"{r['pattern']:56} {r['tokens']:9} {r['ms']:8.2f} {limit:>6} {r['tiles']:8} "
            f"{1e6 * r['ms'] / r['tiles']:8.0f} {r['peak_bytes'] / 1e6:8.1f} {hit:>7}",
            flush=True,
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**provenance(), "rows": rows}, indent=1) + "\n")
    print(f"Written to {options.out}")


if __name__ == "__main__":
    main()
