"""The promises of the GPU backends on a real GPU: the gradient matrix and a run past 2³¹ elements.

    PYTHONPATH=src:tests python tests/gpu/gradient_matrix.py --json results.json

A cell is a head_dim, a dtype, a block size and a feature. Its output, LSE and all gradients are compared with
the float64 oracle, and so is dense attention in the same dtype: ``F.scaled_dot_product_attention`` where it
can say the same, else the formula written out (dropout with the same mask, the LSE's gradient, gradients of
biases). Errors are relative in the 2-norm. A tensor passes at 1.2 times dense attention's error or less; fp32
tensors and the LSE also pass at 1e-5. Processes share the GPU because compiling takes the time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetile.environment import provenance

HEAD_DIMS = (256, 128, 96, 80, 64, 32, 16)
DTYPES = ("float32", "bfloat16", "float16")
BLOCKS = (128, 64, 32, 16)
FEATURES = ("causal", "gqa", "padding", "dropout", "tile_bias", "attn_bias", "lse")
RATIO, FP32_ERROR = 1.2, 1e-5
SERVED = {
    "triton": (HEAD_DIMS, DTYPES, BLOCKS, FEATURES),
    "hopper": (HEAD_DIMS[1:], DTYPES[1:], (128, 64), (*FEATURES[:5], "lse")),
}
"""What each backend answers for: head_dims, dtypes, blocks, features."""


def norms(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """‖got − expected‖ and ‖expected‖ in float64; infinite if infinities differ or NaN appears."""
    got, expected = got.double(), expected.double()
    finite = expected.isfinite()
    if not torch.equal(got[~finite], expected[~finite]) or not got[finite].isfinite().all():
        return math.inf, 1.0
    return (got[finite] - expected[finite]).norm().item(), expected[finite].norm().item()


def norm_error(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ ÷ ‖expected‖."""
    error, size = norms(got, expected)
    return error / max(size, 1e-30)


def dense_answers(case: Any, *, fused: bool) -> dict[str, Tensor]:
    """Output and gradients of dense attention in the case's own dtype: PyTorch's operator, or the formula."""
    from oracle import by_pair, expand_tiles

    leaves = {name: getattr(case, name) for name in ("q", "k", "v", "attn_bias", "tile_bias")}
    leaf = {name: x.detach().clone().requires_grad_() for name, x in leaves.items() if x is not None}
    q, k, v = leaf["q"], leaf["k"], leaf["v"]
    bias = torch.zeros(case.mask.shape, dtype=q.dtype, device=q.device)
    if "attn_bias" in leaf:
        bias = bias + leaf["attn_bias"]
    if "tile_bias" in leaf:
        bias = bias + expand_tiles(leaf["tile_bias"], case.mask, case.block).to(q.dtype)
    bias = bias.masked_fill(~case.mask, -math.inf)
    if case.key_padding_mask is not None:
        bias = bias.masked_fill(by_pair(case.key_padding_mask, q.shape[1] // k.shape[1]), -math.inf)
    bias = bias.expand(q.shape[0], q.shape[1], -1, -1)
    empty = (bias == -math.inf).all(-1, keepdim=True)
    bias = bias.masked_fill(empty, 0)
    answer: dict[str, Tensor] = {}
    group = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if fused:
        # A bias that wants a gradient, or grouped heads, would send it to a formula in fp32.
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias.detach(), scale=case.scale)
        total = (out * case.grad_out.masked_fill(empty, 0)).sum()
        leaf = {name: leaf[name] for name in "qkv"}
    else:
        logits = q @ keys.transpose(2, 3) * case.scale + bias
        weights = logits.softmax(-1)
        keep = case.dropout_keep()
        if keep is not None:
            weights = torch.where(keep, weights / (1 - round(case.dropout_p * 2**16) / 2**16), 0.0)
        out = weights @ values
        total = (out * case.grad_out.masked_fill(empty, 0)).sum().float()
        if case.grad_lse is not None:
            lse = logits.float().logsumexp(-1)
            total = total + (lse * case.grad_lse.masked_fill(empty[..., 0], 0)).sum()
    answer["out"] = out.detach().masked_fill(empty, 0)
    answer.update(zip(leaf, torch.autograd.grad(total, list(leaf.values())), strict=True))
    return answer


def cell(
    head_dim: int,
    dtype: str,
    block: int,
    feature: str,
    *,
    name: str = "triton",
    lean: bool = False,
    length: int = 400,
    device: str = "cuda",
) -> dict[str, Any]:
    """Errors of one cell: ``{"tensors": {name: [error, dense error]}, "ratio", "passed", "seeds"}``.

    A tile bias has a few gradients, sums in which nearly everything cancels: which of two computations is
    nearer to one such sum is chance. So its errors are taken over eight cases together.
    """
    from oracle import random_case
    from sparsetile.kernels.select import BACKENDS

    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril() if feature == "causal" else None
    seeds: list[int] = []
    found: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(8 if feature == "tile_bias" else 1):
        case = random_case(
            head_dim=head_dim,
            dtype=getattr(torch, dtype),
            block=block,
            q_len=length if feature != "gqa" else length - 37,
            k_len=length,
            features=frozenset({feature} - {"causal"}),
            mask=mask,
            device=device,
        )
        case.lean = lean
        seeds.append(case.seed)
        expected, got = case.expected(), answers(BACKENDS[name], case, feature)
        dense = dense_answers(case, fused=False)
        if feature not in ("dropout", "lse"):
            dense |= dense_answers(case, fused=True)
        for which, exact in expected.items():
            theirs = norms(dense[which], exact)[0] if which != "lse" else 0.0
            found.setdefault(which, []).append((*norms(got[which], exact), theirs))
    tensors, ratios, passed = {}, [], True
    for which, triples in found.items():
        ours, size, theirs = (math.hypot(*each) for each in zip(*triples, strict=True))
        error, theirs = ours / max(size, 1e-30), theirs / max(size, 1e-30)
        exact = dtype == "float32" or which == "lse"
        if which != "lse":
            ratios.append(error / max(theirs, 1e-30))
        passed &= error <= RATIO * theirs or (exact and error <= FP32_ERROR)
        tensors[which] = [error, theirs]
    return {"tensors": tensors, "ratio": max(ratios), "passed": passed, "seeds": seeds}


def answers(backend: Any, case: Any, feature: str) -> dict[str, Tensor]:
    """What ``backend`` gives, by the kernels that ``feature`` is to show."""
    from oracle import run
    from sparsetile.kernels.triton_config import Target, override, target_of

    if feature == "causal":
        # Every row is cut into items of one tile, so that the combining kernels are seen, too.
        with override(chunk=1):
            return run(backend, case)
    if feature != "gqa":
        return run(backend, case)
    # On a GPU said to be small the column pass walks the whole group of a key head in one program.
    found, small = backend.target_of, Target(target_of(case.q.device).family, 1)
    backend.target_of = lambda device: small
    try:
        return run(backend, case)
    finally:
        backend.target_of = found


def cells_of(task: tuple[str, int, str, int, float]) -> list[dict[str, Any]]:
    """All features of one backend, head_dim, dtype and block, which share most of their kernels."""
    backend, head_dim, dtype, block, deadline = task
    torch.set_num_threads(1)
    results = []
    for feature in SERVED[backend][3]:
        name = {
            "backend": backend,
            "head_dim": head_dim,
            "dtype": dtype,
            "block": block,
            "feature": feature,
        }
        if time.time() > deadline:
            results.append({**name, "passed": False, "problem": "not run: out of time"})
            continue
        try:
            results.append({**name, **cell(head_dim, dtype, block, feature, name=backend)})
        except Exception as problem:
            results.append(
                {**name, "passed": False, "problem": f"{type(problem).__name__}: {str(problem)[:300]}"}
            )
    return results


def band(blocks: int, block: int, device: str) -> Any:
    """Each query block sees its own key block and the one before."""
    from sparsetile.layout.blocks import BlockLayout

    own = torch.arange(blocks)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), 2 * own + 1])
    cols = torch.stack([own - 1, own], 1).flatten()[1:]
    length = blocks * block
    layout = BlockLayout.from_bsr(starts, cols, q_len=length, k_len=length, block_size=block)
    return layout.to(device)


def past_int32(
    elements: int, *, backward: bool, name: str = "triton", device: str = "cuda"
) -> dict[str, Any]:
    """bf16, 8 heads, head_dim 64 and ``elements`` in q: sampled blocks against float64 on their own keys."""
    from sparsetile.kernels.request import Request
    from sparsetile.kernels.select import BACKENDS

    backend = BACKENDS[name]
    heads, dim, block = 8, 64, 128
    blocks = elements // (heads * dim * block)
    length = blocks * block
    layout = band(blocks, block, device)
    request = Request(layout, dim**-0.5)
    count = 4 if backward else 3
    q, k, v, *rest = (
        torch.randn(1, heads, length, dim, device=device, dtype=torch.bfloat16) for _ in range(count)
    )
    start = time.perf_counter()
    out, lse = backend.forward(q, k, v, request)
    answer = {"out": out, "lse": lse}
    if backward:
        asked = {"tile_bias_grad": False, "attn_bias_grad": False}
        grads = backend.backward(rest[0], None, q, k, v, out, lse, request, **asked)
        answer |= {"q": grads.q, "k": grads.k, "v": grads.v}
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    errors: dict[str, float] = {}
    for head in (0, heads - 1):
        for at in (1, blocks // 2, blocks - 2):
            # Query blocks at and at + 1 see key blocks at − 1 … at + 1; no other queries see key block at.
            rows, keys = slice(at * block, (at + 2) * block), slice((at - 1) * block, (at + 2) * block)
            x = q[0, head, rows].double().requires_grad_()
            y, z = (t[0, head, keys].double().requires_grad_() for t in (k, v))
            query = torch.arange(2 * block, device=device)[:, None] // block
            key = torch.arange(3 * block, device=device) // block
            unseen = (key != query) & (key != query + 1)
            logits = (x @ y.T * dim**-0.5).masked_fill(unseen, -math.inf)
            dense = logits.softmax(-1) @ z
            want = {"out": dense[:block], "lse": logits.logsumexp(-1)[:block]}
            if backward:
                dx, dy, dz = torch.autograd.grad(dense, (x, y, z), rest[0][0, head, rows].double())
                want |= {"q": dx[:block], "k": dy[block : 2 * block], "v": dz[block : 2 * block]}
            for name, exact in want.items():
                part = answer[name][0, head, at * block : (at + 1) * block]
                errors[name] = max(errors.get(name, 0.0), norm_error(part, exact.detach()))
    return {
        "tokens": length,
        "elements": q.numel(),
        "seconds": seconds,
        "errors": errors,
        "passed": q.numel() > 2**31 and all(error < 0.01 for error in errors.values()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True)
    parser.add_argument(
        "--minutes", type=float, default=6.0, help="cells not begun by then are reported as not run"
    )
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--backends", nargs="+", choices=tuple(SERVED), default=tuple(SERVED))
    parser.add_argument("--skip", choices=("matrix", "large"), default=None)
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    started = time.time()
    report: dict[str, Any] = {
        "provenance": provenance(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "limits": {"ratio": RATIO, "fp32": FP32_ERROR},
        "large": {},
        "cells": [],
    }
    if options.skip != "matrix":
        deadline = started + 60 * options.minutes
        tasks = [
            (backend, *of, deadline)
            for backend in options.backends
            for of in itertools.product(*SERVED[backend][:3])
        ]
        with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
            for index, results in enumerate(pool.imap_unordered(cells_of, tasks, chunksize=1), 1):
                report["cells"] += results
                if index % 12 == 0 or index == len(tasks):
                    bad = sum(not result["passed"] for result in report["cells"])
                    print(
                        f"{index}/{len(tasks)} kernels, {bad} cells failed, {time.time() - started:.0f} s",
                        flush=True,
                    )
    if options.skip != "large":
        memory = torch.cuda.mem_get_info()[0]
        tokens = 16 * 2**20 if memory > 85 * 2**30 else 6 * 2**20
        for name in options.backends:
            forward = past_int32(tokens * 512, backward=False, name=name)
            torch.cuda.empty_cache()
            backward = past_int32(5 * 2**20 * 512, backward=True, name=name)
            torch.cuda.empty_cache()
            report["large"] |= {f"{name} forward": forward, f"{name} backward": backward}
        print(json.dumps(report["large"]), flush=True)
    report["seconds"] = time.time() - started
    report["cells"].sort(key=lambda c: (c["backend"], c["head_dim"], c["dtype"], c["block"], c["feature"]))
    Path(options.json).write_text(json.dumps(report, indent=1) + "\n")

    failed = [result for result in report["cells"] if not result["passed"]]
    for result in failed[:40]:
        name = "{backend} D{head_dim} {dtype} block {block} {feature}".format(**result)
        print(
            "FAILED",
            name,
            result.get("problem") or {k: [f"{e:.2e}" for e in v] for k, v in result["tensors"].items()},
        )
    for dtype in DTYPES:
        ratios = sorted(c["ratio"] for c in report["cells"] if c["dtype"] == dtype and "ratio" in c)
        if ratios:
            print(f"{dtype}: ratio to dense, median {ratios[len(ratios) // 2]:.2f}, largest {ratios[-1]:.2f}")
    large_failed = [name for name, result in report["large"].items() if not result["passed"]]
    count = len(report["cells"])
    print(f"{count - len(failed)} of {count} cells passed; large runs failed: {large_failed or 'none'}")
    print(f"{report['seconds']:.0f} s, wrote {options.json}")
    return 1 if failed or large_failed else 0


if __name__ == "__main__":
    sys.exit(main())
