"""Layouts: which tiles of the attention matrix are computed."""

from sparsetile.layout.blocks import BLOCK_SIZES, FULL, BlockLayout, LayoutTensors

__all__ = ["BLOCK_SIZES", "FULL", "BlockLayout", "LayoutTensors"]
