"""Training data: the split, the planted repeats, and what is said when it cannot be had."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from sparsetile.errors import DataError
from sparsetile.train.data import COPY, COPY_START, SOURCE, TEXT, Corpus, Planting, Sequences, load_corpus

SEED = random.SystemRandom().randrange(1 << 32)


def corpus(train: int = 20000, held_out: int = 9000) -> Corpus:
    chance = torch.Generator().manual_seed(SEED)
    parts = [torch.randint(0, 128, (n,), generator=chance, dtype=torch.uint8) for n in (train, held_out)]
    return Corpus(parts[0], parts[1], "noise", "0")


def test_the_standard_library_is_megabytes_and_split_by_file() -> None:
    ours = load_corpus(None)
    assert len(ours.train) > 4_000_000
    assert 0.02 < len(ours.held_out) / len(ours.train) < 0.4
    assert "standard library" in ours.description


def test_a_folder_is_split_by_the_hash_of_the_names(tmp_path: Path) -> None:
    names = [f"part{i}/{random.Random(SEED + i).random()}.txt" for i in range(60)]
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes([i]) * 10)
    (tmp_path / ".hidden").write_bytes(b"\xff" * 10)
    first = load_corpus(str(tmp_path))
    train, held_out = (set(part.tolist()) - {10} for part in (first.train, first.held_out))
    assert not train & held_out and train | held_out | {10} == set(range(60)) | {10}
    # A file keeps its side when others come.
    (tmp_path / "another").write_bytes(b"\xfe")
    second = load_corpus(str(tmp_path))
    assert train <= set(second.train.tolist()) and held_out <= set(second.held_out.tolist())
    assert second.digest != first.digest


def test_the_end_of_a_single_file_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "book").write_bytes(bytes(range(100)))
    found = load_corpus(str(tmp_path / "book"))
    assert found.train.tolist() == list(range(90)) and found.held_out.tolist() == list(range(90, 100))


@pytest.mark.parametrize("what", ["missing", "empty file", "empty folder", "unreadable"])
def test_data_that_cannot_be_had_is_named(tmp_path: Path, what: str) -> None:
    path = tmp_path / "data"
    if what == "empty file":
        path.touch()
    elif what == "empty folder":
        path.mkdir()
    elif what == "unreadable":
        path.symlink_to(path)
    with pytest.raises(DataError, match=r"expected .*got .*data"):
        load_corpus(str(path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX")
def test_a_pipe_is_refused_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe"):
        load_corpus(str(tmp_path / "pipe"))


def test_a_context_longer_than_the_data_is_named() -> None:
    with pytest.raises(DataError, match=r"--context 8999 or less"):
        Sequences(corpus(), 9000, SEED, None)


def test_repeats_that_do_not_fit_are_named() -> None:
    with pytest.raises(DataError, match=r"2,562 bytes.*--context 2,000"):
        Sequences(corpus(), 2000, SEED, Planting(64, 2050, 0.25))


@pytest.mark.parametrize("part", ["training", "held out"])
def test_copies_equal_their_sources_and_lie_far_behind(part: str) -> None:
    planting = Planting(span=32, far=700, fraction=0.25)
    sequences = Sequences(corpus(), 4096, SEED, planting)
    tokens, kinds = sequences.training(3, 2) if part == "training" else sequences.held_out(5)
    distances = set()
    for row, kind in zip(tokens, kinds, strict=True):
        copies = (kind == COPY_START).nonzero().flatten()[::4]
        assert len(copies) == planting.pairs(4097)
        for at in copies.tolist():
            assert (kind[at : at + 4] == COPY_START).all() and (kind[at + 4 : at + 32] == COPY).all()
            # 32 bytes of 7 bits each stand nowhere else by chance.
            windows = row.unfold(0, 32, 1)
            source = (windows == row[at : at + 32]).all(1).nonzero().flatten().tolist()
            assert len(source) == 2 and source[1] == at, SEED
            assert at - source[0] > planting.far, SEED
            assert (kind[source[0] : source[0] + 32] == SOURCE).all()
            distances.add((at - source[0]) % 64)
        planted = kind != TEXT
        assert planted.float().mean() == pytest.approx(0.25, abs=0.02)
        assert (row[planted] >= 128).all() and (row[~planted] < 128).all()
    assert len(distances) > 8, "distances must not fall into step with tiles"


def test_sequences_follow_from_the_seed_and_the_position() -> None:
    planting = Planting(32, 300, 0.25)
    first, second = (Sequences(corpus(), 2048, SEED, planting) for _ in range(2))
    second.training(0, 3)
    assert torch.equal(first.training(7, 2).tokens, second.training(7, 2).tokens)
    assert torch.equal(first.held_out(1).tokens, second.held_out(1).tokens)
    assert not torch.equal(first.training(7, 2).tokens, first.training(8, 2).tokens)
    other = Sequences(corpus(), 2048, SEED + 1, planting)
    assert not torch.equal(first.training(7, 2).tokens, other.training(7, 2).tokens)
    # Rows of a batch are the sequences of smaller batches in order.
    assert torch.equal(first.training(3, 2).tokens[1:], first.training(7, 1).tokens)
