"""What a run leaves: a table, sentences that follow from its numbers, a picture and a JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from sparsetile.viz import no_matplotlib

RANDOM_BITS = 7.0
_LEARNED = 0.5 * RANDOM_BITS
_COPY_TICKS = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 2.0, 4.0, 7.0)


def megabytes(size: int | None) -> str:
    """``size`` bytes in words; "n/a" where it could not be measured."""
    if size is None:
        return "n/a"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def table(results: list[dict[str, Any]]) -> Table:
    """One column an arm. ``results`` are those of ``loop.train``, or ``{"name", "attention", "failed"}``."""
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("held-out bits per byte: text", lambda r: f"{r['held_out']['text']:.3f}"),
        ("… far repeats", lambda r: _bits(r, "copy")),
        ("    their bytes 1, 2", lambda r: _start(r, 0, 2)),
        ("    their bytes 3, 4", lambda r: _start(r, 2, 4)),
        ("    their later bytes", lambda r: _bits(r, "copy_after_start")),
        ("tokens/s", lambda r: f"{r['tokens_per_second']:,.0f}"),
        ("peak memory", lambda r: megabytes(r["peak_memory"])),
        ("density", lambda r: f"{r['density']:.4f}"),
        ("parameters", lambda r: f"{r['parameters']:,}"),
        ("steps", lambda r: f"{r['steps']:,}"),
        ("seconds of training", lambda r: f"{r['seconds']:.1f}"),
    ]
    kinds = sorted({r["memory_kind"] for r in results if "failed" not in r})
    out = Table(caption=f"Peak memory: {', '.join(kinds)}." if kinds else None, caption_justify="left")
    out.add_column()
    for r in results:
        out.add_column(r["name"], justify="right")
    for heading, cell in rows:
        out.add_row(heading, *("—" if "failed" in r else cell(r) for r in results))
    return out


def _bits(result: dict[str, Any], kind: str) -> str:
    return f"{result['held_out'][kind]:.3f}" if kind in result["held_out"] else "—"


def _start(result: dict[str, Any], first: int, end: int) -> str:
    bits = result["held_out"].get("copy_start")
    return "—" if bits is None else ", ".join(f"{value:.2f}" for value in bits[first:end])


def sentences(results: list[dict[str, Any]]) -> list[str]:
    """What the numbers of a comparison say, and no more."""
    arms = {r["name"]: r for r in results if "failed" not in r}
    said = [f"{r['name']}: no result ({r['failed']})." for r in results if "failed" in r]
    dense, window = (arms.get(name) for name in ("dense", "window alone"))
    subjects = {"pattern": "The pattern", "adaptive": "The adaptive arm"}
    sparse = [(subjects[name], arms[name]) for name in subjects if name in arms]
    for subject, arm in sparse if dense else []:
        assert dense is not None
        speed = arm["tokens_per_second"] / dense["tokens_per_second"]
        said.append(
            f"{subject} trains at {speed:.2f}× the speed of dense attention and computes "
            f"{arm['density']:.1%} of its tiles."
        )
    if sparse and dense and "copy" in dense["held_out"]:
        theirs = dense["held_out"]["copy"]
        if theirs > _LEARNED:
            said.append(
                f"Far repeats: dense attention has not yet learned to copy ({theirs:.2f} bits per byte; a "
                f"guess costs {RANDOM_BITS:.0f}), so this run says nothing about reach. Train longer: "
                "--minutes or --steps."
            )
            sparse = []
        for subject, arm in sparse:
            ours, who = arm["held_out"]["copy"], subject.lower()
            more = ours / theirs - 1
            verdict = f"{abs(more):.1%} {'more' if more > 0 else 'less'}"
            if ours > _LEARNED:
                verdict = "not yet learned, though within its reach"
            said.append(f"Far repeats: {who} pays {ours:.3f} bits per byte, dense {theirs:.3f}: {verdict}.")
    if window and "copy" in window["held_out"]:
        bits = window["held_out"]["copy"]
        said.append(
            f"The window alone pays {bits:.2f} bits on them: "
            + (
                f"a guess costs {RANDOM_BITS:.0f}, and the originals lie beyond what its layers can see."
                if bits > _LEARNED
                else "it predicts them, which it should not be able to. Please report this."
            )
        )
    return said


def draw(path: Path, results: list[dict[str, Any]]) -> str | None:
    """Writes the curves to ``path`` as PNG; returns why not, where matplotlib is missing."""
    missing = no_matplotlib()
    if missing is not None:
        return missing
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    results = [r for r in results if "failed" not in r]
    repeats = any("copy" in check for r in results for check in r["checks"])
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3 if repeats else 2)
    axes[0].set(title="training, all bytes", xlabel="step", ylabel="bits per byte")
    axes[1].set(title="held out, text", xlabel="seconds of training", ylabel="bits per byte")
    if repeats:
        # The arms that copy would lie on each other at the foot of a linear scale.
        axes[2].set(title="held out, far repeats", xlabel="step", ylabel="bits per byte", yscale="log")
        axes[2].set_yticks(_COPY_TICKS, [f"{tick:g}" for tick in _COPY_TICKS], minor=False)
        axes[2].yaxis.set_minor_locator(NullLocator())
        axes[2].axhline(RANDOM_BITS, color="grey", linewidth=0.8, linestyle="--", label="a guess")
    for r in results:
        label, checks = (
            f"{r['name']}: {r['attention']}" if r["attention"] != r["name"] else r["name"],
            r["checks"],
        )
        axes[0].plot([p[0] for p in r["losses"]], [p[2] for p in r["losses"]], linewidth=1, label=label)
        axes[1].plot([c["seconds"] for c in checks], [c["text"] for c in checks], marker=".", label=label)
        if repeats:
            axes[2].plot(
                [c["step"] for c in checks], [c.get("copy") for c in checks], marker=".", label=label
            )
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    if repeats:
        # Only what the other panels do not have.
        axes[2].legend(handles=axes[2].lines[:1], fontsize=7)
    figure.savefig(path, dpi=120)
    return None


def write(path: Path, run: dict[str, Any]) -> None:
    """Writes the whole run as JSON."""
    path.write_text(json.dumps(run, indent=1, allow_nan=False) + "\n", encoding="utf-8")
