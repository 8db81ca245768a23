"""The search of long rows in two levels: runs of key tiles first, then the tiles of the best runs.

Scoring every pair of tiles costs O(nq·nk). On request, and by itself where that is faster at last, runs of
:data:`SPAN` consecutive key tiles are scored first, each by a bound of its tiles' scores, and then
the tiles of the best runs alone::

    runs of row i   = own run ∪ sink's run ∪ best runs r by their bounds ŝ_ir        S_i in all
    S_i             = max(32, 2·k_i)                     for k_i tiles that the row keeps
    tiles of row i  = what ``select_tiles`` chooses, from these runs' tiles

which is O(nq·(nk/16 + 16·S)). The bound, ŝ_ir ≥ s_ij for every tile j of run r, takes for each feature of the
key tiles its largest or smallest value in the run, whichever scores more (:func:`bounds_of_runs`), as Quest
does for pages of keys (Tang et al. 2024, arXiv:2406.10774, section 3.2). So a tile that scores above the
bounds of all but S − 1 runs is never missed; others may be: the search is not exact. The score of the run's
mean finds more of a smooth landscape and far fewer single tiles that stand out: docs/notes/select-tuning.md.

A row with at most 32·16 = 512 tiles to choose from keeps all its runs, so it is searched in full. S_i depends
on the row alone, and in causal calls a run is judged only if it ends before the row's own tile (the run with
the own tile is always kept, and its tiles are judged singly), so what a row keeps depends on its past alone.

Noise, in training, perturbs both levels, the runs by draws of their own: every tile keeps its chance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetile.adaptive.scorer import Features, ImportanceScorer
from sparsetile.adaptive.select import at_most, select_tiles, tiles_of_runs
from sparsetile.adaptive.summaries import tile_summaries, valid_tiles
from sparsetile.kernels.triton_select import MOST_KEPT, chosen_rows

SPAN = 16
"""Tiles of a run."""

LEAST_RUNS = 32
"""Runs of a row that are searched in full in any case: 64K tokens in tiles of 128."""

AUTO_ABOVE = 8192
"""Key tiles of a call above which ``search="auto"`` takes two levels: 1M tokens in tiles of 128. There the
full search in one kernel took an H200 1.5 times as long, causal 0.9 times (docs/notes/select-tuning.md)."""

_RUNS_PER_TILE = 2
_OF_RUNS = 0x5851F42D4C957F2D
"""Turns the seed of the tiles' noise into that of the runs'."""

_CHUNK_TERMS = 2**22
"""Products of a chunk of rows in the second level; with what they are made of about 64 MiB."""


@torch.no_grad()
def two_level_tiles(
    scorer: ImportanceScorer,
    features: Features,
    k: int,
    limit: Tensor,
    *,
    is_causal: bool,
    offset_tokens: int,
    block: int,
    temperature: Tensor,
    noise: Tensor | None = None,
    sink: bool = False,
    valid_keys: Tensor | None = None,
) -> Tensor:
    """The tiles that each row keeps, int32 ``[B, G, nq, k]`` as :func:`select_tiles` returns them; no host
    sync, memory O(B·G·nq·(k + S)) besides one chunk.

    A row that lies astride two key tiles keeps the first of them as its own, and never the second.

    Args:
        features: of all query and key tiles; on a GPU those of the forms ``"mlp"`` and ``"bilinear"`` go
            through one Triton kernel a level.
        k: places of a row.
        limit: integers ``[nq]``: places that each row may use, at most k.
        is_causal, offset_tokens, block, temperature, noise, sink, valid_keys: as for :func:`select_tiles`.
    """
    batch, groups, nq, _ = features.a.shape
    nk = features.b.shape[2]
    padding = None if valid_keys is None else ~valid_keys
    where: dict[str, Any] = {
        "is_causal": is_causal,
        "offset_tokens": offset_tokens,
        "block": block,
        "temperature": temperature,
        "sink": sink,
        "span": SPAN,
    }
    of_runs = bounds_of_runs(scorer, features, padding)
    count = of_runs.b.shape[2]
    most = min(max(LEAST_RUNS, _RUNS_PER_TILE * k), count)
    first: dict[str, Any] = {
        "noise": None if noise is None else noise ^ _OF_RUNS,
        "valid_keys": None if padding is None else valid_tiles(padding, SPAN),
    }
    if in_one_kernel(scorer, features, most):
        runs = chosen_rows(of_runs.a, of_runs.b, scorer.output_weight, most, **first, **where)
    else:
        shape = (batch, groups, nq, count)
        runs = select_tiles(
            lambda start, stop: scorer.rows(of_runs, start, stop), shape, most, **first, **where
        ).indices
    runs = at_most(runs, (_RUNS_PER_TILE * limit).clamp(min=LEAST_RUNS))
    second: dict[str, Any] = {"noise": noise, "valid_keys": valid_keys, "within": runs}
    if in_one_kernel(scorer, features, k):
        tiles = chosen_rows(features.a, features.b, scorer.output_weight, k, **second, **where)
        return at_most(tiles, limit)

    def rows(start: int, stop: int) -> Tensor:
        column = tiles_of_runs(runs[:, :, start:stop], SPAN).clamp(0, nk - 1)
        a, b, gates = features
        part = Features(a[:, :, start:stop], b, None if gates is None else gates[:, :, start:stop])
        return scorer.pairs(part, column, dropped=False)

    chunk = max(1, _CHUNK_TERMS // (batch * groups * most * SPAN * features.b.shape[3]))
    tiles = select_tiles(rows, (batch, groups, nq, nk), k, chunk=chunk, **second, **where).indices
    return at_most(tiles, limit)


def bounds_of_runs(scorer: ImportanceScorer, features: Features, padding: Tensor | None) -> Features:
    """Features of runs of key tiles, of which ``scorer.rows`` makes upper bounds of the tiles' scores::

        mlp        Σ_h w_h·ReLU(a_h + b_h)     rises with b_h where w_h > 0, falls where w_h < 0
        bilinear   a·b ≤ a⁺·max b + a⁻·min b   a⁺ = max(a, 0), a⁻ = min(a, 0)
        indexer    Σ_j g_j·ReLU(a_j·b_j)       g_j⁺ with that bound of a_j·b_j, g_j⁻ with the opposite one

    Args:
        features: of all query and key tiles.
        padding: bool ``[B, nk]``, True = ignore the key tile; a run of such tiles alone has no meaning.
    """
    both = tile_summaries(features.b, SPAN, pooling="max_min", padding=padding)
    most, least = both.chunk(2, -1)
    a, gates = features.a, features.gates
    weight = scorer.output_weight
    if weight is not None:
        return Features(a, torch.where(weight[:, None] > 0.0, most, least))
    if scorer.form == "bilinear":
        return Features(torch.cat((a.clamp(min=0.0), a.clamp(max=0.0)), -1), both)
    assert gates is not None
    a, most, least = (torch.unflatten(x, -1, (gates.shape[-1], -1)) for x in (a, most, least))
    signs = torch.cat((a.clamp(min=0.0), a.clamp(max=0.0)), -1)
    above, below = torch.cat((most, least), -1), torch.cat((least, most), -1)
    return Features(
        torch.cat((signs, signs), -2).flatten(-2),
        torch.cat((above, below), -2).flatten(-2),
        torch.cat((gates.clamp(min=0.0), gates.clamp(max=0.0)), -1),
    )


def in_one_kernel(scorer: ImportanceScorer, features: Features, places: int) -> bool:
    """Whether one Triton kernel scores and chooses: the same choice without the scores in memory, up to the
    order in which a score's terms are added."""
    return places <= MOST_KEPT and scorer.has_kernels(features)
