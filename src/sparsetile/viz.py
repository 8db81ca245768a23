"""Pictures of a block layout, in the terminal and as PNG, and the numbers that go with them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from torch import Tensor

from sparsetile.errors import ArgumentError, explain
from sparsetile.facts import Coverage, Description, coverage, describe, tiles_of
from sparsetile.layout.blocks import BlockLayout

FULL_COLOUR = (78, 161, 255)
PARTIAL_COLOUR = (255, 180, 84)
EMPTY_COLOUR = (22, 25, 33)
_SHADES = " ░▒▓█"


def draw(layout: BlockLayout, *, width: int = 64, colour: bool = True, batch: int = 0, head: int = 0) -> Text:
    """The layout of one head as text: queries downwards, keys to the right, axes labelled in tokens.

    With ``colour`` a character is two cells, one above the other, in the colours of whole and partial tiles;
    without, it is one of four shades. ``width`` is the number of columns of the picture without its labels.
    """
    seen = coverage(layout, width if colour else max(1, width // 2), width, batch=batch, head=head)
    lines = _coloured_lines(seen) if colour else _shaded_lines(seen)
    tokens_a_line = seen.cell_q * (2 if colour else 1)
    every = 4 if len(lines) > 6 else 1
    labels = [tokens(i * tokens_a_line) if i % every == 0 else "" for i in range(len(lines))]
    margin = max(len(label) for label in labels)
    columns = seen.full.shape[1]
    picture = Text(no_wrap=True)
    picture.append(" " * (margin + 2) + _key_axis(columns, seen.cell_k) + "\n", style="dim")
    picture.append(" " * (margin + 1) + "╭" + "─" * columns + "╮\n", style="dim")
    for label, line in zip(labels, lines, strict=True):
        picture.append(f"{label:>{margin}} " + ("┤" if label else "│"), style="dim")
        picture.append_text(line)
        picture.append("│\n", style="dim")
    picture.append(" " * (margin + 1), style="dim")
    picture.append("╰" + "─" * columns + "╯", style="dim")
    return picture


def legend(colour: bool = True) -> Text:
    """What the colours (or shades) of :func:`draw` mean."""
    if not colour:
        return Text("↓ queries  → keys   ░▒▓█ share of kept pairs, blank: none")
    text = Text("↓ queries  → keys   ")
    text.append("■ ", style=_rgb(FULL_COLOUR))
    text.append("whole tiles   ")
    text.append("■ ", style=_rgb(PARTIAL_COLOUR))
    text.append("masked tiles   brighter: more pairs kept")
    return text


def fact_rows(about: Description, head_dim: int = 128) -> list[tuple[str, str]]:
    """(name, value) of everything that ``show`` and the PNG print."""
    less = about.dense_flops(head_dim) / about.flops(head_dim) if about.tiles else float("inf")
    share = about.causal_density
    triangle = "" if share is None else f", {share:.4%} of the causal triangle's tiles"
    return [
        ("tokens", f"{about.q_len:,} queries × {about.k_len:,} keys"),
        ("tiles", f"{about.tiles:,} of {about.tile_grid:,} ({about.block_q} × {about.block_k} tokens)"),
        ("density", f"{about.density:.4%} of tiles, {about.pair_density:.4%} of pairs{triangle}"),
        (
            "whole / masked",
            f"{about.tiles - about.partial:,} / {about.partial:,} ({about.masks:,} distinct masks)",
        ),
        ("tiles a row", f"min {about.row_min:,} · mean {about.row_mean:,.1f} · max {about.row_max:,}"),
        ("farthest key", _reach(about)),
        ("queries without a key", "yes (output 0)" if about.empty_queries else "none"),
        (
            "layout memory",
            f"{byte_size(about.nbytes)}" + (f" ({about.heads} heads)" if about.heads > 1 else ""),
        ),
        (
            f"FLOPs a head (D {head_dim})",
            f"{_si(about.flops(head_dim))}, dense {_si(about.dense_flops(head_dim))}: {less:,.1f}× fewer",
        ),
    ]


def save_png(
    layout: BlockLayout,
    path: str | Path,
    *,
    title: str = "",
    batch: int = 0,
    head: int = 0,
    cells: int = 512,
) -> None:
    """Draw the layout of one head as PNG, with the tiles of each row beside it and its numbers below.

    Raises:
        ArgumentError: matplotlib is missing (``pip install 'sparsetile[plot]'``), or no such head.
        OSError: the file cannot be written.
    """
    figure_class, ticker = require_matplotlib()
    seen = coverage(layout, cells, cells, batch=batch, head=head)
    about = describe(layout, batch=batch, head=head)
    counts = tiles_of(layout, batch, head).counts
    share = about.q_len / about.k_len
    image_height = 6.4 * min(max(share, 0.35), 1.6)
    figure = figure_class(figsize=(8.6, image_height + 2.3), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    upper, lower = figure.subfigures(2, 1, height_ratios=(image_height + 0.7, 1.6))
    axes, side = upper.subplots(1, 2, width_ratios=(6, 1), sharey=True)
    axes.imshow(
        _blend(seen).numpy(),
        extent=(0, seen.full.shape[1] * seen.cell_k, seen.full.shape[0] * seen.cell_q, 0),
        interpolation="nearest",
        aspect="auto",
    )
    axes.spines[:].set_visible(False)  # they would cover the first and last cells: global rows and columns
    axes.set(xlim=(0, about.k_len), ylim=(about.q_len, 0), xlabel="key (token)", ylabel="query (token)")
    axes.set_title(title or "block layout", fontsize=11, loc="left", wrap=True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.MaxNLocator(8, steps=[1, 2, 4, 8, 10], integer=True))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: tokens(int(value))))
    if max(about.q_len, about.k_len) >= 2048:
        axes.xaxis.set_major_locator(ticker.MultipleLocator(_binary_step(about.k_len)))
        axes.yaxis.set_major_locator(ticker.MultipleLocator(_binary_step(about.q_len)))
    edges = (torch.arange(len(counts) + 1) * about.block_q).clamp(max=about.q_len)
    side.stairs(counts.numpy(), edges.numpy(), orientation="horizontal", fill=True, color=_unit(FULL_COLOUR))
    side.set_title("tiles a row", fontsize=9)
    if about.row_min > 0 and about.row_max > 20 * about.row_min:
        side.set(xscale="log", xlim=(1, 1.5 * about.row_max))
        side.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        side.xaxis.set_minor_locator(ticker.NullLocator())
    else:
        side.xaxis.set_major_locator(ticker.MaxNLocator(3, integer=True))
    side.spines[["top", "right"]].set_visible(False)
    side.tick_params(labelleft=False, labelsize=8)
    names = ((FULL_COLOUR, "whole tiles"), (PARTIAL_COLOUR, "masked tiles"))
    keys = [axes.plot([], [], "s", color=_unit(colour), label=label)[0] for colour, label in names]
    lower.legend(handles=keys, loc="upper right", fontsize=8.5, frameon=False, handletextpad=0)
    for place, (name, value) in enumerate(fact_rows(about)):
        lower.text(0.03, 0.97 - 0.105 * place, name, va="top", fontsize=8.5, color="0.4")
        lower.text(0.25, 0.97 - 0.105 * place, value, va="top", fontsize=8.5)
    figure.savefig(path, format="png")


def tokens(count: int) -> str:
    """A token position for an axis: 4096 → ``4K``, 1048576 → ``1M``, 1000 → ``1000``."""
    for unit, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if count >= unit and count * 4 % unit == 0:
            return f"{count / unit:g}{letter}"
    if count >= 1 << 17:
        return f"{count / (1 << 20):.3g}M" if count >= 1 << 20 else f"{count / 1024:.0f}K"
    return str(count)


def byte_size(count: float) -> str:
    """Bytes in binary units, three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def _blend(seen: Coverage) -> Tensor:
    """RGB in 0–1, ``[rows, columns, 3]``: hue by kind, brightness by √share (so that thin lines show)."""
    total = seen.full + seen.partial
    mix = (seen.partial / total.clamp(min=1e-30))[..., None]
    hue = (1 - mix) * torch.tensor(_unit(FULL_COLOUR)) + mix * torch.tensor(_unit(PARTIAL_COLOUR))
    strength = torch.where(total > 0, 0.25 + 0.75 * total.clamp(max=1).sqrt(), 0.0)[..., None]
    return (1 - strength) * torch.tensor(_unit(EMPTY_COLOUR)) + strength * hue


def _coloured_lines(seen: Coverage) -> list[Text]:
    pixels = (_blend(seen) * 255).round().int().tolist()
    if len(pixels) % 2:
        pixels.append([list(EMPTY_COLOUR)] * len(pixels[0]))
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        line = Text()
        for above, below in zip(upper, lower, strict=True):
            line.append("▀", style=f"{_rgb(above)} on {_rgb(below)}")
        lines.append(line)
    return lines


def _shaded_lines(seen: Coverage) -> list[Text]:
    share = seen.full + seen.partial
    bounds = torch.tensor([0.25, 0.5, 0.85], dtype=share.dtype)
    level = torch.where(share > 0, 1 + torch.bucketize(share, bounds, right=True), 0)
    return [Text("".join(_SHADES[i] for i in row)) for row in level.tolist()]


def _key_axis(columns: int, cell: int) -> str:
    line = ""
    for column in range(0, columns, 12):
        label = tokens(column * cell)
        if len(line) <= column and column + len(label) <= columns:
            line = line.ljust(column) + label
    return line


def _reach(about: Description) -> str:
    if about.back is None or about.ahead is None:
        return "none"
    parts = [f"{about.back:,} tokens back"] if about.back > 0 else []
    if about.ahead > 0:
        parts.append(f"{about.ahead:,} ahead")
    return ", ".join(parts) or "the query itself"


def _binary_step(length: int) -> int:
    step = 1
    while length > 8 * step:
        step *= 2
    return step


def _si(value: float) -> str:
    for unit in ("", "K", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.3g} {unit}FLOP"
        value /= 1000
    return f"{value:,.3g} EFLOP"


def _rgb(colour: Any) -> str:
    return f"rgb({colour[0]},{colour[1]},{colour[2]})"


def _unit(colour: tuple[int, int, int]) -> tuple[float, float, float]:
    return (colour[0] / 255, colour[1] / 255, colour[2] / 255)


def require_matplotlib() -> tuple[Any, Any]:
    """``Figure`` and ``ticker``; raises ArgumentError where matplotlib is missing."""
    try:
        from matplotlib import ticker
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError(
            explain(
                "PNG",
                expected="matplotlib",
                got=str(error),
                fix="Install it: pip install 'sparsetile[plot]'.",
            )
        ) from error
    return Figure, ticker


def no_matplotlib() -> str | None:
    """What to say where there will be no picture for want of matplotlib; None where there is one."""
    if importlib.util.find_spec("matplotlib") is not None:
        return None
    return "No picture: matplotlib is not installed. Install it with: pip install 'sparsetile[plot]'"
