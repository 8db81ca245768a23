"""Decoding one token a sequence over a long cache, against dense attention of the same cache.

``python benchmarks/decode.py [--device cuda] [--length 131072] [--batch 8] [--out benchmarks/results]``

32 query heads in bf16 (fp32 on a CPU), every sequence as long as the cache, patterns that keep about 5 % of
the keys. Each answer is first compared with the pattern written out, in float64. Rivals: every backend of
``F.scaled_dot_product_attention``, with ``enable_gqa`` and with keys and values repeated for each query
head; the fastest counts. Plain calls and CUDA graphs, the L2 overwritten before each, and the host's share of
a call. Prints a table and writes ``decode_<machine>.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparsetile as st
from sparsetile.bench.measure import time_call
from sparsetile.environment import provenance

HEADS, BLOCK, SINKS, SHARE = 32, 128, 64, 0.05
SHAPES = ((8, 128), (HEADS, 128), (8, 64))
"""Key-value heads and head_dim."""
DENSE = {
    "cuda": {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    },
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH},
}
MOST_ERROR = {torch.bfloat16: 2**-7, torch.float32: 1e-5}


def patterns(length: int) -> dict[str, st.Pattern]:
    """Patterns whose last query keeps about ``SHARE`` of the keys."""
    every = round(1 / SHARE) * BLOCK
    return {
        "window and sinks": st.Local(round(SHARE * length) - SINKS - 1, 0) | st.Global(SINKS, rows=False),
        "strided tiles": st.Strided(every),
    }


def kept(pattern: st.Pattern, length: int, device: torch.device) -> Tensor:
    """bool ``[length]``: the keys of the last query, by the pattern's definition."""
    resolved = pattern.resolve(BLOCK, BLOCK, 0, length)
    return resolved.allows(torch.tensor(length - 1), torch.arange(length)).expand(length).to(device)


def worst_error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> float:
    """Largest difference from attention over ``keys`` in float64, over the largest value."""
    group, worst, largest = q.shape[1] // k.shape[1], 0.0, 0.0
    chosen = keys.nonzero().flatten()
    for head in range(k.shape[1]):
        queries = q[:, head * group : (head + 1) * group, 0].double()
        some_k, some_v = k[:, head, chosen].double(), v[:, head, chosen].double()
        weights = (queries @ some_k.transpose(1, 2) / math.sqrt(q.shape[3])).softmax(-1)
        expected = weights @ some_v
        got = out[:, head * group : (head + 1) * group, 0].double()
        worst = max(worst, float((got - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    return worst / largest


def graphed(call: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def times(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Median milliseconds, plain and (on a GPU) as a graph."""
    found = {"plain_ms": time_call(call, device).median_ms}
    if device.type == "cuda":
        found["graph_ms"] = time_call(graphed(call), device).median_ms
    return found


def host_us(call: Callable[[], object], repeats: int = 100, rounds: int = 9) -> float:
    """Microseconds that a call takes the host: the best of several runs of calls that nobody waits for."""
    best = math.inf
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, (time.perf_counter() - start) / repeats * 1e6)
    torch.cuda.synchronize()
    return best


def dense_calls(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Dense attention in every form; a token sees the whole cache, so none needs a mask."""
    group = q.shape[1] // k.shape[1]
    caches = {"enable_gqa": (k, v)}
    if group > 1:
        caches["repeated"] = (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))

    def made(backend: SDPBackend, keys: Tensor, values: Tensor) -> Callable[[], Tensor]:
        grouped = keys.shape[1] != q.shape[1]

        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, keys, values, enable_gqa=grouped)

        return call

    return {
        f"{name}, {form}" if group > 1 else name: made(backend, *cache)
        for name, backend in DENSE[q.device.type].items()
        for form, cache in caches.items()
    }


def dense_times(q: Tensor, k: Tensor, v: Tensor) -> dict[str, dict[str, float] | str]:
    """Times of each form; for one that does not serve, what it says."""
    found: dict[str, dict[str, float] | str] = {}
    for name, call in dense_calls(q, k, v).items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch warns of each reason before it raises
                found[name] = times(call, q.device)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as problem:
            found[name] = str(problem).splitlines()[0]
            if q.is_cuda:
                torch.cuda.synchronize()
    return found


def measured(
    batch: int, length: int, key_heads: int, width: int, device: torch.device
) -> list[dict[str, Any]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q = torch.randn(batch, HEADS, 1, width, device=device, dtype=dtype)
    k, v = (torch.randn(batch, key_heads, length, width, device=device, dtype=dtype) for _ in range(2))
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    ours = {}
    for name, pattern in patterns(length).items():

        def call(pattern: st.Pattern = pattern) -> Tensor:
            return st.decode_attention(q, k, v, pattern, lengths=lengths, block_size=BLOCK, enable_gqa=True)

        keys = kept(pattern, length, device)
        error = worst_error(call(), q, k, v, keys)
        if not error <= MOST_ERROR[dtype]:
            raise SystemExit(f"{name}, {key_heads} key-value heads of {width}: error {error:.3g}")
        ours[name] = (call, int(keys.sum()), error)
    # One after the other on the same tensors, so that whatever else the machine does falls on all of them.
    dense = dense_times(q, k, v)
    timed = [x for x in dense.values() if not isinstance(x, str)]
    best = {kind: min(x[kind] for x in timed) for kind in timed[0]}
    found = []
    for name, (call, keys_read, error) in ours.items():
        own = times(call, device)
        nbytes = 2 * keys_read * batch * key_heads * width * k.element_size()
        fastest = min(own.values())
        found.append(
            {
                "pattern": name,
                "text": repr(patterns(length)[name]),
                "shape": {
                    "batch": batch,
                    "length": length,
                    "heads": HEADS,
                    "key_heads": key_heads,
                    "head_dim": width,
                    "dtype": str(dtype).removeprefix("torch."),
                },
                "share_of_keys": keys_read / length,
                "relative_error": error,
                "milliseconds": own,
                "host_us": host_us(call) if device.type == "cuda" else None,
                "gigabytes_a_second": nbytes / fastest / 1e6,
                "dense": dense,
                "best_dense": best,
                "times_best_dense": {kind: best[kind] / own[kind] for kind in own},
            }
        )
    return found


def row(result: dict[str, Any]) -> str:
    shape, own, best = result["shape"], result["milliseconds"], result["best_dense"]
    cells = [
        f"{shape['key_heads']:>3} × {shape['head_dim']:<3}",
        f"{result['pattern']:<16}",
        f"{100 * result['share_of_keys']:5.2f} %",
    ]
    cells += [f"{own[kind]:8.3f} {best[kind]:8.3f} {best[kind] / own[kind]:6.1f}×" for kind in own]
    host = "" if result["host_us"] is None else f"{result['host_us']:7.0f}"
    return "  ".join([*cells, f"{result['gigabytes_a_second']:6.0f}", host])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--length", type=int, default=131_072)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    chosen = options.parse_args()
    device = torch.device(chosen.device)
    kinds = ["plain", "graph"] if device.type == "cuda" else ["plain"]
    head = "".join(f"{kind + ': ours, dense (ms), times':>26}" for kind in kinds)
    print(f"Hkv × D   pattern            keys  {head}    GB/s  host µs", flush=True)
    cases = []
    for key_heads, width in SHAPES:
        for result in measured(chosen.batch, chosen.length, key_heads, width, device):
            print(row(result), flush=True)
            cases.append(result)
    chosen.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(device).split()[1].lower() if device.type == "cuda" else "cpu"
    found = {"provenance": provenance(), "cases": cases}
    (chosen.out / f"decode_{name}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
