"""A pattern for every head, such that all of them together keep so many tiles at the least cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetile.profile.candidates import Candidate


def choose(cost: Tensor, tiles: Tensor, budget: float) -> Tensor:
    """One candidate for each head.

    The heads' choices are a knapsack problem with one item a head. A price for a tile turns it into a choice
    of each head for itself (Everett 1963, "Generalized Lagrange multiplier method", theorem 1); the price is
    found by bisection, and what it leaves of the budget goes to the heads that gain most by a tile more.

    Args:
        cost: ``[heads, candidates]``.
        tiles: ``[candidates]`` that each keeps.
        budget: tiles of all heads together.

    Returns:
        int64 ``[heads]``. Where not even the smallest candidates fit into the budget, those.
    """
    cost, size = cost.double(), tiles.double()
    low, high = 0.0, float(cost.max())
    pick = cost.masked_fill(size != size.min(), torch.inf).argmin(1)
    for _ in range(100):
        price = (low + high) / 2
        tried = (cost + price * size).argmin(1)
        if float(size[tried].sum()) > budget:
            low = price
        else:
            high, pick = price, tried
    left = budget - float(size[pick].sum())
    while True:
        gain = cost.gather(1, pick[:, None]) - cost
        extra = size[None] - size[pick][:, None]
        rate = torch.where((extra > 0) & (extra <= left) & (gain > 0), gain / extra, 0.0)
        best = int(rate.argmax())
        if float(rate.flatten()[best]) <= 0:
            return pick
        head, candidate = divmod(best, cost.shape[1])
        left -= float(extra[head, candidate])
        pick[head] = candidate


def settings_of(pick: Tensor, tried: list[Candidate], block: int, about: dict[str, Any]) -> dict[str, Any]:
    """``config.sparsetile`` for choices ``[layers, heads]``."""
    layers = {
        str(layer): {"heads": [repr(tried[i].pattern) for i in row]}
        for layer, row in enumerate(pick.tolist())
    }
    return {"about": about, "block_size": block, "layers": layers}
