"""BlockLayout: which tiles of the attention matrix are computed, in compressed rows.

This is the contract between patterns and kernels. Rows are flattened as (layout batch, layout head, query
block), so row ``(b·heads + h)·q_blocks + i`` holds the tiles of query block ``i``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetile.errors import LayoutError, PatternError, explain
from sparsetile.layout import build, convert
from sparsetile.patterns.base import Pattern
from sparsetile.patterns.tiles import Grid, mask_words, unpack

BLOCK_SIZES = (16, 32, 64, 128)
FULL = build.FULL

__all__ = ["BLOCK_SIZES", "FULL", "BlockLayout", "LayoutTensors", "mask_words"]


def memo_of(indptr: Tensor) -> dict[str, object]:
    """The memo of the layout whose row starts these are; an empty one for tensors made inside a graph."""
    memo: dict[str, object] = getattr(indptr, "_sparsetile_memo", {})
    return memo


class LayoutTensors(NamedTuple):
    """The tensors of a layout in the order in which operators pass them."""

    indptr: Tensor
    indices: Tensor
    mask_ids: Tensor
    masks: Tensor
    t_indptr: Tensor
    t_indices: Tensor
    t_edges: Tensor


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Tiles of ``block_q × block_k`` tokens, compressed by rows, with the transpose.

    Attributes:
        indptr: ``[batch·heads·q_blocks + 1]`` int32 (int64 past 2³¹ tiles). Row starts in ``indices``.
        indices: ``[capacity]`` int32. Key block of each tile, ascending within a row. ``capacity`` is the
            tile count where the host knows it; a layout made on the device without a sync may hold unused
            entries past ``indptr[-1]``.
        mask_ids: ``[capacity]`` int32. −1: every pair of the tile is allowed; else a row of ``masks``.
        masks: ``[n_masks, block_q, mask_words(block_k)]`` int32. Distinct partial tiles as bits: bit ``j``
            (least significant first) of word ``w`` of row ``i`` says that query ``i`` of the tile may attend
            key ``32·w + j`` of the tile. Rows and columns past the ends of the sequence are 0, so a tile that
            hangs over ``q_len`` or ``k_len`` is always partial.
        t_indptr: ``[batch·heads·k_blocks + 1]``, t_indices: ``[capacity]`` (query block, ascending within a
            column), t_edges: ``[capacity]`` (position of that tile in ``indices``): the transpose.
        batch, heads: 1 (shared by all) or the tensor's own count of batch elements and query heads.
        q_len, k_len: tokens; any lengths. Query ``i`` stands at position ``i + k_len − q_len``.
    """

    indptr: Tensor
    indices: Tensor
    mask_ids: Tensor
    masks: Tensor
    t_indptr: Tensor
    t_indices: Tensor
    t_edges: Tensor
    q_len: int
    k_len: int
    block_q: int
    block_k: int
    batch: int = 1
    heads: int = 1
    _memo: dict[str, object] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Operators receive the tensors alone; what was derived from them travels with the first.
        if not torch.compiler.is_compiling():
            self.indptr._sparsetile_memo = self._memo  # type: ignore[attr-defined]

    @property
    def q_blocks(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def k_blocks(self) -> int:
        return -(-self.k_len // self.block_k)

    @property
    def device(self) -> torch.device:
        return self.indices.device

    @property
    def capacity(self) -> int:
        """Entries in ``indices``: the tile count, or a bound of it that needs no device sync."""
        return self.indices.numel()

    def tensors(self) -> LayoutTensors:
        return LayoutTensors(
            self.indptr, self.indices, self.mask_ids, self.masks, self.t_indptr, self.t_indices, self.t_edges
        )

    # -- constructors ---------------------------------------------------------------------------------

    @classmethod
    def from_pattern(
        cls,
        pattern: Pattern,
        q_len: int,
        k_len: int | None = None,
        block_size: int | tuple[int, int] = 128,
        device: torch.device | str = "cpu",
        heads: int | None = None,
    ) -> BlockLayout:
        """The tiles of a pattern. Built on the CPU in O(tiles), then moved to ``device``.

        Args:
            pattern: what may attend.
            q_len, k_len: tokens; ``k_len`` defaults to ``q_len``.
            block_size: 16, 32, 64 or 128, or a pair ``(block_q, block_k)`` of them.
            heads: query heads. Needed if the pattern differs by head; otherwise the layout is shared by all
                heads whatever is given.

        Raises:
            PatternError: the pattern does not fit the lengths or blocks.
            LayoutError: impossible lengths, block sizes or heads.
        """
        if not isinstance(pattern, Pattern):
            raise PatternError(
                explain(
                    "from_pattern(pattern)",
                    expected="a Pattern",
                    got=type(pattern).__name__,
                    fix="Use e.g. Local(1024) & Causal(), or parse_pattern() for text.",
                )
            )
        q_len, k_len, block_q, block_k = _sizes(q_len, k_len, block_size)
        if heads is not None and (type(heads) is not int or heads < 1):
            raise LayoutError(
                explain("heads", expected="an integer ≥ 1", got=repr(heads), fix="Give the query heads.")
            )
        pattern.check(q_len, k_len, heads)
        if pattern.needs_heads and heads is None:
            raise LayoutError(
                explain(
                    "heads",
                    expected="the number of query heads, because the pattern differs by head",
                    got=None,
                    fix="Pass heads=….",
                )
            )
        groups = heads if pattern.needs_heads and heads is not None else 1
        grid = Grid(q_len, k_len, block_q, block_k, k_len - q_len, groups)
        rows = build.tiles_of(pattern.resolve(block_q, block_k, grid.offset), grid)
        return cls._of(rows, q_len, k_len, block_q, block_k, heads=groups).to(device)

    @classmethod
    def _of(
        cls,
        rows: build.Rows,
        q_len: int,
        k_len: int,
        block_q: int,
        block_k: int,
        batch: int = 1,
        heads: int = 1,
    ) -> BlockLayout:
        """Adds row starts and the transpose."""
        q_blocks, k_blocks, groups = -(-q_len // block_q), -(-k_len // block_k), batch * heads
        starts = build.row_starts(rows.row, groups * q_blocks)
        turned = build.transpose(rows.row, rows.col, q_blocks, k_blocks, groups)
        return cls(
            indptr=starts,
            indices=rows.col.to(torch.int32),
            mask_ids=rows.mask_ids,
            masks=rows.masks,
            t_indptr=turned.indptr,
            t_indices=turned.indices,
            t_edges=turned.edges,
            q_len=q_len,
            k_len=k_len,
            block_q=block_q,
            block_k=block_k,
            batch=batch,
            heads=heads,
            _memo={"nnz": rows.row.numel()},
        )

    @classmethod
    def from_dense_mask(cls, mask: Tensor, block_size: int | tuple[int, int] = 128) -> BlockLayout:
        """The tiles of a boolean matrix, True = may attend.

        Args:
            mask: bool ``[Nq, Nk]``, ``[H, Nq, Nk]`` or ``[B, H, Nq, Nk]`` (B, H may be 1), on any device.
        """
        mask = convert.four_dims("from_dense_mask(mask)", mask)
        q_len, k_len, block_q, block_k = _sizes(mask.shape[2], mask.shape[3], block_size)
        rows = convert.dense_tiles(mask, block_q, block_k)
        return cls._of(rows, q_len, k_len, block_q, block_k, mask.shape[0], mask.shape[1])

    # -- views ----------------------------------------------------------------------------------------

    @property
    def nnz(self) -> int:
        """Tiles. Known without a device sync unless the layout was made on the device; then kept."""
        if "nnz" not in self._memo:
            self._memo["nnz"] = int(self.indptr[-1])
        value = self._memo["nnz"]
        assert isinstance(value, int)
        return value

    @property
    def density(self) -> float:
        """Tiles ÷ all tiles."""
        return self.nnz / (self.batch * self.heads * self.q_blocks * self.k_blocks)

    @property
    def causal_density(self) -> float:
        """Tiles in the causal triangle ÷ all tiles that hold a pair with key at or before query."""
        row, col = self._tiles()
        last = torch.arange(1, self.q_blocks + 1, device=self.device) * self.block_q
        last = last.clamp(max=self.q_len) + (self.k_len - self.q_len - 1)
        reach = torch.div(last, self.block_k, rounding_mode="floor")
        every = int((reach + 1).clamp(min=0).sum()) * self.batch * self.heads
        return int((col <= reach[row % self.q_blocks]).sum()) / every

    def _tiles(self) -> tuple[Tensor, Tensor]:
        """Flattened row and key block of each tile, int64."""
        rows = torch.arange(self.indptr.numel() - 1, device=self.device)
        row = rows.repeat_interleave(self.row_counts().long(), output_size=self.nnz)
        return row, self.indices[: self.nnz].long()

    def row_counts(self) -> Tensor:
        """``[batch·heads·q_blocks]`` tiles of each row."""
        return self.indptr.diff()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def to(self, device: torch.device | str) -> BlockLayout:
        """This layout on ``device`` (itself, if it is there)."""
        device = torch.device(device)
        if device.type == self.device.type and device.index in (None, self.device.index):
            return self
        known = {"nnz": self._memo["nnz"]} if "nnz" in self._memo else {}
        return replace(self, **{n: t.to(device) for n, t in self.tensors()._asdict().items()}, _memo=known)

    def to_dense(self, head: int = 0, batch: int = 0) -> Tensor:
        """bool ``[q_len, k_len]``: the allowed pairs of one head of one batch element, written out."""
        if not (0 <= head < self.heads and 0 <= batch < self.batch):
            raise LayoutError(
                explain(
                    "to_dense(head, batch)",
                    expected=f"head below {self.heads} and batch below {self.batch}",
                    got=(head, batch),
                    fix="A layout shared by all heads has the one head 0.",
                )
            )
        start = (batch * self.heads + head) * self.q_blocks
        bounds = self.indptr[start : start + self.q_blocks + 1].long()
        first, end = int(bounds[0]), int(bounds[-1])
        rows = torch.arange(self.q_blocks, device=self.device)
        row = rows.repeat_interleave(bounds.diff(), output_size=end - first)
        ids = self.mask_ids[first:end].long()
        whole = torch.ones((1, self.block_q, self.block_k), dtype=torch.bool, device=self.device)
        bits = torch.cat((unpack(self.masks, self.block_k), whole))
        out = torch.zeros(
            (self.q_blocks, self.k_blocks, self.block_q, self.block_k), dtype=torch.bool, device=self.device
        )
        # FULL is −1, which picks the all-ones tile at the end.
        out[row, self.indices[first:end].long()] = bits[ids]
        dense = out.transpose(1, 2).reshape(self.q_blocks * self.block_q, self.k_blocks * self.block_k)
        return dense[: self.q_len, : self.k_len]


def _sizes(q_len: int, k_len: int | None, block_size: int | tuple[int, int]) -> tuple[int, int, int, int]:
    """``(q_len, k_len, block_q, block_k)``, checked."""
    k_len = q_len if k_len is None else k_len
    if type(q_len) is not int or type(k_len) is not int or q_len < 1 or k_len < 1:
        raise LayoutError(
            explain(
                "q_len, k_len",
                expected="integers ≥ 1",
                got=(q_len, k_len),
                fix="Lengths count tokens.",
            )
        )
    pair = block_size if isinstance(block_size, (tuple, list)) else (block_size, block_size)
    if len(pair) != 2 or any(type(n) is not int or n not in BLOCK_SIZES for n in pair):
        raise LayoutError(
            explain(
                "block_size",
                expected=f"one of {BLOCK_SIZES}, or a pair of them",
                got=repr(block_size),
                fix="128 suits GPUs; smaller blocks follow fine patterns with fewer wasted pairs.",
            )
        )
    return q_len, k_len, pair[0], pair[1]
