"""What a call is judged by: how many tiles its rows may choose from."""

from __future__ import annotations

import random

import pytest
import torch

from sparsetile.adaptive import ImportanceScorer
from sparsetile.adaptive.config import AdaptiveConfig
from sparsetile.adaptive.seen import Seen


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("trial", range(12))
def test_choices_are_the_allowed_tiles(trial: int, is_causal: bool, padded: bool) -> None:
    seed = random.SystemRandom().getrandbits(32)
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    block = draw.choice((16, 32))
    q_len, k_len = draw.randint(1, 300), draw.randint(1, 300)
    batch, groups = draw.randint(1, 3), draw.randint(1, 3)
    q, k = (torch.randn(batch, groups, n, 8, generator=generator) for n in (q_len, k_len))
    padding = None
    if padded:
        ends = torch.randint(0, k_len + 1, (batch, 1), generator=generator)
        padding = torch.arange(k_len) >= ends
    config = AdaptiveConfig(block_size=block)
    seen = Seen.of(q, k, ImportanceScorer(8, 4), config, is_causal=is_causal, padding=padding)
    allowed = seen.allowed(torch.arange(seen.shape[2]))
    assert int(seen.choices()) == int(allowed.sum()) * groups, (seed, q_len, k_len)
    # By hand: a row may choose a tile if a key of it stands at or before the row's last query.
    count = 0
    for row in range(-(-q_len // block)):
        last = (row + 1) * block - 1 + k_len - q_len
        for tile in range(-(-k_len // block)):
            sees = not is_causal or tile * block <= last
            for b in range(batch):
                count += sees and (padding is None or not bool(padding[b, tile * block :][:block].all()))
    assert int(seen.choices()) == count * groups, (seed, q_len, k_len)
