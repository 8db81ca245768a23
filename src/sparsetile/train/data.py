"""Text for training: bytes from files, split by hash, with far repeats planted in every sequence.

A *planted repeat* is a span of random bytes (128…255, which source code hardly uses: 7 bits each) and its
copy at a later, random place. The span itself cannot be predicted; the copy can, by whoever can look far
enough back. The distance is larger than ``planting.far``, so that windows cannot bridge it even
chained layer by layer. Everything is a function of the seed and the position in the run: there is no state to
save, and it is the same for every arm of a comparison, on every machine.
"""

from __future__ import annotations

import hashlib
import os
import random
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetile.errors import DataError, explain

TEXT, SOURCE, COPY_START, COPY = range(4)
START_BYTES = 4
_LOWEST_PLANTED = 128
_LARGEST = 2 << 30


class Batch(NamedTuple):
    """``tokens`` uint8 [B, N + 1]; ``kinds`` uint8 [B, N + 1]: TEXT, SOURCE, COPY_START (first 4) or COPY."""

    tokens: Tensor
    kinds: Tensor


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes held out, each uint8 [n]; a line that says what they are; their SHA-256."""

    train: Tensor
    held_out: Tensor
    description: str
    digest: str


@dataclass(frozen=True)
class Planting:
    """How far repeats are planted: spans of ``span`` bytes whose copies start more than ``far`` bytes later.

    ``fraction`` of all bytes belongs to a span or its copy.
    """

    span: int
    far: int
    fraction: float

    def pairs(self, length: int) -> int:
        return int(self.fraction * length / (2 * self.span) + 0.5)

    def fits(self, context: int) -> bool:
        return self.shortest_context() <= context

    def shortest_context(self) -> int:
        """Room for repeats that far apart, with some to spare for where they lie."""
        return self.far + 8 * self.span


def load_corpus(path: str | None) -> Corpus:
    """Reads ``path`` (a file, or a folder with everything in it), or Python's standard library if None.

    A file is held out if the first byte of the SHA-256 of its path within the folder is below 26 (one in
    ten); of a single file, and of a folder where this leaves one part empty, the last tenth is held out.

    Raises:
        DataError: nothing there, unreadable, empty, or more than 2 GiB.
    """
    root = Path(path if path is not None else sysconfig.get_path("stdlib")).expanduser()
    try:
        names = sorted(_standard_library(root) if path is None else _files(root))
        if sum((root / name).stat().st_size for name in names) > _LARGEST:
            raise DataError(
                explain(
                    "--data", expected="at most 2 GiB", got=f"more, in {root}", fix="Name a smaller folder."
                )
            )
        parts: tuple[list[bytes], list[bytes]] = ([], [])
        for name in names:
            held = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[0] < 26
            parts[held].append((root / name).read_bytes())
    except OSError as error:
        raise DataError(
            explain(
                "training data",
                expected="a readable file or folder",
                got=f"{root}: {error.strerror or error}",
                fix="Check the path given to --data, or leave it out to train on Python's own source.",
            )
        ) from error
    train, held_out = (b"\n".join(part) for part in parts)
    if not train or not held_out:
        whole = train or held_out
        cut = len(whole) - len(whole) // 10
        train, held_out = whole[:cut], whole[cut:]
    if not train or not held_out:
        raise DataError(
            explain(
                "training data",
                expected="text",
                got=f"{len(train) + len(held_out)} bytes in {len(names)} files at {root}",
                fix="Name a file or a folder with text in it.",
            )
        )
    what = "Python's standard library (.py files)" if path is None else str(root)
    sizes = f"{len(train) / 1e6:.1f} MB to train on, {len(held_out) / 1e6:.1f} MB held out"
    description = f"{what}: {len(names):,} files, {sizes}"
    digest = hashlib.sha256(hashlib.sha256(train).digest() + held_out).hexdigest()
    return Corpus(_bytes(train), _bytes(held_out), description, digest)


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


_NOT_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")


def _standard_library(root: Path) -> Iterator[str]:
    return (name for name in _files(root, _NOT_LIBRARY) if name.endswith(".py"))


def _files(root: Path, left_out: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths of the regular files below ``root`` relative to it, hidden ones left out; "." if it is a file."""
    if not root.is_dir():
        # A pipe would be waited for and a device has no end.
        if not stat.S_ISREG(root.stat().st_mode):
            raise OSError(0, "neither a file nor a folder")
        yield "."
        return

    def refuse(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        for name in files:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path.relative_to(root).as_posix()


class Sequences:
    """Training and held-out batches of one experiment.

    Args:
        context: bytes a model sees at once; sequences have one more, to predict.
        planting: None for plain text.

    Raises:
        DataError: a part of the corpus is shorter than one sequence, or repeats so far do not fit in one.
    """

    def __init__(self, corpus: Corpus, context: int, seed: int, planting: Planting | None) -> None:
        self.corpus, self.length, self.seed, self.planting = corpus, context + 1, seed, planting
        shortest = min(len(corpus.train), len(corpus.held_out))
        if shortest < self.length:
            raise DataError(
                explain(
                    "training data",
                    expected=f"at least {self.length:,} bytes to train on and to hold out (--context + 1)",
                    got=f"{len(corpus.train):,} and {len(corpus.held_out):,} ({corpus.description})",
                    fix=f"Use --context {max(shortest - 1, 1)} or less, or more data.",
                )
            )
        if planting is not None and not planting.fits(context):
            raise DataError(
                explain(
                    "planted repeats",
                    expected=f"a context of at least {planting.shortest_context():,} bytes "
                    f"for repeats more than {planting.far:,} bytes apart",
                    got=f"--context {context:,}",
                    fix="Use a longer context, a smaller window, fewer layers, or --plant 0 for none.",
                )
            )

    def training(self, step: int, batch: int, rows: range | None = None) -> Batch:
        """The batch of a step, or these rows of it: random places in the training bytes."""
        rows = range(batch) if rows is None else rows
        return self._stack([self._sequence("train", step * batch + row) for row in rows])

    def held_out(self, index: int) -> Batch:
        """Held-out sequence ``index`` as a batch of one: the same whatever was trained, and how long."""
        return self._stack([self._sequence("held out", index)])

    @staticmethod
    def _stack(rows: list[tuple[Tensor, Tensor]]) -> Batch:
        return Batch(torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows]))

    def _sequence(self, part: str, index: int) -> tuple[Tensor, Tensor]:
        # A string seeds Python's generator through SHA-512, alike in every process and version.
        chance = random.Random(f"{self.seed}/{part}/{index}")
        text = self.corpus.train if part == "train" else self.corpus.held_out
        start = chance.randrange(len(text) - self.length + 1)
        tokens = text[start : start + self.length].clone()
        kinds = torch.zeros(self.length, dtype=torch.uint8)
        if self.planting is not None:
            self._plant(tokens, kinds, chance, self.planting)
        return tokens, kinds

    def _plant(self, tokens: Tensor, kinds: Tensor, chance: random.Random, planting: Planting) -> None:
        # A slot is half as long again as a span, which lies anywhere in it: no distance falls into step with
        # the tiles of a pattern.
        span = planting.span
        slot = span + span // 2
        slots = self.length // slot
        gap = planting.far // slot + 2
        pairs = planting.pairs(self.length)
        content = torch.randint(
            _LOWEST_PLANTED,
            256,
            (pairs, span),
            dtype=torch.uint8,
            generator=torch.Generator().manual_seed(chance.getrandbits(62)),
        )
        taken: set[int] = set()
        for row in content:
            for _ in range(64):
                copy = chance.randrange(gap, slots)
                source = chance.randrange(copy - gap + 1)
                if not taken & {source, copy}:
                    break
            else:
                return  # The sequence is full; what lies farther apart than `far` has found its place.
            taken |= {source, copy}
            for place, kind in ((source, SOURCE), (copy, COPY)):
                at = place * slot + chance.randrange(slot - span + 1)
                tokens[at : at + span] = row
                kinds[at : at + span] = kind
                if kind == COPY:
                    kinds[at : at + START_BYTES] = COPY_START
