"""The Triton decoding kernels in their interpreter, against the dense float64 reference; and compiled."""

import math

import pytest
import torch

from kernels.test_triton_compile import assert_fit, compile_all
from sparsetile import (
    BlockLayout,
    ByHead,
    Full,
    Global,
    Local,
    Random,
    Strided,
    decode_attention,
)
from sparsetile.decode import decode_layout
from sparsetile.kernels import triton_decode_launch
from sparsetile.kernels.triton_config import Target

EXACT = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the real kernels"
)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """As many as fill a small GPU, of as little as a step: rows are split, and the interpreter is slow."""
    monkeypatch.setattr(triton_decode_launch, "target_of", lambda device: Target("hopper", 8))
    monkeypatch.setattr(triton_decode_launch, "_LEAST_BYTES", 1)


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


@interpreted
@pytest.mark.parametrize(
    ("dim", "block", "dtype"),
    [
        (16, 16, torch.float32),
        (40, 32, torch.float16),
        (64, 128, torch.bfloat16),
        (128, 64, torch.float32),
        (256, 32, torch.bfloat16),
        (1, 16, torch.float16),
    ],
)
@pytest.mark.parametrize("q_len", [1, 3])
def test_equals_the_reference(dim, block, dtype, q_len):
    q = torch.randn(2, 6, q_len, dim, dtype=dtype)
    k, v = torch.randn(2, 2, 2, 300, dim, dtype=dtype).unbind(0)
    lengths = torch.tensor([300, 130])  # of which three queries are in two rows of tiles
    for pattern in (Local(100, 0) | Global(20), Random(0.3, unit="token", by_head=True)):
        check(*both(q, k, v, pattern, lengths=lengths, block_size=block), dtype)


@interpreted
def test_sixteen_queries_of_a_large_group_over_several_products():
    q = torch.randn(2, 6, 16, 16, dtype=torch.bfloat16)
    k, v = torch.randn(2, 2, 1, 150, 16, dtype=torch.bfloat16).unbind(0)
    lengths = torch.tensor([150, 70])
    check(*both(q, k, v, Local(60, 0) | Global(3), lengths=lengths, block_size=32), torch.bfloat16)


@interpreted
@pytest.mark.parametrize("q_len", [1, 5])
def test_left_padding_masks_and_garbage(q_len):
    q = torch.randn(4, 4, q_len, 32)
    k, v = torch.randn(2, 4, 2, 300, 32).unbind(0)
    lengths = torch.tensor([300, 250, 40, 2], dtype=torch.int32)
    starts = torch.tensor([70, 0, 40, 0])
    for b, length in enumerate(lengths.tolist()):
        for x in (k, v):
            x[b, :, length:], x[b, :, : starts[b]] = math.nan, math.nan
    ignore = torch.rand(4, 320)[:, 5:305] < 0.3
    k.transpose(1, 2)[ignore] = math.nan
    given = {"lengths": lengths, "starts": starts, "key_padding_mask": ignore, "block_size": 32}
    got, expected = both(q, k, v, Local(120, 0) | Global(9), **given)
    check(got, expected, torch.float32)
    # All of one is padding, and of another there are fewer keys than queries.
    assert (got[1][2] == -math.inf).all() and (got[1][3, :, : max(0, q_len - 2)] == -math.inf).all()


@interpreted
def test_a_cache_that_dropped_its_first_keys():
    q, dropped = torch.randn(1, 2, 1, 16), 133
    k, v = torch.randn(2, 1, 2, 200, 16).unbind(0)
    layout = decode_layout(Local(60, 0) & Strided(2, "token"), 200, 32)
    whole, expected = both(q, k, v, layout)
    kept, _ = both(q, k[:, :, dropped:], v[:, :, dropped:], layout, starts=torch.tensor([-dropped]))
    check(whole, expected, torch.float32)
    check(kept, expected, torch.float32)


@interpreted
def test_pages():
    q = torch.randn(2, 4, 3, 64, dtype=torch.float16)
    pages = torch.randn(2, 11, 2, 64, 64, dtype=torch.float16)
    table = torch.randperm(11)[:10].view(2, 5).int()
    given = {"lengths": torch.tensor([320, 77]), "block_size": 32}
    _, expected = both(*(q, *pages), Strided(64, 32) | Local(40), page_table=table, **given)
    table[1, 2:] = -1  # of pages that are not filled
    got, _ = [
        decode_attention(
            *(q, *pages, Strided(64, 32) | Local(40)),
            page_table=table,
            enable_gqa=True,
            return_lse=True,
            backend=name,
            **given,
        )
        for name in ("triton", "cpu")
    ]
    check(got, expected, torch.float16)


@interpreted
def test_heads_of_a_group_with_patterns_of_their_own():
    q = torch.randn(1, 4, 1, 32)
    k, v = torch.randn(2, 1, 2, 257, 32).unbind(0)
    pattern = ByHead([Local(9, 0), Full(), Local(99, 0) | Global(33), Strided(64, 32)])
    check(*both(q, k, v, pattern, block_size=32), torch.float32)


@interpreted
def test_whole_tiles_alone_and_strided_caches():
    q = torch.randn(2, 1, 4, 16).transpose(1, 2)
    k, v = torch.randn(2, 2, 96, 2, 16).transpose(2, 3).unbind(0)
    whole = torch.ones(3, 3, dtype=torch.bool).tril()
    layout = BlockLayout.from_block_mask(whole, 96, 96, 32)
    assert not layout.masks.shape[0]
    check(*both(q, k, v, layout, lengths=torch.tensor([96, 33])), torch.float32)


@pytest.mark.parametrize(("batch", "longest"), [(1, 1), (1, 51), (8, 51), (600, 51), (3, 1 << 13)])
def test_splits_fill_the_gpu(batch, longest):
    q = torch.empty(batch, 32, 1, 128, dtype=torch.bfloat16, device="meta")
    layout = decode_layout(Local(3, 0), 4096)
    shape = triton_decode_launch.Shape.of(q, 8, layout, Target("hopper", 132))
    splits = triton_decode_launch.splits_for(shape, longest, 132)
    most = 2 * 132 // (8 * batch)
    assert shape.works == 8 * batch and splits == max(1, min(most, longest))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_compiles_for_hopper(dtype):
    forms = [{}, {"queries": 16}, {"paged": True}, {"padded": True}, {"by_head": True}, {"merge": True}]
    cases = [["decode", 128, dtype, "sm_90", form] for form in forms]
    cases += [["decode", dim, dtype, "sm_90", {}] for dim in (16, 64, 80)]
    # Past that width fp32 operands in three parts do not fit the registers.
    cases += [["decode", 256, dtype, "sm_90", {"direct": True}]]
    results = compile_all(cases)
    assert_fit(results)
    tight = [r for r in results if r["spills_in_loops"] > 2]
    assert not [r for r in tight if (dtype, r["case"][1]) != ("float32", 256)], tight


def test_compiles_for_other_gpus():
    cases = [["decode", 128, "bfloat16", target, {}] for target in ("sm_80", "sm_100", "gfx942")]
    cases += [["decode", 128, "float32", target, {"queries": 4}] for target in ("sm_80", "gfx942")]
    cases += [["decode", 256, "float16", "gfx942", {"queries": 16, "padded": True}]]
    results = compile_all(cases)
    assert_fit(results)
    assert not [r for r in results if r.get("spills_in_loops", 0) > 2], results
