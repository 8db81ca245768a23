"""The answer that kernels are compared with: dense attention in float64, differentiated by autograd.

Shares no code with the package: a mask is a dense boolean tensor here, a gradient is what autograd says.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetile.kernels.dropout import keep_mask
from sparsetile.kernels.request import Request
from sparsetile.layout.blocks import BlockLayout

# Relative to the largest value; errors below are not compared with dense attention's. For 16 bits that is
# the cost of rounding the exact answer once; gradients start from an output that was rounded, so they are
# rounded twice.
FLOOR = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2**-8 + 1e-5,
    torch.float16: 2**-11 + 1e-5,
}


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    attn_bias: Tensor | None = None,
    tile_bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Float64 output ``[B, H, Nq, D]`` and LSE ``[B, H, Nq]``; safe at rows without keys (0, −inf, no
    gradient).

    mask broadcasts to ``[B, H, Nq, Nk]``, True = may attend; attn_bias and tile_bias (written out per pair)
    likewise; key_padding_mask ``[B, Nk]`` or ``[B, Hkv, Nk]``, True = ignore; dropout_keep
    ``[B, H, Nq, Nk]``.
    """
    repeats = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    k = k[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2)
    v = v[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2)
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    allowed = mask.expand(logits.shape)
    for bias in (attn_bias, tile_bias):
        if bias is not None:
            finite = bias > -math.inf
            allowed = allowed & finite
            logits = logits + torch.where(finite, bias.double(), 0.0)
    if key_padding_mask is not None:
        allowed = allowed & ~by_pair(key_padding_mask, repeats)
    empty = ~allowed.any(-1)
    peak = torch.where(allowed, logits, -math.inf).amax(-1).detach()
    peak = torch.where(empty, 0.0, peak)
    powers = torch.where(allowed, torch.exp(torch.where(allowed, logits - peak[..., None], 0.0)), 0.0)
    total = torch.where(empty, 1.0, powers.sum(-1))
    lse = torch.where(empty, -math.inf, peak + total.log())
    weights = powers / total[..., None]
    if dropout_keep is not None:
        weights = torch.where(dropout_keep, weights / (1 - round(dropout_p * 2**16) / 2**16), 0.0)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v), lse


def by_pair(key_padding_mask: Tensor, repeats: int) -> Tensor:
    """``[B, 1 or H, 1, Nk]`` of a mask ``[B, Nk]`` or ``[B, Hkv, Nk]``, for ``repeats`` heads a key head."""
    if key_padding_mask.dim() == 2:
        return key_padding_mask[:, None, None]
    return torch.stack([x for x in key_padding_mask.unbind(1) for _ in range(repeats)], 1)[:, :, None]


def random_mask(gen: random.Random, batch: int, heads: int, q_len: int, k_len: int, block: int) -> Tensor:
    """``[batch, heads, q_len, k_len]`` bool: tiles missing, whole or partial, and some empty rows."""
    seed = gen.getrandbits(40)
    rng = torch.Generator().manual_seed(seed)
    nq, nk = -(-q_len // block), -(-k_len // block)
    shape = (batch, heads, nq * block, nk * block)
    state = torch.rand((batch, heads, nq, nk), generator=rng)
    state = state.repeat_interleave(block, 2).repeat_interleave(block, 3)
    pairs = torch.rand(shape, generator=rng) < 0.4
    mask = (state < 0.3) | ((state < 0.65) & pairs)
    rows = torch.rand((batch, heads, nq * block), generator=rng) < 0.04
    mask &= ~rows[..., None]
    return mask[:, :, :q_len, :k_len].contiguous()


def expand_tiles(values: Tensor, mask: Tensor, block: int) -> Tensor:
    """One value a stored tile ``[B|1, H|1, tiles]`` written out per pair of ``mask`` ``[Lb, Lh, Nq, Nk]``."""
    q_len, k_len = mask.shape[2:]
    padded = F.pad(mask, (0, -k_len % block, 0, -q_len % block))
    tiled = padded.unflatten(3, (-1, block)).unflatten(2, (-1, block))
    stored = tiled.any(5).any(3)
    entry = (stored.flatten().cumsum(0) - 1).clamp(min=0).view(stored.shape)
    entry = entry.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :q_len, :k_len]
    batch, heads = max(len(values), len(mask)), max(values.shape[1], mask.shape[1])
    if not stored.any():
        return values.sum() + torch.zeros(
            (batch, heads, q_len, k_len), dtype=values.dtype, device=mask.device
        )
    entry = entry.expand(batch, heads, -1, -1)
    return values.expand(batch, heads, -1).gather(2, entry.flatten(2)).view(entry.shape)


@dataclass
class Case:
    """One attention problem with everything a backend needs and everything the oracle needs."""

    seed: int
    features: frozenset[str]
    block: int
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    layout: BlockLayout
    scale: float
    grad_out: Tensor
    grad_lse: Tensor | None
    attn_bias: Tensor | None
    tile_bias: Tensor | None
    key_padding_mask: Tensor | None
    dropout_p: float
    dropout_seed: Tensor | None
    q_tiles: Tensor | None = None
    k_tiles: Tensor | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    lean: bool = False

    def request(self) -> Request:
        return Request(
            layout=self.layout,
            scale=self.scale,
            dropout_p=self.dropout_p,
            seed=self.dropout_seed,
            key_padding_mask=self.key_padding_mask,
            attn_bias=self.attn_bias,
            tile_bias=self.tile_bias,
            q_tiles=self.q_tiles,
            k_tiles=self.k_tiles,
            lean=self.lean,
        )

    def dropout_keep(self) -> Tensor | None:
        if self.dropout_seed is None:
            return None
        batch, heads, q_len, _ = self.q.shape
        stream = torch.arange(batch * heads, device=self.q.device).view(batch, heads, 1, 1)
        query = torch.arange(q_len, device=self.q.device)[:, None]
        key = torch.arange(self.k.shape[2], device=self.q.device)
        if self.q_tiles is not None and self.k_tiles is not None:
            # Tile by tile, from the places that the tiles have in a longer sequence.
            query = torch.cat([t * self.block + torch.arange(self.block) for t in self.q_tiles.tolist()])
            query = query[:q_len, None].to(self.q.device)
            lines = [
                torch.cat([t * self.block + torch.arange(self.block) for t in line])[: self.k.shape[2]]
                for line in self.k_tiles.expand(self.k.shape[1], -1).tolist()
                for _ in range(heads // self.k.shape[1])
            ]
            key = torch.stack(lines)[:, None].to(self.q.device)
        return keep_mask(self.dropout_seed, self.dropout_p, stream, query, key)

    def expected(self) -> dict[str, Tensor]:
        """The oracle's ``out``, ``lse`` and gradients ``q, k, v`` (``tile_bias``, ``attn_bias``) in
        float64."""
        leaves = {
            "q": self.q,
            "k": self.k,
            "v": self.v,
            "attn_bias": self.attn_bias,
            "tile_bias": self.tile_bias,
        }
        leaf = {n: None if t is None else t.detach().double().requires_grad_() for n, t in leaves.items()}
        tile_bias = leaf["tile_bias"]
        out, lse = oracle(
            leaf["q"],
            leaf["k"],
            leaf["v"],
            self.mask,
            self.scale,
            attn_bias=leaf["attn_bias"],
            tile_bias=None if tile_bias is None else expand_tiles(tile_bias, self.mask, self.block),
            key_padding_mask=self.key_padding_mask,
            dropout_keep=self.dropout_keep(),
            dropout_p=self.dropout_p,
        )
        total = (out * self.grad_out.double()).sum()
        if self.grad_lse is not None:
            # Rows without keys have LSE −inf, a constant.
            total = total + torch.where(lse == -math.inf, 0.0, lse * self.grad_lse.double()).sum()
        given = {n: t for n, t in leaf.items() if t is not None}
        grads = torch.autograd.grad(total, list(given.values()), allow_unused=True)
        answer = {"out": out.detach(), "lse": lse.detach()}
        for (name, tensor), grad in zip(given.items(), grads, strict=True):
            answer[name] = torch.zeros_like(tensor) if grad is None else grad
        return answer

    def dense_errors(self, expected: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        """(relative_error, spread_error) of ``F.scaled_dot_product_attention`` in this dtype, without
        dropout and LSE."""
        plain = Case(**{**self.__dict__, "dropout_p": 0.0, "dropout_seed": None, "grad_lse": None})
        if self.dropout_p or self.grad_lse is not None:
            expected = plain.expected()
        batch, heads, q_len, _ = self.q.shape
        operands = {
            "q": self.q,
            "k": self.k,
            "v": self.v,
            "attn_bias": self.attn_bias,
            "tile_bias": self.tile_bias,
        }
        leaf = {n: t.detach().clone().requires_grad_() for n, t in operands.items() if t is not None}
        bias = torch.zeros((batch, heads, q_len, self.k.shape[2]), dtype=self.q.dtype, device=self.q.device)
        if self.attn_bias is not None:
            bias = bias + leaf["attn_bias"]
        if self.tile_bias is not None:
            bias = bias + expand_tiles(leaf["tile_bias"], self.mask, self.block)
        bias = bias.masked_fill(~self.mask, -math.inf)
        if self.key_padding_mask is not None:
            repeats = self.q.shape[1] // self.k.shape[1]
            bias = bias.masked_fill(by_pair(self.key_padding_mask, repeats), -math.inf)
        empty = (bias == -math.inf).all(-1, keepdim=True)
        bias = bias.masked_fill(empty, 0).to(self.q.dtype)
        out = F.scaled_dot_product_attention(
            leaf["q"], leaf["k"], leaf["v"], attn_mask=bias, scale=self.scale, enable_gqa=True
        )
        grads = torch.autograd.grad(out, list(leaf.values()), self.grad_out.masked_fill(empty, 0))
        got = {"out": out.detach().masked_fill(empty, 0), **dict(zip(leaf, grads, strict=True))}
        return {
            name: (
                relative_error(got[name], expected[name], self.unit(name)),
                spread_error(got[name], expected[name], self.unit(name)),
            )
            for name in got
        }

    def unit(self, name: str) -> float:
        """What errors are measured against where a tensor cancels; see ``relative_error``.

        Gradients of q, k and biases are differences that cancel to nothing in rows of one key or tile.
        Where they do not cancel, they are of about the sizes below.
        """
        if name == "tile_bias":  # sums, over the rows of a tile, products dO·V of size √D
            return math.sqrt(self.block * self.q.shape[3])
        if name == "k":  # sums over the rows that attend the key
            return 0.25 * math.sqrt(max(1.0, self.q.shape[2] / self.k.shape[2]))
        if name == "attn_bias":  # products dO·V of size √D, each times a weight of about one over the keys
            return max(0.05, math.sqrt(self.q.shape[3]) / self.k.shape[2])
        # For q, scale·√D = 1 times such a weight times a key: 1 where every row may be left with one key, 1/4
        # where many share the weight.
        few = self.k.shape[2] <= 4
        return (1.0 if few else 0.25) if name == "q" else 0.05

    def describe(self) -> str:
        return (
            f"seed={self.seed} features={sorted(self.features)} block={self.block} q={list(self.q.shape)} "
            f"k={list(self.k.shape)} {self.q.dtype}"
        )


def relative_error(got: Tensor, expected: Tensor, unit: float = 0.05) -> float:
    """Largest difference over the largest value; infinities must agree, NaN is an infinite error.

    Operands are of unit scale: a tensor that cancels to nothing (rows of one key) is measured against
    ``unit``.
    """
    got, expected = got.double(), expected.double()
    infinite = expected.isinf()
    if not torch.equal(got[infinite], expected[infinite]) or not got[~infinite].isfinite().all():
        return math.inf
    if not (~infinite).any():
        return 0.0
    difference = (got - expected)[~infinite].abs().max().item()
    return difference / max(expected[~infinite].abs().max().item(), unit)


def spread_error(got: Tensor, expected: Tensor, unit: float) -> float:
    """Norm of the difference over the norm of what was expected (of ``unit`` an element, at the least)."""
    got, expected = got.double(), expected.double()
    if not torch.isfinite(got).all():
        return math.inf
    return ((got - expected).norm() / expected.norm().clamp(min=unit * expected.numel() ** 0.5)).item()


def random_case(
    *,
    seed: int | None = None,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    block: int = 32,
    q_len: int = 100,
    k_len: int | None = None,
    batch: int = 2,
    heads: int = 4,
    key_heads: int | None = None,
    features: frozenset[str] | set[str] = frozenset(),
    mask: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Case:
    """A fresh problem.

    Features: ``tile_bias``, ``attn_bias`` (with −inf), ``padding``, ``padding_by_head``, ``dropout``,
    ``placed`` (dropout of tiles that lie anywhere in a longer sequence), ``lse`` (its gradient), ``per_head``
    and ``per_batch`` (layouts), ``gqa``, ``strided`` (operands stored ``[B, N, H, D]``).
    """
    seed = random.SystemRandom().getrandbits(32) if seed is None else seed
    gen = random.Random(seed)
    rng = torch.Generator().manual_seed(seed)
    k_len = q_len if k_len is None else k_len
    if key_heads is None:
        key_heads = heads // 2 if "gqa" in features else heads

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(of).to(device)

    def operand(count: int, length: int) -> Tensor:
        if "strided" in features:
            return normal(batch, length, count, head_dim).transpose(1, 2)
        return normal(batch, count, length, head_dim)

    if mask is None:
        layout_batch, layout_heads = (
            batch if "per_batch" in features else 1,
            heads if "per_head" in features else 1,
        )
        mask = random_mask(gen, layout_batch, layout_heads, q_len, k_len, block)
    mask = mask.to(device)
    layout = BlockLayout.from_dense_mask(mask, block)
    statistic = torch.float64 if dtype == torch.float64 else torch.float32
    attn_bias = tile_bias = padding = dropout_seed = None
    if "attn_bias" in features:
        shape = (gen.choice((1, batch)), gen.choice((1, heads)), q_len, k_len)
        attn_bias = normal(*shape)
        forbidden = torch.rand(shape, generator=rng).to(device) < 0.1
        attn_bias = attn_bias.masked_fill(forbidden, -math.inf)
    if "tile_bias" in features:
        tile_bias = normal(gen.choice((1, batch)), gen.choice((1, heads)), layout.capacity, of=statistic)
    if "padding" in features:
        padding = torch.rand((batch, k_len), generator=rng).to(device) < 0.2
        padding[0, k_len // 2 :] = True
    if "padding_by_head" in features:
        padding = torch.rand((batch, key_heads, k_len), generator=rng).to(device) < 0.2
        padding[0, -1, k_len // 2 :] = True
    if "dropout" in features or "placed" in features:
        dropout_seed = torch.tensor([gen.getrandbits(62)], device=device)
    q_tiles = k_tiles = None
    if "placed" in features:
        lines = gen.choice((1, key_heads))
        k_tiles = torch.stack([torch.randperm(1000, generator=rng)[: layout.k_blocks] for _ in range(lines)])
        q_tiles = torch.randperm(1000, generator=rng)[: layout.q_blocks].to(device)
        k_tiles = k_tiles.to(device)
    return Case(
        seed=seed,
        features=frozenset(features),
        block=block,
        q=operand(heads, q_len),
        k=operand(key_heads, k_len),
        v=operand(key_heads, k_len),
        mask=mask,
        layout=layout,
        scale=gen.choice((1.0, 1.3)) / math.sqrt(head_dim),
        grad_out=normal(batch, heads, q_len, head_dim),
        grad_lse=normal(batch, heads, q_len, of=statistic) if "lse" in features else None,
        attn_bias=attn_bias,
        tile_bias=tile_bias,
        key_padding_mask=padding,
        dropout_p=0.25 if dropout_seed is not None else 0.0,
        dropout_seed=dropout_seed,
        q_tiles=q_tiles,
        k_tiles=k_tiles,
        device=torch.device(device),
    )


def sum_to(grad: Tensor, shape: torch.Size) -> Tensor:
    """Sums the gradient of a bias, as a backend returns it, to the shape of the bias."""
    if shape[0] == 1:
        grad = grad.sum(0, keepdim=True)
    if shape[1] == 1:
        grad = grad.sum(1, keepdim=True)
    return grad.expand(shape) if grad.shape == shape else grad


def run(backend: object, case: Case) -> dict[str, Tensor]:
    """What a backend answers, named as ``Case.expected`` names it; bias gradients summed to their biases."""
    request = case.request()
    assert backend.why_not(case.q, case.k, case.v, request) is None
    out, lse = backend.forward(case.q, case.k, case.v, request)
    grads = backend.backward(
        case.grad_out,
        case.grad_lse,
        case.q,
        case.k,
        case.v,
        out,
        lse,
        request,
        tile_bias_grad=case.tile_bias is not None,
        attn_bias_grad=case.attn_bias is not None,
    )
    answer = {"out": out, "lse": lse, "q": grads.q, "k": grads.k, "v": grads.v}
    if case.tile_bias is not None:
        answer["tile_bias"] = _bias_sum(grads.tile_bias, case)
    if case.attn_bias is not None:
        answer["attn_bias"] = sum_to(grads.attn_bias.double(), case.attn_bias.shape)
    return answer


def _bias_sum(grad: Tensor, case: Case) -> Tensor:
    """Sums a tile bias gradient; a tile of a layout per head reads one head's entry of a wider bias."""
    batch, heads = case.q.shape[:2]
    per_batch, per_head = case.layout.batch > 1, case.layout.heads > 1
    assert grad.shape == (1 if per_batch else batch, 1 if per_head else heads, case.layout.capacity)
    want = case.tile_bias.shape
    grad = grad.double()
    padded = F.pad(case.mask, (0, -case.mask.shape[3] % case.block, 0, -case.mask.shape[2] % case.block))
    stored = padded.unflatten(3, (-1, case.block)).unflatten(2, (-1, case.block)).any(5).any(3)
    owner_b, owner_h = (stored.nonzero()[:, axis] for axis in (0, 1))
    if per_batch and want[0] > 1:
        grad = grad * (owner_b == torch.arange(want[0], device=grad.device)[:, None])[:, None]
    if per_head and want[1] > 1:
        grad = grad * (owner_h == torch.arange(want[1], device=grad.device)[:, None])
    return sum_to(grad, want)


def check(backend: object, case: Case) -> None:
    """Asserts that a backend's output and gradients are as accurate as dense attention in the same dtype.

    float32 and float64 are held to their floors, the log-sum-exp always. In 16 bits the root of the summed
    squares of all errors may be 1.2 times dense attention's, and the single worst element 2.5 times dense
    attention's worst: a maximum over few elements differs by half between two equally good kernels, a sum
    does not. Or as many roundings as there are in sequence: of the result; of the weights, in gradients; and,
    where δ = Σ dO·out comes in, of out, which dense attention does not go by.
    """
    expected, got = case.expected(), run(backend, case)
    half = case.q.dtype.itemsize == 2
    dense = case.dense_errors(expected) if half else {}
    for name in expected:
        assert got[name].shape == expected[name].shape, f"{name}: {case.describe()}"
        unit = case.unit(name)
        worst = relative_error(got[name], expected[name], unit)
        if not half or name == "lse":
            limit = FLOOR[torch.float64 if case.q.dtype == torch.float64 else torch.float32]
            assert worst <= limit, f"{name}: relative error {worst:.3g} above {limit:.3g}; {case.describe()}"
            continue
        spread, (dense_worst, dense_spread) = spread_error(got[name], expected[name], unit), dense[name]
        floor, in_sequence = FLOOR[case.q.dtype], {"out": 1, "v": 2}.get(name, 3)
        for kind, error, limit in (
            ("summed", spread, max(1.2 * dense_spread, floor * min(in_sequence, 2) / 2)),
            ("worst", worst, max(2.5 * dense_worst, floor * in_sequence)),
        ):
            assert error <= limit, f"{name}: {kind} error {error:.3g} above {limit:.3g}; {case.describe()}"
