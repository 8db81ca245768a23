"""``sparsetile show --adaptive``: what a trained model's learned tiles keep of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparsetile.adaptive.picture import TileView, save_grid
from sparsetile.errors import ArgumentError, CheckpointError, DataError, explain
from sparsetile.nn.adaptive import AdaptiveConfig, BlockSparseAdaptive
from sparsetile.train.arms import attention_of_learned
from sparsetile.train.checkpoint import load_checkpoint
from sparsetile.train.model import Attention, Model, ModelConfig


def show(console: Console, checkpoint: str, text: str, length: int | None, png: str | None) -> None:
    """Runs the text through the model, prints the recall of each layer and head, and draws the tiles.

    Args:
        length: bytes of the text to run; default: the context that the model was trained with.
        png: where to draw; default: beside the checkpoint, if matplotlib is there.

    Raises:
        CheckpointError: no checkpoint of ``sparsetile train --arms adaptive``.
        DataError: the text is shorter than two tiles.
        ArgumentError: ``png`` was given, and matplotlib is missing.
        OSError: the text cannot be read, or the picture not written.
    """
    model, trained = load_model(Path(checkpoint))
    block, context = trained["adaptive"]["block_size"], trained["context"]
    views, count = look(model, read_text(Path(text), context if length is None else length, block))
    console.print(
        f"{text}: {count:,} bytes through {checkpoint}, in tiles of {block}", soft_wrap=True, markup=False
    )
    console.print(recall_table(views))
    path = Path(checkpoint).with_suffix(".png") if png is None else Path(png)
    try:
        save_grid(views, path, block=block, length=count, title=f"{Path(text).name}, {trained['attention']}")
    except ArgumentError as missing:
        if png is not None:
            raise
        console.print(f"No picture. {missing}", soft_wrap=True, markup=False)
    else:
        console.print(f"wrote {path}", soft_wrap=True, markup=False)


def load_model(path: Path) -> tuple[Model, dict[str, Any]]:
    """The model of a checkpoint, and the settings that it was trained with."""
    state = load_checkpoint(path)
    trained: dict[str, Any] = state["identity"]
    if "adaptive" not in trained:
        raise CheckpointError(
            explain(
                f"checkpoint {path}",
                expected="an arm that learns its tiles",
                got=f"attention {trained['attention']}",
                fix=f"Train one: sparsetile train --arms adaptive --checkpoint {path.name}.",
            )
        )
    try:
        model = Model(ModelConfig(**trained["model"]), AdaptiveConfig(**trained["adaptive"]))
        model.load_state_dict(state["model"])
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(
            explain(
                f"checkpoint {path}",
                expected="one that this version of sparsetile train wrote",
                got=f"one of another: {error}",
                fix="Train it again.",
            )
        ) from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), trained


def read_text(path: Path, length: int, block: int) -> Tensor:
    """The first ``length`` bytes of a file, or as many as it has, int64 ``[1, N]``."""
    with open(path, "rb") as file:
        found = file.read(length)
    if len(found) < 2 * block:
        raise DataError(
            explain(
                f"text {path}",
                expected=f"at least two tiles of the model, {2 * block} bytes",
                got=f"{len(found)}",
                fix="Name a longer file, or raise --length.",
            )
        )
    return torch.frombuffer(bytearray(found), dtype=torch.uint8).long()[None]


@torch.no_grad()
def look(model: Model, text: Tensor) -> tuple[list[TileView], int]:
    """A view of each layer, and the number of bytes."""
    views: list[TileView] = []

    def watched(learned: torch.nn.Module, attend: Attention) -> Attention:
        assert isinstance(learned, BlockSparseAdaptive)

        def watch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = attend(q, k, v)
            views.append(TileView.of(q, k, learned.last_layout, learned.scale))
            return out

        return watch

    pairs = zip(model.learned, attention_of_learned(model), strict=True)
    text = text.to(next(model.parameters()).device)
    model(text, [watched(learned, attend) for learned, attend in pairs])
    return views, text.shape[1]


def recall_table(views: list[TileView]) -> Table:
    """A row for each layer and head, and their mean."""
    table = Table(
        caption="Shares of dense attention's mass inside as many tiles: those that were kept, the own tile "
        "and others at random, those with the most mass.",
        caption_justify="left",
    )
    for heading in ("layer", "head", "recall", "at random", "best", "tiles kept"):
        table.add_column(heading, justify="right")
    columns = ("recall", "chance", "best", "density")
    numbers = torch.stack([torch.stack([getattr(view, name) for name in columns]) for view in views])
    for layer, of_layer in enumerate(numbers):
        for head, row in enumerate(of_layer.T.tolist()):
            table.add_row(str(layer + 1), str(head + 1), *(f"{value:.1%}" for value in row))
        table.add_section()
    table.add_row("mean", "", *(f"{value:.1%}" for value in numbers.mean((0, 2)).tolist()))
    return table
