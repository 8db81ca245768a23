"""What a run leaves: a table with intervals, what it says about the claims, a picture and a JSON file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from sparsetile.errors import DataError, explain
from sparsetile.recall.arms import ARMS, FIXED
from sparsetile.viz import no_matplotlib

Run = dict[str, Any]
# The 97.5 % quantile of Student's t for 1, 2, … degrees of freedom.
_T = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)
_NORMAL = 1.96


class Estimate(NamedTuple):
    """A mean over seeds and half the width of its 95 % interval (Student's t); None with one seed."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")


def estimate(values: list[float]) -> Estimate:
    """Mean and interval of one value a seed."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return Estimate(mean, None)
    spread = math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1))
    quantile = _T[n - 2] if n - 2 < len(_T) else _NORMAL
    return Estimate(mean, quantile * spread / math.sqrt(n))


def by_arm(runs: list[Run]) -> dict[str, list[Run]]:
    """The runs of each arm that has any, in the order of :data:`ARMS`, by seed."""
    found = {arm: sorted((r for r in runs if r["arm"] == arm), key=lambda r: r["seed"]) for arm in ARMS}
    return {arm: some for arm, some in found.items() if some}


def over_seeds(runs: list[Run], name: str) -> Estimate:
    return estimate([run[name] for run in runs])


_COLUMNS = ("arm", "seeds", "tiles", "density", "accuracy", "kept", "recall", "at start", "seconds")


def rows(runs: list[Run]) -> list[tuple[str, ...]]:
    """A row of text for each arm, in the order of ``_COLUMNS``."""
    out: list[tuple[str, ...]] = []
    for arm, some in by_arm(runs).items():
        start = estimate([run["checks"][0]["accuracy"] for run in some])
        out.append(
            (
                arm,
                str(len(some)),
                f"{some[0]['tiles']:,}",
                f"{some[0]['density']:.2%}",
                str(over_seeds(some, "accuracy")),
                f"{over_seeds(some, 'within').mean:.3f}",
                str(over_seeds(some, "recall")),
                f"{start.mean:.3f}",
                f"{over_seeds(some, 'seconds').mean:.1f}",
            )
        )
    return out


def table(runs: list[Run]) -> Table:
    out = Table()
    for column in _COLUMNS:
        out.add_column(column, justify="left" if column == "arm" else "right")
    for row in rows(runs):
        out.add_row(*row)
    return out


def claims(runs: list[Run]) -> list[str]:
    """What the experiment is to show, and whether these runs do, as far as they have the arms for it."""
    arms = by_arm(runs)
    accuracy = {arm: over_seeds(some, "accuracy") for arm, some in arms.items()}
    learned, dense, moba = (accuracy.get(arm) for arm in ("learned", "dense", "moba"))
    fixed = {arm: accuracy[arm] for arm in FIXED if arm in accuracy}
    said: list[tuple[bool | None, str]] = []
    if learned:
        said.append((learned.mean >= 0.95, f"learned answers at least 0.95: {learned}"))
    if learned and dense:
        share = learned.mean / dense.mean
        said.append((share >= 0.98, f"learned reaches at least 0.98 of dense ({dense}): {share:.3f}"))
    if fixed:
        best = max(fixed, key=lambda arm: fixed[arm].mean)
        said.append(
            (fixed[best].mean <= 0.35, f"the best fixed pattern ({best}) at most 0.35: {fixed[best]}")
        )
    if learned and moba:
        apart = None
        if learned.half is not None and moba.half is not None:
            apart = learned.mean - learned.half > moba.mean + moba.half
        text = f"learned ({learned}) above moba ({moba}), intervals apart"
        said.append((apart, text if apart is not None else f"{text} (one seed has no interval)"))
    if learned:
        recall = over_seeds(arms["learned"], "recall")
        said.append((recall.mean >= 0.95, f"learned keeps at least 0.95 of the oracle's mass: {recall}"))
    words = {True: "yes", False: "NO", None: "open"}
    return [f"{words[holds]}: {text}" for holds, text in said]


def markdown(result: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    runs, settings = result["runs"], result["settings"]
    task, model = settings["task"], settings["model"]
    lines = ["# sparsetile recall", ""]
    lines += [text for where in result["provenance"] for text in (origin(where), "")]
    tiles = task["length"] // task["block"]
    lines += [
        f"Block-MQAR: {task['length']:,} tokens in {tiles} tiles of {task['block']}, {task['pairs']} pairs "
        f"of {task['keys']:,} keys and {task['values']} values, {tiles // 2} queries. Model: layers "
        f"{model['layers']}, width {model['width']}, heads {model['heads']}, {settings['dtype']} on "
        f"{settings['device']}. {settings['short_steps']} dense steps of {settings['short_batch']} × "
        f"{settings['short_length']:,} tokens, the same for all arms, then {settings['steps']} steps of "
        f"{settings['batch']} × {task['length']:,} with the arm's own attention.",
        "",
        "Means over seeds ± 95 % intervals (Student's t). *Kept*: share of queries whose answer's tile "
        "is. *Recall*: "
        "dense attention mass of a query inside the kept tiles over that inside as many tiles chosen by an "
        "oracle. *At start*: accuracy before the first step with the arm's own attention. A guess is right "
        f"{1 / task['values']:.3f} of the time.",
        "",
        line(_COLUMNS),
        line(("---",) * len(_COLUMNS)),
        *(line(row) for row in rows(runs)),
        "",
        *(f"- {text}" for text in claims(runs)),
        "",
    ]
    return "\n".join(lines)


def origin(where: dict[str, Any]) -> str:
    """One line of a result's ``provenance()``."""
    machine, versions = where["machine"], where["versions"]
    devices = ", ".join(device["name"] for device in machine["devices"]) or "no GPU"
    modified = " with uncommitted changes" if where["modified"] else ""
    numbers = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    source = where["source"][:12]
    return (
        f"{where['date']} · commit {where['commit'] or 'unknown'}{modified} · source {source} · "
        f"{machine['cpu']} ({machine['cores']} cores, {machine['threads']} threads), {devices} · {numbers}"
    )


def line(cells: tuple[str, ...]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def draw(path: Path, result: dict[str, Any]) -> str | None:
    """Writes accuracy at the end, and over training, as PNG; returns why not, where matplotlib is missing."""
    missing = no_matplotlib()
    if missing is not None:
        return missing
    from matplotlib.figure import Figure

    arms, task = by_arm(result["runs"]), result["settings"]["task"]
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    for place, (arm, some) in enumerate(arms.items()):
        colour = f"C{list(ARMS).index(arm)}"
        found = over_seeds(some, "accuracy")
        left.barh(place, found.mean, xerr=found.half, color=colour, alpha=0.6, capsize=3)
        left.plot([run["accuracy"] for run in some], [place] * len(some), "k.", markersize=3)
        curves = list(zip(*([check["accuracy"] for check in run["checks"]] for run in some), strict=True))
        steps = [check["step"] for check in some[0]["checks"]]
        points = [estimate(list(values)) for values in curves]
        means = [point.mean for point in points]
        right.plot(steps, means, color=colour, marker=".", label=arm)
        if len(some) > 1:
            low, high = (
                [m + side * (p.half or 0.0) for m, p in zip(means, points, strict=True)] for side in (-1, 1)
            )
            right.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    left.set_yticks(range(len(arms)), list(arms))
    left.invert_yaxis()
    left.axvline(1 / task["values"], color="grey", linewidth=0.8, linestyle="--")
    left.set(xlim=(0, 1.05), xlabel="queries answered right (dashed: a guess)")
    left.set_title(f"block-MQAR, {task['length']:,} tokens, {result['settings']['density']:.0%} of the tiles")
    right.set(ylim=(0, 1.05), xlabel="step with the arm's own attention", ylabel="queries answered right")
    right.set_title("over training, from equal weights")
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    return None


def write(folder: Path, result: dict[str, Any]) -> str | None:
    """Writes ``recall.json``, ``recall.md`` and ``recall.png``; returns why there is no picture, if so."""
    write_json(folder / "recall.json", result)
    (folder / "recall.md").write_text(markdown(result), encoding="utf-8")
    return draw(folder / "recall.png", result)


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def merged(paths: list[Path]) -> dict[str, Any]:
    """The runs of several ``recall.json`` as one result; of an arm and seed that occur twice, the later.

    Raises:
        DataError: a file is no result of this experiment, or its settings are others.
    """
    results = [_read(path) for path in paths]
    first = results[0]
    for path, result in zip(paths[1:], results[1:], strict=True):
        mine, other = first["settings"], result["settings"]
        different = sorted(name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name))
        if different:
            raise DataError(
                explain(
                    str(path),
                    expected=f"the settings of {paths[0]}",
                    got=f"others: {', '.join(different)}",
                    fix="Merge runs that differ in arms and seeds alone.",
                )
            )
    runs = {(run["arm"], run["seed"]): run for result in results for run in result["runs"]}
    return {**first, "provenance": [w for r in results for w in r["provenance"]], "runs": list(runs.values())}


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        known = result["experiment"] == "recall" and {"settings", "provenance", "runs"} <= result.keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise DataError(
            explain(
                str(path),
                expected="a recall.json of `sparsetile recall`",
                got="another file",
                fix="Check the path.",
            )
        )
    return dict(result)
