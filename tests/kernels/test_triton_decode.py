"""The Triton decoding kernels in their interpreter, against the dense float64 reference."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsetile import ByHead, Full, Global, Local, Random, Strided, decode_attention
from sparsetile.kernels import triton_decode

ROOT = Path(__file__).parents[2]
EXACT = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def both(q, k, v, pattern, **given):
    """The kernels' (out, lse) and the reference's."""
    return [
        decode_attention(q, k, v, pattern, enable_gqa=True, return_lse=True, backend=name, **given)
        for name in ("triton", "reference")
    ]


def check(got, expected, dtype):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a == -math.inf, b == -math.inf)
        finite = b > -math.inf
        assert float((a.double() - b.double())[finite].abs().max()) <= EXACT[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 40, 64, 128])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_equals_the_reference(dim, block, dtype):
    q = torch.randn(2, 6, 2, dim, dtype=dtype)
    k, v = torch.randn(2, 2, 2, 400, dim, dtype=dtype).unbind(0)
    lengths = torch.tensor([400, 131])
    for pattern in (Local(100, 0) | Global(20), Random(0.3, unit="token", by_head=True)):
        check(*both(q, k, v, pattern, lengths=lengths, block_size=block), dtype)


def test_left_padding_dropped_keys_masks_and_garbage():
    q = torch.randn(3, 4, 1, 32)
    k, v = torch.randn(2, 3, 2, 300, 32).unbind(0)
    lengths, starts = torch.tensor([300, 250, 40], dtype=torch.int32), torch.tensor([70, 0, 40])
    for b, length in enumerate(lengths.tolist()):
        k[b, :, length:], v[b, :, length:] = math.nan, math.nan
        k[b, :, : starts[b]], v[b, :, : starts[b]] = math.nan, math.nan
    ignore = torch.rand(3, 300) < 0.3
    given = {"lengths": lengths, "starts": starts, "key_padding_mask": ignore, "block_size": 32}
    got, expected = both(q, k, v, Local(120, 0) | Global(9), **given)
    check(got, expected, torch.float32)
    assert (got[1][2] == -math.inf).all()


def test_pages():
    q = torch.randn(2, 4, 3, 64, dtype=torch.float16)
    pages = torch.randn(2, 11, 2, 64, 64, dtype=torch.float16)
    table = torch.randperm(11)[:10].view(2, 5).int()
    given = {"lengths": torch.tensor([320, 77]), "page_table": table, "block_size": 32}
    check(*both(q, pages[0], pages[1], Strided(64, 32) | Local(40), **given), torch.float16)


def test_heads_of_a_group_with_patterns_of_their_own():
    q = torch.randn(1, 4, 1, 32)
    k, v = torch.randn(2, 1, 2, 257, 32).unbind(0)
    pattern = ByHead([Local(9, 0), Full(), Local(99, 0) | Global(33), Strided(64, 32)])
    check(*both(q, k, v, pattern, block_size=32), torch.float32)


@pytest.mark.parametrize(("programs", "longest"), [(1, 1), (1, 51), (64, 51), (5000, 51), (3, 1 << 13)])
def test_splits_cover_the_longest_row(programs, longest):
    splits, tiles = triton_decode.split(programs, longest, 132)
    assert splits * tiles >= longest > (splits - 1) * tiles
    assert splits <= 128


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_for_gpus_that_are_not_here(target):
    cases = [
        ["decode", dim, dtype, target, {}] for dtype in ("bfloat16", "float32") for dim in (64, 128, 256)
    ]
    cases += [
        ["decode", 80, "float16", target, {"padded": True}],
        ["decode", 128, "bfloat16", target, {"paged": True}],
    ]
    cases += [["decode", 128, "bfloat16", target, {"by_head": True}]]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "src")
    script = [sys.executable, str(ROOT / "tests" / "cross_compile.py")]
    done = subprocess.run(script, input=json.dumps(cases), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(cases)
    most = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}[target] * 1024
    for result in results:
        assert result["shared"] <= most, result
        assert result.get("spills_in_loops", 0) == 0, result
