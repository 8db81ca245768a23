"""The arms: ways of choosing tiles, at equal tiles a row, one object for each layer."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetile.adaptive.config import AdaptiveConfig
from sparsetile.adaptive.select import select_tiles
from sparsetile.adaptive.summaries import tile_summaries
from sparsetile.errors import ArgumentError, explain
from sparsetile.functional import sparse_attention
from sparsetile.kernels.dropout import draw_seed
from sparsetile.layout.blocks import BlockLayout
from sparsetile.nn.adaptive import BlockSparseAdaptive
from sparsetile.patterns import SparsePatternConfig
from sparsetile.patterns.budget import tiles_for

ARMS = {
    "dense": "all tiles",
    "oracle": "the tiles with most true mass, computed densely",
    "learned": "BlockSparseAdaptive",
    "moba": "q̄·k̄ with mean pooling (arXiv:2502.13189): no scorer, no bias",
    "untrained": "the learned arm's module, its scorer random and frozen",
    "random": "random tiles, fixed",
    "local": "the nearest tiles",
    "dilated": "tiles evenly spaced over the past",
    "global+local": "the first tiles and the nearest",
}
FIXED = ("random", "local", "dilated", "global+local")
_FAMILIES = {"local": "local_window", "dilated": "dilated_sparse", "global+local": "global_local"}


@dataclass(frozen=True)
class Shape:
    """What an arm is made for: ``length`` tokens in tiles of ``block``, a ``density`` of the tiles."""

    length: int
    block: int
    density: float
    heads: int
    head_dim: int
    device: torch.device

    @property
    def tiles(self) -> int:
        return self.length // self.block

    def budget(self) -> Tensor:
        """int64 ``[tiles]``: tiles that each row keeps, the same in all sparse arms."""
        return tiles_for(self.density, torch.arange(self.tiles) + 1)


class Attend(nn.Module):
    """Causal attention of one layer, and which tiles it kept last.

    Attributes:
        kept: int ``[B or 1, heads or 1, tiles, k]``: key tiles of each row of the last call, −1: unused; None
            if all were kept.
        seen: q and k of the last call in evaluation, to measure true mass with.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        budget = shape.budget()
        self.most, self.budget = int(budget.max()), budget.to(shape.device)
        self.kept: Tensor | None = None
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v ``[B, H, N, D]`` → ``[B, H, N, D]``."""
        self.seen = None if self.training else (q, k)
        return self.attend(q, k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Dense attention."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def explore(self, on: bool) -> None:
        """Whether training may try tiles below the cut; only the learned arm does."""

    def extra_loss(self) -> Tensor | None:
        """What the last forward in training adds to the loss."""
        return None

    def _chosen(
        self, scores: Callable[[int, int], Tensor], batch: int, noise: Tensor | None = None
    ) -> Tensor:
        """Own tile and best others by ``scores(start, stop)`` of rows, within the budget."""
        shape = self.shape
        return select_tiles(
            scores,
            (batch, shape.heads, shape.tiles, shape.tiles),
            self.most,
            is_causal=True,
            offset_tokens=0,
            block=shape.block,
            noise=noise,
            limit=self.budget,
        ).indices

    def _over(self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        """Attention over the tiles ``kept``."""
        self.kept = kept
        layout = BlockLayout.from_topk(kept, self.shape.length, self.shape.length, self.shape.block, True)
        return sparse_attention(q, k, v, layout)


class Fixed(Attend):
    """A layout that is always the same."""

    def __init__(self, shape: Shape, layout: BlockLayout) -> None:
        super().__init__(shape)
        self.layout = layout
        self.kept = tiles_of(layout)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, self.layout)


class RandomTiles(Fixed):
    """The own tile and others drawn once, of each head."""

    def __init__(self, shape: Shape) -> None:
        drawn, length = Attend(shape), shape.length
        flat = torch.zeros((1, shape.heads, 1, shape.tiles), device=shape.device)
        kept = drawn._chosen(lambda i, j: flat.expand(-1, -1, j - i, -1), 1, draw_seed(shape.device))
        super().__init__(shape, BlockLayout.from_topk(kept, length, length, shape.block, True))


class Moba(Attend):
    """Mixture of block attention (Lu et al. 2025, arXiv:2502.13189, eq. 5 and 6): the tiles with the largest
    product of the query with their mean key; a tile of queries is judged by its first, as the learned arm
    judges it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            first = q[:, :, :: self.shape.block].float()
            means = tile_summaries(k.float(), self.shape.block)
            kept = self._chosen(lambda i, j: first[:, :, i:j] @ means.mT, q.shape[0])
        return self._over(q, k, v, kept)


class Oracle(Attend):
    """The tiles that hold most of what dense attention of the tile's first query would attend to."""

    def best(self, q: Tensor, k: Tensor) -> Tensor:
        return self._chosen(partial(true_mass, q, k, self.shape.block), q.shape[0])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._over(q, k, v, self.best(q, k))


class Learned(Attend):
    """:class:`BlockSparseAdaptive`; frozen, with a scorer of random weights, it is the arm ``untrained``."""

    def __init__(self, shape: Shape, config: AdaptiveConfig, *, frozen: bool = False) -> None:
        super().__init__(shape)
        self.module = BlockSparseAdaptive(
            config, num_heads=shape.heads, head_dim=shape.head_dim, device=shape.device
        )
        self.frozen = frozen
        if frozen:
            scorer = self.module.scorer
            if scorer.form == "bilinear":
                # Its own start, W = UᵀU, is MoBA's q̄·k̄ already, not a random scorer.
                nn.init.orthogonal_(scorer.w_k)
            self.module.requires_grad_(False)
        self.explore(not frozen)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = self.module(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
        assert isinstance(out, Tensor)
        if not self.training:
            self.kept = tiles_of(self.module.last_layout)
        return out.transpose(1, 2)

    def explore(self, on: bool) -> None:
        self.module.config = replace(self.module.config, exploration=on and not self.frozen)

    def extra_loss(self) -> Tensor | None:
        if self.frozen or self.module.config.distillation == "none":
            return None
        return self.module.distillation_loss()


def attends_of(arm: str, shape: Shape, layers: int, adaptive: AdaptiveConfig) -> tuple[Attend, ...]:
    """One :class:`Attend` for each layer.

    Raises:
        ArgumentError: an unknown arm, or a fixed one that does not keep as many tiles as the others.
    """
    check_arm(arm)
    makers: dict[str, Callable[[], Attend]] = {
        "dense": partial(Attend, shape),
        "oracle": partial(Oracle, shape),
        "learned": partial(Learned, shape, adaptive),
        "moba": partial(Moba, shape),
        "untrained": partial(Learned, shape, adaptive, frozen=True),
        "random": partial(RandomTiles, shape),
    }
    made = [(makers.get(arm) or partial(_pattern, arm, shape))() for _ in range(layers)]
    for attend in made:
        if isinstance(attend, Fixed):
            check_tiles(arm, attend)
    return tuple(made)


def check_arm(arm: str) -> None:
    """Raises ArgumentError unless it is a key of :data:`ARMS`."""
    if arm not in ARMS:
        close = difflib.get_close_matches(arm, list(ARMS), n=1)
        fix = f"Did you mean {close[0]!r}?" if close else "See sparsetile recall --help."
        raise ArgumentError(explain("arm", expected=f"one of {', '.join(ARMS)}", got=repr(arm), fix=fix))


def check_tiles(arm: str, attend: Attend) -> None:
    """Raises ArgumentError unless every row of the last call kept exactly its budget of tiles."""
    if attend.kept is None:
        return
    counts, budget = (attend.kept >= 0).sum(-1), attend.budget
    if not bool((counts == budget).all()):
        row = int((counts != budget).flatten(0, 1).any(0).nonzero()[0])
        raise ArgumentError(
            explain(
                f"arm {arm!r}",
                expected=f"{int(budget[row])} tiles in row {row}, as the other arms keep",
                got=f"{int(counts[..., row].min())} to {int(counts[..., row].max())}",
                fix="Choose another density.",
            )
        )


def _pattern(arm: str, shape: Shape) -> Fixed:
    options: dict[str, tuple[int, ...]] = {}
    if arm == "dilated":
        rate = max(1, math.floor(1 / shape.density))
        options = {"segment_lengths": (shape.length,), "dilation_rates": (rate,)}
    tokens = {"global_tokens": 2 * shape.block} if arm == "global+local" else {}
    config = SparsePatternConfig(
        _FAMILIES[arm], sparsity_ratio=shape.density, block_size=shape.block, **tokens
    )
    layout = BlockLayout.from_pattern(
        config.pattern(True, **options),
        q_len=shape.length,
        k_len=shape.length,
        block_size=shape.block,
        device=shape.device,
    )
    return Fixed(shape, layout)


# -- what tiles hold ----------------------------------------------------------------------------------


@torch.no_grad()
def true_mass(q: Tensor, k: Tensor, block: int, start: int, stop: int) -> Tensor:
    """The share of its softmax that the first query of each tile ``start … stop − 1`` would put on each key
    tile under dense causal attention: float32 ``[B, H, stop − start, tiles]``, a few rows at a time."""
    place = torch.arange(start, stop, device=q.device) * block
    logits = (q[:, :, place].float() @ k.float().mT) / math.sqrt(q.shape[-1])
    ahead = torch.arange(k.shape[2], device=q.device) > place[:, None]
    weights = logits.masked_fill(ahead, -math.inf).softmax(-1)
    return torch.unflatten(weights, -1, (-1, block)).sum(-1)


def tiles_of(layout: BlockLayout) -> Tensor:
    """int64 ``[batch, heads, q_blocks, k]``: key tiles of each row of a layout, −1: unused. Waits for the
    device, to learn k."""
    starts, ends = layout.indptr[:-1].long(), layout.indptr[1:].long()
    place = starts[:, None] + torch.arange(int((ends - starts).max()), device=layout.device)
    tiles = layout.indices[place.clamp(max=layout.indices.numel() - 1)].long()
    tiles = torch.where(place < ends[:, None], tiles, -1)
    return tiles.view(layout.batch, layout.heads, layout.q_blocks, -1)


def mass_in(mass: Tensor, kept: Tensor) -> Tensor:
    """Sum of ``mass`` ``[B, H, rows, tiles]`` over the tiles ``kept`` ``[B or 1, H or 1, rows, k]``."""
    kept = kept.expand(*mass.shape[:2], -1, -1)
    return mass.gather(-1, kept.clamp(min=0)).masked_fill(kept < 0, 0.0).sum(-1)
