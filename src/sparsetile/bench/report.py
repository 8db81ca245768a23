"""A result file as a Markdown table and as plots. Draws only what was measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sparsetile.kernels.select import BACKENDS
from sparsetile.viz import byte_size, tokens

Row = dict[str, Any]
_HEADER = (
    "rival",
    "forward ms",
    "× dense",
    "× flex",
    "backward ms",
    "× dense",
    "× flex",
    "peak, fwd + bwd",
    "error out",
    "error grads",
)
_PHASES = ("forward", "backward")


def markdown(result: dict[str, Any]) -> str:
    """The whole result as Markdown: provenance, a table a case, and what could not be measured, with reasons.

    ``× dense`` is the time of the fastest dense rival of the same case divided by the row's; ``× flex`` that
    of FlexAttention. Above 1 the row is faster.
    """
    where = result["provenance"]
    machine, versions = where["machine"], where["versions"]
    devices = ", ".join(device["name"] for device in machine["devices"]) or "no GPU"
    modified = " with uncommitted changes" if where["modified"] else ""
    lines = [
        "# sparsetile bench",
        "",
        f"{where['date']} · commit {where['commit'] or 'unknown'}{modified} · source {where['source'][:12]}",
        "",
        f"{machine['cpu']} ({machine['cores']} cores, {machine['threads']} threads), {devices} · measured on "
        f"{result['device']} · "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None),
        "",
        "Medians, forward and backward timed apart. × dense: fastest dense rival ÷ this row; × flex: "
        f"FlexAttention ÷ this row. Peak: {result['memory']}. Error: {result['error']}; grads: the largest.",
        "",
        *_overview(result["rows"], result.get("ceilings")),
    ]
    for rows in _by_case(result["rows"]):
        case = rows[0]["case"]
        shape = f"B{case['batch']} H{case['heads']} N {case['length']:,} D{case['head_dim']} {case['dtype']}"
        density = rows[0].get("density")
        kept = (
            ""
            if density is None
            else f", density {density:.4f} ({rows[0]['tiles']:,} tiles of {case['block']}²)"
        )
        share = rows[0].get("causal_density")
        if share is not None:
            kept += f", {share:.4f} of the causal triangle; dense rivals are causal too"
        lines += [f"## {case['pattern']} · {shape}{kept}", "", _line(_HEADER), _line(["---"] * len(_HEADER))]
        lines += [_line(_cells(row, rows)) for row in rows]
        lines.append("")
        lines += [f"- {row['rival']}: {reason}" for row in rows for reason in _reasons(row)]
        lines += [""] if lines[-1] else []
    return "\n".join(lines)


def floor_ms(case: Row, density: float, ceilings: dict[str, float], phase: str) -> float:
    """No kernel can be faster: the tiles' products at the measured rate of a matrix product, or q, k, v and
    out moved once at that of a copy, whichever takes longer; backward 2.5 times the one, twice the other."""
    size: int = case["batch"] * case["heads"] * case["length"] * case["head_dim"]
    length: int = case["length"]
    work = 4 * size * length * density * (1.0 if phase == "forward" else 2.5)
    moved = 4 * size * (4 if case["dtype"] == "float32" else 2) * (1 if phase == "forward" else 2)
    return max(work / ceilings["flops"], moved / ceilings["bytes"]) * 1e3


def _overview(rows: list[Row], ceilings: dict[str, float] | None) -> list[str]:
    """Forward / backward milliseconds: a line for each case, a column for each rival; with the ceilings, the
    floor and, in brackets, the efficiency η of what skips tiles."""
    names = list(dict.fromkeys(row["rival"] for row in rows))
    lines = ["Forward / backward in ms:"]
    if ceilings is not None:
        lines = [
            "Forward / backward in ms, in brackets η = fastest dense rival's time × density ÷ this time. "
            f"Floor: products at {ceilings['flops'] / 1e12:.0f} TFLOP/s or copies at "
            f"{ceilings['bytes'] / 1e12:.2f} TB/s, as measured in this run:"
        ]
    floors = ["floor"] if ceilings is not None else []
    header = ["case", "density", *floors, *names]
    lines += ["", _line(header), _line(["---"] * len(header))]
    for group in _by_case(rows):
        cells = {
            row["rival"]: " / ".join(_time(row, phase) for phase in _PHASES) if row["status"] == "ok" else "—"
            for row in group
        }
        case, density = group[0]["case"], group[0].get("density")
        kept = ["—" if density is None else f"{density:.4f}"]
        if ceilings is not None and density is not None:
            kept.append(" / ".join(f"{floor_ms(case, density, ceilings, phase):.3f}" for phase in _PHASES))
            for row in group:
                if row["status"] == "ok" and not row["dense"]:
                    cells[row["rival"]] += f" ({_efficiencies(row, group, density)})"
        elif ceilings is not None:
            kept.append("—")
        lines.append(_line([case["label"], *kept, *(cells.get(name, "—") for name in names)]))
    return [*lines, ""]


def _efficiencies(row: Row, group: list[Row], density: float) -> str:
    shares = []
    for phase in _PHASES:
        dense = _fastest_dense(group, phase)
        shares.append(f"{dense * density / row[phase]['median_ms']:.2f}" if dense and row[phase] else "—")
    return " / ".join(shares)


def row_line(row: Row) -> str:
    """One row as one line, for the terminal while measuring."""
    start = f"{row['case']['label']} · {row['rival']}: "
    if row["status"] != "ok":
        return f"{start}{row['status']}: {row['reason']}"
    times = " / ".join(_time(row, phase) for phase in _PHASES)
    error = max(_number(value) for value in row["errors"].values())
    return f"{start}{times} ms, error {error:.1e}" + (" (shared)" if row.get("shared") else "")


def plot(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``time.png``, ``memory.png`` and ``efficiency.png``, those with data, and return their paths.

    Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["status"] == "ok"]
    colours = {name: f"C{place}" for place, name in enumerate(dict.fromkeys(row["rival"] for row in rows))}
    written = []
    drawers = {"time.png": _draw_time, "memory.png": _draw_memory, "efficiency.png": _draw_efficiency}
    for name, draw in drawers.items():
        figure = Figure(dpi=130, layout="constrained")
        if not draw(figure, rows, colours):
            continue
        where = result["provenance"]
        device = (
            where["machine"]["devices"][0]["name"] if result["device"] != "cpu" else where["machine"]["cpu"]
        )
        figure.text(0.995, 0.005, f"{device} · {where['date'][:10]}", ha="right", fontsize=7, color="0.5")
        figure.savefig(folder / name)
        written.append(folder / name)
    return written


def _draw_time(figure: Any, rows: list[Row], colours: dict[str, str]) -> bool:
    kinds: dict[str, Callable[[Row], float | None]] = {
        "forward": lambda row: row["forward"]["median_ms"],
        "backward": lambda row: row["backward"]["median_ms"] if row["backward"] else None,
    }
    return _lines_over_length(figure, rows, colours, kinds, "ms a head")


def _draw_memory(figure: Any, rows: list[Row], colours: dict[str, str]) -> bool:
    kinds: dict[str, Callable[[Row], float | None]] = {
        "forward": lambda row: row["forward_bytes"] / 2**20,
        "forward + backward": lambda row: (
            row["training_bytes"] / 2**20 if row.get("training_bytes") else None
        ),
    }
    return _lines_over_length(figure, rows, colours, kinds, "peak MiB a head")


def _lines_over_length(
    figure: Any,
    rows: list[Row],
    colours: dict[str, str],
    values: dict[str, Callable[[Row], float | None]],
    unit: str,
) -> bool:
    """A panel for each pattern (across) and value (down); a line for each rival, density and head_dim."""
    patterns = list(dict.fromkeys(row["case"]["pattern"] for row in rows))
    if not patterns:
        return False
    figure.set_size_inches(1.2 + 3.6 * len(patterns), 3.1 * len(values) + 0.9)
    panels = figure.subplots(len(values), len(patterns), sharex=True, sharey="row", squeeze=False)
    asked = sorted({row["case"]["asked"] for row in rows if row["case"]["asked"] is not None})
    dashes = dict(zip(asked, ("-", "--", "-.", ":") * len(asked), strict=False))
    labels: dict[str, Any] = {}
    for down, (name, value) in enumerate(values.items()):
        for across, pattern in enumerate(patterns):
            axes = panels[down][across]
            series: dict[tuple[Any, ...], list[tuple[int, float]]] = defaultdict(list)
            for row in rows:
                case, measured = row["case"], value(row)
                if case["pattern"] == pattern and measured:
                    density = None if row["dense"] else case["asked"]
                    heads = case["batch"] * case["heads"]
                    key = (row["rival"], density, case["head_dim"])
                    series[key].append((case["length"], measured / heads))
            for (rival, density, head_dim), points in sorted(series.items(), key=str):
                points = sorted(set(points))
                (line,) = axes.plot(
                    *zip(*points, strict=True),
                    dashes.get(density, "-"),
                    color=colours[rival],
                    marker="o" if head_dim < 128 else "s",
                    markersize=3.5,
                    linewidth=2 if rival in BACKENDS else 1.1,
                )
                text = rival + ("" if density is None else f", {density:g}") + f", D{head_dim}"
                labels.setdefault(text, line)
            axes.set(xscale="log", yscale="log")
            axes.grid(True, which="major", alpha=0.3)
            _plain_ticks(axes.yaxis)
            if down == 0:
                axes.set_title(pattern, fontsize=10)
            if across == 0:
                axes.set_ylabel(f"{name}\n{unit}", fontsize=9)
    _length_ticks(panels[-1], [row["case"]["length"] for row in rows])
    figure.legend(
        labels.values(),
        labels.keys(),
        loc="outside lower center",
        ncols=min(5, len(labels)),
        fontsize=7,
        frameon=False,
    )
    return True


def _draw_efficiency(figure: Any, rows: list[Row], colours: dict[str, str]) -> bool:
    """Speed-up over the fastest dense rival as a share of 1/density, the most that skipping tiles gives.

    Where the pattern is causal, so are the dense rivals, and density is that of the causal triangle.
    """
    found: dict[str, dict[tuple[str, str], list[tuple[float, float]]]] = {
        phase: defaultdict(list) for phase in _PHASES
    }
    for group in _by_case(rows):
        for phase in _PHASES:
            base = _fastest_dense(group, phase)
            for row in group:
                if base and not row["dense"] and row[phase]:
                    density = row.get("causal_density") or row["density"]
                    share = base / row[phase]["median_ms"] * density
                    found[phase][row["rival"], row["case"]["pattern"]].append((density, share))
    if not any(found.values()):
        return False
    figure.set_size_inches(10, 4.6)
    markers = dict(
        zip(
            dict.fromkeys(key[1] for phase in found.values() for key in phase), "osD^v<>P*X" * 9, strict=False
        )
    )
    labels: dict[str, Any] = {}
    panels = figure.subplots(1, 2, sharey=True, squeeze=False)[0]
    for axes, phase in zip(panels, _PHASES, strict=True):
        for (rival, pattern), points in found[phase].items():
            dots = axes.scatter(
                *zip(*points, strict=True), color=colours[rival], marker=markers[pattern], s=26, alpha=0.85
            )
            labels.setdefault(f"{rival}, {pattern}", dots)
        axes.axhline(1, color="0.4", linewidth=0.8, linestyle="--")
        axes.set(xscale="log", yscale="log", xlabel="density (tiles kept)", title=phase)
        axes.grid(True, which="major", alpha=0.3)
        _plain_ticks(axes.xaxis)
        _plain_ticks(axes.yaxis)
    panels[0].set_ylabel("speed-up over dense ÷ ideal (1 / density)")
    figure.legend(
        labels.values(),
        labels.keys(),
        loc="outside lower center",
        ncols=min(5, len(labels)),
        fontsize=7,
        frameon=False,
    )
    return True


def _length_ticks(panels: Iterable[Any], lengths: list[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for axes in panels:
        axes.xaxis.set_major_locator(FixedLocator(sorted(set(lengths))))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(int(value))))
        axes.set_xlabel("N (tokens)", fontsize=9)


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10 … as plain numbers on a logarithmic axis, also where it spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=15))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _by_case(rows: list[Row]) -> list[list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[str(row["case"])].append(row)
    return list(groups.values())


def _fastest_dense(rows: list[Row], phase: str) -> float | None:
    times = [row[phase]["median_ms"] for row in rows if row["dense"] and row["status"] == "ok" and row[phase]]
    return min(times, default=None)


def _cells(row: Row, rows: list[Row]) -> list[str]:
    if row["status"] != "ok":
        return [row["rival"], row["status"], *["—"] * (len(_HEADER) - 2)]
    cells = [row["rival"]]
    flex = next((other for other in rows if other["rival"] == "flex" and other["status"] == "ok"), None)
    for phase in _PHASES:
        cells.append(_time(row, phase))
        bases = (_fastest_dense(rows, phase), flex[phase]["median_ms"] if flex and flex[phase] else None)
        cells += [f"{base / row[phase]['median_ms']:.2f}" if base and row[phase] else "—" for base in bases]
    cells.append(
        byte_size(row.get("training_bytes") or row["forward_bytes"]) + ("" if row["backward"] else " (fwd)")
    )
    errors = row["errors"]
    cells.append(f"{_number(errors['out']):.1e}" if "out" in errors else "—")
    gradients = [_number(value) for name, value in errors.items() if name != "out"]
    cells.append(f"{max(gradients):.1e}" if gradients else "—")
    return cells


def _reasons(row: Row) -> list[str]:
    if row["status"] != "ok":
        return [f"{row['status']}: {row['reason']}"]
    return [f"no backward: {row['backward_reason']}"] if row["backward_reason"] else []


def _time(row: Row, phase: str) -> str:
    times = row[phase]
    if not times:
        return "—"
    return f"{times['median_ms']:.3f}" if times["median_ms"] < 10 else f"{times['median_ms']:.1f}"


def _number(value: float | str) -> float:
    """Result files write NaN and infinity as strings."""
    return float(value)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
