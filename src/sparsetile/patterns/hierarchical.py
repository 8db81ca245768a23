"""Hierarchical: density by distance in the machine that holds the sequence."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetile.errors import PatternError, explain
from sparsetile.patterns.parameters import floor, integer, truth
from sparsetile.patterns.sized import Sized
from sparsetile.patterns.tiles import Grid, Key, Span, State, Tiles

_MOST_RANKS = 1 << 20
_DENOMINATOR = 1 << 20


class Dealt(NamedTuple):
    """Tiles in the hands of their owners.

    Attributes:
        owner: int64 ``[tiles]``: who has each tile.
        place: int64 ``[tiles]``: its place among those of its owner, in ascending order.
        tiles: int64 ``[tiles]``: the tiles by owner, ascending for each.
        starts: int64 ``[owners + 1]``: where each owner's start in ``tiles``.
    """

    owner: Tensor
    place: Tensor
    tiles: Tensor
    starts: Tensor

    @classmethod
    def by(cls, owner: Tensor, owners: int) -> Dealt:
        by_owner = owner.argsort(stable=True)
        starts = torch.zeros(owners + 1, dtype=torch.int64)
        torch.cumsum(torch.bincount(owner, minlength=owners), 0, out=starts[1:])
        place = torch.empty_like(owner)
        place[by_owner] = torch.arange(owner.numel()) - starts[owner[by_owner]]
        return cls(owner, place, by_owner, starts)

    def held(self, owner: Tensor) -> Tensor:
        """How many tiles an owner has."""
        return self.starts[owner + 1] - self.starts[owner]

    def before(self, owner: Tensor, tile: Tensor) -> Tensor:
        """How many tiles of an owner lie before a tile."""
        every = self.owner.numel()
        key = self.owner[self.tiles] * every + self.tiles
        return torch.searchsorted(key, owner * every + tile) - self.starts[owner]


def deal(tiles: int, ranks: int, order: tuple[int, ...] | None) -> Dealt:
    """Tiles over ranks, in chunks of consecutive tiles that are as even as whole tiles allow.

    Args:
        order: None for one chunk a rank, in order; else the chunks as they are dealt (see :func:`is_order`).
    """
    chunk = torch.arange(ranks) if order is None else torch.tensor(order)
    chunks = chunk.numel()
    owner_of = torch.empty_like(chunk)
    owner_of[chunk] = torch.arange(chunks) // (chunks // ranks)
    sizes = torch.full((chunks,), tiles // chunks)
    sizes[: tiles % chunks] += 1
    return Dealt.by(owner_of.repeat_interleave(sizes, output_size=tiles), ranks)


def is_order(order: tuple[object, ...], ranks: int) -> bool:
    """Whether this is a permutation of ``0 … C − 1``, ``C`` a multiple of ``ranks``: rank ``r`` gets the
    chunks ``order[r·C/ranks : (r + 1)·C/ranks]``."""
    if not order or len(order) % ranks or any(type(c) is not int for c in order):
        return False
    return sorted(order) == list(range(len(order)))  # type: ignore[type-var]


class _Share(NamedTuple):
    """A density as an exact fraction. Of ``n`` tiles it keeps ``⌊density·n + ½⌋``, evenly spaced: tile ``e``
    is kept where that number grows from ``n = e`` to ``n = e + 1``. So the tiles that are kept of the first
    ``n`` do not depend on how many follow."""

    over: int
    under: int

    @classmethod
    def exact(cls, density: float) -> _Share:
        exact = Fraction(repr(density)).limit_denominator(_DENOMINATOR)
        return cls(exact.numerator, exact.denominator)

    def of(self, n: Tensor) -> Tensor:
        return floor(2 * self.over * n + self.under, 2 * self.under)

    def keeps(self, e: Tensor) -> Tensor:
        return self.of(e + 1) > self.of(e)

    def kept(self, n: int) -> Tensor:
        """Those among ``n`` tiles that are kept, ascending."""
        if not self.over:
            return torch.empty(0, dtype=torch.int64)
        k = torch.arange(int(self.of(torch.tensor(n))))
        return -floor(-(2 * k + 1) * self.under, 2 * self.over) - 1


@dataclass(frozen=True, eq=False, repr=False)
class Hierarchical(Sized):
    """Whole tiles of a sequence that lies on many ranks: dense inside a rank, sparser inside its node,
    sparsest across nodes.

    Each key tile is of one of three classes for a query tile, so nothing is covered twice and all of it is
    one softmax: held by the same rank, by another rank of the same node, or by another node. ``T`` tiles of
    a class, counted up to the query's own tile if ``causal``, keep ``⌊density·T + ½⌋``:

    * ``local_sparsity``, inside the rank: the nearest ones in the order in which the rank keeps its tiles
      (of two equally near, the past one), the own tile always among them. At the ends of the rank's tiles the
      window shifts.
    * ``global_sparsity``, inside the node: evenly spaced among the tiles of the node's other ranks.
    * ``inter_node_sparsity``, across: evenly spaced among the tiles of the other nodes.

    The three are *densities*, names kept from the system's description: 0.05 keeps one tile in twenty. The
    tiles kept of other ranks are the same for all rows of a rank, and those of other nodes for all ranks of a
    node (if ``causal``, as far as they lie in the past). So a rank receives no more than the densities say,
    and each node receives one set of tiles.

    A pure function of positions: it depends on where tiles live, not on who asks. Whole tiles hold later keys
    too, so causal attention is ``Hierarchical(…, causal=True) & Causal()``. ``Sharding.hierarchical`` makes
    the pattern that fits a sharding. Tiles must be square; :meth:`resolve` fills in ``block`` and
    ``k_blocks``. Queries outside of the keys count with the first or last tile.

    Attributes:
        ranks: how many ranks hold the sequence, up to 2²⁰.
        ranks_per_node: consecutive ranks of one node, a divisor of ``ranks``; None: all.
        order: how chunks of tiles are dealt to the ranks, as in ``Sharding``; None: one a rank, in order.

    Raises:
        PatternError: a value is not as above, or a density is not in [0, 1].
    """

    ranks: int
    ranks_per_node: int | None = None
    local_sparsity: float = 0.4
    global_sparsity: float = 0.1
    inter_node_sparsity: float = 0.05
    causal: bool = False
    order: tuple[int, ...] | None = None
    block: int | None = None
    k_blocks: int | None = None
    _needs_number = "Who holds a tile depends on how many there are."
    _needs_tiles = "who holds a tile depends on their number in a layout"

    def __post_init__(self) -> None:
        if integer("Hierarchical", "ranks", self.ranks, 1) > _MOST_RANKS:
            raise _bad("ranks", f"at most {_MOST_RANKS}", self.ranks, "Count the processes of the group.")
        if self.ranks_per_node is not None:
            node = integer("Hierarchical", "ranks_per_node", self.ranks_per_node, 1)
            if self.ranks % node:
                raise _bad(
                    "ranks_per_node", f"a divisor of {self.ranks}", node, "Every node holds as many ranks."
                )
        for name in ("local_sparsity", "global_sparsity", "inter_node_sparsity"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value <= 1:
                raise _bad(name, "a density from 0 to 1", repr(value), "0.05 keeps one tile in twenty.")
            object.__setattr__(self, name, float(value))
        truth("Hierarchical", "causal", self.causal)
        if self.order is not None:
            order = tuple(self.order) if isinstance(self.order, (tuple, list)) else ()
            if not is_order(order, self.ranks):
                raise _bad(
                    "order",
                    f"a permutation of 0 … C − 1 with C a multiple of {self.ranks} ranks",
                    repr(self.order)[:80],
                    "Take that of the sharding.",
                )
            object.__setattr__(self, "order", order)
        self._check_sizes()

    @property
    def needs_length(self) -> bool:
        return self.k_blocks is None

    # -- who holds what, and what rows keep of it -----------------------------------------------------

    @cached_property
    def _held_memo(self) -> tuple[Dealt, Dealt]:
        size = self.ranks_per_node or self.ranks
        with torch.device("cpu"):
            by_rank = deal(self._sizes()[1], self.ranks, self.order)
            return by_rank, Dealt.by(by_rank.owner // size, self.ranks // size)

    def _held(self, device: torch.device) -> tuple[Dealt, Dealt]:
        """The tiles by rank, and by node."""
        by_rank, by_node = self._held_memo
        return Dealt(*(t.to(device) for t in by_rank)), Dealt(*(t.to(device) for t in by_node))

    @cached_property
    def _shares_memo(self) -> tuple[_Share, _Share, _Share]:
        each = (self.local_sparsity, self.global_sparsity, self.inter_node_sparsity)
        local, near, far = (_Share.exact(density) for density in each)
        return local, near, far

    def _own(self, position: Tensor) -> Tensor:
        block, k_blocks = self._sizes()
        return floor(position, block).clamp_(0, k_blocks - 1)

    def _window(self, own: Tensor) -> Span:
        """Which places among the rank's own tiles a row with this own tile keeps."""
        by_rank, share = self._held(own.device)[0], self._shares_memo[0]
        place, count = by_rank.place[own], by_rank.held(by_rank.owner[own])
        if self.causal:
            return Span(place + 1 - share.of(place + 1).clamp_(min=1), place + 1)
        keep = share.of(count).clamp_(min=1)
        lo = torch.minimum(place - keep // 2, count - keep).clamp_(min=0)
        return Span(lo, lo + keep)

    def _keeps(self, own: Tensor, tile: Tensor) -> Tensor:
        """Whether rows with these own tiles keep these key tiles; tensors that broadcast."""
        shape = (own + tile).shape
        own, tile = own.expand(shape).contiguous(), tile.expand(shape).contiguous()
        (by_rank, by_node), (_, near, far) = self._held(own.device), self._shares_memo
        rank, node = by_rank.owner[own], by_node.owner[own]
        lo, hi = self._window(own)
        place = by_rank.place[tile]
        in_node = by_node.before(node, tile)
        local = (lo <= place) & (place < hi)
        kept = torch.where(
            by_rank.owner[tile] == rank,
            local,
            torch.where(
                by_node.owner[tile] == node,
                near.keeps(in_node - by_rank.before(rank, tile)),
                far.keeps(tile - in_node),
            ),
        )
        return kept & (tile <= own) if self.causal else kept

    def _elsewhere(self, rank: Tensor) -> tuple[Tensor, Tensor]:
        """``[n, s]`` tiles that ranks ``[n]`` keep of other ranks, and which of them are no padding."""
        (by_rank, by_node), (_, near, far) = self._held_memo, self._shares_memo
        every = by_rank.owner.numel()
        node = rank // (self.ranks_per_node or self.ranks)
        in_node, own = by_node.held(node), by_rank.held(rank)

        e = far.kept(int((every - in_node).max()))
        # Of the tiles outside of a node, `gap` lie before its x-th one; tile e of them is past those with
        # gap ≤ e.
        gap = by_node.owner[by_node.tiles] * every + by_node.tiles - by_node.place[by_node.tiles]
        past = torch.searchsorted(gap, node[:, None] * every + e, right=True) - by_node.starts[node][:, None]
        far_tiles, far_ok = e + past, e < (every - in_node)[:, None]

        e = near.kept(int((in_node - own).max()))
        # The same among the tiles of the node.
        gap = by_rank.owner[by_rank.tiles] * every
        gap = gap + by_node.place[by_rank.tiles] - by_rank.place[by_rank.tiles]
        past = torch.searchsorted(gap, rank[:, None] * every + e, right=True) - by_rank.starts[rank][:, None]
        near_ok = e < (in_node - own)[:, None]
        at = torch.where(near_ok, by_node.starts[node][:, None] + e + past, 0)
        near_tiles = by_node.tiles[at]
        return torch.cat((far_tiles, near_tiles), 1), torch.cat((far_ok, near_ok), 1)

    def _spans(self, own: Tensor) -> Span:
        """``[n, s]`` ranges of key tiles that rows with these own tiles keep."""
        by_rank = self._held_memo[0]
        rank = by_rank.owner[own]
        few, index = torch.unique(rank, return_inverse=True)
        tiles, ok = (x.index_select(0, index) for x in self._elsewhere(few))
        if self.causal:
            ok = ok & (tiles <= own[:, None])
        lo, hi = self._window(own)
        # A rank's own tiles are a few runs of consecutive ones, at most one for each of its chunks.
        runs = 1 if self.order is None else len(self.order) // self.ranks
        mine = by_rank.tiles
        follows = (mine[1:] == mine[:-1] + 1) & (by_rank.owner[mine[1:]] == by_rank.owner[mine[:-1]])
        begins = torch.cat((torch.ones(1, dtype=torch.bool), ~follows)).nonzero().flatten()
        ends = torch.cat((begins[1:], torch.tensor([mine.numel()])))
        start = by_rank.starts[rank]
        first = torch.searchsorted(begins, start)
        number = first[:, None] + torch.arange(runs)
        within = number < begins.numel()
        number = number.clamp(max=begins.numel() - 1)
        a = torch.maximum(begins[number], (start + lo)[:, None])
        b = torch.minimum(ends[number], (start + hi)[:, None])
        b = torch.where(within, b, a)
        run_lo = mine[begins[number]] + a - begins[number]
        run_hi = run_lo + (b - a)
        return Span(torch.cat((run_lo, tiles), 1), torch.cat((run_hi, tiles + ok), 1))

    def allows(self, q: Tensor, k: Tensor, head: Tensor | int = 0) -> Tensor:
        return self._keeps(self._own(q), self._own(k))

    # -- how layouts are built ------------------------------------------------------------------------

    def _ends(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """``[rows]`` own tiles of the first and last query of each block row of the grid."""

        def make() -> tuple[Tensor, Tensor]:
            first, last = self._own(grid.ends)
            return first, last

        return grid.remember(("own", self), make)

    def cover(self, grid: Grid, clip: Span) -> Span:
        block, _ = self._sizes()
        first, last = self._ends(grid)
        lows, highs = [], []
        for step in range(int((last - first).max()) + 1):
            spans = self._spans(torch.minimum(first + step, last))
            lo = torch.maximum(spans.lo * block, clip.lo[:, None])
            lows.append(lo)
            highs.append(torch.maximum(torch.minimum(spans.hi * block, clip.hi[:, None]), lo))
        return grid.blocks(Span(torch.cat(lows, 1), torch.cat(highs, 1)))

    def state(self, tiles: Tiles) -> State:
        block, _ = self._sizes()
        first, last = (own.index_select(0, tiles.row) for own in self._ends(tiles.grid))
        # At most two rows and one column of this pattern in a tile: their two answers decide.
        simple = (last - first <= 1) & (floor(tiles.k0, block) == floor(tiles.k1, block))
        tile = self._own(tiles.k0)
        at_first = self._keeps(first, tile)
        at_last = at_first if torch.equal(first, last) else self._keeps(last, tile)
        return State(at_first | at_last | ~simple, at_first & at_last & simple)

    def signature(self, tiles: Tiles) -> Key:
        block, _ = self._sizes()
        if (tiles.grid.block_q, tiles.grid.block_k) != (block, block):
            return super().signature(tiles)
        # Undecided tiles are cut in two by the border between two rows, all at the same height, and one of
        # the two rows keeps them: which one is all there is to know.
        first = self._ends(tiles.grid)[0].index_select(0, tiles.row)
        return Key(self._keeps(first, self._own(tiles.k0)).long(), 2)


def _bad(name: str, expected: str, got: object, fix: str) -> PatternError:
    return PatternError(explain(f"Hierarchical({name}=…)", expected=expected, got=got, fix=fix))
