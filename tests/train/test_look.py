"""`sparsetile show --adaptive`: from a checkpoint and a text to the recall of every layer and head."""

from __future__ import annotations

import random
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from sparsetile.cli import main
from sparsetile.nn.adaptive import AdaptiveConfig
from sparsetile.train.arms import attention_of_learned
from sparsetile.train.checkpoint import load_checkpoint, save_checkpoint
from sparsetile.train.look import load_model, look, read_text
from sparsetile.train.model import Model, ModelConfig

SEED = random.SystemRandom().randrange(1 << 32)
SIZES = ModelConfig(2, 32, 4, 2)
CONFIG = AdaptiveConfig(0.6, block_size=16)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(SEED)
    identity = {
        "model": asdict(SIZES),
        "adaptive": asdict(CONFIG),
        "attention": "adaptive(…)",
        "context": 192,
    }
    path = tmp_path / "learned.pt"
    save_checkpoint(path, {"identity": identity, "model": Model(SIZES, CONFIG).state_dict()})
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(random.Random(SEED).choices(range(97, 110), k=250)))
    return path


def test_a_view_of_every_layer_is_what_the_model_does(checkpoint: Path, text: Path) -> None:
    model, trained = load_model(checkpoint)
    assert trained["context"] == 192 and not model.training
    tokens = read_text(text, 200, 16)
    views, count = look(model, tokens)
    assert count == 200 and len(views) == 2
    model(tokens.to(next(model.parameters()).device), attention_of_learned(model))
    for view, learned in zip(views, model.learned, strict=True):
        assert view.kept.sum() == learned.last_layout.nnz, SEED
        assert (view.recall <= view.best + 1e-6).all() and (view.recall < 1).all()
        torch.testing.assert_close(view.density.mean().item(), learned.last_density.item())
        rows = torch.tensor([16.0] * 12 + [8.0], dtype=torch.float64).expand(4, -1)
        torch.testing.assert_close(view.mass.sum(-1), rows, rtol=1e-4, atol=1e-4)


def test_show_prints_recall_and_draws(
    checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    assert main(["show", "--adaptive", str(checkpoint), "--text", str(text)]) == 0
    said = capsys.readouterr().out
    views, _ = look(load_model(checkpoint)[0], read_text(text, 192, 16))
    for view in views:
        assert all(f" {value:.1%} " in said for value in view.recall.tolist()), SEED
    assert f" {torch.stack([view.recall for view in views]).mean():.1%} " in said and "mean" in said
    assert "192 bytes" in said and f"wrote {checkpoint.with_suffix('.png')}" in said.replace("\n", "")
    assert checkpoint.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    # Without matplotlib the numbers are still there, unless the picture was asked for.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ["show", "--adaptive", str(checkpoint), "--text", str(text), "--length", "64"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "64 bytes" in said and "No picture" in said and "sparsetile[plot]" in said
    assert main([*arguments, "--png", str(text.with_suffix(".png"))]) == 2
    assert "sparsetile[plot]" in capsys.readouterr().err


def test_what_cannot_be_shown_is_one_line(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_checkpoint(checkpoint)
    del state["format"]
    dense = {name: value for name, value in state["identity"].items() if name != "adaptive"}
    save_checkpoint(tmp_path / "dense.pt", state | {"identity": dense | {"attention": "dense"}})
    wider = {"adaptive": asdict(replace(CONFIG, hidden_dim=8))}
    save_checkpoint(tmp_path / "wider.pt", state | {"identity": state["identity"] | wider})
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    (tmp_path / "short.txt").write_bytes(b"a" * 31)
    learned = str(checkpoint)
    for arguments, code, says in (
        ([str(tmp_path / "dense.pt"), "--text", str(text)], 1, "got attention dense"),
        ([str(tmp_path / "wider.pt"), "--text", str(text)], 1, "Train it again"),
        ([str(tmp_path / "other.pt"), "--text", str(text)], 1, "which does not"),
        ([str(tmp_path / "none.pt"), "--text", str(text)], 1, "none.pt"),
        ([learned, "--text", str(tmp_path / "none.txt")], 1, "none.txt: No such file"),
        ([learned, "--text", str(tmp_path)], 1, "directory"),
        ([learned, "--text", str(tmp_path / "short.txt")], 2, "32 bytes, got 31"),
        ([learned, "--text", str(text), "--length", "20"], 2, "got 20"),
        ([learned], 2, "got --adaptive"),
        ([learned, "--text", str(text), "--causal"], 2, "got --adaptive, --text, --causal"),
        ([learned, "--text", str(text), "--run", "runs"], 2, "--run"),
        ([learned, "--text", str(text), "--png", str(tmp_path / "no" / "x.png")], 1, "No such file"),
    ):
        assert main(["show", "--adaptive", *arguments]) == code, arguments
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, error
    assert main(["show", "Local(8)", "--adaptive", learned, "--text", str(text)]) == 2
    assert "got --adaptive, --text, PATTERN" in capsys.readouterr().err
    assert main(["show", "--text", str(text)]) == 2
    assert "got --text" in capsys.readouterr().err
