"""``sparsetile profile``: from a model and texts to patterns, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsetile.errors import DataError, explain
from sparsetile.profile import choose as choosing
from sparsetile.profile.candidates import Candidate, Kept, candidates, kept
from sparsetile.profile.evaluate import best_tiles, loss_under, loss_with, pooled
from sparsetile.profile.measure import Tables, measure

_SEARCH_STEPS = 6
Say = Callable[[str], None]


@dataclass
class Profile:
    """A model measured on a text, ready to choose patterns.

    Attributes:
        tried: the candidates.
        chosen: the tiles that they keep.
        tables: what they do to each head.
        dense: the dense loss of a token of the text, in nats.
    """

    model: PreTrainedModel
    block: int
    tried: list[Candidate]
    chosen: Kept
    tables: Tables
    dense: float
    about: dict[str, Any]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokens: Tensor,
        block: int,
        about: dict[str, Any],
        done: Callable[[], None] = lambda: None,
    ) -> Profile:
        """Measures ``tokens`` ``[1, N]``, N a multiple of the block."""
        length = tokens.shape[1]
        if length % block or length < 2 * block:
            raise DataError(
                explain(
                    "length",
                    expected=f"a multiple of the tile's {block} tokens, two of them at least",
                    got=length,
                    fix="Choose another --length.",
                )
            )
        tried = candidates(length, block)
        chosen = kept(tried, length, block).to(tokens.device)
        tables, dense = measure(model, tokens, chosen, block, done=done)
        return cls(model, block, tried, chosen, tables, dense, about)

    @property
    def cost(self) -> Tensor:
        """``[layers, H, candidates]``."""
        return self.tables.stacked("cost")

    @property
    def mass(self) -> Tensor:
        """``[layers, H, candidates]``."""
        return self.tables.stacked("mass")

    @property
    def tiles(self) -> Tensor:
        """``[candidates]``, on the CPU."""
        return self.chosen.tiles.cpu()

    def pick(self, density: float) -> Tensor:
        """A candidate for each head at a density of all heads together: int64 ``[layers, H]``."""
        cost = self.cost
        layers, heads, _ = cost.shape
        budget = density * self.chosen.every * layers * heads
        return choosing.choose(cost.flatten(0, 1), self.tiles, budget).view(layers, heads)

    def density(self, pick: Tensor) -> float:
        return float(self.tiles[pick].float().mean()) / self.chosen.every

    def mass_of(self, pick: Tensor) -> Tensor:
        """``[layers, H]``."""
        return self.mass.gather(2, pick[..., None])[..., 0]

    def settings(self, pick: Tensor) -> dict[str, Any]:
        about = {**self.about, "density": self.density(pick), "mass_kept": float(self.mass_of(pick).mean())}
        return choosing.settings_of(pick, self.tried, self.block, about)

    def singles(self, density: float) -> list[Candidate]:
        """The largest member of each family within a density, for all heads alike."""
        largest: dict[str, tuple[int, float, int]] = {}
        cost, tiles = self.cost.sum((0, 1)), self.tiles.tolist()
        for number, candidate in enumerate(self.tried):
            if tiles[number] <= density * self.chosen.every + 0.5:
                # Of equally many tiles the cheaper.
                rank = (tiles[number], -float(cost[number]), number)
                largest[candidate.family] = max(largest.get(candidate.family, rank), rank)
        return [self.tried[number] for _, _, number in largest.values()]

    def next_single(self, density: float) -> Candidate:
        """The cheapest for all heads alike that has more tiles, a quarter more at most: sizes have steps, and
        what just misses a density is a fairer rival than what falls far short of it."""
        cost, tiles = self.cost.sum((0, 1)), self.tiles.double() / self.chosen.every
        near = (tiles > density) & (tiles <= max(1.25 * density, float(tiles[tiles > density].min())))
        return self.tried[int(cost.masked_fill(~near, torch.inf).argmin())]


def search(profile: Profile, tokens: Tensor, increase: float, say: Say) -> Tensor:
    """The sparsest choice of heads whose loss on ``tokens`` is at most ``1 + increase`` times the dense one.

    Bisects the density, which the loss follows but for noise.
    """
    low, high = 0.0, 1.0
    found = profile.pick(1.0)
    for _ in range(_SEARCH_STEPS):
        density = (low + high) / 2
        pick = profile.pick(density)
        loss = loss_under(profile.model, tokens, profile.settings(pick))
        say(f"density {profile.density(pick):.1%}: loss {loss:.4f} ({loss / profile.dense - 1:+.2%})")
        if loss <= profile.dense * (1 + increase):
            high, found = density, pick
        else:
            low = density
    return found


def compare(
    profile: Profile, held_out: Tensor, densities: tuple[float, ...], small: Profile | None, say: Say
) -> list[dict[str, Any]]:
    """Losses on a held-out text, for each density: the heads' own patterns; each family for all heads alike;
    tiles of half the size; tiles chosen by pooled queries and keys; and the oracle."""
    model, block = profile.model, profile.block
    oracle, _ = measure(
        model,
        held_out,
        kept(profile.tried[-1:], held_out.shape[1], block).to(held_out.device),
        block,
        densities,
    )
    rows = []
    for density in densities:

        def add(name: str, loss: float, share: float, detail: str = "", density: float = density) -> None:
            row = {"asked": density, "what": name, "density": share, "loss": loss, "pattern": detail}
            rows.append(row)
            say(f"{density:.0%} {name}: {loss:.4f}")

        pick = profile.pick(density)
        add("heads' own", loss_under(model, held_out, profile.settings(pick)), profile.density(pick))
        if small is not None:
            pick = small.pick(density)
            name = f"heads' own, tiles of {small.block}"
            add(name, loss_under(model, held_out, small.settings(pick)), small.density(pick))
        rivals = [(single.family, single) for single in profile.singles(density)]
        if density < 1:
            larger = profile.next_single(density)
            rivals.append((f"{larger.family}, more tiles", larger))
        for name, single in rivals:
            settings = {"pattern": repr(single.pattern), "block_size": block}
            share = profile.tiles[profile.tried.index(single)].item() / profile.chosen.every
            add(name, loss_under(model, held_out, settings), share, repr(single.pattern))
        add("pooled (adaptive)", loss_with(model, held_out, pooled(density, block), block), density)
        add("oracle", loss_with(model, held_out, best_tiles(oracle.best[density]), block), density)
    return rows


def closed(rows: list[dict[str, Any]], density: float) -> tuple[float, float, float, float]:
    """(heads' own, best single, oracle, share of the gap between the latter two that the first closes); the
    single ones are those within the density and the one with a few tiles more."""
    here = [row for row in rows if row["asked"] == density]
    losses = {row["what"]: row["loss"] for row in here}
    single = min(row["loss"] for row in here if row["pattern"])
    own, oracle = losses["heads' own"], losses["oracle"]
    return own, single, oracle, (single - own) / (single - oracle) if single > oracle else float("inf")


def dense_loss(model: PreTrainedModel, tokens: Tensor) -> float:
    """Mean next-token loss of ``tokens`` ``[1, N]`` with every key kept, in nats."""
    return loss_under(model, tokens, {"pattern": "Full()"})


def on_device(tokens: Tensor, model: PreTrainedModel) -> Tensor:
    device: torch.device = model.device
    return tokens.to(device)
