"""What a profile leaves: tables, a picture and files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from sparsetile.profile.run import Profile, closed
from sparsetile.viz import no_matplotlib


def mass_table(profile: Profile, densities: tuple[float, ...]) -> Table:
    """The share of the attention mass that each family keeps, for all heads alike and for the heads' own."""
    table = Table(
        title="Share of dense attention's mass kept, mean over heads and queries", title_justify="left"
    )
    table.add_column("pattern, largest within the density")
    for density in densities:
        table.add_column(f"{density:.0%}", justify="right")
    mass = profile.mass.mean((0, 1))
    families: dict[str, list[str]] = {}
    for column, density in enumerate(densities):
        for single in profile.singles(density):
            cells = families.setdefault(single.family, ["–"] * len(densities))
            cells[column] = f"{float(mass[profile.tried.index(single)]):.3f}"
    for family, cells in families.items():
        table.add_row(family, *cells)
    own = [f"{float(profile.mass_of(profile.pick(density)).mean()):.3f}" for density in densities]
    table.add_row("heads' own, of least estimated cost", *own, style="bold")
    return table


def loss_table(rows: list[dict[str, Any]], dense: float) -> Table:
    """Losses on the held-out text, best first within each density."""
    table = Table(title=f"Loss on the held-out text (dense {dense:.4f})", title_justify="left")
    for name, justify in (("asked", "right"), ("what", "left"), ("tiles", "right"), ("loss", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("over dense", justify="right")
    for density in dict.fromkeys(row["asked"] for row in rows):
        here = sorted((row for row in rows if row["asked"] == density), key=lambda row: row["loss"])
        for row in here:
            style = "bold" if row["what"] == "heads' own" else None
            share, loss = f"{row['density']:.1%}", f"{row['loss']:.4f}"
            over = f"{row['loss'] / dense - 1:+.2%}"
            table.add_row(f"{density:.0%}", row["what"], share, loss, over, style=style)
        table.add_section()
    return table


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def claims(rows: list[dict[str, Any]]) -> list[str]:
    """For each density, where the heads' own patterns stand between the best single one and the oracle."""
    lines = []
    for density in dict.fromkeys(row["asked"] for row in rows):
        own, single, oracle, share = closed(rows, density)
        lines.append(
            f"{density:.0%}: heads' own {own:.4f}, best single pattern {single:.4f}, oracle {oracle:.4f}: "
            f"{share:.0%} of the gap closed."
        )
    return lines


def kinds(profile: Profile, pick: Tensor) -> str:
    """Which families the heads took, most frequent first."""
    count = Counter(profile.tried[i].family for i in pick.flatten().tolist())
    return ", ".join(f"{number} × {family}" for family, number in count.most_common())


def write_settings(path: Path, profile: Profile, pick: Tensor) -> None:
    """The file that ``use`` and ``config.sparsetile`` take."""
    path.write_text(json.dumps(profile.settings(pick), indent=1) + "\n", encoding="utf-8")


def picture(path: Path, profile: Profile, pick: Tensor, title: str) -> str | None:
    """Heat maps by layer and head: the mass that the largest single window keeps at this density, the tiles
    that each head is given, and the mass that it then keeps. Returns why there is none, or None."""
    missing = no_matplotlib()
    if missing:
        return missing
    from matplotlib.figure import Figure

    density = profile.density(pick)
    single = next(s for s in reversed(profile.singles(density)) if s.family.startswith("window"))
    share = profile.tiles[pick].float() / profile.chosen.every
    maps = [
        (f"mass kept by {single.pattern!r}", profile.mass[..., profile.tried.index(single)], (0.0, 1.0)),
        ("tiles of the head's own pattern", share, (0.0, None)),
        ("mass kept by it", profile.mass_of(pick), (0.0, 1.0)),
    ]
    layers, heads = pick.shape
    size = (max(9.0, 3 * (1.2 + 0.28 * heads)), max(3.2, 1.4 + 0.19 * layers))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (name, values, (least, most)) in zip(axes, maps, strict=True):
        image = axis.imshow(values.numpy(), vmin=least, vmax=most, cmap="viridis", aspect="auto")
        axis.set_title(name, fontsize=8, wrap=True)
        axis.set_xlabel("head")
        figure.colorbar(image, ax=axis, shrink=0.9)
    axes[0].set_ylabel("layer")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
    return None


def markdown(result: dict[str, Any]) -> str:
    """The result as a page: what was measured, and every loss."""
    about = result["about"]
    lines = [
        f"# Profile of {about['model']}",
        "",
        f"{about['length']:,} tokens of {about['text']} measured, {about['length']:,} tokens of "
        f"{about['held_out']} held out; tiles of {about['block_size']}. Dense loss on it "
        f"{result['dense']:.4f} nats a token.",
        "",
        f"Commit {result['provenance']['commit']}, {result['provenance']['date']}, "
        f"{result['provenance']['machine']['cpu']}, torch {result['provenance']['versions']['torch']}.",
        "",
        "| asked | what | tiles | loss | over dense | pattern |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        pattern = f"`{row['pattern']}`".replace("|", "\\|") if row["pattern"] else ""
        over = f"{row['loss'] / result['dense'] - 1:+.2%}"
        numbers = f"{row['density']:.1%} | {row['loss']:.4f} | {over}"
        lines.append(f"| {row['asked']:.0%} | {row['what']} | {numbers} | {pattern} |")
    return "\n".join([*lines, "", *result["claims"], ""])
