"""Counter-based dropout: whether a weight is kept depends on (seed, batch, head, query, key) alone.

Every backend computes the same bits, so backward regenerates what forward drew, backends can be compared
bit for bit, and splitting rows over programs, tiles or machines cannot change the mask.

The generator is the 32-bit finaliser "lowbias32" (Chris Wellons, "Hash Prospector", public domain), chained::

    row  = mix(mix(seed_low ^ mix(seed_high + batch·H + head)) + query)
    bits = mix(row ^ (key · 0x9E3779B1))            all modulo 2³²
    keep = bits ≥ round(p · 2³²)

Triton repeats these lines in uint32 arithmetic; here int64 tensors stand for uint32 values.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
KEY_STEP = 0x9E3779B1


def threshold(dropout_p: float) -> int:
    """Random 32-bit values below this are dropped."""
    return min(round(dropout_p * 2**32), _MASK)


def mix(x: Tensor) -> Tensor:
    """lowbias32 on int64 tensors that hold uint32 values."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def random_bits(seed: Tensor, batch_head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """32 bits as int64, in the broadcast shape of ``batch_head`` (b·H + h), ``query``, ``key`` (int64)."""
    low = seed & _MASK
    high = (seed >> 32) & _MASK
    stream = mix(low ^ mix((high + batch_head) & _MASK))
    row = mix((stream + query) & _MASK)
    return mix(row ^ (key * KEY_STEP & _MASK))


def keep_mask(seed: Tensor, dropout_p: float, batch_head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Bool, in the broadcast shape of ``batch_head`` (b·H + h), ``query`` and ``key`` (all int64)."""
    return random_bits(seed, batch_head, query, key) >= threshold(dropout_p)


def positions(tiles: Tensor, block: int, at: Tensor) -> Tensor:
    """int64 ``[…, n]``: the positions ``at`` ``[n]`` of a layout in the sequence, whose tiles ``tiles`` ``[…,
    blocks]`` are those of the layout."""
    return tiles[..., at // block] * block + at % block


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed from the device's own generator; no host sync."""
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)
