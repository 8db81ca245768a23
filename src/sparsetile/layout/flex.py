"""Layouts from FlexAttention's masks, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsetile.errors import LayoutError, explain
from sparsetile.layout import build
from sparsetile.layout.convert import whole_tiles
from sparsetile.patterns.tiles import Grid, Tiles, ones, pack

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from sparsetile.layout.blocks import BlockLayout

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query, key) → bool, on scalar tensors that ``torch.vmap`` batches."""

# On a CPU what a chunk needs stays in the cache; on a GPU launches are few.
_PAIRS_ON_CPU = 1 << 20
_PAIRS = 1 << 24
_MASKS_WAITING = 4096


def pairs_at_a_time(device: torch.device) -> int:
    """How many pairs a ``mask_mod`` is asked about in one call."""
    return _PAIRS_ON_CPU if device.type == "cpu" else _PAIRS


class _Masks:
    """Bit masks numbered by content as they come, in memory of the distinct ones and a few more."""

    def __init__(self, block_q: int, block_k: int, device: torch.device) -> None:
        self.masks = build.no_masks(block_q, block_k, device)
        self.block_k = block_k
        self.waiting: list[Tensor] = []
        self.unmerged: list[Tensor] = []
        self.ids: list[Tensor] = []

    def add(self, words: Tensor) -> None:
        """``[n, block_q, words]`` masks of the next ``n`` tiles."""
        ids, masks = build.distinct(words, self.block_k)
        before = self.masks.shape[0] + sum(w.shape[0] for w in self.waiting)
        self.waiting.append(masks)
        self.unmerged.append(torch.where(ids >= 0, ids + before, ids).cpu())
        # Where as many wait as are known, merging them all costs O(1) for each.
        if before + masks.shape[0] > self.masks.shape[0] + max(_MASKS_WAITING, self.masks.shape[0]):
            self._merge()

    def _merge(self) -> None:
        every = torch.cat((self.masks, *self.waiting))
        numbers, masks = build.distinct(every, self.block_k)
        # What was merged before comes first, in its order: the numbers that tiles have stay.
        places = torch.arange(len(every), device=every.device)
        first = torch.full((len(masks),), len(every), device=every.device)
        order = first.scatter_reduce_(0, numbers.long(), places, "amin").argsort()
        self.masks = masks[order]
        # The last entries stand for FULL (−1) and EMPTY (−2), which index from the end.
        own = torch.cat((order.argsort()[numbers.long()].cpu(), torch.tensor([build.EMPTY, build.FULL])))
        self.ids += [own[ids.long()].to(torch.int32) for ids in self.unmerged]
        self.waiting, self.unmerged = [], []

    def finish(self) -> tuple[Tensor, Tensor]:
        """``(ids, masks)`` on the CPU: int32 ``[tiles]`` FULL, EMPTY or a row of ``masks``."""
        if self.unmerged:
            self._merge()
        return torch.cat((torch.empty(0, dtype=torch.int32), *self.ids)), self.masks.cpu()


def _ask(mask_mod: MaskMod, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """``mask_mod`` on scalars, as FlexAttention shows it its pairs.

    Args:
        batch, head: ``[n]``.
        q: ``[n, queries]``.
        k: ``[n, keys]``, or ``[keys]`` for all.

    Returns:
        bool ``[n, queries, keys]``.
    """
    over_keys = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    over_pairs = torch.vmap(over_keys, in_dims=(None, None, 0, None))
    over_all = torch.vmap(over_pairs, in_dims=(0, 0, 0, 0 if k.dim() == 2 else None))
    shape = (*q.shape, k.shape[-1])
    try:
        out = over_all(batch, head, q, k)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise LayoutError(
            explain(
                "mask_mod",
                expected=f"a function (b, h, q, k) of scalar tensors on {q.device} that torch.vmap can run",
                got=f"{type(error).__name__}: {error}",
                fix="Tensors that it captures must be on that device and as long as the positions; "
                "instead of `if`, `and`, `or`, `not` it takes torch.where, &, |, ~.",
            )
        ) from error
    if isinstance(out, Tensor):
        got = f"{out.dtype} {list(out.shape[len(shape) :])} on {out.device}"
        sound = out.dtype == torch.bool and tuple(out.shape) == shape and out.device == q.device
    else:
        got, sound = type(out).__name__, False
    if not sound:
        raise LayoutError(
            explain(
                "mask_mod(b, h, q, k)",
                expected=f"one torch.bool for each pair, on {q.device}",
                got=got,
                fix="True means: q may attend k. A score_mod is something else.",
            )
        )
    return out


def _within(bits: Tensor, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
    """``bits`` ``[n, queries, keys]`` without the pairs past the ends."""
    if grid.whole is grid:
        return bits
    return bits & (q < grid.q_len)[..., :, None] & (k < grid.k_len)[..., None, :]


def mask_mod_tiles(
    mask_mod: MaskMod, size: tuple[int, int, int, int], batch: int, heads: int, device: torch.device
) -> build.Rows:
    """Tiles of a ``mask_mod`` that is asked about every pair on ``device``.

    A chunk is some block rows with all their keys, or a part of one row: its tiles follow those before.

    Args:
        size: ``(q_len, k_len, block_q, block_k)``.
    """
    if not callable(mask_mod):
        raise LayoutError(
            explain(
                "from_mask_mod(mask_mod)",
                expected="a function (b, h, q, k) → bool",
                got=type(mask_mod).__name__,
                fix="For a BlockMask use BlockLayout.from_flex(block_mask).",
            )
        )
    for name, count in (("batch", batch), ("heads", heads)):
        if type(count) is not int or count < 1:
            raise LayoutError(
                explain(name, expected="an integer ≥ 1", got=repr(count), fix="1: shared by all.")
            )
    grid = Grid(*size, offset=0, heads=batch * heads)
    block_q, block_k = grid.block_q, grid.block_k
    budget = max(1, pairs_at_a_time(device) // (block_q * block_k))
    wide = min(budget, grid.k_blocks)
    high = budget // wide if wide == grid.k_blocks else 1
    masks = _Masks(block_q, block_k, device)
    rows, cols = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for top in range(0, grid.rows, high):
        row = torch.arange(top, min(top + high, grid.rows), device=device)
        group = torch.div(row, grid.q_blocks, rounding_mode="floor")
        b, h = torch.div(group, heads, rounding_mode="floor"), group % heads
        q = (row % grid.q_blocks * block_q)[:, None] + torch.arange(block_q, device=device)
        for left in range(0, grid.k_blocks, wide):
            right = min(left + wide, grid.k_blocks)
            k = torch.arange(left * block_k, right * block_k, device=device)
            bits = _ask(mask_mod, b, h, q.clamp(max=grid.q_len - 1), k.clamp(max=grid.k_len - 1))
            tiles = _within(bits, q, k, grid).reshape(len(row), block_q, right - left, block_k)
            at, col = tiles.any(3).any(1).nonzero().unbind(1)
            if at.numel():
                masks.add(pack(tiles[at, :, col]))
                rows.append(at.cpu() + top)
                cols.append(col.cpu() + left)
    ids, words = masks.finish()
    return build.Rows(torch.cat(rows), torch.cat(cols), ids, words)


def flex_tiles(mask: BlockMask, q_len: int, k_len: int, block_q: int, block_k: int) -> build.Rows:
    """Tiles of a FlexAttention block mask; ``mask_mod`` is asked about its partial tiles alone."""
    rows, cols, partial = [], [], []
    k_blocks = -(-k_len // block_k)
    for counts, blocks, asked in (
        (mask.kv_num_blocks, mask.kv_indices, True),
        (mask.full_kv_num_blocks, mask.full_kv_indices, False),
    ):
        if counts is None or blocks is None:
            continue
        blocks = blocks.reshape(-1, blocks.shape[-1])
        listed = torch.arange(blocks.shape[1], device=blocks.device) < counts.reshape(-1, 1)
        row = listed.nonzero()[:, 0].cpu()
        rows.append(row)
        cols.append(blocks[listed].cpu().long())
        partial.append(torch.full_like(row, asked, dtype=torch.bool))
    row, col, ask = torch.cat(rows), torch.cat(cols), torch.cat(partial)
    order = (row * k_blocks + col).argsort()
    row, col, ask = row[order], col[order], ask[order]
    batch, heads = mask.kv_num_blocks.shape[:2]
    whole = whole_tiles(row, col, q_len, k_len, block_q, block_k, batch * heads)
    which = ask.nonzero().flatten()
    if not which.numel():
        return whole
    tiles = Tiles(Grid(q_len, k_len, block_q, block_k, 0, batch * heads), row, col).pick(which)
    own, own_masks = _partial(mask.mask_mod, tiles, heads, mask.kv_num_blocks.device)
    ids = whole.mask_ids.clone()
    ids[which] = torch.where(own >= 0, own + whole.masks.shape[0], own)
    kept = (ids != build.EMPTY).nonzero().flatten()
    # The tails of full tiles and the partial ones may share contents, and some tails are not in use any more.
    used, ids = torch.unique(ids[kept], return_inverse=True)
    full = torch.full((1, *own_masks.shape[1:]), ones(block_k), dtype=torch.int32)
    every = torch.cat((full, whole.masks, own_masks))
    numbers, masks = build.distinct(every[used.long() + 1], block_k)
    return build.Rows(row[kept], col[kept], numbers[ids], masks)


def _partial(mask_mod: MaskMod, tiles: Tiles, heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``(ids, masks)`` of tiles, as :meth:`_Masks.finish` gives them."""
    grid = tiles.grid
    step = max(1, pairs_at_a_time(device) // (grid.block_q * grid.block_k))
    masks = _Masks(grid.block_q, grid.block_k, device)
    for start in range(0, len(tiles), step):
        few = tiles.pick(torch.arange(start, min(start + step, len(tiles))))
        q, k, group = few.queries.to(device), few.keys.to(device), few.head.to(device)
        batch, head = torch.div(group, heads, rounding_mode="floor"), group % heads
        bits = _ask(mask_mod, batch, head, q.clamp(max=grid.q_len - 1), k.clamp(max=grid.k_len - 1))
        masks.add(pack(_within(bits, q, k, grid)))
    return masks.finish()


def to_flex(layout: BlockLayout) -> BlockMask:
    """See :meth:`BlockLayout.to_flex`."""
    from torch.nn.attention.flex_attention import BlockMask

    shape = (layout.batch, layout.heads, layout.q_blocks, layout.k_blocks)
    row, col = layout.rows_and_columns()
    ids = layout.mask_ids[: layout.nnz]
    small = layout.masks.shape[0] < 2**15
    table = torch.full(shape, build.EMPTY, dtype=torch.int16 if small else torch.int32, device=layout.device)
    table.view(-1, shape[-1])[row, col] = ids.to(table.dtype)

    def listed(which: Tensor) -> tuple[Tensor, Tensor]:
        flags = which.to(torch.int8)
        return flags.sum(-1, dtype=torch.int32), flags.argsort(dim=-1, descending=True, stable=True).int()

    masks, block_q, block_k = layout.masks, layout.block_q, layout.block_k
    if not masks.shape[0]:
        masks = build.no_masks(block_q, block_k, layout.device).new_zeros((1, *masks.shape[1:]))
    own_batch, own_heads = int(layout.batch > 1), int(layout.heads > 1)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        number = table[b * own_batch, h * own_heads, q // block_q, k // block_k].int()
        word = masks[number.clamp(min=0), q % block_q, k % block_k // 32]
        return (number == build.FULL) | ((number >= 0) & ((word >> (k % block_k % 32).int()) & 1 == 1))

    return BlockMask.from_kv_blocks(
        *listed(table >= 0),
        *listed(table == build.FULL),
        BLOCK_SIZE=(block_q, block_k),
        mask_mod=mask_mod,
        seq_lengths=(layout.q_len, layout.k_len),
    )
