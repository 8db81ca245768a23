"""The Triton forward in its interpreter, on the CPU: head_dims, blocks, layouts and features."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from oracle import FLOOR, Case, check, random_case, relative_error, run
from sparsetile.kernels import triton_backend
from sparsetile.kernels.dropout import keep_mask
from sparsetile.kernels.request import Request
from sparsetile.kernels.triton_config import Target, backward_tiles, forward_tiles, override
from sparsetile.kernels.triton_table import DIMS, FAMILIES, SIZES, WORK, Pair, Tiles
from sparsetile.layout.blocks import BlockLayout

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the real kernels"
)


def forward_error(case: Case) -> float:
    """The larger relative error of output and LSE."""
    expected = case.expected()
    out, lse = triton_backend.forward(case.q, case.k, case.v, case.request())
    assert out.dtype == case.q.dtype and lse.dtype == torch.float32
    # P is rounded to 16 bits before the product with V and, in the interpreter, cut rather than rounded.
    limit = FLOOR[case.q.dtype] * (4 if case.q.dtype != torch.float32 else 1)
    assert relative_error(lse, expected["lse"]) <= 1e-5, case.describe()
    error = relative_error(out, expected["out"])
    assert error <= limit, f"{error:.3g}: {case.describe()}"
    return error


@pytest.mark.parametrize("head_dim", [1, 4, 12, 16, 24, 35, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_dims_and_dtypes(head_dim: int, dtype: torch.dtype) -> None:
    forward_error(random_case(head_dim=head_dim, dtype=dtype, block=32, q_len=40, batch=1, heads=1))


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_square_blocks_with_ragged_tails(block: int) -> None:
    forward_error(random_case(block=block, q_len=2 * block + 7, k_len=2 * block - 1, batch=1, heads=2))


@pytest.mark.parametrize(("block_q", "block_k"), [(16, 128), (128, 16), (32, 64), (64, 16)])
def test_oblong_blocks(block_q: int, block_k: int) -> None:
    case = random_case(block=64, q_len=150, k_len=190, batch=1, heads=1)
    forward_error(replace(case, layout=BlockLayout.from_dense_mask(case.mask, (block_q, block_k))))


@pytest.mark.parametrize("q_len", [1, 15, 16, 17])
def test_lengths_around_a_block(q_len: int) -> None:
    forward_error(random_case(block=16, q_len=q_len, k_len=q_len, batch=1, heads=2))
    everything = torch.ones(1, 1, q_len, q_len, dtype=torch.bool)
    forward_error(random_case(block=16, q_len=q_len, k_len=q_len, batch=1, heads=2, mask=everything))


@pytest.mark.parametrize(
    "features",
    [
        {"gqa", "strided"},
        {"per_head", "gqa", "tile_bias"},
        {"per_batch", "tile_bias"},
        {"per_batch", "per_head", "padding"},
        {"attn_bias", "padding", "strided"},
        {"placed", "gqa"},
        {"placed", "padding_by_head", "per_head"},
    ],
    ids=lambda features: "+".join(sorted(features)),
)
def test_features(features: set[str]) -> None:
    forward_error(random_case(block=16, q_len=41, heads=4, head_dim=16, features=features))


def test_one_key_head_for_all() -> None:
    forward_error(random_case(block=16, q_len=40, heads=3, key_heads=1, head_dim=16))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale(scale: float) -> None:
    forward_error(
        replace(random_case(block=16, q_len=40, batch=1, heads=1, features={"padding"}), scale=scale)
    )


def test_rows_without_keys_give_zero_and_minus_infinity() -> None:
    mask = torch.zeros(1, 1, 50, 50, dtype=torch.bool)
    mask[..., 20:23, 5:9] = True
    case = random_case(block=16, q_len=50, batch=1, heads=1, mask=mask)
    out, lse = triton_backend.forward(case.q, case.k, case.v, case.request())
    empty = ~mask[0, 0].any(-1)
    assert (out[0, 0, empty] == 0).all() and (lse[0, 0, empty] == -math.inf).all()
    assert lse[0, 0, ~empty].isfinite().all()
    nothing = replace(case, layout=BlockLayout.from_dense_mask(mask & False, 16))
    out, lse = triton_backend.forward(case.q, case.k, case.v, nothing.request())
    assert (out == 0).all() and (lse == -math.inf).all()


def test_what_is_not_kept_does_not_leak() -> None:
    """NaN in tiles that no row keeps, under padding, and in memory past the tail."""
    length, block = 72, 32
    mask = torch.zeros(1, 1, length, length, dtype=torch.bool)
    mask[..., :block] = True
    mask[..., 40:, 64:] = True
    case = random_case(block=block, q_len=length, batch=1, heads=2, mask=mask, features={"padding"})
    assert case.key_padding_mask is not None
    case.key_padding_mask[:] = False
    case.key_padding_mask[:, 3:9] = True
    expected = case.expected()

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        longer = torch.full((*x.shape[:2], length + 40, x.shape[3]), math.nan)
        longer[:, :, :length] = x
        longer[:, :, block : 2 * block] = math.nan
        longer[:, :, 3:9] = math.inf
        return longer[:, :, :length]

    bad = replace(case, k=poisoned(case.k), v=poisoned(case.v))
    got = run(triton_backend, bad)
    for name in ("out", "lse", "q"):
        assert relative_error(got[name], expected[name]) <= 1e-5, name
    kept = torch.ones(length, dtype=torch.bool)
    kept[block : 2 * block] = False
    kept[3:9] = False
    for name in ("k", "v"):
        assert relative_error(got[name][:, :, kept], expected[name][:, :, kept]) <= 1e-5, name
        assert (got[name][:, :, 3:9] == 0).all()


def test_dropout_draws_the_bits_of_the_definition() -> None:
    """V of ones at one key and zeros elsewhere shows which weights were kept."""
    p, length, heads = 0.37, 48, 2
    seed = torch.tensor([random.SystemRandom().getrandbits(62)])
    q = torch.zeros(2, heads, length, 64)
    eye = torch.zeros(2, heads, length, 64)
    eye[:, :, :, :length] = torch.eye(length)
    layout = BlockLayout.from_dense_mask(torch.ones(1, 1, length, length, dtype=torch.bool), 16)
    out, _ = triton_backend.forward(q, q, eye, Request(layout, 1.0, dropout_p=p, seed=seed))
    stream = torch.arange(2 * heads).view(2, heads, 1, 1)
    keep = keep_mask(seed, p, stream, torch.arange(length)[:, None], torch.arange(length))
    assert torch.equal(out[..., :length] > 0, keep)
    assert torch.allclose(out[..., :length], keep / (1 - p) / length)
    heavy = Request(layout, 1.0, dropout_p=0.75, seed=seed)
    out, _ = triton_backend.forward(q, q, eye, heavy)
    keep = keep_mask(seed, 0.75, stream, torch.arange(length)[:, None], torch.arange(length))
    assert torch.equal(out[..., :length] > 0, keep)


@pytest.mark.parametrize("chunk", [1, 2])
def test_split_rows_equal_whole_rows(chunk: int) -> None:
    case = random_case(block=16, q_len=50, k_len=100, features={"per_head", "gqa"}, head_dim=16)
    with override(chunk=chunk):
        forward_error(case)


def test_compute_tiles_smaller_than_layout_tiles() -> None:
    case = random_case(block=64, q_len=100, batch=1, heads=1, features={"tile_bias"})
    with override(forward=Tiles(16, 32, 4, 1), backward=Pair((32, 16), (16, 32), 4, 1)):
        check(triton_backend, case)


@pytest.mark.parametrize("shift", [-1e9, -1e30, 1e9])
def test_a_great_bias_of_a_lone_tile_leaves_the_output(shift: float) -> None:
    """In fp32 it swallows the scores, here of some hundreds; softmax does not see it."""
    mask = torch.eye(3, dtype=torch.bool)[None, None].repeat_interleave(32, 2).repeat_interleave(32, 3)
    mask = mask[..., :70, :70] & (torch.rand(70, 70) < 0.9)
    case = random_case(block=32, q_len=70, batch=1, heads=2, head_dim=16, mask=mask, features={"tile_bias"})
    assert case.tile_bias is not None
    case = replace(case, q=60 * case.q, tile_bias=torch.zeros_like(case.tile_bias))
    expected = case.expected()
    out, lse = triton_backend.forward(
        case.q, case.k, case.v, replace(case, tile_bias=case.tile_bias + shift).request()
    )
    assert relative_error(out, expected["out"]) <= 1e-4, case.describe()
    assert relative_error(lse, expected["lse"] + shift) <= 1e-6, case.describe()


def test_tiles_never_exceed_the_layout() -> None:
    hopper = Target("hopper", 132)
    tiles = forward_tiles(hopper, 2, 128, 16, 32, "whole")
    assert (tiles.queries, tiles.keys) == (16, 32) and tiles.warps <= 4
    assert forward_tiles(hopper, 2, 80, 128, 128, "whole") == forward_tiles(hopper, 2, 128, 128, 128, "whole")
    pair = backward_tiles(hopper, 2, 128, 16, 32, "whole")
    assert (pair.rows, pair.columns) == ((16, 32), (16, 32)) and pair.warps <= 4


def test_no_choice_has_one_warp() -> None:
    """Triton 3.6 miscompiles the column programs at one warp."""
    for family, element_bytes, dim in itertools.product(FAMILIES, SIZES, DIMS):
        target, sizes = Target(family, 1), (element_bytes, min(dim, 16), 16, 16)
        for work in WORK["backward"]:
            assert backward_tiles(target, *sizes, work).warps >= 2
        for work in WORK["forward"]:
            assert forward_tiles(target, *sizes, work).warps >= 2


def test_why_not() -> None:
    case = random_case(q_len=20, batch=1, heads=1)
    request = case.request()

    def reason(q: torch.Tensor) -> str:
        return triton_backend.why_not(q, q, q, request) or ""

    assert reason(case.q) == ""
    assert "float64" in reason(case.q.double())
    assert "head_dim" in reason(case.q.new_zeros(1, 1, 16, 257))
    assert "contiguous" in reason(case.q.transpose(2, 3).contiguous().transpose(2, 3))
    assert "meta" in reason(case.q.to("meta"))


@pytest.mark.parametrize("triton_is_there", [True, False])
def test_why_not_outside_the_interpreter(triton_is_there: bool) -> None:
    """In a fresh process: CPU tensors are refused, and a missing Triton is a reason, not an ImportError."""
    program = f"""
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
import torch
if not {triton_is_there}:
    sys.modules["triton"] = None
from sparsetile.kernels import triton_backend
from sparsetile.kernels.request import Request
from sparsetile.layout.blocks import BlockLayout
layout = BlockLayout.from_dense_mask(torch.ones(1, 1, 16, 16, dtype=torch.bool), 16)
q = torch.zeros(1, 1, 16, 16)
print(triton_backend.why_not(q, q, q, Request(layout, 1.0)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ("on the CPU" if triton_is_there else "cannot be imported") in done.stdout
