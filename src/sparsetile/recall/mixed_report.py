"""What ``sparsetile mixed`` leaves: a table with intervals, the two claims, a picture and a JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from sparsetile.recall.mixed import DENSE, KINDS, TOP_P, Arm
from sparsetile.recall.report import Estimate, Run, estimate, line, origin, write_json
from sparsetile.viz import no_matplotlib

RATIO, SAVED = 3.0, 0.3
"""What is claimed: tiles of hard inputs over those of easy ones, and the share of tiles saved."""
_ALIKE = 0.01
_COLUMNS = (
    "tiles a row",
    "seeds",
    "accuracy",
    "easy",
    "hard",
    "tiles, mean",
    "tiles, easy",
    "tiles, hard",
    "found, hard",
    "seconds",
)


def by_arm(runs: list[Run]) -> dict[Arm, list[Run]]:
    """The runs of each arm by seed: ``top_p``, fixed numbers as they rise, ``dense``."""
    arms = {run["arm"] for run in runs}
    fixed: list[Arm] = sorted(arm for arm in arms if isinstance(arm, int))
    order: list[Arm] = [arm for arm in (TOP_P, *fixed, DENSE) if arm in arms]
    return {arm: sorted((r for r in runs if r["arm"] == arm), key=lambda r: r["seed"]) for arm in order}


def over_seeds(runs: list[Run], name: str, kind: str) -> Estimate:
    return estimate([run[name][kind] for run in runs])


def rows(runs: list[Run]) -> list[tuple[str, ...]]:
    """A row of text for each arm, in the order of ``_COLUMNS``."""
    out: list[tuple[str, ...]] = []
    for arm, some in by_arm(runs).items():
        accuracies = (str(over_seeds(some, "accuracy", kind)) for kind in ("both", *KINDS))
        tiles = [over_seeds(some, "tiles", kind) for kind in ("both", *KINDS)]
        shown = [str(x) if arm == TOP_P else f"{x.mean:g}" for x in tiles]
        found = f"{over_seeds(some, 'found', 'hard').mean:.3f}"
        seconds = f"{estimate([run['seconds'] for run in some]).mean:.1f}"
        out.append((str(arm), str(len(some)), *accuracies, *shown, found, seconds))
    return out


def table(runs: list[Run]) -> Table:
    out = Table()
    for column in _COLUMNS:
        out.add_column(column, justify="left" if column == _COLUMNS[0] else "right")
    for row in rows(runs):
        out.add_row(*row)
    return out


def ratio(runs: list[Run]) -> Estimate:
    """Tiles of a row of hard inputs over those of easy ones under ``top_p``: each row has as many tiles to
    choose from, so it is the ratio of densities, too."""
    return estimate([run["tiles"]["hard"] / run["tiles"]["easy"] for run in by_arm(runs)[TOP_P]])


def cheapest(runs: list[Run], below: float = 0.0) -> int | None:
    """The smallest fixed number of tiles whose mean accuracy is at most ``below`` under that of ``top_p``;
    None: no number is."""
    arms = by_arm(runs)
    least = over_seeds(arms[TOP_P], "accuracy", "both").mean - below
    fits = (
        arm
        for arm, some in arms.items()
        if isinstance(arm, int) and over_seeds(some, "accuracy", "both").mean >= least
    )
    return next(fits, None)


def saved(runs: list[Run], fixed: int) -> Estimate:
    """Share of the tiles of ``fixed`` that ``top_p`` does without."""
    return estimate([1.0 - run["tiles"]["both"] / fixed for run in by_arm(runs)[TOP_P]])


def claims(runs: list[Run]) -> list[str]:
    """What the experiment is to show, and whether these runs do, as far as they have the arms for it."""
    arms = by_arm(runs)
    if TOP_P not in arms:
        return []
    found = ratio(runs)
    said = [
        (found.mean >= RATIO, f"hard inputs get at least {RATIO:g} times the tiles of easy ones: {found}")
    ]
    if any(isinstance(arm, int) for arm in arms):
        accuracy = over_seeds(arms[TOP_P], "accuracy", "both")
        equal = cheapest(runs)
        if equal is None:
            said.append((False, f"no fixed number of those tried is as accurate as top_p ({accuracy})"))
        for number, words in ((equal, "not below"), (cheapest(runs, _ALIKE), f"at most {_ALIKE:g} below")):
            if number is not None:
                share, theirs = saved(runs, number), over_seeds(arms[number], "accuracy", "both")
                text = (
                    f"at least {SAVED:.0%} fewer tiles than {number}, the smallest fixed number with an "
                    f"accuracy ({theirs}) {words} that of top_p ({accuracy}): {share}"
                )
                said.append((share.mean >= SAVED, text))
    return [f"{'yes' if holds else 'NO'}: {text}" for holds, text in said]


def markdown(result: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    runs, settings = result["runs"], result["settings"]
    task = settings["task"]
    lines = ["# sparsetile mixed", ""]
    lines += [text for where in result["provenance"] for text in (origin(where), "")]
    lines += [
        f"A memory of {task['tiles']} tiles of {task['block']} tokens and {task['questions']} questions, "
        f"half of the sequences hard: {task['votes']} votes, a majority of one; {task['keys']} keys, "
        f"{task['values']} values. Model: one layer, width {settings['model']['width']}, on "
        f"{settings['device']}. {settings['start_steps']} dense steps of {settings['start_batch']} short "
        f"sequences, the same for all arms, then {settings['steps']} steps of {settings['batch']} sequences. "
        f"top_p keeps tiles until p = {settings['p']} of the predicted mass.",
        "",
        f"Means over seeds ± 95 % intervals (Student's t), on {settings['held_out']} fresh sequences a "
        "seed. Tiles are counted over all rows that are computed, the own one included. *Found*: share of "
        "the tiles with the key asked for that are kept. A guess is right "
        f"{1 / task['values']:.3f} of the time, one of the two values that were voted for, half of it.",
        "",
        line(_COLUMNS),
        line(("---",) * len(_COLUMNS)),
        *(line(row) for row in rows(runs)),
        "",
        *(f"- {text}" for text in claims(runs)),
        "",
    ]
    return "\n".join(lines)


def draw(path: Path, result: dict[str, Any]) -> str | None:
    """Writes accuracy against tiles, of both kinds together and of each, as PNG; returns why not, where
    matplotlib is missing."""
    missing = no_matplotlib()
    if missing is not None:
        return missing
    from matplotlib.figure import Figure

    arms = by_arm(result["runs"])
    fixed = [arm for arm in arms if isinstance(arm, int)]
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    both, each = figure.subplots(1, 2, sharey=True)
    for axes, kind, colour, label in (
        (both, "both", "black", ""),
        (each, "easy", "C0", "easy: "),
        (each, "hard", "C3", "hard: "),
    ):
        points = [over_seeds(arms[arm], "accuracy", kind) for arm in fixed]
        means, halves = [p.mean for p in points], [p.half or 0.0 for p in points]
        if fixed:
            style = {"color": colour, "marker": "o", "markersize": 4, "capsize": 3}
            axes.errorbar(fixed, means, yerr=halves, label=f"{label}a fixed number", **style)
        if TOP_P in arms:
            tiles, right = (over_seeds(arms[TOP_P], name, kind) for name in ("tiles", "accuracy"))
            axes.errorbar(
                tiles.mean,
                right.mean,
                xerr=tiles.half,
                yerr=right.half,
                color=colour,
                marker="*",
                markersize=14,
                linestyle="none",
                capsize=3,
                label=f"{label}top_p: {tiles.mean:.1f} tiles",
            )
        if DENSE in arms:
            dense = over_seeds(arms[DENSE], "accuracy", kind).mean
            axes.axhline(dense, color=colour, linewidth=0.8, linestyle="--", label=f"{label}dense")
    both.set(xlabel="tiles a row", ylabel="questions answered right", ylim=(0, 1.05))
    both.set_title("easy and hard inputs in one stream")
    each.set(xlabel="tiles a row of that kind")
    each.set_title("each kind")
    for axes in (both, each):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)
    return None


def write(folder: Path, result: dict[str, Any]) -> str | None:
    """Writes ``mixed.json``, ``mixed.md`` and ``mixed.png``; returns why there is no picture, if so."""
    write_json(folder / "mixed.json", result)
    (folder / "mixed.md").write_text(markdown(result), encoding="utf-8")
    return draw(folder / "mixed.png", result)
