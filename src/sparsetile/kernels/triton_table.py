"""The table file of the Triton kernels' tiles: ``tuned.json``, what stands in it, and who finds which entry.

``sparsetile bench --tune`` writes such a file. Nothing is ever timed at a call: a choice changes only when
the file does.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from sparsetile.errors import BackendError, DataError, explain
from sparsetile.layout.blocks import BLOCK_SIZES

Kernel = Literal["forward", "backward"]
Family = Literal["hopper", "blackwell", "ampere", "amd"]
Work = Literal["whole", "partial", "featured", "short whole", "short partial"]

KERNELS: tuple[Kernel, ...] = get_args(Kernel)
FAMILIES: tuple[Family, ...] = get_args(Family)
SIZES = (2, 4)
DIMS = (64, 128, 256)
WORK: dict[Kernel, tuple[Work, ...]] = {
    "forward": ("whole", "partial", "featured"),
    "backward": ("whole", "partial", "featured", "short whole", "short partial"),
}
"""Layouts of whole tiles, layouts with partial tiles, a dense bias or padding; "short" for hardly more than a
tile a row, where more programs on a multiprocessor hide what each loads once, before its loop. Neither a tile
bias, one scalar a step, nor dropout makes another kind of work."""

SHARED_BYTES: dict[Family, int] = {
    "hopper": 227 * 1024,
    "blackwell": 227 * 1024,
    "ampere": 99 * 1024,
    "amd": 64 * 1024,
}
"""Shared memory that every GPU of a family gives to a program, so the most that a choice may take."""

TABLE_FILE = Path(__file__).with_name("tuned.json")

_OTHERWISE: dict[Work, Work] = {
    "short whole": "whole",
    "short partial": "partial",
    "featured": "partial",
    "partial": "whole",
}
_ABOUT = (
    "Tiles of the Triton kernels, as `sparsetile bench --tune` writes them. bytes: of an element. dim: "
    "head_dim padded to 64, 128 or 256. block: of the layout; null serves every block without an entry of "
    "its own. A kind of work that is missing there is served by the plainer one: short, featured, partial, "
    "whole. measured: null is a default that nobody has timed."
)


@dataclass(frozen=True)
class Tiles:
    """Queries × keys of one step of the inner loop and the launch options; never above the layout's tile."""

    queries: int
    keys: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.queries}×{self.keys} w{self.warps} s{self.stages}"


@dataclass(frozen=True)
class Pair:
    """Backward: (queries, keys) of a step of the row programs and of the column programs, in one launch."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    warps: int
    stages: int

    def __str__(self) -> str:
        rows, columns = ("×".join(map(str, shape)) for shape in (self.rows, self.columns))
        return f"{rows} + {columns} w{self.warps} s{self.stages}"


@dataclass(frozen=True)
class Place:
    """What an entry is for. ``dim`` is head_dim padded to 64, 128 or 256; ``block`` is None in an entry for
    every block that has none of its own."""

    kernel: Kernel
    family: Family
    bytes: int
    dim: int
    block: int | None
    work: Work


@dataclass(frozen=True)
class Measured:
    """Where a choice was timed: the device's name, the day, the commit of the code (None where it ran without
    its history), and milliseconds of a call, the geometric mean over the tuner's layouts."""

    device: str
    date: str
    commit: str | None
    ms: float


@dataclass(frozen=True)
class Entry:
    """A choice, and how it was measured: None for a default that nobody has timed."""

    choice: Tiles | Pair
    measured: Measured | None = None


Table = Mapping[Place, Entry]


@lru_cache(maxsize=1)
def table() -> Table:
    """The package's table, read once. Raises DataError if the file is malformed."""
    return read_table(TABLE_FILE)


def entry_for(entries: Table, place: Place) -> Entry:
    """The entry that serves ``place``: its own, else the one for every block, of its work or of plainer work.
    A choice for one block and kind of work serves no other: nobody has tried it there.

    Raises BackendError for a place without any: a family that the table does not know.
    """
    entry = entries.get(place)
    work: Work | None = place.work
    while entry is None and work is not None:
        entry = entries.get(replace(place, block=None, work=work))
        work = _OTHERWISE.get(work)
    if entry is not None:
        return entry
    raise BackendError(
        explain(
            "tiles of the Triton kernels",
            expected=f"a GPU family among {', '.join(FAMILIES)}, {SIZES} bytes, head_dim padded to {DIMS}",
            got=place,
            fix="Add a default for it to tuned.json.",
        )
    )


def read_table(path: Path) -> Table:
    """The entries of a table file.

    Raises:
        DataError: it is malformed: what no kernel can use, a place that comes twice, or one that no entry
            serves. OSError if it cannot be read.
    """
    try:
        lines = json.loads(path.read_text(encoding="utf-8"))["entries"]
    except (ValueError, KeyError, TypeError) as problem:
        _refuse(path.name, 'JSON with a list "entries"', f"{type(problem).__name__}: {problem}")
    if not isinstance(lines, list):
        _refuse(path.name, 'a list "entries"', type(lines).__name__)
    entries: dict[Place, Entry] = {}
    for at, line in enumerate(lines, 1):
        place, entry = _entry_of(line, f"{path.name}, entry {at}")
        if place in entries:
            _refuse(f"{path.name}, entry {at}", "one entry for each place", f"another for {place}")
        entries[place] = entry
    for default in itertools.product(KERNELS, FAMILIES, SIZES, DIMS):
        if Place(*default, None, "whole") not in entries:
            _refuse(path.name, 'an entry without a block for "whole"', f"none for {default}")
    return entries


def write_table(entries: Table, path: Path) -> None:
    """Write a table file, one entry a line; a reader, or a crash, never sees half of it."""

    def rank(place: Place) -> tuple[int, ...]:
        by = KERNELS.index(place.kernel), FAMILIES.index(place.family), place.bytes, place.dim
        return *by, place.block or 0, WORK[place.kernel].index(place.work)

    order = sorted(entries, key=rank)
    lines = [json.dumps(asdict(place) | asdict(entries[place]), ensure_ascii=False) for place in order]
    text = f'{{"about": {json.dumps(_ABOUT)},\n"entries": [\n' + ",\n".join(lines) + "\n]}\n"
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _entry_of(line: Any, where: str) -> tuple[Place, Entry]:
    """One line's place and entry, every value checked: it comes from a file that people edit."""
    kernel = line.get("kernel") if isinstance(line, dict) else line
    if kernel not in KERNELS:
        _refuse(where, f"kernel among {KERNELS}", repr(kernel))
    try:
        given = dict(line)
        choice = {name: _plain(value) for name, value in dict(given.pop("choice")).items()}
        measured = given.pop("measured")
        place = Place(**given)
        made: Tiles | Pair = Tiles(**choice) if place.kernel == "forward" else Pair(**choice)
        entry = Entry(made, None if measured is None else Measured(**measured))
    except (ValueError, KeyError, TypeError) as problem:
        _refuse(where, "the keys that other entries have", f"{type(problem).__name__}: {problem}")
    allowed: dict[str, tuple[Any, ...]] = {
        "family": FAMILIES,
        "bytes": SIZES,
        "dim": DIMS,
        "block": (None, *BLOCK_SIZES),
        "work": WORK[place.kernel],
    }
    for name, values in allowed.items():
        if getattr(place, name) not in values:
            _refuse(where, f"{name} among {values}", repr(getattr(place, name)))
    shapes = ((made.queries, made.keys),) if isinstance(made, Tiles) else (made.rows, made.columns)
    for shape in shapes:
        if not isinstance(shape, tuple) or len(shape) != 2 or not all(_power(side, 16) for side in shape):
            _refuse(where, "two sides, powers of two from 16", repr(shape))
    if not _power(made.warps, 2):  # one warp is miscompiled: see ``triton_config._cut``
        _refuse(where, "warps, a power of two from 2", repr(made.warps))
    if type(made.stages) is not int or made.stages < 1:
        _refuse(where, "stages from 1", repr(made.stages))
    return place, entry


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _power(value: Any, least: int) -> bool:
    return type(value) is int and value >= least and value & (value - 1) == 0


def _refuse(where: str, expected: str, got: str) -> NoReturn:
    fix = "Restore the file, or take one that `sparsetile bench --tune` wrote."
    raise DataError(explain(where, expected=expected, got=got, fix=fix)) from None
