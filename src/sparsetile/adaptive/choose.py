"""Which tiles a call keeps, by the settings of a module: causal calls know nothing of what is to come."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparsetile.adaptive.config import PLACES_PER_BUDGET, AdaptiveConfig
from sparsetile.adaptive.lasting import lasting
from sparsetile.adaptive.places import Places
from sparsetile.adaptive.scorer import ImportanceScorer
from sparsetile.adaptive.search import in_one_kernel, two_level_tiles
from sparsetile.adaptive.seen import Seen
from sparsetile.adaptive.select import at_most, own_tiles, reach, select_tiles
from sparsetile.kernels.triton_select import chosen_rows
from sparsetile.patterns.budget import tiles_for


@torch.no_grad()
def choose_tiles(
    seen: Seen,
    config: AdaptiveConfig,
    scorer: ImportanceScorer,
    *,
    threshold: Tensor,
    temperature: Tensor,
    noise: Tensor | None,
) -> Places:
    """The tiles of each row and the layout of them, without a host sync.

    Args:
        threshold: θ, ``[G or 1]``.
        temperature: τ, a scalar.
        noise: seed of the Gumbel noise (``draw_seed``), or None.
    """
    batch, groups, nq, nk = seen.shape
    own, last = seen.own, seen.reach
    most = config.places_for(nk)
    limit = _limits(config, nq, nk, seen.k_len - seen.q_len, seen.is_causal, seen.astride, device=own.device)
    options: dict[str, Any] = {"limit": limit}
    if config.selection == "top_p":
        options |= {"top_p": config.p, "k_min": min(config.k_min, most)}
    # The own tile of a causal row holds what comes after its first query, so its score counts for nothing.
    # Where its mass is asked for, by top_p, it passes for a tile on the verge; the second tile of a row that
    # lies astride must take no place from others.
    hide = seen.is_causal and (seen.astride or config.selection == "top_p")
    verge = threshold.to(scorer.compute_dtype).view(-1, 1, 1)

    def rows(start: int, stop: int) -> Tensor:
        scores = scorer.rows(seen.features, start, stop)
        if hide:
            column, home = torch.arange(nk, device=own.device), own[start:stop, None]
            scores = torch.where(column == home, verge, scores).masked_fill(column > home, -math.inf)
        return scores

    where: dict[str, Any] = {
        "is_causal": seen.is_causal,
        "offset_tokens": seen.k_len - seen.q_len,
        "block": seen.block,
        "temperature": temperature,
        "noise": noise,
        "sink": config.sink,
        "valid_keys": seen.valid,
    }
    if config.search_for(nk) == "two_level":
        indices = two_level_tiles(scorer, seen.features, most, options["limit"], **where)
    elif config.selection == "top_k" and not hide and in_one_kernel(scorer, seen.features, most):
        a, b, _ = seen.features
        indices = at_most(chosen_rows(a, b, scorer.output_weight, most, **where), options["limit"])
    else:
        indices = select_tiles(rows, seen.shape, most, **where, **options).indices
    if seen.astride:
        second = torch.where(own < last, own + 1, -1).expand(batch, nq)
        if seen.valid is not None:
            second = torch.where(seen.valid[:, second[0].clamp(min=0)], second, -1)
        second = second[:, None, :, None].expand(-1, groups, -1, -1)
        # Where nothing else was left it may have been chosen already.
        indices = torch.where(indices > own[:, None], -1, indices)
        indices = torch.cat((indices, second.to(indices.dtype)), -1)
    return Places.of(indices, seen.heads, seen.q_len, seen.k_len, seen.block, seen.is_causal)


@lasting
def _limits(
    config: AdaptiveConfig,
    nq: int,
    nk: int,
    offset: int,
    is_causal: bool,
    astride: bool,
    *,
    device: torch.device,
) -> Tensor | None:
    """int64 ``[nq]``: how many places each row may use; None if all may use as many as there are."""
    where: dict[str, Any] = {"offset_tokens": offset, "block": config.block_size, "device": device}
    # If astride, how far the last row would reach with all of its queries: where the sequence ends is no
    # business of those that it has.
    whole = reach(nq, nk + 1 if astride else nk, is_causal=is_causal, **where)
    if config.selection == "top_k":
        limit = tiles_for(config.density, whole + 1)
        # The second tile of a row that lies astride counts, and is added beside the choice.
        return (limit - (own_tiles(nq, nk, **where) < whole).long()).clamp(min=1) if astride else limit
    if is_causal and config.k_max is None:
        # Of its own past: a row's bound knows nothing of how long the sequence is.
        return (PLACES_PER_BUDGET * tiles_for(config.density, whole + 1)).clamp(min=config.k_min)
    return None
