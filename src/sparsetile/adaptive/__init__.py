"""Patterns that a network learns: tile summaries, the scorer of tile pairs, and the selection of tiles."""

from sparsetile.adaptive.scorer import Features, ImportanceScorer
from sparsetile.adaptive.select import Selection, gumbel, own_tiles, reach, select_tiles
from sparsetile.adaptive.summaries import group_queries, summary_dim, tile_summaries, valid_tiles

__all__ = [
    "Features",
    "ImportanceScorer",
    "Selection",
    "group_queries",
    "gumbel",
    "own_tiles",
    "reach",
    "select_tiles",
    "summary_dim",
    "tile_summaries",
    "valid_tiles",
]
