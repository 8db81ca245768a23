"""Counter-based dropout: whether a weight is kept depends on (seed, batch, head, query, key) alone.

Every backend computes the same bits, so backward regenerates what forward drew, backends can be compared
bit for bit, and splitting rows over programs, tiles or machines cannot change the mask.

``mix`` is the 32-bit finaliser "lowbias32" (Chris Wellons, "Hash Prospector", public domain); ``fold`` is
the upper half of a 64-bit product xor its lower half (as in wyhash, Wang Yi, public domain). Four weights
share two words: those at queries q and q + 8 and keys k and k + 8, which one thread holds of a product of
tensor cores, whichever of the two its rows are. With c(i) = 8⌊i / 16⌋ + i mod 8, all modulo 2³²::

    row  = fold((mix(seed_low ^ mix(seed_high + batch·H + head)) ^ (c(query) · 0x85EBCA6B)) · 0xC2B2AE35)
    x    = fold(fold((row ^ (c(key) · 0x9E3779B1)) · 0xD2511F53) · 0xCD9E8D57)
    y    = fold(x · 0xA0761D65)
    word = y if ⌊query / 8⌋ is odd else x
    bits = word // 2¹⁶ if ⌊key / 8⌋ is odd else word mod 2¹⁶
    keep = bits ≥ round(p · 2¹⁶)

Triton repeats these lines in uint32 arithmetic; here int64 tensors stand for uint32 values.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
KEY_STEP = 0x9E3779B1


_QUERY_STEP, _ROW, _FIRST, _SECOND, _THIRD = 0x85EBCA6B, 0xC2B2AE35, 0xD2511F53, 0xCD9E8D57, 0xA0761D65
_STEPS = 1 << 16


def threshold(dropout_p: float) -> int:
    """Random 16-bit values below this are dropped: p in steps of 2⁻¹⁶; some are, and some are not, for any p
    in (0, 1)."""
    if dropout_p == 0:
        return 0
    return min(max(round(dropout_p * _STEPS), 1), _STEPS - 1)


def keep_scale(dropout_p: float) -> float:
    """One divided by the probability to be kept: what a weight that is kept is multiplied by."""
    return _STEPS / (_STEPS - threshold(dropout_p))


def mix(x: Tensor) -> Tensor:
    """lowbias32 on int64 tensors that hold uint32 values."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def random_bits(seed: Tensor, batch_head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """32 bits as int64, in the broadcast shape of ``batch_head`` (b·H + h), ``query``, ``key`` (int64), for
    draws that are not dropout's: two rounds of ``mix``, the query's and the key's."""
    row = mix((_stream(seed, batch_head) + query) & _MASK)
    return mix(row ^ (key * KEY_STEP & _MASK))


def _stream(seed: Tensor, batch_head: Tensor) -> Tensor:
    low, high = seed & _MASK, (seed >> 32) & _MASK
    return mix(low ^ mix((high + batch_head) & _MASK))


def fold(x: Tensor, factor: int) -> Tensor:
    """Upper half of the 64-bit product xor the lower one, on int64 tensors that hold uint32 values."""
    product = x * factor
    return (product >> 32).bitwise_xor_(product).bitwise_and_(_MASK)


def keep_mask(seed: Tensor, dropout_p: float, batch_head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Bool, in the broadcast shape of ``batch_head`` (b·H + h), ``query`` and ``key`` (all int64)."""
    x = _words(seed, batch_head, _cell(query), _cell(key))
    word = torch.where(query & 8 != 0, fold(x, _THIRD), x)
    return (word >> 2 * (key & 8)) & (_STEPS - 1) >= threshold(dropout_p)


def keep_tiles(
    seed: Tensor, dropout_p: float, batch_head: Tensor, query: Tensor, key: Tensor, shape: tuple[int, int]
) -> Tensor:
    """``keep_mask`` of whole tiles, at a quarter of its work: bool ``[…, rows, keys]``.

    Args:
        batch_head: int64 ``[…]``, b·H + h.
        query, key: int64 ``[…]``: where a tile's queries and keys begin, multiples of 16.
        shape: (rows, keys) of a tile, multiples of 16.
    """
    limit, groups = threshold(dropout_p), [n // 16 for n in shape]
    q_cells, k_cells = (
        (at >> 1)[..., None] + torch.arange(n // 2, device=at.device)
        for at, n in zip((query, key), shape, strict=True)
    )
    x = _words(seed, batch_head[..., None, None], q_cells[..., None], k_cells[..., None, :])
    kept = x.new_empty((*x.shape[:-2], groups[0], 2, 8, groups[1], 2, 8), dtype=torch.bool)
    for odd, words in enumerate((x, fold(x, _THIRD))):
        words = words.view(*x.shape[:-2], groups[0], 8, groups[1], 8)
        torch.ge(words & (_STEPS - 1), limit, out=kept[..., odd, :, :, 0, :])
        torch.ge(words >> 16, limit, out=kept[..., odd, :, :, 1, :])
    return kept.view(*x.shape[:-2], *shape)


def _words(seed: Tensor, batch_head: Tensor, q_cell: Tensor, k_cell: Tensor) -> Tensor:
    """x, the first of the two words of four weights."""
    row = fold(_stream(seed, batch_head) ^ (q_cell * _QUERY_STEP & _MASK), _ROW)
    return fold(fold(row ^ (k_cell * KEY_STEP & _MASK), _FIRST), _SECOND)


def _cell(place: Tensor) -> Tensor:
    """Number of the two places, 8 apart, that share their words."""
    return (place >> 4 << 3) | (place & 7)


def positions(tiles: Tensor, block: int, at: Tensor) -> Tensor:
    """int64 ``[…, n]``: the positions ``at`` ``[n]`` of a layout in the sequence, whose tiles ``tiles`` ``[…,
    blocks]`` are those of the layout."""
    return tiles[..., at // block] * block + at % block


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed from the device's own generator; no host sync."""
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)
