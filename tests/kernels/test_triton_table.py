"""The table of tiles: who finds which entry, what a file may say, and the file of the package."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sparsetile.errors import BackendError, DataError
from sparsetile.kernels import triton_config, triton_table
from sparsetile.kernels.triton_config import Target, backward_tiles, forward_tiles, override, target_of
from sparsetile.kernels.triton_table import (
    DIMS,
    FAMILIES,
    KERNELS,
    SIZES,
    TABLE_FILE,
    WORK,
    Entry,
    Measured,
    Pair,
    Place,
    Tiles,
    entry_for,
    read_table,
    table,
    write_table,
)

AT = Place("backward", "hopper", 2, 128, 64, "short partial")


def pair(stages: int) -> Entry:
    return Entry(Pair((64, 32), (32, 64), 4, stages))


def test_a_place_goes_to_its_own_entry_then_by_work_without_a_block() -> None:
    order = [AT, *(replace(AT, block=None, work=w) for w in ("short partial", "partial", "whole"))]
    entries = {place: pair(stages) for stages, place in enumerate(order, 1)}
    # None of these serves AT: another block, another work at its block, features.
    for other in (
        replace(AT, block=128),
        replace(AT, work="partial"),
        replace(AT, work="whole"),
        replace(AT, block=None, work="featured"),
        replace(AT, block=None, work="short whole"),
    ):
        entries[other] = pair(9)
    for stages, place in enumerate(order, 1):
        assert entry_for(entries, AT) == pair(stages)
        del entries[place]
    with pytest.raises(BackendError, match="GPU family among hopper, blackwell"):
        entry_for(entries, AT)


@pytest.mark.parametrize(
    ("work", "chain"),
    [
        ("featured", ["featured", "partial", "whole"]),
        ("short whole", ["short whole", "whole"]),
        ("partial", ["partial", "whole"]),
        ("whole", ["whole"]),
    ],
)
def test_work_falls_to_plainer_work(work, chain) -> None:
    at = replace(AT, work=work)
    entries = {replace(AT, block=None, work=kind): pair(i) for i, kind in enumerate(WORK["backward"], 1)}
    for kind in chain:
        place = replace(AT, block=None, work=kind)
        assert entry_for(entries, at) is entries.pop(place)
    with pytest.raises(BackendError):
        entry_for(entries, at)


def test_launches_take_the_entry_of_their_block(monkeypatch) -> None:
    own, general = Tiles(32, 32, 2, 4), Tiles(128, 64, 8, 2)
    at = Place("forward", "hopper", 2, 64, 64, "partial")
    entries = {at: Entry(own), replace(at, block=None, work="whole"): Entry(general)}
    columns = Pair((64, 64), (32, 64), 4, 2)
    entries[replace(at, kernel="backward", work="short partial")] = Entry(columns)
    monkeypatch.setattr(triton_config, "table", lambda: entries)
    hopper = Target("hopper", 132)
    assert forward_tiles(hopper, 2, 40, 64, 64, "partial") == own
    assert forward_tiles(hopper, 2, 40, 64, 64, "whole") == replace(general, queries=64, warps=4)
    assert forward_tiles(hopper, 2, 40, 128, 128, "partial") == general
    assert forward_tiles(hopper, 2, 40, 64, 128, "partial") == replace(general, queries=64, warps=4)
    assert backward_tiles(hopper, 2, 64, 64, 64, "short partial") == columns
    with override(forward=Tiles(16, 16, 2, 1)):
        assert forward_tiles(hopper, 2, 40, 64, 64, "partial") == Tiles(16, 16, 2, 1)
    with pytest.raises(BackendError, match="family='volta'"):
        forward_tiles(replace(hopper, family="volta"), 2, 40, 64, 64, "partial")


def test_the_package_s_table_serves_everything_and_is_as_written(tmp_path) -> None:
    write_table(table(), tmp_path / "tuned.json")
    assert (tmp_path / "tuned.json").read_bytes() == TABLE_FILE.read_bytes()
    assert table() is table() and read_table(TABLE_FILE) == table()
    for kernel in KERNELS:
        for family in FAMILIES:
            for place in (
                Place(kernel, family, b, d, 32, w) for b in SIZES for d in DIMS for w in WORK[kernel]
            ):
                entry = entry_for(table(), place)
                assert isinstance(entry.choice, Tiles if kernel == "forward" else Pair)
    # Nobody has run these.
    assert not [p for p, e in table().items() if p.family in ("blackwell", "ampere", "amd") and e.measured]


def test_measured_entries_survive_the_file(tmp_path) -> None:
    entries = dict(table())
    entries[AT] = replace(pair(2), measured=Measured("a GPU", "2026-11-24", None, 0.25))
    write_table(entries, tmp_path / "tuned.json")
    assert read_table(tmp_path / "tuned.json") == entries
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.json"]
    assert len((tmp_path / "tuned.json").read_text().splitlines()) == len(entries) + 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda line: line.update(kernel="sideways"), "kernel among"),
        (lambda line: line.update(kernel=None), "kernel among"),
        (lambda line: line.update(family="volta"), "family among"),
        (lambda line: line.update(bytes=8), "bytes among"),
        (lambda line: line.update(dim=96), "dim among"),
        (lambda line: line.update(block=24), "block among"),
        (lambda line: line.update(work="hard"), "work among"),
        (lambda line: line.update(tokens=3), "the keys that other entries have"),
        (lambda line: line.pop("measured"), "KeyError: 'measured'"),
        (lambda line: line.update(measured={"device": "a GPU"}), "the keys that other entries have"),
        (lambda line: line.update(choice=[64, 64]), "the keys that other entries have"),
        (lambda line: line["choice"].pop("warps"), "the keys that other entries have"),
        (lambda line: line["choice"].update(warps=1), "a power of two from 2, got 1"),
        (lambda line: line["choice"].update(warps=6), "a power of two from 2, got 6"),
        (lambda line: line["choice"].update(stages=0), "stages from 1, got 0"),
        (lambda line: line["choice"].update({next(iter(line["choice"])): 8}), "powers of two from 16"),
        (lambda line: line["choice"].update({next(iter(line["choice"])): [64, 48]}), "powers of two from 16"),
    ],
)
def test_a_malformed_entry_is_named(change, says, tmp_path) -> None:
    found = json.loads(TABLE_FILE.read_text())
    at = random.randrange(len(found["entries"]))
    change(found["entries"][at])
    path = tmp_path / "table.json"
    path.write_text(json.dumps(found))
    with pytest.raises(DataError, match=rf"^table.json, entry {at + 1}: expected .*") as raised:
        read_table(path)
    assert says in str(raised.value) and "bench --tune" in str(raised.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"entries": 3}', '{"entries": null}', "[3", '"x"'])
def test_a_file_without_entries_is_an_error_that_says_so(text, tmp_path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r'^table.json: expected .*"entries"'):
        read_table(path)


def test_an_entry_twice_and_a_missing_default_are_errors(tmp_path) -> None:
    found = json.loads(TABLE_FILE.read_text())
    lines = found["entries"]
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"entries": [*lines, lines[0]]}))
    with pytest.raises(DataError, match=f"entry {len(lines) + 1}: expected one entry for each place"):
        read_table(path)
    kept = [line for line in lines if (line["family"], line["bytes"], line["dim"]) != ("amd", 4, 256)]
    path.write_text(json.dumps({"entries": kept}))
    with pytest.raises(DataError, match=r"none for .*'amd', 4, 256"):
        read_table(path)


@pytest.mark.parametrize(
    ("capability", "family"),
    [(8, "ampere"), (9, "hopper"), (10, "blackwell"), (11, "ampere"), (12, "ampere")],
)
def test_families_go_by_capability(capability, family, monkeypatch) -> None:
    properties = SimpleNamespace(major=capability, multi_processor_count=7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    find = target_of.__wrapped__
    assert find(torch.device("cuda", 0)) == Target(family, 7)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert find(torch.device("cuda", 0)) == Target("amd", 7)
    assert find(torch.device("cpu")).family == "hopper"


def test_every_family_has_its_shared_memory() -> None:
    assert set(triton_table.SHARED_BYTES) == set(FAMILIES)
