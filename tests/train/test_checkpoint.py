"""Checkpoints: whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsetile.errors import CheckpointError
from sparsetile.train.checkpoint import load_checkpoint, require_same, save_checkpoint

SEED = random.SystemRandom().randrange(1 << 32)
# One import of torch for all rounds: each saver is a fork.
_ROUNDS = """
import os, random, signal, sys, time, torch
from pathlib import Path
from sparsetile.train.checkpoint import load_checkpoint, save_checkpoint

torch.set_num_threads(1)  # a forked child has none of its parent's OpenMP threads, and would wait for them
path, chance, last = Path(sys.argv[1]), random.Random(int(sys.argv[2])), 0
for _ in range(8):
    out, back = os.pipe()
    child = os.fork()
    if child == 0:
        number = last
        while True:
            number += 1
            tensor = torch.empty(1 << 20).fill_(number)
            save_checkpoint(path, {"number": number, "tensor": tensor})
            os.write(back, number.to_bytes(4, "little"))
    os.close(back)
    said = os.read(out, 4)
    time.sleep(chance.uniform(0.0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(out, 4):
        said = more
    os.close(out)
    said = int.from_bytes(said, "little")
    state = load_checkpoint(path)
    # What was said to be saved is there, or the one after it, and in one piece.
    assert state["number"] in (said, said + 1), (state["number"], said)
    assert (state["tensor"] == state["number"]).all()
    assert len(list(path.parent.iterdir())) <= 2
    last = state["number"]
print("rounds done")
"""


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    state = {
        "model": {"a": torch.randn(3, 4)},
        "step": 7,
        "losses": [[1, 0.5, 2.0]],
        "limit": {"steps": None},
    }
    save_checkpoint(tmp_path / "deep" / "run.pt", state)
    found = load_checkpoint(tmp_path / "deep" / "run.pt")
    assert torch.equal(found["model"]["a"], state["model"]["a"])
    assert {k: found[k] for k in ("step", "losses", "limit")} == {
        k: state[k] for k in ("step", "losses", "limit")
    }
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["run.pt"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks to have something to kill")
def test_a_process_killed_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _ROUNDS, str(tmp_path / "run.pt"), str(SEED)]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **paths}, timeout=120)
    assert "rounds done" in done.stdout, (SEED, done.stderr)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped", "text", "folder", "pickle"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "run.pt"
    save_checkpoint(path, {"tensor": torch.randn(5000)})
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "pickle":
        torch.save({"format": 1, "code": Path}, path)
    elif damage == "flipped":
        at = len(whole) // 2 + random.Random(SEED).randrange(-4000, 4000)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
    else:
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"not a checkpoint"}[damage])
    with pytest.raises(CheckpointError, match=r"expected .* got .*run\.pt") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="which does not"):
        load_checkpoint(tmp_path / "other.pt")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="to write"):
        save_checkpoint(tmp_path / "file" / "run.pt", {"step": 1})


def test_another_run_is_told_apart() -> None:
    saved = {"context": 1024, "model": {"width": 64, "layers": 2}, "seed": 0}
    require_same(Path("run.pt"), saved, dict(saved))
    with pytest.raises(CheckpointError, match=r"expected model .*128.* got model .*64"):
        require_same(Path("run.pt"), saved, {**saved, "model": {"width": 128, "layers": 2}})
