"""Adaptive attention written out: dense, float64, one softmax, gradients by autograd.

Shares no code with the package but the tiles that were chosen, and the parameters.
"""

import math
import random

import torch

import sparsetile as st
from sparsetile.nn.adaptive import BlockSparseAdaptive

BLOCK = 16


def tiles_of(layout, batch, heads):
    """bool [B, H, q_blocks, k_blocks]: the tiles of a layout."""
    line, col = layout.rows_and_columns()
    grid = torch.zeros(layout.batch * layout.heads * layout.q_blocks, layout.k_blocks, dtype=torch.bool)
    grid[line, col] = True
    grid = grid.view(layout.batch, layout.heads, layout.q_blocks, layout.k_blocks)
    return grid.expand(batch, heads, -1, -1)


def means(x, block, ignored):
    """[B, N, H, D] → [B, H, tiles, D]: mean of the tokens that are not ignored."""
    out = []
    for start in range(0, x.shape[1], block):
        piece = x[:, start : start + block]
        live = (~ignored[:, start : start + block]).to(x.dtype)[..., None, None]
        piece = torch.where(live > 0, piece, torch.zeros_like(piece))
        out.append((piece * live).sum(1) / live.sum(1).clamp(min=1))
    return torch.stack(out, 2)


def dense_adaptive(config, parameters, q, k, v, tiles, *, is_causal, padding, first, scale, key_bias=None):
    """Output [B, Nq, H, D], weights [B, H, Nq, Nk], and θ and log τ as every tile reads them, of q, k, v
    [B, N, H, D] over ``tiles``.

    ``parameters``: w_q, w_k, b1, w2, b2, theta, log_tau. ``first``: query tiles are judged by their first
    query. ``key_bias``: [B, Nk], added to every logit of the key. All in float64.
    """
    p, block = parameters, config.block_size
    batch, q_len, heads, _ = q.shape
    k_len, kv_heads = k.shape[1], k.shape[2]
    offset = k_len - q_len
    ignored = torch.zeros(batch, k_len, dtype=torch.bool) if padding is None else padding
    position = torch.arange(q_len) + offset
    silent = torch.zeros(batch, q_len, dtype=torch.bool)
    if config.self_attention:
        inside = position >= 0
        silent[:, inside] = ignored[:, position[inside]]
    q_bar = means(q[:, ::block], 1, silent[:, ::block]) if first else means(q, block, silent)
    groups = heads if config.per_query_head else kv_heads
    q_bar = q_bar.reshape(batch, groups, heads // groups, *q_bar.shape[2:]).mean(2)
    k_bar = means(k, block, ignored).repeat_interleave(groups // kv_heads, 1)
    nq, nk = q_bar.shape[2], k_bar.shape[2]
    scores = []
    for g in range(groups):
        w_q, w_k, b1, w2, b2 = (
            p[name] if config.share_heads else p[name][g] for name in ("w_q", "w_k", "b1", "w2", "b2")
        )
        pairs = torch.cat(
            (
                q_bar[:, g, :, None].expand(-1, -1, nk, -1),
                k_bar[:, g, None].expand(-1, nq, -1, -1),
            ),
            -1,
        )
        hidden = torch.relu(pairs @ torch.cat((w_q, w_k), 1).T + b1)
        scores.append(hidden @ w2 + b2)
    scores = torch.stack(scores, 1)
    read = [
        (x + torch.zeros_like(scores)) for x in (p["theta"].view(-1, 1, 1), p["log_tau"].view(1, 1, 1, 1))
    ]
    bias = torch.log(torch.sigmoid((scores - read[0]) / read[1].exp()))
    at = (torch.arange(nq) * block + offset).clamp(0, (nk - 1) * block) // block
    column = torch.arange(nk)
    free = column >= at[:, None] if is_causal else column == at[:, None]
    bias = torch.where(free, torch.zeros_like(bias), bias).repeat_interleave(heads // groups, 1)
    spread = bias.repeat_interleave(block, 2)[:, :, :q_len].repeat_interleave(block, 3)[..., :k_len]
    allowed = tiles.repeat_interleave(block, 2)[:, :, :q_len].repeat_interleave(block, 3)[..., :k_len]
    allowed = allowed & ~ignored[:, None, None]
    if is_causal:
        allowed = allowed & (torch.arange(k_len) <= position[:, None])
    kk, vv = (x.repeat_interleave(heads // kv_heads, 2) for x in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, kk) * scale + spread
    if key_bias is not None:
        logits = logits + key_bias[:, None, None]
    empty = ~allowed.any(-1, keepdim=True)
    logits = logits.masked_fill(~allowed, -math.inf).masked_fill(empty, 0.0)
    weights = logits.softmax(-1).masked_fill(empty, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, vv), weights, read


def fresh():
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


def made(q, k, *, dtype=torch.float32, **settings):
    """A module for these inputs, with parameters large enough for scores that differ."""
    options = {name: settings.pop(name) for name in ("dropout", "scale", "backend") if name in settings}
    config = st.AdaptiveConfig(**{"base_sparsity": 0.6, "block_size": BLOCK} | settings)
    module = BlockSparseAdaptive(
        config,
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        head_dim=q.shape[3],
        dtype=dtype,
        **options,
    )
    with torch.no_grad():
        for parameter in module.scorer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


def inputs(batch=2, q_len=150, k_len=150, heads=4, kv_heads=2, dim=16, dtype=torch.float32):
    shapes = [(batch, q_len, heads, dim), (batch, k_len, kv_heads, dim), (batch, k_len, kv_heads, dim)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def tail_padding(batch, k_len, *lengths):
    return torch.arange(k_len) >= torch.tensor(lengths + (k_len,) * (batch - len(lengths)))[:, None]


def run_oracle(module, q, k, v, is_causal=False, padding=None):
    """(leaves by name, and what ``dense_adaptive`` returns) over the tiles of the last forward."""
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    names = {name.removeprefix("scorer."): x for name, x in own.items()}
    names |= {
        "theta": names.pop("threshold"),
        "log_tau": names.pop("log_temperature"),
        "q": q,
        "k": k,
        "v": v,
    }
    leaf = {name: x.detach().double().requires_grad_() for name, x in names.items()}
    result = dense_adaptive(
        module.config,
        leaf,
        *(leaf[name] for name in "qkv"),
        tiles_of(module.last_layout, len(q), q.shape[2]),
        is_causal=is_causal,
        padding=padding,
        first=is_causal and module.config.query_summary == "auto",
        scale=module.scale or 1 / math.sqrt(q.shape[3]),
    )
    return leaf, *result


def compare(module, q, k, v, limit, is_causal=False, padding=None):
    """Asserts that output and every gradient are those of attention written out, within ``limit``."""
    for x in (q, k, v):
        x.grad = None
    module.zero_grad()
    out = module(q, k, v, is_causal=is_causal, key_padding_mask=padding)
    weight = torch.randn(out.shape, dtype=torch.float64, device=out.device)
    if padding is not None:
        # With dropped rows the sums of gradients over tokens differ from tile to tile.
        weight = weight * (torch.rand(out.shape[:2], device=out.device) < 0.8)[..., None, None]
    weight = weight.to(out.dtype).double()
    (out * weight).sum().backward()
    with out.device:
        leaf, expected, _, read = run_oracle(module, q, k, v, is_causal, padding)
    for x in read:
        x.retain_grad()
    (expected * weight).sum().backward()
    # Scalars are sums over all tiles that may cancel: they are measured against what is summed. Where softmax
    # has one tile to choose from nothing is left to sum: then against a tenth of the gradient of one β, a
    # sum over its rows of products dO·V of size √D.
    unit = {name: x.grad.norm().item() for name, x in zip(("theta", "log_tau"), read, strict=True)}
    unit["b2"] = unit["theta"]
    least = 0.1 * math.sqrt(module.config.block_size * q.shape[3])
    grads = {"theta": module.threshold.grad, "log_tau": module.log_temperature.grad}
    grads |= {name: x.grad for name, x in module.scorer.named_parameters()}
    grads |= {"q": q.grad, "k": k.grad, "v": v.grad}
    pairs = {name: (grad, leaf[name].grad) for name, grad in grads.items() if grad is not None}
    assert len(pairs) >= 9
    for name, (got, want) in ({"out": (out, expected)} | pairs).items():
        size = max(want.norm().item(), unit.get(name, 0.0), least)
        error = (got.double() - want).norm().item() / size
        assert error <= limit, f"{name}: {error:.3g} above {limit:.3g}"
