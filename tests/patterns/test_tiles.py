"""Exact keys and bit masks."""

from __future__ import annotations

import pytest
import torch

from sparsetile.patterns.tiles import (
    Key,
    combine,
    interval_words,
    mask_words,
    ones,
    pack,
    representatives,
    unpack,
)


@pytest.mark.parametrize("radix", [3, 1 << 20, 1 << 40, 1 << 62])
def test_combined_keys_are_equal_exactly_where_all_parts_are(radix):
    seed = int(torch.randint(2**40, ()))
    generator = torch.Generator().manual_seed(seed)
    few = torch.randint(radix, (4,), generator=generator)
    parts = few[torch.randint(4, (5, 400), generator=generator)]
    key = combine([Key(part, radix) for part in parts])
    assert (key.values >= 0).all() and (key.values < key.radix).all(), seed
    same = (parts[:, :, None] == parts[:, None, :]).all(0)
    assert torch.equal(key.values[:, None] == key.values[None, :], same), seed
    which, index = representatives(key.values)
    assert torch.equal(parts[:, which[index]], parts), seed
    assert which.numel() == torch.unique(parts, dim=1).shape[1], seed


@pytest.mark.parametrize("block_k", [16, 32, 64, 128])
def test_words(block_k):
    seed = int(torch.randint(2**40, ()))
    generator = torch.Generator().manual_seed(seed)
    lo, hi = torch.randint(-20, block_k + 20, (2, 500), generator=generator)
    key = torch.arange(block_k)
    expected = (lo[:, None] <= key) & (key < hi[:, None])
    words = interval_words(lo, hi, block_k)
    assert words.shape == (500, mask_words(block_k)) and words.dtype == torch.int32
    assert torch.equal(unpack(words, block_k), expected), seed
    assert torch.equal(pack(expected), words), seed
    bits = torch.rand(7, 3, block_k, generator=generator) < 0.5
    assert torch.equal(unpack(pack(bits), block_k), bits), seed
    # Bit j, least significant first, of word w is key 32·w + j.
    numbers = pack(bits).long() & 0xFFFFFFFF
    spelled = sum(bits[..., j].long() << (j % 32) for j in range(min(32, block_k)))
    assert torch.equal(numbers[..., 0], spelled), seed
    assert (pack(torch.ones(2, block_k, dtype=torch.bool)) == ones(block_k)).all()
