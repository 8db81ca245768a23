"""Layouts from FlexAttention's masks, and back."""

from __future__ import annotations

import time
import warnings
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pattern_draws import HEADS, case, runs
from sparsetile.errors import LayoutError
from sparsetile.layout import BlockLayout, flex
from sparsetile.patterns import Causal, Documents, Local

SIZES = st.sampled_from([16, 32, 64, 128])
BATCH = 2


def written_out(layout):
    heads = [[layout.to_dense(h, b) for h in range(layout.heads)] for b in range(layout.batch)]
    return torch.stack([torch.stack(row) for row in heads])


def same_tiles(a, b):
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("indptr", "indices", "t_edges")) and (
        torch.equal(a.mask_ids < 0, b.mask_ids < 0)
    )


def blocks_of(layout):
    """bool ``[batch, heads, q_blocks, k_blocks]``: which tiles there are."""
    row, col = layout.rows_and_columns()
    out = torch.zeros((layout.indptr.numel() - 1, layout.k_blocks), dtype=torch.bool)
    out[row, col] = True
    return out.reshape(layout.batch, layout.heads, layout.q_blocks, layout.k_blocks)


class Largest(TorchDispatchMode):
    """The entries of the largest tensor that any operation gave."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            # A view takes no memory, so what an expanded one counts does not matter.
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes():
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.itemsize)
        return out


@runs(40)
@given(case(longest=300))
def test_flex_and_back(drawn):
    size = (drawn.block_q, drawn.block_k)
    layout = BlockLayout.from_pattern(drawn.pattern, drawn.q_len, drawn.k_len, size, heads=HEADS)
    flex = layout.to_flex()
    assert tuple(flex.shape) == (1, layout.heads, drawn.q_len, drawn.k_len)
    mask = create_mask(flex.mask_mod, 2, HEADS, drawn.q_len, drawn.k_len, device="cpu")
    assert torch.equal(mask, written_out(layout).expand_as(mask))
    again = BlockLayout.from_flex(flex)
    again.validate()
    assert same_tiles(layout, again) and torch.equal(written_out(again), written_out(layout))


def test_flex_masks_of_others():
    def rule(b, h, q, k):
        return (q >= k + b) & (q - k < 70 + 9 * h)

    flex = create_block_mask(rule, 2, 3, 300, 200, device="cpu", BLOCK_SIZE=(64, 32))
    layout = BlockLayout.from_flex(flex)
    layout.validate()
    assert torch.equal(written_out(layout), create_mask(rule, 2, 3, 300, 200, device="cpu"))


def test_flex_attention_agrees():
    layout = BlockLayout.from_pattern(Local(40, 3), 200, block_size=32)
    seed = int(torch.randint(2**40, ()))
    q, k, v = torch.randn(3, 1, 2, 200, 16, generator=torch.Generator().manual_seed(seed)).unbind()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.nn.attention.flex_attention import flex_attention

        out = flex_attention(q, k, v, block_mask=layout.to_flex())
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=layout.to_dense())
    torch.testing.assert_close(out, expected, msg=str(seed))


def test_partial_blocks_that_turn_out_whole():
    def rule(b, h, q, k):
        return k // 32 <= q // 32

    flex_mask = create_block_mask(
        rule, None, None, 128, 128, device="cpu", BLOCK_SIZE=32, separate_full_blocks=False
    )
    layout = BlockLayout.from_flex(flex_mask)
    layout.validate()
    assert not layout.masks.numel() and torch.equal(
        layout.to_dense(), written_dense(rule, 1, 1, 128, 128)[0, 0]
    )


def written_dense(rule, batch, heads, q_len, k_len):
    """The rule on all positions at once, by broadcasting and not by vmap."""
    b, h = torch.arange(batch)[:, None, None, None], torch.arange(heads)[:, None, None]
    out = rule(b, h, torch.arange(q_len)[:, None], torch.arange(k_len))
    return out.expand(batch, heads, q_len, k_len)


def rules(generator, batch, heads, q_len, k_len):
    """Name → (rule, batch, heads)."""
    longest = max(q_len, k_len)
    number = (torch.rand(longest, generator=generator) < 0.03).cumsum(0)
    each = (torch.rand((batch, longest), generator=generator) < 0.03).cumsum(1)
    kept = torch.rand((heads, q_len, k_len), generator=generator) < 0.1
    kept &= torch.rand((heads, 1, k_len), generator=generator) < 0.1
    width = int(torch.randint(1, longest + 1, (), generator=generator))
    widths = torch.randint(1, longest + 1, (heads,), generator=generator)
    return {
        "causal": (lambda b, h, q, k: q >= k, 1, 1),
        "bottom right": (lambda b, h, q, k: q + (k_len - q_len) >= k, 1, 1),
        "window": (lambda b, h, q, k: (q - k < width) & (k - q < 9), 1, 1),
        "documents": (lambda b, h, q, k: (number[q] == number[k]) & (q >= k), 1, 1),
        "documents by batch": (lambda b, h, q, k: each[b, q] == each[b, k], batch, 1),
        "window by head": (lambda b, h, q, k: (q - k).abs() < widths[h], 1, heads),
        "all four": (
            lambda b, h, q, k: (each[b, q] == each[b, k]) & ((q - k).abs() < widths[h]),
            batch,
            heads,
        ),
        "captured": (lambda b, h, q, k: kept[h, q, k], 1, heads),
        "nowhere": (lambda b, h, q, k: q < 0, 1, 1),
        "everywhere": (lambda b, h, q, k: k >= 0, batch, heads),
    }


NAMES = sorted(rules(torch.Generator(), 1, 1, 1, 1))


@runs(150)
@given(
    st.sampled_from(NAMES),
    st.integers(1, 300),
    st.integers(1, 300),
    SIZES,
    SIZES,
    st.integers(0, 2**40),
    st.sampled_from([1, 1 << 12, 1 << 14, 1 << 16, 1 << 20]),
    st.sampled_from([0, 3, 4096]),
)
def test_mask_mods(name, q_len, k_len, block_q, block_k, seed, pairs, waiting):
    rule, batch, heads = rules(torch.Generator().manual_seed(seed), BATCH, HEADS, q_len, k_len)[name]
    size = (block_q, block_k)
    with mock.patch.object(flex, "_PAIRS_ON_CPU", pairs), mock.patch.object(flex, "_MASKS_WAITING", waiting):
        layout = BlockLayout.from_mask_mod(rule, q_len, k_len, size, batch, heads)
    layout.validate()
    assert (layout.batch, layout.heads) == (batch, heads)
    expected = written_dense(rule, batch, heads, q_len, k_len)
    assert torch.equal(written_out(layout), expected)
    theirs = create_block_mask(rule, batch, heads, q_len, k_len, device="cpu", BLOCK_SIZE=size)
    assert torch.equal(blocks_of(layout), theirs.to_dense().bool())
    again = BlockLayout.from_dense_mask(expected, size)
    assert same_tiles(layout, again) and layout.masks.shape == again.masks.shape
    back = BlockLayout.from_flex(layout.to_flex())
    back.validate()
    assert same_tiles(layout, back) and torch.equal(written_out(back), expected)
    with mock.patch.object(flex, "_PAIRS_ON_CPU", pairs), mock.patch.object(flex, "_MASKS_WAITING", waiting):
        own = BlockLayout.from_flex(theirs)
    own.validate()
    assert same_tiles(layout, own) and torch.equal(written_out(own), expected)


def test_mask_mods_that_patterns_know():
    number = torch.arange(3).repeat_interleave(torch.tensor([500, 30, 470]))
    for rule, pattern, q_len in (
        (lambda b, h, q, k: (q - k).abs() <= 70, Local(70), 1000),
        (lambda b, h, q, k: (number[q] == number[k]) & (q >= k), Documents((500, 30, 470)) & Causal(), 1000),
        (lambda b, h, q, k: q + 600 >= k, Causal(), 400),
    ):
        layout = BlockLayout.from_mask_mod(rule, q_len, 1000, 64)
        expected = BlockLayout.from_pattern(pattern, q_len, 1000, 64)
        assert same_tiles(layout, expected) and torch.equal(layout.to_dense(), expected.to_dense())


def test_indices_are_not_aligned_at_the_bottom_right():
    layout = BlockLayout.from_mask_mod(lambda b, h, q, k: q >= k, 40, 100, 16)
    assert torch.equal(layout.to_dense(), torch.ones(40, 100, dtype=torch.bool).tril())


@pytest.mark.parametrize("kind", ["causal", "documents"])
def test_nothing_grows_with_the_square_of_the_length(kind):
    length = 16384
    number = torch.arange(length) // 700
    rule = {
        "causal": lambda b, h, q, k: q >= k,
        "documents": lambda b, h, q, k: (number[q] == number[k]) & (q >= k),
    }[kind]
    started = time.perf_counter()
    with Largest() as seen:
        layout = BlockLayout.from_mask_mod(rule, length)
    assert time.perf_counter() - started < 10
    # A chunk, which is 1/256 of all pairs, or what is kept.
    assert 1 << 19 <= seen.numel <= 1 << 20
    pattern = Causal() if kind == "causal" else Causal() & Documents((700,) * 23 + (284,))
    expected = BlockLayout.from_pattern(pattern, length)
    assert same_tiles(layout, expected) and layout.masks.shape == expected.masks.shape


def test_from_flex_asks_in_chunks():
    # All 64 × 64 blocks are partial, with two kinds of contents.
    length, q_blocks = 8192, 64
    every = torch.arange(q_blocks, dtype=torch.int32).expand(1, 1, q_blocks, q_blocks).contiguous()
    counts = torch.full((1, 1, q_blocks), q_blocks, dtype=torch.int32)
    block_mask = BlockMask.from_kv_blocks(
        counts,
        every,
        BLOCK_SIZE=128,
        mask_mod=lambda b, h, q, k: q % 128 >= k % 128,
        seq_lengths=(length,) * 2,
    )
    with Largest() as seen:
        layout = BlockLayout.from_flex(block_mask)
    assert 1 << 19 <= seen.numel <= 1 << 20
    assert layout.nnz == q_blocks**2 and layout.masks.shape[0] == 1


def test_captured_tensors_elsewhere():
    elsewhere = torch.zeros(100, dtype=torch.bool, device="meta")
    with pytest.raises(LayoutError, match=r"on cpu.*, got .*meta.*\. \S"):
        BlockLayout.from_mask_mod(lambda b, h, q, k: elsewhere[q] & elsewhere[k], 100, block_size=16)
    with pytest.raises(LayoutError, match=r"on cpu.*, got .*meta.*\. \S") as caught:
        BlockLayout.from_mask_mod(lambda b, h, q, k: elsewhere[q] & (q >= k), 100, block_size=16)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_errors_of_a_mask_mod_are_the_cause():
    short = torch.zeros(10, dtype=torch.bool)
    with pytest.raises(LayoutError, match="index") as caught:
        BlockLayout.from_mask_mod(lambda b, h, q, k: short[q], 100, block_size=16)
    assert isinstance(caught.value.__cause__, (IndexError, RuntimeError))

    def branches(b, h, q, k):
        return k if q >= k else q

    with pytest.raises(LayoutError, match="data-dependent") as caught:
        BlockLayout.from_mask_mod(branches, 100, block_size=16)
    assert isinstance(caught.value.__cause__, RuntimeError)


def causal(b, h, q, k):
    return q >= k


@pytest.mark.parametrize(
    "make",
    [
        lambda: BlockLayout.from_flex(
            create_block_mask(causal, None, None, 200, 200, device="cpu", BLOCK_SIZE=48)
        ),
        lambda: BlockLayout.from_mask_mod(causal, 0),
        lambda: BlockLayout.from_mask_mod(causal, 100, -1),
        lambda: BlockLayout.from_mask_mod(causal, 100.0),
        lambda: BlockLayout.from_mask_mod(causal, 100, block_size=48),
        lambda: BlockLayout.from_mask_mod(causal, 100, batch=0),
        lambda: BlockLayout.from_mask_mod(causal, 100, heads=True),
        lambda: BlockLayout.from_mask_mod("causal", 100),
        lambda: BlockLayout.from_mask_mod(create_block_mask(causal, None, None, 64, 64, device="cpu"), 64),
        lambda: BlockLayout.from_mask_mod(lambda b, h, q, k: q - k, 100),
        lambda: BlockLayout.from_mask_mod(lambda b, h, q, k: True, 100),
        lambda: BlockLayout.from_mask_mod(lambda b, h, q, k: (q >= k, q), 100),
        lambda: BlockLayout.from_mask_mod(lambda b, h, q, k: torch.stack((q >= k, q < k)), 100),
        lambda: BlockLayout.from_mask_mod(lambda score, b, h, q, k: score, 100),
    ],
)
def test_bad_input(make):
    with pytest.raises(LayoutError, match=r"expected .*, got [\s\S]*\. \S"):
        make()
