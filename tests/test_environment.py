"""Provenance: complete, writable as JSON, and honest about code that is not the commit's."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sparsetile import environment


def test_provenance_is_json_and_complete():
    record = json.loads(json.dumps(environment.provenance()))
    assert set(record) == {"date", "commit", "modified", "source", "versions", "machine"}
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["sparsetile"] == environment.__version__
    assert record["machine"]["cores"] >= 1
    assert len(record["source"]) == 64


def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "src" / "sparsetile"
    package.mkdir(parents=True)
    (package / "_version.py").write_text("__version__ = '0'\n")
    monkeypatch.setattr(environment, "_PACKAGE", package)
    return package


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_names_the_checkout_and_sees_changes(tmp_path, monkeypatch):
    package = checkout(tmp_path, monkeypatch)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert environment.commit() == (head, False)
    (tmp_path / "notes.txt").write_text("outside the package")
    assert environment.commit() == (head, False)
    (package / "_version.py").write_text("__version__ = '1'\n")
    assert environment.commit() == (head, True)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_ignores_a_checkout_that_is_not_ours(tmp_path, monkeypatch):
    checkout(tmp_path, monkeypatch)
    monkeypatch.delenv("SPARSETILE_COMMIT", raising=False)
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "someone else's project")
    assert environment.commit() == (None, None)
    monkeypatch.setenv("SPARSETILE_COMMIT", "abc123")
    assert environment.commit() == ("abc123", None)


def test_commit_without_git(monkeypatch):
    def no_git(*_arguments: object, **_options: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    monkeypatch.delenv("SPARSETILE_COMMIT", raising=False)
    assert environment.commit() == (None, None)


def test_source_digest_follows_names_and_contents(tmp_path, monkeypatch):
    package = checkout(tmp_path, monkeypatch)
    seen = {environment.source_digest()}
    (package / "_version.py").write_text("__version__ = '1'\n")
    seen.add(environment.source_digest())
    (package / "_version.py").rename(package / "other.py")
    seen.add(environment.source_digest())
    (package / "table.json").write_text("{}")
    seen.add(environment.source_digest())
    assert len(seen) == 4
    (package / "notes.txt").write_text("not code")
    assert environment.source_digest() in seen


def test_installed():
    assert environment.installed("torch") is not None
    assert environment.installed("no-such-distribution-anywhere") is None
