"""What ``sparsetile bench --tune`` times a cell on: layouts, features and tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsetile.bench.cases import Case
from sparsetile.bench.tune_candidates import Cell, Choice
from sparsetile.kernels.request import Request
from sparsetile.kernels.triton_config import Target, override


@dataclass(frozen=True)
class Problem:
    """A layout to time on. ``features``: of padding, dropout, bias; bias is a dense one and one a tile, both
    with gradients, and two query heads a key head."""

    case: Case
    features: tuple[str, ...] = ()


@dataclass
class Call:
    """The tensors of one problem; ``results`` are what its launches fill, ``right`` what they should hold."""

    inputs: tuple[Tensor, ...]
    request: Request
    results: tuple[Tensor | None, ...]
    right: list[Tensor] = field(default_factory=list)

    def launches(self, cell: Cell, choice: Choice, target: Target) -> list[Any]:
        from sparsetile.kernels import triton_launch

        with override(**{cell.place.kernel: choice}):  # type: ignore[arg-type]
            if cell.place.kernel == "forward":
                given: tuple[Any, ...] = (*self.inputs, *self.results, self.request, target)
                return list(triton_launch.forward_launches(*given))
            q, k, v, grad, out, lse = self.inputs
            given = (q, k, v, out, lse, grad, None, *self.results, self.request, target)
            return list(triton_launch.backward_launches(*given))

    def run(self, launches: list[Any]) -> list[Any]:
        """What the launches return; results that they do not write are NaN afterwards."""
        for at, result in enumerate(self.results):
            if result is not None:
                result.fill_(math.nan if at < 3 else 0.0)  # the gradients of biases come as zeros
        return [launch.run() for launch in launches]

    def keep(self) -> None:
        """The results are right."""
        self.right = [result.clone() for result in self.results if result is not None]

    def error(self) -> float:
        """The largest relative Frobenius error of a result; NaN if one has NaN, or nothing is known to be
        right."""
        found = [result for result in self.results if result is not None]
        if not self.right:
            return math.nan
        errors = [
            (got.float() - right.float()).norm() / right.float().norm()
            for got, right in zip(found, self.right, strict=True)
        ]
        return float(torch.stack(errors).max())


def problems(cell: Cell, tokens: int, heads: int) -> list[Problem]:
    """The layouts of a cell: local, random and global+local, as far as its kind of work has them."""
    place, block = cell.place, cell.block

    def case(pattern: str, keys: int | None = None, *, length: int = tokens, batch: int = 1) -> Case:
        tiles = None if keys is None else max(1, min(keys, length) // block)
        return Case(pattern, length, batch, heads, place.dim, cell.dtype, block, tiles)

    short = tokens // 4
    if place.work == "whole":
        found = [case("local", tokens // 24), case("random", tokens // 8), case("global+local", tokens // 16)]
        return [Problem(each) for each in found]
    if place.work == "partial":
        window, span = tokens // 16, tokens // 32  # a window in each: no row is without keys
        patterns = (
            f"Local({window})",
            f"Random(0.125) | Local({block})",
            f"Local({span}) | Global({block // 2})",
        )
        return [Problem(case(f"({pattern}) & Causal()")) for pattern in patterns]
    if place.work == "featured":
        return [
            Problem(case("local", tokens // 24), ("padding",)),
            Problem(case("random", tokens // 8), ("padding", "dropout")),
            Problem(case("global+local", short // 4, length=short), ("padding", "dropout", "bias")),
        ]
    # Short rows, one or two tiles each; more sequences, or they would leave multiprocessors idle.
    if place.work == "short whole":
        return [Problem(case("local", block, batch=4)), Problem(case("random", 2 * block, batch=4))]
    return [
        Problem(case(f"Local({block - 1}, 0)", batch=4)),
        Problem(case("Local(0)", batch=4)),
    ]


def call_of(problem: Problem, cell: Cell, device: torch.device, seed: int, *, filled: bool = True) -> Call:
    """The tensors of a problem; not ``filled``, only their shapes count, and they take no memory yet."""
    case, features = problem.case, problem.features
    batch, heads, length, dim = case.shape
    drawn = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def draw(*shape: int) -> Tensor:
        if not filled:
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.randn(shape, dtype=dtype, device=device, generator=drawn)

    layout = case.layout(torch.device("cpu"), torch.Generator().manual_seed(seed)).to(device)
    kv_heads = heads // 2 if "bias" in features else heads
    q, k, v = draw(*case.shape), draw(batch, kv_heads, length, dim), draw(batch, kv_heads, length, dim)
    bias = draw(1, 1, length, length) if "bias" in features else None
    dropped = "dropout" in features
    padding = torch.rand(batch, length, device=device, generator=drawn) < 0.1
    request = Request(
        layout,
        dim**-0.5,
        dropout_p=0.1 if dropped else 0.0,
        seed=torch.full((1,), seed, device=device) if dropped else None,
        key_padding_mask=padding if "padding" in features else None,
        attn_bias=bias,
        tile_bias=None if bias is None else torch.zeros(1, 1, layout.capacity, device=device),
    )
    out = draw(*case.shape)
    # Forward's results need not be right to time backward, but of the right size: logits of random inputs are
    # N(0, 1), whose exponential is √e on average.
    keys = length // 16 if case.tiles is None else case.block * case.tiles
    lse = torch.full(case.shape[:3], math.log(keys) + 0.5, device=device)
    if cell.place.kernel == "forward":
        return Call((q, k, v), request, (out, lse))
    tile_grad = bias_grad = None
    if bias is not None:
        from sparsetile.kernels.triton_launch import tile_grad_parts

        tile_grad = torch.empty(tile_grad_parts(layout), batch, heads, layout.capacity, device=device)
        bias_grad = torch.empty(batch, heads, length, length, device=device)
    grads = tuple(torch.empty_like(x) for x in (q, k, v))
    return Call((q, k, v, draw(*case.shape), out, lse), request, (*grads, tile_grad, bias_grad))
