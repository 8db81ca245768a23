"""Kept tiles over the true mass of dense attention: numbers and a picture, for every layer and head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetile.layout.blocks import BlockLayout
from sparsetile.viz import require_matplotlib, tokens

_LEAST_SHARE = 1e-4
"""Where the colours of a picture end at the latest: one part in ten thousand of a query's attention."""

_SAMPLED = 1 << 20
"""Tiles of a layer that its darkest colour is taken from."""

_KEPT_COLOUR = "#35e0ff"


@dataclass(frozen=True, eq=False)
class TileView:
    """What causal attention of a sequence over itself kept, and what dense attention would have weighed.

    Attributes:
        kept: bool ``[H, n, n]``: tiles, queries first.
        mass: float64 ``[H, n, n]``: the weights of dense attention summed over each tile, so that a row of
            tiles sums to its number of queries.
    """

    kept: Tensor
    mass: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, q: Tensor, k: Tensor, layout: BlockLayout, scale: float | None) -> TileView:
        """A causal call of one sequence and the layout it kept.

        One row of tiles at a time: memory O(block·N), and the n × n numbers that are asked for.

        Args:
            q, k: ``[1, H, N, D]``, ``[1, Hkv, N, D]``.
            scale: as in :func:`sparsetile.sparse_attention`.
        """
        (_, heads, length, width), count, block = q.shape, layout.q_blocks, layout.block_q
        scale = 1.0 / math.sqrt(width) if scale is None else scale
        q, k = (x[0] if x.dtype == torch.float64 else x[0].float() for x in (q, k))
        k, place = k.repeat_interleave(heads // len(k), 0).mT, torch.arange(length, device=q.device)
        mass = torch.zeros(heads, count, count, dtype=torch.float64)
        for row in range(count):
            start, stop = row * block, min((row + 1) * block, length)
            logits = torch.matmul(q[:, start:stop] * scale, k[..., :stop])
            ahead = place[:stop] > place[start:stop, None]
            of_keys = logits.masked_fill_(ahead, -math.inf).softmax(-1).sum(1)
            whole = F.pad(of_keys, (0, (row + 1) * block - stop))
            mass[:, row, : row + 1] = torch.unflatten(whole, -1, (-1, block)).sum(-1)
        line, column = (x.cpu() for x in layout.rows_and_columns())
        kept = torch.zeros(layout.heads * count, count, dtype=torch.bool)
        kept[line, column] = True
        return cls(kept.view(layout.heads, count, count).expand(heads, -1, -1), mass)

    @property
    def recall(self) -> Tensor:
        """``[H]``: share of dense attention's mass inside the kept tiles."""
        return torch.where(self.kept, self.mass, 0.0).sum((1, 2)) / self.mass.sum((1, 2))

    @property
    def best(self) -> Tensor:
        """``[H]``: the same of the tiles with the most mass, as many in each row."""
        most = self.mass.sort(-1, descending=True).values
        within = torch.arange(most.shape[-1]) < self.kept.sum(-1, keepdim=True)
        return torch.where(within, most, 0.0).sum((1, 2)) / self.mass.sum((1, 2))

    @property
    def chance(self) -> Tensor:
        """``[H]``: the same, in the mean, of each row's own tile and as many others drawn from its past."""
        past = torch.arange(self.mass.shape[-1])
        drawn = (self.kept.sum(-1) - 1) / past.clamp(min=1)
        own = self.mass.diagonal(dim1=1, dim2=2)
        others = self.mass.tril(-1).sum(-1)
        return (own + drawn * others).sum(-1) / self.mass.sum((1, 2))

    @property
    def density(self) -> Tensor:
        """``[H]``: kept tiles ÷ tiles of the causal triangle."""
        count = self.kept.shape[-1]
        return self.kept.sum((1, 2)) / (count * (count + 1) / 2)


def save_grid(views: Sequence[TileView], path: str | Path, *, block: int, length: int, title: str) -> None:
    """Draw a panel for every layer (downwards) and head: kept tiles outlined over the shares of dense mass.

    Raises:
        ArgumentError: matplotlib is missing (``pip install 'sparsetile[plot]'``).
        OSError: the file cannot be written.
    """
    figure_class, ticker = require_matplotlib()
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LogNorm

    layers, heads, count = len(views), *views[0].mass.shape[:2]
    edge = 3.1 if heads <= 6 else 2.2
    figure = figure_class(figsize=(edge * heads + 1.3, edge * layers + 1.15), dpi=150, layout="constrained")
    panels = figure.subplots(layers, heads, sharex=True, sharey=True, squeeze=False)
    future = torch.ones(count, count, dtype=torch.bool).triu(1)
    shares = [view.mass / view.mass.sum(-1, keepdim=True) for view in views]
    low = torch.cat([share[:, ~future].flatten()[:_SAMPLED] for share in shares]).quantile(0.02).item()
    least = min(max(low, _LEAST_SHARE), 3e-3)
    norm = LogNorm(least, 1.0)
    # A line must leave most of its tile to be seen.
    width = min(1.3, 0.16 * 72 * edge / count)
    image = None
    for layer, (view, share) in enumerate(zip(views, shares, strict=True)):
        recall, best = view.recall, view.best
        for head in range(heads):
            axes = panels[layer, head]
            shown = share[head].clamp(min=least).masked_fill(future, math.nan)
            axes.set_facecolor("0.93")
            image = axes.imshow(
                shown.numpy(), norm=norm, cmap="inferno", interpolation="nearest", extent=(0, count, count, 0)
            )
            for lines, part in ((_outline(view.kept[head]), 1.0), (_strokes(view.kept[head]), 0.5)):
                axes.add_collection(LineCollection(lines, colors=_KEPT_COLOUR, linewidths=part * width))
            axes.set_title(
                f"head {head + 1}: recall {recall[head]:.1%} (best {best[head]:.1%})", fontsize=2.8 * edge
            )
            axes.tick_params(labelsize=7.5)
            axes.spines[:].set_visible(False)
        panels[layer, 0].set_ylabel(f"layer {layer + 1}\nquery", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("key", fontsize=9)
    step = 1 << max(0, math.ceil(math.log2(count / 5)))
    for axis in (panels[0, 0].xaxis, panels[0, 0].yaxis):
        axis.set_major_locator(ticker.MultipleLocator(step))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: tokens(int(value * block))))
    bar = figure.colorbar(image, ax=panels, fraction=0.03, pad=0.015, aspect=30, extend="min")
    bar.set_label("share of a query's dense attention", fontsize=8.5)
    bar.ax.tick_params(labelsize=7.5)
    key = panels[0, 0].plot([], [], color=_KEPT_COLOUR, linewidth=2, label="kept tiles")[0]
    figure.legend(handles=[key], loc="outside upper right", fontsize=8.5, facecolor="0.2", labelcolor="white")
    names = ("recall", "best", "density")
    recall, best, density = (torch.stack([getattr(x, name) for x in views]).mean() for name in names)
    figure.suptitle(
        f"{title}\n{length:,} tokens in tiles of {block}: kept {density:.1%} of the tiles, with a recall of "
        f"{recall:.1%} of dense attention's mass (best possible: {best:.1%})",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    figure.savefig(path, format="png")


def _strokes(kept: Tensor) -> list[list[tuple[int, int]]]:
    """A stroke across each kept tile: an outline alone does not tell inside from outside."""
    return [[(x, y + 1), (x + 1, y)] for y, x in kept.nonzero().tolist()]


def _outline(kept: Tensor) -> list[list[tuple[int, int]]]:
    """The edges between kept tiles ``[n, n]`` and the others, as lines from corner to corner."""
    count = kept.shape[0]
    padded = torch.zeros(count + 2, count + 2, dtype=torch.bool)
    padded[1:-1, 1:-1] = kept
    upright = (padded[1:-1, 1:] != padded[1:-1, :-1]).nonzero().tolist()
    level = (padded[1:, 1:-1] != padded[:-1, 1:-1]).nonzero().tolist()
    lines = [[(x, y), (x, y + 1)] for y, x in upright]
    return lines + [[(x, y), (x + 1, y)] for y, x in level]
