"""Budget: patterns that keep a requested number of tiles a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sparsetile.errors import PatternError, explain
from sparsetile.patterns import preference
from sparsetile.patterns.branches import segments_of
from sparsetile.patterns.parameters import floor, integer, truth
from sparsetile.patterns.preference import Kept, Rows
from sparsetile.patterns.sized import Sized
from sparsetile.patterns.tiles import Grid, Key, Span, State, Tiles

if TYPE_CHECKING:
    from sparsetile.layout.blocks import BlockLayout
    from sparsetile.patterns.config import SparsePatternConfig

KINDS = ("local_window", "dilated_sparse", "global_local", "ultra_sparse")
GLOBAL_TOKENS = 64
_TILES_AT_A_TIME = 1 << 15  # int64 work tensors of this size stay in the cache
_WITH_GLOBALS = ("global_local", "ultra_sparse")


@dataclass(frozen=True, eq=False, repr=False)
class Budget(Sized):
    """Whole tiles, ``m = max(1, ⌊density·T + ½⌋)`` of them in each row, its own always among them.

    A row is a tile of queries, counted by position: position ``p`` belongs to tile ``p // block`` (to the
    first or last one if it lies outside of the keys), and that is its *own* key tile. ``T`` is the number of
    key tiles it may choose from: all of them, or, if ``causal``, those up to its own (its row of the causal
    triangle). Whole tiles hold later keys too, so causal attention is ``Budget(…, causal=True) & Causal()``;
    then a row depends on its position alone, not on the length.

    Each ``kind`` is an order of preference, of which the row takes the first ``m`` tiles:

    * ``"local_window"``: nearest first (of two equally near, the past one); at the ends of the sequence the
      window shifts, so that the row still has ``m`` tiles. For signals and text where what matters is near.
    * ``"global_local"``: own; the first ``⌈global_tokens / block⌉`` tiles; then nearest first. For sequences
      whose beginning everyone needs (a prompt, a class token, attention sinks). Global tokens are keys that
      all queries see; global queries that see all keys would break the budget (see :class:`Global`).
    * ``"dilated_sparse"``: own; then the branches ``(segment_lengths[i], dilation_rates[i])`` name tiles by
      turns, each its nearest at a distance that is a multiple of its rate (in tiles), inside its segment (in
      tokens; a tile belongs to every segment that it overlaps). A tile that a second branch names is kept
      already and costs nothing. A branch with no tile left passes its turns on; when none has any left, the
      row ends, with fewer than ``m`` tiles. So all branches have equally many tiles, and each reaches as far
      as its rate takes it: LongNet's mix of near and far (Ding et al. 2023, arXiv:2307.02486, section 2.2)
      at a given cost.
    * ``"ultra_sparse"``: own; tile 0; the next tile (if causal, or at the end, the previous one); one
      log-spaced tile; the rest of the first ``⌈global_tokens / block⌉`` tiles; the previous tile; the rest of
      the log-spaced ones; then nearest first. Log-spaced are, by turns, those at +2, +4, +8, … and at −2, −4,
      −8, … tiles (the latter alone, if causal); row ``i`` begins each list of ``n`` at entry
      ``⌊n · frac(0.618… · i)⌋`` and goes round, so that neighbouring rows differ in their reach. Thus even
      the smallest budget connects any two positions (causal: any position with each one before it) within
      ``2·log₂ T + 2`` layers (computed for every pair of up to 16,384 tiles), a larger one sooner. A row
      keeps at least 4 tiles (own, 0, beside, far) where it has as many. For the longest sequences, at
      densities of 1 % and below.

    ``density=1`` keeps every tile (of ``dilated_sparse``: every tile of its branches).

    The block and the number of key tiles come from the layout: :meth:`resolve` fills in ``block`` and
    ``k_blocks``. Tiles must be square. Where queries start in the middle of a tile (``k_len − q_len`` is no
    multiple of the block), a row of the layout holds parts of two rows of this pattern.

    Raises:
        PatternError: unknown kind, density outside (0, 1], branches that do not pair up, a parameter that
            the kind does not have.
    """

    kind: str
    density: float
    causal: bool = False
    global_tokens: int | None = None
    segment_lengths: tuple[int, ...] | None = None
    dilation_rates: tuple[int, ...] | None = None
    block: int | None = None
    k_blocks: int | None = None
    _needs_number = "A budget is a share of the key tiles, so it needs their number."
    _needs_tiles = "its budget is a share of the tiles of a layout"

    def __post_init__(self) -> None:
        check_kind("Budget(kind)", self.kind)
        object.__setattr__(self, "density", check_density("Budget(density)", self.density))
        truth("Budget", "causal", self.causal)
        if self.kind in _WITH_GLOBALS:
            tokens = GLOBAL_TOKENS if self.global_tokens is None else self.global_tokens
            object.__setattr__(self, "global_tokens", integer("Budget", "global_tokens", tokens, 0))
        elif self.global_tokens is not None:
            raise _no_effect("Budget(global_tokens)", self.kind, self.global_tokens, _WITH_GLOBALS)
        if self.kind == "dilated_sparse":
            lengths, rates = segments_of(self.segment_lengths, self.dilation_rates)  # type: ignore[arg-type]
            object.__setattr__(self, "segment_lengths", lengths)
            object.__setattr__(self, "dilation_rates", rates)
        elif self.segment_lengths is not None or self.dilation_rates is not None:
            given = (self.segment_lengths, self.dilation_rates)
            raise _no_effect("Budget(segment_lengths, dilation_rates)", self.kind, given, ("dilated_sparse",))
        self._check_sizes()

    @property
    def needs_length(self) -> bool:
        return self.k_blocks is None and not self.causal

    # -- the rows -------------------------------------------------------------------------------------

    def _own(self, position: Tensor) -> Tensor:
        block, k_blocks = self._sizes()
        return floor(position, block).clamp_(0, k_blocks - 1)

    def _kept(self, own: Tensor) -> Kept:
        """What rows with these own tiles ``[n]`` keep."""
        block, k_blocks = self._sizes()
        end = own + 1 if self.causal else torch.full_like(own, k_blocks)
        rows = Rows(own, end, tiles_for(self.density, end))
        if self.kind == "local_window":
            return preference.local_window(rows)
        if self.kind == "dilated_sparse":
            assert self.segment_lengths is not None and self.dilation_rates is not None
            branches = tuple(zip(self.segment_lengths, self.dilation_rates, strict=True))
            most = int(rows.keep.max()) * len(branches)
            return preference.in_parts(lambda r: preference.dilated_sparse(r, block, branches), rows, most)
        assert self.global_tokens is not None
        sinks = -(-self.global_tokens // block)
        if self.kind == "global_local":
            return preference.global_local(rows, sinks)
        steps = 2 * k_blocks.bit_length()
        return preference.in_parts(lambda r: preference.ultra_sparse(r, sinks), rows, steps)

    def allows(self, q: Tensor, k: Tensor, head: Tensor | int = 0) -> Tensor:
        own, place = torch.unique(self._own(q), return_inverse=True)
        if not own.numel():
            return (q + k).bool()
        tile = floor(k, self._sizes()[0])
        return self._kept(own).pick(place).holds(tile)

    # -- how layouts are built ------------------------------------------------------------------------

    def _ends(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """``[rows]`` own tiles of the first and last query of each block row of the grid."""

        def make() -> tuple[Tensor, Tensor]:
            first, last = self._own(grid.ends)
            return first, last

        return grid.remember(("own", self), make)

    def _kept_at(self, grid: Grid, which: int) -> Kept:
        """What the rows at the first (0) or last (1) query of each block row keep."""
        first, last = self._ends(grid)
        if which == 1 and torch.equal(first, last):
            return self._kept_at(grid, 0)
        return grid.remember(("kept", which, self), lambda: self._kept((first, last)[which]))

    def cover(self, grid: Grid, clip: Span) -> Span:
        block, _ = self._sizes()
        first, last = self._ends(grid)
        lows, highs = [], []
        for step in range(int((last - first).max()) + 1):
            kept = self._kept_at(grid, 0) if step == 0 else self._kept(torch.minimum(first + step, last))
            spans = kept.spans()
            lo = torch.maximum(spans.lo * block, clip.lo[:, None])
            lows.append(lo)
            highs.append(torch.maximum(torch.minimum(spans.hi * block, clip.hi[:, None]), lo))
        return grid.blocks(Span(torch.cat(lows, 1), torch.cat(highs, 1)))

    def state(self, tiles: Tiles) -> State:
        block, _ = self._sizes()
        first, last = (own.index_select(0, tiles.row) for own in self._ends(tiles.grid))
        # At most two rows and one column of this pattern in a tile: their two answers decide.
        simple = (last - first <= 1) & (floor(tiles.k0, block) == floor(tiles.k1, block))
        at_first, at_last = self._answers(tiles)
        return State(at_first | at_last | ~simple, at_first & at_last & simple)

    def _answers(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """Whether each tile is kept by the row at its first and by the one at its last query."""
        block, _ = self._sizes()
        at_first, at_last = self._kept_at(tiles.grid, 0), self._kept_at(tiles.grid, 1)
        parts = zip(*(torch.split(x, _TILES_AT_A_TIME) for x in (tiles.row, tiles.k0)), strict=True)
        each = [(row, floor(k0, block)) for row, k0 in parts]
        answer = torch.cat([at_first.pick(row).holds(tile) for row, tile in each])
        if at_last is at_first:
            return answer, answer
        return answer, torch.cat([at_last.pick(row).holds(tile) for row, tile in each])

    def signature(self, tiles: Tiles) -> Key:
        block, _ = self._sizes()
        if (tiles.grid.block_q, tiles.grid.block_k) != (block, block):
            return super().signature(tiles)
        # Undecided tiles are cut in two by the border between two rows, all at the same height, and one of
        # the two rows keeps them: which one is all there is to know.
        at_first, _ = self._answers(tiles)
        return Key(at_first.long(), 2)


def tiles_for(density: float, choices: Tensor) -> Tensor:
    """``m = max(1, ⌊density·T + ½⌋)`` for each ``T`` of ``choices``, int64."""
    return (choices.double() * density + 0.5).floor().long().clamp_(min=1)


def check_kind(what: str, kind: object) -> str:
    if not isinstance(kind, str) or kind not in KINDS:
        raise PatternError(
            explain(
                what,
                expected=f"one of {', '.join(map(repr, KINDS))}",
                got=repr(kind),
                fix="See Budget for what each of them keeps.",
            )
        )
    return kind


def check_density(what: str, value: object) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= 1:  # type: ignore[operator]
        raise PatternError(
            explain(
                what,
                expected="a Python number, 0 < density ≤ 1",
                got=repr(value),
                fix="It is the share of tiles to keep: 0.01 keeps one in a hundred, 1.0 keeps all.",
            )
        )
    return float(value)  # type: ignore[arg-type]


def _no_effect(what: str, kind: str, got: object, kinds: tuple[str, ...]) -> PatternError:
    return PatternError(
        explain(
            what,
            expected=f"none, because {kind!r} does not use it",
            got=repr(got),
            fix=f"Leave it out, or choose {' or '.join(map(repr, kinds))}.",
        )
    )


class DensityReport(NamedTuple):
    """Shares of tiles: of all of them, or of those that hold a pair of the causal triangle.

    ``requested`` is None if no density was asked for. ``reason`` says why some row has more than one tile
    more or fewer than asked for; None if none has.
    """

    requested: float | None
    realised: float
    reason: str | None


def density_report(
    config: SparsePatternConfig, layout: BlockLayout, is_causal: bool = False
) -> DensityReport:
    """The density that a config asks for beside the one that a layout of its pattern has.

    Args:
        config: what was asked for.
        layout: the layout of ``config.pattern(is_causal, …)``, on any device.
        is_causal: count tiles of the causal triangle only.
    """
    realised = layout.causal_density if is_causal else layout.density
    if config.sparsity_ratio is None:
        return DensityReport(None, realised, None)
    last = torch.arange(1, layout.q_blocks + 1) * layout.block_q
    last = last.clamp(max=layout.q_len) + (layout.k_len - layout.q_len - 1)
    every = torch.full_like(last, layout.k_blocks)
    if is_causal:
        every = (floor(last, layout.block_k) + 1).clamp(min=0)
    wanted = torch.where(every > 0, tiles_for(config.sparsity_ratio, every), 0)
    counts = layout.row_counts().cpu().long().reshape(-1, layout.q_blocks)
    over, under = int((counts - wanted).max()), int((wanted - counts).max())
    reasons = []
    if over > 1 and config.pattern_type == "ultra_sparse" and int(wanted.min()) < preference.LEAST_REACH - 1:
        least = preference.LEAST_REACH
        reasons.append(
            f"ultra_sparse keeps at least {least} tiles a row, without which far tokens lose touch"
        )
    if over > 1 and (layout.k_len - layout.q_len) % layout.block_q:
        reasons.append(
            f"queries start inside a tile (k_len − q_len = {layout.k_len - layout.q_len} is no multiple of "
            f"{layout.block_q}), so rows of the layout span two rows of tiles"
        )
    if under > 1 and config.pattern_type == "dilated_sparse":
        reasons.append(
            "the segments hold no more tiles at these dilation rates; longer segments or lower rates do"
        )
    if max(over, under) > 1 and not reasons:
        reasons.append(f"some row has {over} tiles more or {under} fewer: the layout is of another pattern")
    return DensityReport(config.sparsity_ratio, realised, "; ".join(reasons) or None)
