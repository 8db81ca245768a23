"""What sparse attention costs at its limits on one GPU: length, blocks, options, repeats, memory.

``python benchmarks/limits.py [--out benchmarks/results] [--only linearity,card]``

Each section runs in a process of its own, so that no memory, cap or failed kernel of one reaches another:

``linearity``  nanoseconds a tile from 131,072 to 8,388,608 tokens; ``spread`` is (most − least) ÷ least.
``blocks``     blocks of 128, 64 and 32 at one density, by tile-FLOP rate; ``ratio`` is to block 128.
``ratios``     deterministic backward, tile biases, key padding and dropout, each against the call without.
``host``       microseconds that a forward call takes the host, of its backend and of ``sparse_attention``.
``repeats``    1,000 calls on the same input: whether the bits stay, and how far a gradient strays.
``memory8``    the longest sequences in 8 GiB; inputs, outputs and gradients count.
``card``       the longest sequence on the whole GPU.

Needs a GPU. Writes ``limits_<machine>.json`` after every measurement; what fails has an ``error``. A section
that was measured before and is not asked for stays, with its own provenance. ``--device cpu`` shows on small
sizes that the script runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparsetile as st
from sparsetile.bench.cases import Case
from sparsetile.bench.measure import time_call
from sparsetile.environment import provenance
from sparsetile.kernels.request import Request
from sparsetile.kernels.select import choose

GIB = 2**30
BUDGET_MS = {"cuda": 100.0, "cpu": 1.0}  # of one timing
SECTION_SECONDS = 300  # after which a section is stopped
DTYPE = torch.bfloat16
FLOPS = {"forward": 4, "backward": 10}  # a pair of a tile and entry of head_dim
STRAY = 1e-4  # a relative deviation beyond the order of fp32 sums, seen through bf16

Row = dict[str, Any]


def made(case: Case, device: torch.device) -> st.BlockLayout:
    """The layout of a case, built on the CPU."""
    return case.layout(torch.device("cpu"), torch.Generator().manual_seed(0)).to(device)


def tensors(shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, which need a gradient, and the output's gradient."""
    q, k, v, grad = (torch.randn(tuple(shape), device=device, dtype=DTYPE) for _ in range(4))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def served(
    inputs: Sequence[Tensor],
    layout: st.BlockLayout,
    *,
    backend: str = "auto",
    dropout_p: float = 0.0,
    deterministic: bool = False,
    **features: Tensor,
) -> str:
    """The name of the backend that serves a call."""
    seed = torch.zeros(1, dtype=torch.int64, device=inputs[0].device) if dropout_p else None
    request = Request(layout, 1.0, dropout_p, seed, lean=deterministic, **features)
    module: Any = choose(backend, *inputs[:3], request)
    return str(module.__name__).rpartition(".")[2].removesuffix("_backend")


def timed(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    layout: st.BlockLayout,
    *,
    tile_bias: Tensor | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Milliseconds of forward, and of backward for all that needs a gradient."""
    q, k, v, grad = inputs
    call = partial(st.sparse_attention, q, k, v, layout, tile_bias=tile_bias, **settings)
    with torch.no_grad():
        forward = time_call(call, q.device, BUDGET_MS[q.device.type]).median_ms
    out = call()
    leaves = [x for x in (q, k, v, tile_bias) if x is not None and x.requires_grad]
    backward = partial(torch.autograd.grad, out, leaves, grad, retain_graph=True)
    return {
        "forward_ms": forward,
        "backward_ms": time_call(backward, q.device, BUDGET_MS[q.device.type]).median_ms,
    }


def tried(what: Row, measure: Callable[[], Row]) -> Row:
    """``what`` was measured with its measurement, or with the error that came instead."""
    try:
        return {**what, **measure()}
    except Exception as problem:
        return {**what, "error": f"{type(problem).__name__}: {problem}"[:500]}


def heads_that_fit(wanted: int, length: int, head_dim: int, device: torch.device) -> int:
    """At most ``wanted`` heads whose tensors take 80 % of the GPU: q, k, v, out, their gradients, the sum of
    dq in fp32, and three fp32 numbers a query."""
    if device.type != "cuda":
        return wanted
    one = length * (8 * DTYPE.itemsize * head_dim + 4 * head_dim + 3 * 4)
    return min(wanted, int(0.8 * torch.cuda.get_device_properties(device).total_memory / one))


def linearity(
    device: torch.device,
    *,
    lengths: Sequence[int] = (131_072, 524_288, 2_097_152, 8_388_608),
    head_dims: Sequence[int] = (64, 128),
    patterns: Sequence[str] = ("local", "random"),
    heads: int = 4,
    block: int = 128,
    tiles: int = 8,
) -> Iterator[Row]:
    for head_dim in head_dims:
        shared = heads_that_fit(heads, max(lengths), head_dim, device)
        for pattern in patterns:
            series: list[Row] = []

            def measure(case: Case) -> Row:
                layout = made(case, device)
                times = timed(tensors(case.shape, device), layout)
                count = layout.nnz * case.heads
                per_tile = {f"{x}_ns_a_tile": times[f"{x}_ms"] * 1e6 / count for x in FLOPS}
                return {"tiles": layout.nnz, **times, **per_tile}

            for length in lengths:
                case = Case(pattern, length, 1, shared, head_dim, "bfloat16", block, tiles)
                what = {"pattern": pattern, "head_dim": head_dim, "heads": shared, "length": length}
                series.append(tried(what, partial(measure, case)))
                yield series[-1]
                gc.collect()
                torch.cuda.empty_cache()
            good = [row for row in series if "error" not in row]
            if len(good) < 2:
                continue
            spread: Row = {"pattern": pattern, "head_dim": head_dim, "over": [row["length"] for row in good]}
            for direction in FLOPS:
                costs = [row[f"{direction}_ns_a_tile"] for row in good]
                spread[f"{direction}_spread"] = (max(costs) - min(costs)) / min(costs)
            yield spread


def blocks(
    device: torch.device,
    *,
    length: int = 32_768,
    heads: int = 16,
    head_dims: Sequence[int] = (64, 128),
    largest: int = 128,
    budgets: dict[str, int] | None = None,
    backends: Sequence[str] = ("auto", "triton"),
) -> Iterator[Row]:
    """``budgets``: tiles of ``largest`` a row, by pattern."""
    for head_dim in head_dims:
        inputs = tensors((1, heads, length, head_dim), device)
        for pattern, tiles in (budgets or {"random": 26, "local": 5}).items():
            known: dict[tuple[str, int], Row] = {}

            def measure(what: Row, case: Case, known: dict[tuple[str, int], Row], inputs: Any) -> Row:
                layout = made(case, device)
                by = served(inputs, layout, backend=what["backend"])
                found = known.get((by, case.block))  # "auto" may have been this one
                if found is None:
                    work = layout.nnz * case.heads * case.head_dim * case.block**2
                    times = timed(inputs, layout, backend=what["backend"])
                    rates = {f"{x}_tflops": n * work / times[f"{x}_ms"] / 1e9 for x, n in FLOPS.items()}
                    found = known[by, case.block] = {**times, **rates}
                return {"served_by": by, "tiles_a_row": case.tiles, **found}

            for backend in backends:
                whole: Row = {}
                for block in (largest, largest // 2, largest // 4):
                    budget = tiles * largest // block
                    case = Case(pattern, length, 1, heads, head_dim, "bfloat16", block, budget)
                    what = {"pattern": pattern, "head_dim": head_dim, "block": block, "backend": backend}
                    row = tried(what, partial(measure, what, case, known, inputs))
                    whole = row if block == largest else whole
                    if "error" not in row and "error" not in whole:
                        for x in FLOPS:
                            row[f"{x}_ratio"] = row[f"{x}_tflops"] / whole[f"{x}_tflops"]
                    yield row


def ratios(
    device: torch.device,
    *,
    length: int = 32_768,
    heads: int = 16,
    head_dims: Sequence[int] = (64, 128),
    block: int = 128,
    budgets: dict[str, int] | None = None,
    without: str = "triton",
) -> Iterator[Row]:
    """``without``: the backend that dropout is compared with."""

    def measure(inputs: Any, layout: st.BlockLayout, setting: dict[str, Any]) -> Row:
        return {"served_by": served(inputs, layout, **setting), **timed(inputs, layout, **setting)}

    for head_dim in head_dims:
        inputs = tensors((1, heads, length, head_dim), device)
        for pattern, tiles in (budgets or {"random": 26, "local": 5, "global+local": 11}).items():
            layout = made(Case(pattern, length, 1, heads, head_dim, "bfloat16", block, tiles), device)
            bias = torch.randn(1, heads, layout.capacity, device=device)
            padding = torch.arange(length, device=device)[None] >= 0.9 * length
            settings: dict[str, dict[str, Any]] = {
                "normal": {},
                "deterministic": {"deterministic": True},
                "tile bias": {"tile_bias": bias},
                "tile bias with gradient": {"tile_bias": bias.clone().requires_grad_()},
                "padding": {"key_padding_mask": padding},
                "dropout": {"dropout_p": 0.1},
                "without dropout": {"backend": without},
            }
            found: dict[str, Row] = {}
            for name, setting in settings.items():
                what = {"pattern": pattern, "head_dim": head_dim, "call": name}
                found[name] = tried(what, partial(measure, inputs, layout, setting))
                yield found[name]

            def ratio(over: str, under: str, direction: str, found: dict[str, Row] = found) -> float | None:
                times = [found[name].get(f"{direction}_ms") for name in (over, under)]
                return None if None in times else times[0] / times[1]

            graded, dropped = "tile bias with gradient", ("dropout", "without dropout")
            yield {
                "pattern": pattern,
                "head_dim": head_dim,
                "deterministic_ratio": ratio("deterministic", "normal", "backward"),
                "tile_bias_gradient_ratio": ratio(graded, "normal", "backward"),
                "tile_bias_gradient_ratio_to_tile_bias": ratio(graded, "tile bias", "backward"),
                "padding_forward_ratio": ratio("padding", "normal", "forward"),
                "padding_backward_ratio": ratio("padding", "normal", "backward"),
                "dropout_forward_ratio": ratio(*dropped, "forward"),
                "dropout_backward_ratio": ratio(*dropped, "backward"),
            }


def host(
    device: torch.device,
    *,
    length: int = 8_192,
    heads: int = 64,
    head_dims: Sequence[int] = (64, 128),
    block: int = 128,
    rounds: int = 21,
) -> Iterator[Row]:
    """Medians over ``rounds`` of ten calls that nobody waits for; local layouts of three tiles a row."""
    for head_dim in head_dims:
        q, k, v, _ = tensors((1, heads, length, head_dim), device)
        layout = made(Case("local", length, 1, heads, head_dim, "bfloat16", block, 3), device)
        request = Request(layout, head_dim**-0.5)
        backend: Any = choose("auto", q, k, v, request)
        calls: dict[str, Callable[[], object]] = {
            "backend": partial(backend.forward, q, k, v, request),
            "sparse_attention": partial(st.sparse_attention, q, k, v, layout),
        }
        for name, call in calls.items():
            taken = []
            with torch.no_grad():
                for _ in range(rounds + 1):
                    start = time.perf_counter()
                    for _ in range(10):
                        call()
                    taken.append((time.perf_counter() - start) / 10 * 1e6)
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
            yield {
                "head_dim": head_dim,
                "call": name,
                "served_by": served((q, k, v), layout),
                "host_us": sorted(taken[1:])[rounds // 2],
            }


def mixed(length: int, block: int, most: int) -> st.BlockLayout:
    """Rows of 0 to ``most`` tiles anywhere, a quarter of the tiles partial."""
    draw, count = torch.Generator().manual_seed(0), length // block
    counts = torch.randint(most + 1, (count,), generator=draw)
    counts[:2] = torch.tensor([0, most])
    places = torch.rand(count, count, generator=draw).argsort(1).argsort(1)
    kept = places < counts[:, None]
    partial_tiles = torch.rand(count, count, generator=draw) < 0.25
    kept, partial_tiles = (
        x.repeat_interleave(block, 0).repeat_interleave(block, 1) for x in (kept, partial_tiles)
    )
    pairs = torch.rand(length, length, generator=draw) < 0.5
    return st.BlockLayout.from_dense_mask(kept & (pairs | ~partial_tiles), block)


def repeated(call: Callable[[], Sequence[Tensor]], names: Sequence[str], calls: int) -> Row:
    """How the results of ``calls`` calls differ from the first; the host never waits for one."""

    def bits(x: Tensor) -> Tensor:
        return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)

    def finite(x: Tensor) -> Tensor:
        return x.float().masked_fill(torch.isneginf(x), 0.0)  # lse of a row without keys

    first = [x.detach().clone() for x in call()]
    norms = [finite(x).norm() for x in first]
    device = first[0].device
    worst = [torch.zeros((), device=device) for _ in first]
    stray, other = (torch.zeros(len(first), dtype=torch.int64, device=device) for _ in range(2))
    for _ in range(calls):
        for i, x in enumerate(call()):
            deviation = (finite(x.detach()) - finite(first[i])).norm() / norms[i]
            worst[i] = torch.maximum(worst[i], deviation)
            stray[i] += ~(deviation <= STRAY)  # NaN strays
            other[i] += (bits(x.detach()) != bits(first[i])).any()
    found = {"calls": calls, "same_bits": not other.any().item()}
    for i, name in enumerate(names):
        found[name] = {
            "calls_that_differ": int(other[i]),
            "most_deviation": worst[i].item(),
            "calls_that_stray": int(stray[i]),
        }
    return found


def repeats(
    device: torch.device,
    *,
    length: int = 8192,
    heads: int = 4,
    head_dims: Sequence[int] = (64, 128),
    block: int = 128,
    most: int = 40,
    calls: int = 1000,
) -> Iterator[Row]:
    layout = mixed(length, block, most).to(device)
    for head_dim in head_dims:
        q, k, v, grad = tensors((1, heads, length, head_dim), device)
        call = partial(st.sparse_attention, q, k, v, layout, return_lse=True)

        def forward(call: Callable[..., Any] = call) -> Row:
            with torch.no_grad():
                return repeated(call, ("out", "lse"), calls)

        def backward(
            deterministic: bool, call: Any = call, inputs: Any = (q, k, v), grad: Tensor = grad
        ) -> Row:
            out, _ = call(deterministic=deterministic)
            again = partial(torch.autograd.grad, out, inputs, grad, retain_graph=True)
            return repeated(again, ("dq", "dk", "dv"), calls)

        yield tried({"head_dim": head_dim, "direction": "forward"}, forward)
        for deterministic in (True, False):
            what = {"head_dim": head_dim, "direction": "backward", "deterministic": deterministic}
            yield tried(what, partial(backward, deterministic))


def once(device: torch.device, tokens: int, *, gradient: bool, memory: str, heads: int, head_dim: int) -> Row:
    """One call on new tensors, eight tiles of 128 a row around the diagonal: what it took at most."""
    torch.cuda.reset_peak_memory_stats(device)
    layout = made(Case("local", tokens, 1, heads, head_dim, "bfloat16", 128, 8), device)
    shape = 1, heads, tokens, head_dim
    kept: Any
    if gradient:
        q, k, v, grad = tensors(shape, device)
        out = st.sparse_attention(q, k, v, layout, memory=memory)
        kept = torch.autograd.grad(out, (q, k, v), grad)
    else:
        q, k, v = (torch.randn(shape, device=device, dtype=DTYPE) for _ in range(3))
        kept = st.sparse_attention(q, k, v, layout, memory=memory)
    torch.cuda.synchronize(device)
    del kept
    peak = torch.cuda.max_memory_allocated(device)
    named = (8 if gradient else 4) * q.nbytes
    return {
        "tokens": tokens,
        "sparsity": 1 - layout.density,
        "peak_allocated_bytes": peak,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
        "named_bytes": named,
        "layout_bytes": layout.footprint,
        "share_beyond": 1 - named / peak,
    }


def fits(call: Callable[[int], Row], tokens: int) -> Row | None:
    """The call's row, or None where memory ran out."""
    gc.collect()
    torch.cuda.empty_cache()
    try:
        return call(tokens)
    except RuntimeError as problem:  # the allocator's, or the driver's for a kernel
        if "out of memory" not in str(problem):
            raise
        return None


def longest(call: Callable[[int], Row | None], low: int, high: int, step: int, tries: int) -> Row | None:
    """The row of the most tokens, to ``step``, that fit below ``high``; None where not even ``step`` does.

    ``low`` should fit; where it does not, a tenth less is tried until something does. ``tries`` bounds the
    halvings after that.
    """
    best = call(low)
    while best is None and low > step:
        high, low = low, max(step, low * 9 // 10 // step * step)
        best = call(low)
    while best is not None and tries and high - low > step:
        middle = (low + high) // 2 // step * step
        if middle <= low:  # which need not be a multiple of the step
            middle += step
        row = call(middle)
        low, high, best = (low, middle, best) if row is None else (middle, high, row)
        tries -= 1
    return best


def memory8(
    device: torch.device, *, gib: float = 8.0, heads: int = 8, head_dim: int = 64, step: int = 16_384
) -> Iterator[Row]:
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(gib * GIB / total, device)
    for name, asked, gradient, memory in (
        ("forward and backward", 800_000, True, "auto"),
        ("forward and backward", 950_000, True, "low"),
        ("forward", 1_800_000, False, "auto"),
    ):
        tokens = math.ceil(asked / 128) * 128
        call = partial(once, device, gradient=gradient, memory=memory, heads=heads, head_dim=head_dim)
        what = {"call": name, "memory": memory, "gib": gib}

        def target(call: Callable[[int], Row] = call, tokens: int = tokens) -> Row:
            found = fits(call, tokens)
            return {"fits": found is not None, **(found or {"tokens": tokens})}

        def most(call: Callable[[int], Row] = call, tokens: int = tokens, gradient: bool = gradient) -> Row:
            bound = int(gib * GIB) // ((8 if gradient else 4) * heads * head_dim * DTYPE.itemsize)
            found = longest(partial(fits, call), tokens, bound, step, 5)
            return {"longest": True, **(found or {"tokens": None})}

        yield tried(what, target)
        yield tried(what, most)


def card(
    device: torch.device, *, heads: int = 8, head_dim: int = 64, step: int = 16_384, tries: int = 4
) -> Iterator[Row]:
    call = partial(once, device, gradient=True, memory="low", heads=heads, head_dim=head_dim)

    def most() -> Row:
        call(step)  # what the driver keeps for kernels counts as taken
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        bound = free // (8 * heads * head_dim * DTYPE.itemsize)
        guess = int(0.95 * bound) // step * step
        found = longest(partial(fits, call), guess, bound, step, tries)
        return {"longest": True, "free_bytes": free, "total_bytes": total, **(found or {"tokens": None})}

    yield tried({"call": "forward and backward", "memory": "low"}, most)


SECTIONS: dict[str, Callable[..., Iterator[Row]]] = {
    "linearity": linearity,
    "blocks": blocks,
    "ratios": ratios,
    "host": host,
    "repeats": repeats,
    "memory8": memory8,
    "card": card,
}
_FEW = {"length": 256, "heads": 2, "head_dims": (16,)}
SMALL: dict[str, dict[str, Any]] = {
    "linearity": {"lengths": (128, 256), "head_dims": (16,), "heads": 1, "block": 16, "tiles": 2},
    "blocks": {**_FEW, "largest": 64, "budgets": {"random": 2, "local": 1}, "backends": ("auto", "cpu")},
    "ratios": {**_FEW, "block": 32, "budgets": {"random": 3, "global+local": 4}, "without": "cpu"},
    "host": {**_FEW, "block": 32, "rounds": 3},
    "repeats": {**_FEW, "block": 32, "most": 6, "calls": 3},
}
"""Sizes of ``--device cpu``; the other sections need a GPU."""


def one_section(name: str, device: torch.device) -> None:
    """Print every row of a section as a line of JSON, an error last."""
    torch.manual_seed(0)
    try:
        if device.type == "cpu" and name not in SMALL:
            raise RuntimeError("needs a GPU")
        if device.type == "cuda":
            torch.cuda.init()  # statistics of memory are refused before
        for row in SECTIONS[name](device, **(SMALL[name] if device.type == "cpu" else {})):
            print(json.dumps(row), flush=True)
    except Exception as problem:
        print(json.dumps({"error": f"{type(problem).__name__}: {problem}"[:500]}), flush=True)


def in_short(name: str, row: Row) -> str:
    numbers = {key: f"{x:.4g}" if isinstance(x, float) else x for key, x in row.items()}
    return f"{name}: " + ", ".join(f"{key} {x}" for key, x in numbers.items())


def measured(name: str, device: str, save: Callable[[Row], None]) -> None:
    """A section in a process of its own; ``save`` is called with what there is after every row."""
    start = time.monotonic()
    rows: list[Row] = []
    found: Row = {"provenance": provenance(), "rows": rows}
    # Settings of PyTorch's allocator would change what fits. The second name is that of PyTorch up to 2.9.
    settings = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment = {key: value for key, value in os.environ.items() if key not in settings}
    command = [sys.executable, __file__, "--device", device, "--section", name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    watch = threading.Timer(SECTION_SECONDS, process.kill)
    watch.start()
    assert process.stdout is not None
    for line in process.stdout:
        if not line.startswith("{"):
            continue
        rows.append(json.loads(line))
        print(in_short(name, rows[-1]), flush=True)
        save(found)
    code = process.wait()
    watch.cancel()
    if code:
        found["error"] = f"the section's process ended with {code}"
        print(in_short(name, {"error": found["error"]}), flush=True)
    found["seconds"] = time.monotonic() - start
    save(found)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.section is not None:
        one_section(
            chosen.section, torch.device("cuda", 0) if chosen.device == "cuda" else torch.device("cpu")
        )
        return
    names = chosen.only.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        options.error(f"--only: expected some of {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    machine = "cpu" if chosen.device == "cpu" else torch.cuda.get_device_name().split()[1].lower()
    chosen.out.mkdir(parents=True, exist_ok=True)
    file = chosen.out / f"limits_{machine}.json"
    results: dict[str, Row] = json.loads(file.read_text()) if file.exists() else {}

    def save(name: str, found: Row) -> None:
        results[name] = found
        file.write_text(json.dumps(results, indent=1) + "\n")

    for name in names:
        measured(name, chosen.device, partial(save, name))


if __name__ == "__main__":
    main()
