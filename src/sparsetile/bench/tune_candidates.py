"""The cells of the table that ``sparsetile bench --tune`` measures, and what it tries in each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sparsetile.kernels.triton_config import Target, backward_tiles, forward_tiles, override
from sparsetile.kernels.triton_table import KERNELS, WORK, Family, Pair, Place, Table, Tiles

Choice = Tiles | Pair
HEAD_DIMS = (64, 128, 256)
BLOCKS = (128, 64, 32)


@dataclass(frozen=True)
class Cell:
    """One place of the table, with a block, and the dtype that it is timed with."""

    place: Place
    dtype: str

    @property
    def block(self) -> int:
        assert self.place.block is not None
        return self.place.block

    @property
    def label(self) -> str:
        place = self.place
        return f"{place.kernel} {self.dtype} D{place.dim} block {place.block} {place.work}"


# By bytes of an element and padded head_dim: queries, keys, warps, stages; of backward queries and keys of
# its rows, then of its columns. ``candidates`` picks those that suit a block.
_SMALL = ((32, 32, 2, 2), (32, 32, 2, 3), (32, 32, 4, 2), (32, 32, 4, 3))
_FORWARD: dict[tuple[int, int], tuple[tuple[int, int, int, int], ...]] = {
    (2, 64): (
        *((128, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 128, 4, 3)),
        *((64, 64, 4, 2), (64, 32, 4, 3), *_SMALL),
    ),
    (2, 128): (
        *((64, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2)),
        *((64, 32, 4, 3), (64, 32, 4, 2), *_SMALL),
    ),
    (2, 256): (
        *((128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2), (64, 32, 8, 2)),
        *((64, 32, 4, 3), (32, 32, 4, 2), (32, 32, 8, 2), (32, 32, 4, 1)),
    ),
    (4, 64): ((64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 8, 2), (32, 64, 4, 2), (32, 32, 4, 2), (32, 32, 2, 2)),
    (4, 128): (
        (16, 32, 4, 2),
        (32, 32, 4, 2),
        (64, 32, 4, 2),
        (64, 32, 8, 2),
        (32, 32, 8, 2),
        (32, 32, 4, 1),
    ),
    (4, 256): ((16, 32, 8, 1), (32, 32, 8, 1), (16, 32, 4, 1), (32, 16, 8, 1), (16, 16, 4, 1)),
}
_BACKWARD: dict[tuple[int, int], tuple[tuple[int, int, int, int, int, int], ...]] = {
    (2, 64): (
        *((64, 64, 64, 64, 4, 3), (64, 64, 32, 64, 4, 3), (64, 64, 64, 64, 4, 2), (128, 64, 64, 128, 8, 3)),
        *((128, 64, 64, 128, 8, 2), (64, 32, 32, 64, 4, 2), (64, 32, 32, 64, 4, 3)),
        *((32, 32, *small) for small in _SMALL),
    ),
    (2, 128): (
        *((128, 64, 64, 128, 8, 3), (128, 64, 32, 128, 8, 3), (64, 64, 32, 64, 4, 2), (64, 32, 32, 64, 4, 3)),
        *((64, 32, 32, 64, 4, 2), (64, 32, 64, 32, 8, 2), (128, 32, 32, 128, 8, 3)),
        *((32, 32, *small) for small in _SMALL),
    ),
    (2, 256): (
        *((64, 32, 64, 32, 8, 1), (64, 32, 32, 64, 8, 2), (64, 64, 64, 64, 8, 1), (32, 32, 32, 32, 8, 1)),
        *((32, 32, 32, 32, 8, 2), (32, 32, 32, 32, 4, 1), (32, 32, 32, 32, 4, 2)),
    ),
    (4, 64): (
        *((64, 32, 16, 32, 4, 2), (64, 32, 32, 32, 4, 2), (32, 32, 16, 32, 4, 2), (32, 32, 32, 32, 4, 2)),
        (32, 32, 32, 32, 4, 1),
    ),
    (4, 128): (
        (16, 32, 32, 16, 8, 2),
        (16, 32, 16, 32, 8, 2),
        (32, 32, 32, 32, 8, 1),
        (32, 32, 32, 32, 8, 2),
    ),
    (4, 256): ((16, 16, 16, 16, 8, 1), (16, 16, 16, 16, 4, 1), (16, 32, 32, 16, 8, 1)),
}


def cells(family: Family, dtype: str, head_dims: Sequence[int], blocks: Sequence[int]) -> list[Cell]:
    """Every cell of these, in the order in which they are tuned."""
    size = 4 if dtype == "float32" else 2
    return [
        Cell(Place(kernel, family, size, dim, block, work), dtype)
        for block in blocks
        for dim in head_dims
        for kernel in KERNELS
        for work in WORK[kernel]
    ]


def candidates(cell: Cell, entries: Table) -> list[Choice]:
    """What a launch takes now; then all that ``entries`` have for this kernel, family, size and head_dim, and
    the lists above, cut to the block as a launch would; none twice. For 16-bit elements up to head_dim 128
    none whose longer side is below 64 where the block is larger: too little work a step.
    """
    place = cell.place
    known = [
        entry.choice
        for at, entry in entries.items()
        if (at.kernel, at.family, at.bytes, at.dim) == (place.kernel, place.family, place.bytes, place.dim)
    ]
    least = min(cell.block, 64) if place.bytes == 2 and place.dim < 256 else 16
    found = [launched(cell, None)]
    for choice in (*known, *_listed(place)):
        sides = (choice.queries, choice.keys) if isinstance(choice, Tiles) else choice.rows + choice.columns
        cut = launched(cell, choice)
        if cut not in found and max(sides) >= least:
            found.append(cut)
    return found


def launched(cell: Cell, choice: Choice | None) -> Choice:
    """What a launch makes of ``choice``, or of the package's table."""
    place, target = cell.place, Target(cell.place.family, 1)
    sizes = target, place.bytes, place.dim, cell.block, cell.block, place.work
    with override(**{place.kernel: choice}):  # type: ignore[arg-type]
        return forward_tiles(*sizes) if place.kernel == "forward" else backward_tiles(*sizes)


def _listed(place: Place) -> Iterator[Choice]:
    # 64 KB of shared memory hold no third stage.
    most = 2 if place.family == "amd" else 9
    if place.kernel == "forward":
        for queries, keys, warps, stages in _FORWARD[place.bytes, place.dim]:
            yield Tiles(queries, keys, warps, min(stages, most))
    else:
        for a, b, c, d, warps, stages in _BACKWARD[place.bytes, place.dim]:
            yield Pair((a, b), (c, d), warps, min(stages, most))
