"""BlockLayout: which tiles of the attention matrix are computed, in compressed rows.

This is the contract between patterns and kernels. Rows are flattened as (layout batch, layout head, query
block), so row ``(b·heads + h)·q_blocks + i`` holds the tiles of query block ``i``.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sparsetile.errors import LayoutError
from sparsetile.layout import build, convert, flex, order
from sparsetile.layout.build import Transpose
from sparsetile.layout.check import BLOCK_SIZES, check_pattern, first_broken, sizes
from sparsetile.layout.topk import (
    SHORT_ROWS,
    Sizes,
    TopkTensors,
    check_indices,
    distinct,
    in_order,
    topk_tensors,
)
from sparsetile.patterns.base import Pattern
from sparsetile.patterns.tiles import Grid, mask_words

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FULL = build.FULL

__all__ = ["BLOCK_SIZES", "FULL", "BlockLayout", "LayoutTensors", "mask_words"]


def memo_of(indptr: Tensor) -> dict[str, object]:
    """The memo of the layout whose row starts these are; an empty one for tensors made inside a graph."""
    memo: dict[str, object] = getattr(indptr, "_sparsetile_memo", {})
    return memo


_TRANSPOSE = "transpose"


class LayoutTensors(NamedTuple):
    """The tensors of a layout in the order in which operators pass them (see ``BlockLayout.operands``)."""

    indptr: Tensor
    indices: Tensor
    mask_ids: Tensor
    masks: Tensor
    t_indptr: Tensor
    t_indices: Tensor
    t_edges: Tensor


@dataclass(frozen=True, eq=False, repr=False)
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
        q_len, k_len: tokens; any lengths. Query ``i`` stands at position ``i + k_len − q_len``.
        batch, heads: 1 (shared by all) or the tensor's own count of batch elements and query heads.
        given: the transpose, if it came with the tiles; see ``transpose``.
        row_bound: for learned indices, how many tiles no row exceeds; their partial tiles end their rows.
    """

    indptr: Tensor
    indices: Tensor
    mask_ids: Tensor
    masks: Tensor
    q_len: int
    k_len: int
    block_q: int
    block_k: int
    batch: int = 1
    heads: int = 1
    given: Transpose | None = None
    row_bound: int | None = None
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

    @property
    def transpose(self) -> Transpose:
        """The tiles by columns: ``indptr`` ``[batch·heads·k_blocks + 1]``, ``indices`` ``[capacity]`` (query
        block, ascending within a column), ``edges`` ``[capacity]`` (position of that tile in ``indices``).

        A layout of learned indices makes it when it is first asked for: a forward pass never needs it.
        """
        if self.given is not None:
            return self.given
        known = self._memo.get(_TRANSPOSE)
        if not isinstance(known, Transpose):
            known = self._memo[_TRANSPOSE] = order.transpose(self.indptr, self.indices, self.shape)
        return known

    @property
    def t_indptr(self) -> Tensor:
        return self.transpose.indptr

    @property
    def t_indices(self) -> Tensor:
        return self.transpose.indices

    @property
    def t_edges(self) -> Tensor:
        return self.transpose.edges

    @property
    def shape(self) -> order.Shape:
        return order.Shape(self.batch * self.heads, self.q_blocks, self.k_blocks)

    def tensors(self) -> LayoutTensors:
        """All seven; makes the transpose where there is none yet."""
        return LayoutTensors(self.indptr, self.indices, self.mask_ids, self.masks, *self.transpose)

    def operands(self) -> list[Tensor]:
        """What operators pass: the tensors that the constructor was given, so without a transpose that only
        a backward pass would ask for."""
        return [self.indptr, self.indices, self.mask_ids, self.masks, *(self.given or ())]

    @property
    def geometry(self) -> list[int]:
        """What operators pass beside the tensors; ``row_bound`` as 0 where there is none."""
        sizes = [self.q_len, self.k_len, self.block_q, self.block_k, self.batch, self.heads]
        return [*sizes, self.row_bound or 0]

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
        q_len, k_len, block_q, block_k = sizes(q_len, k_len, block_size)
        check_pattern(pattern, q_len, k_len, heads)
        groups = heads if pattern.needs_heads and heads is not None else 1
        # Under another default device, what is made on the way still belongs on the CPU.
        elsewhere = torch.get_default_device().type != "cpu"
        with torch.device("cpu") if elsewhere else nullcontext():
            grid = Grid(q_len, k_len, block_q, block_k, k_len - q_len, groups)
            rows = build.tiles_of(pattern.resolve(block_q, block_k, grid.offset, k_len), grid)
            layout = cls._of(rows, q_len, k_len, block_q, block_k, heads=groups)
        return layout.to(device)

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
            q_len=q_len,
            k_len=k_len,
            block_q=block_q,
            block_k=block_k,
            batch=batch,
            heads=heads,
            given=turned,
            _memo={"nnz": rows.row.numel(), "host_known": True},
        )

    @classmethod
    def from_dense_mask(cls, mask: Tensor, block_size: int | tuple[int, int] = 128) -> BlockLayout:
        """The tiles of a boolean matrix, True = may attend.

        Args:
            mask: bool ``[Nq, Nk]``, ``[H, Nq, Nk]`` or ``[B, H, Nq, Nk]`` (B, H may be 1), on any device.
        """
        mask = convert.four_dims("from_dense_mask(mask)", mask)
        q_len, k_len, block_q, block_k = sizes(mask.shape[2], mask.shape[3], block_size)
        rows = convert.dense_tiles(mask, block_q, block_k)
        return cls._of(rows, q_len, k_len, block_q, block_k, mask.shape[0], mask.shape[1])

    @classmethod
    def from_block_mask(
        cls, mask: Tensor, q_len: int, k_len: int | None = None, block_size: int | tuple[int, int] = 128
    ) -> BlockLayout:
        """Whole tiles, one boolean each: bool ``[q_blocks, k_blocks]``, with leading ``H`` or ``B, H``."""
        mask = convert.four_dims("from_block_mask(mask)", mask)
        q_len, k_len, block_q, block_k = sizes(q_len, k_len, block_size)
        rows = convert.block_tiles(mask, q_len, k_len, block_q, block_k)
        layout = cls._of(rows, q_len, k_len, block_q, block_k, mask.shape[0], mask.shape[1])
        return layout.to(mask.device)

    @classmethod
    def from_bsr(
        cls,
        blocks: Tensor,
        cols: Tensor | None = None,
        *,
        q_len: int | None = None,
        k_len: int | None = None,
        block_size: int | tuple[int, int] | None = None,
    ) -> BlockLayout:
        """Whole tiles in compressed rows.

        Args:
            blocks: a ``torch.sparse_bsr`` tensor ``[…, Nq, Nk]`` whose stored blocks are the tiles (their
                values are not looked at), or the row starts ``[…, q_blocks + 1]`` that belong to ``cols``.
            cols: integer ``[…, tiles]`` key blocks, if ``blocks`` is row starts.
            q_len, k_len, block_size: needed with ``cols``. For a sparse tensor the lengths default to its
                shape and may be less by a part of a block; the block size is its own.
        """
        starts, cols, q_len, k_len, block_size = convert.row_parts(blocks, cols, q_len, k_len, block_size)
        q_len, k_len, block_q, block_k = sizes(q_len, k_len, block_size)
        row, col, groups = convert.compressed_rows(starts, cols, -(-q_len // block_q), -(-k_len // block_k))
        rows = convert.whole_tiles(row, col, q_len, k_len, block_q, block_k, groups)
        heads = starts.shape[-2] if starts.dim() > 1 else 1
        return cls._of(rows, q_len, k_len, block_q, block_k, groups // heads, heads).to(starts.device)

    @classmethod
    def from_flex(cls, mask: BlockMask) -> BlockLayout:
        """The tiles of a FlexAttention block mask; its ``mask_mod`` is evaluated on partial blocks alone."""
        q_len, k_len, block_q, block_k = sizes(*mask.seq_lengths, mask.BLOCK_SIZE)
        batch, heads = mask.kv_num_blocks.shape[:2]
        rows = flex.flex_tiles(mask, q_len, k_len, block_q, block_k)
        return cls._of(rows, q_len, k_len, block_q, block_k, batch, heads).to(mask.kv_num_blocks.device)

    @classmethod
    def from_mask_mod(
        cls,
        mask_mod: flex.MaskMod,
        q_len: int,
        k_len: int | None = None,
        block_size: int | tuple[int, int] = 128,
        batch: int = 1,
        heads: int = 1,
        device: torch.device | str = "cpu",
    ) -> BlockLayout:
        """The tiles of a FlexAttention ``mask_mod``, without a block mask in between.

        Every pair is evaluated: time is O(batch · heads · q_len · k_len). Memory is O(tiles + distinct masks)
        and a chunk of at most 2²⁴ pairs, so no matrix of blocks is made. Where a Pattern says the same
        (windows, documents, strides, their unions and intersections), :meth:`from_pattern` takes O(tiles).

        Args:
            mask_mod: ``(b, h, q, k) → bool`` on scalar tensors, which ``torch.vmap`` batches. q and k are
                FlexAttention's indices, 0 … q_len − 1 and 0 … k_len − 1. They are not aligned at the bottom
                right as a Pattern's positions are: with q_len ≠ k_len, ``q >= k`` is not ``Causal()``, but
                ``q + k_len - q_len >= k`` is.
            q_len, k_len: tokens; ``k_len`` defaults to ``q_len``.
            batch, heads: how many b and h there are; 1: what ``mask_mod`` says of 0 is shared by all.
            device: where ``mask_mod`` is evaluated, its captured tensors are, and the layout will be.

        Raises:
            LayoutError: impossible lengths, block sizes, batch or heads; or ``mask_mod`` fails (torch's own
                error is the cause) or returns something else than bool.
        """
        size = sizes(q_len, k_len, block_size)
        rows = flex.mask_mod_tiles(mask_mod, size, batch, heads, torch.device(device))
        return cls._of(rows, *size, batch, heads).to(device)

    @classmethod
    def from_topk(
        cls,
        indices: Tensor,
        q_len: int,
        k_len: int | None = None,
        block_size: int | tuple[int, int] = 128,
        is_causal: bool = False,
    ) -> BlockLayout:
        """The tiles that a model chose, without a host sync.

        Args:
            indices: integers ``[B or 1, H or 1, q_blocks, k]`` on any device: key blocks of each query block.
                Repeats, and values that name no key block (such as −1), are ignored.
            is_causal: drop tiles that lie in the future and mask the diagonal.

        Returns:
            a layout with ``capacity = indices.numel()``; the tile count stays on the device.
        """
        size = Sizes(*sizes(q_len, k_len, block_size), is_causal)
        check_indices(indices, size.q_blocks)
        return cls.from_chosen(topk_tensors(in_order(distinct(indices, size.k_blocks), size), 1, size), size)

    @classmethod
    def from_chosen(cls, made: TopkTensors, size: Sizes) -> BlockLayout:
        """The layout of a selection, of the tensors made from it."""
        batch, groups, share, _, k = made.slot.shape
        return cls(
            *made[:4],
            *size[:4],
            batch=batch,
            heads=groups * share,
            row_bound=k,
            _memo={} if made.items is None else {SHORT_ROWS: made.items},
        )

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
        row, col = self.rows_and_columns()
        last = torch.arange(1, self.q_blocks + 1, device=self.device) * self.block_q
        last = last.clamp(max=self.q_len) + (self.k_len - self.q_len - 1)
        reach = torch.div(last, self.block_k, rounding_mode="floor")
        every = int((reach + 1).clamp(min=0).sum()) * self.batch * self.heads
        return int((col <= reach[row % self.q_blocks]).sum()) / every

    def rows_and_columns(self) -> tuple[Tensor, Tensor]:
        """Flattened row and key block of each tile, int64 ``[nnz]``."""
        rows = torch.arange(self.indptr.numel() - 1, device=self.device)
        row = rows.repeat_interleave(self.row_counts().long(), output_size=self.nnz)
        return row, self.indices[: self.nnz].long()

    def row_counts(self) -> Tensor:
        """``[batch·heads·q_blocks]`` tiles of each row."""
        return self.indptr.diff()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, those of a transpose not made yet left out."""
        return sum(t.nbytes for t in self._existing())

    def _existing(self) -> tuple[Tensor, ...]:
        known = self._memo.get(_TRANSPOSE)
        return (*self.operands(), *(known if isinstance(known, Transpose) else ()))

    @property
    def footprint(self) -> int:
        """Bytes of all tensors, those of the schedules that kernels derived from them included."""
        tensors = list(self._existing())
        for derived in tuple(self._memo.values()):
            if hasattr(derived, "tensors"):
                tensors += derived.tensors()
        # A schedule may hold the layout's own tensors; without an address (meta) the object tells apart.
        return sum({t.data_ptr() or id(t): t.nbytes for t in tensors}.values())

    def to(self, device: torch.device | str) -> BlockLayout:
        """This layout on ``device`` (itself, if it is there)."""
        device = torch.device(device)
        if device.type == self.device.type and device.index in (None, self.device.index):
            return self
        known: dict[str, object] = {
            name: self._memo[name] for name in ("nnz", "host_known") if name in self._memo
        }
        there = {name: getattr(self, name).to(device) for name in LayoutTensors._fields[:4]}
        given = None if self.given is None else Transpose(*(t.to(device) for t in self.given))
        return replace(self, **there, given=given, _memo=known)

    def to_dense(self, head: int = 0, batch: int = 0) -> Tensor:
        """bool ``[q_len, k_len]``: the allowed pairs of one head of one batch element, written out."""
        return convert.to_dense(self, head, batch)

    def to_flex(self) -> BlockMask:
        """This layout as a FlexAttention block mask, whose ``mask_mod`` reads the bit masks.

        FlexAttention's own form takes memory in O(q_blocks · k_blocks).
        """
        return flex.to_flex(self)

    def validate(self) -> None:
        """Raises LayoutError that names the first broken invariant of the class. Syncs with the device."""
        broken = first_broken(self)
        if broken is not None:
            raise LayoutError(f"The layout is malformed: {broken}. Build it with one of the constructors.")

    def __repr__(self) -> str:
        if "nnz" in self._memo:
            tiles = f"tiles={self.nnz} ({100 * self.density:.3g} %)"
        else:
            tiles = f"tiles≤{self.capacity}"
        return (
            f"BlockLayout({self.q_len}×{self.k_len} tokens, blocks {self.block_q}×{self.block_k}, "
            f"batch={self.batch}, heads={self.heads}, {tiles}, masks={self.masks.shape[0]}, {self.device})"
        )
