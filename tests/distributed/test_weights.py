"""The softmax weights of a sequence over several ranks against those of the single process."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsetile as st
from processes import run_ranks
from sparsetile.distributed import unshard_sequence
from sparsetile.distributed.call import Settings, sharding_by
from sparsetile.distributed.ranks import Ranks
from sparsetile.distributed.weights import attention_and_weights
from sparsetile.errors import ArgumentError, BackendError, MismatchError
from sparsetile.nn import weights as of_one
from sparsetile.patterns import Pattern

BLOCK = 16


def settings(**changed: Any) -> Settings:
    plain = Settings("contiguous", False, None, 0.0, True, "auto", BLOCK, None, True, True)
    return plain._replace(**changed)


def drawn(seed: int, length: int, kv_heads: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """(leaves q, k, v; the mask; gradients of output and weights of each head)."""
    torch.manual_seed(seed)
    leaves = [torch.randn(2, h, length, 8, dtype=torch.float64) for h in (4, kv_heads, kv_heads)]
    mask = torch.rand(2, length) < 0.2
    grad, of_weights = torch.randn_like(leaves[0]), torch.randn(2, 4, length, length, dtype=torch.float64)
    return [x.requires_grad_() for x in leaves], mask, grad, of_weights


def dense(rank: int, world: int, pattern: Pattern, length: int, order: str, seed: int) -> None:
    kv_heads = 2
    (q, k, v), mask, grad, of_weights = drawn(seed, length, kv_heads)
    common = {"key_padding_mask": mask, "block_size": BLOCK}
    expected = st.sparse_attention(q, k, v, pattern, enable_gqa=True, **common)
    for average in (False, True):
        weights = of_one.attention_weights(q, k, q, pattern, average=average, **common)
        of = of_weights.mean(1) if average else of_weights
        wanted = torch.autograd.grad(
            (expected * grad).sum() + (weights * of).sum(), (q, k, v), retain_graph=True
        )

        where = sharding_by(order, length, world, BLOCK)
        mine = where.positions_of(rank)
        leaves = [x.detach()[:, :, mine].requires_grad_() for x in (q, k, v)]
        out, got = attention_and_weights(
            *leaves, pattern, Ranks.of(None), settings(order=order), mask[:, mine], average
        )
        assert got is not None
        torch.testing.assert_close(got, weights[..., mine, :], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(out, expected[:, :, mine], rtol=1e-10, atol=1e-10)
        total = (out * grad[:, :, mine]).sum() + (got * of[..., mine, :]).sum()
        for a, b in zip(torch.autograd.grad(total, leaves), wanted, strict=True):
            torch.testing.assert_close(unshard_sequence(a, 2, where), b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(
    "pattern",
    [(st.Local(30) | st.Global(5)) & st.Causal(), st.Random(0.3, seed=1, by_head=True)],
    ids=["shared", "by head"],
)
def test_dense_weights_and_their_gradients(world: int, pattern: Pattern) -> None:
    run_ranks(dense, world, pattern, random.randrange(90, 200), "balanced", random.getrandbits(30))


def test_ranks_without_tokens_have_no_weights() -> None:
    run_ranks(dense, 4, st.Local(40), 2 * BLOCK + 3, "contiguous", random.getrandbits(30))


def sparse(rank: int, world: int, pattern: Pattern, length: int, seed: int) -> None:
    (q, k, v), mask, _, _ = drawn(seed, length, 2)
    common = {"key_padding_mask": mask, "block_size": BLOCK}
    lse = st.sparse_attention(q, k, v, pattern, enable_gqa=True, return_lse=True, **common)[1]
    mine = sharding_by("balanced", length, world, BLOCK).positions_of(rank)
    leaves = [x[:, :, mine] for x in (q, k, v)]
    for average in (False, True):
        whole = of_one.attention_weights(q, k, lse, pattern, weights="sparse", average=average, **common)
        asked = settings(order="balanced", weights="sparse")
        _, got = attention_and_weights(*leaves, pattern, Ranks.of(None), asked, mask[:, mine], average)
        assert got is not None and got.layout == torch.sparse_bsr and not got.requires_grad
        rows = got.to_dense()
        assert rows.shape[-2:] == (-(-len(mine) // BLOCK) * BLOCK, -(-length // BLOCK) * BLOCK)
        expected = whole.to_dense()[..., mine, :]
        torch.testing.assert_close(rows[..., : len(mine), :], expected, rtol=1e-10, atol=1e-10)
        assert not rows[..., len(mine) :, :].any()


@pytest.mark.parametrize("pattern", [st.Local(30), st.Random(0.3, seed=1, by_head=True)])
def test_sparse_weights(pattern: Pattern) -> None:
    run_ranks(sparse, 3, pattern, random.randrange(90, 200), random.getrandbits(30))
    run_ranks(sparse, 4, pattern, 2 * BLOCK + 3, random.getrandbits(30))


def of_one_operand(rank: int, world: int) -> None:
    """Another leaf on each rank: backward is collective all the same."""
    torch.manual_seed(rank)
    x = [torch.randn(1, 2, 2 * BLOCK, 8) for _ in range(3)]
    x[rank].requires_grad_()
    out, weights = attention_and_weights(*x, st.Full(), Ranks.of(None), settings(), None, False)
    assert weights is not None
    (out.sum() + weights.square().sum()).backward()
    assert x[rank].grad is not None and x[rank].grad.any()


def test_gradients_of_another_operand_on_each_rank() -> None:
    run_ranks(of_one_operand, 3)


def refused(rank: int, world: int) -> list[str]:
    x = torch.randn(1, 2, 2 * BLOCK - (3 if rank == world - 1 else 0), 8, requires_grad=True)
    ranks, texts = Ranks.of(None), []

    def call(**changed: Any) -> tuple[Tensor, Tensor | None]:
        return attention_and_weights(x, x, x, st.Full(), ranks, settings(**changed), None, True)

    weights = call()[1]
    assert weights is not None
    with pytest.raises(BackendError, match="no second derivative"):
        torch.autograd.grad(weights.square().sum(), [x], create_graph=True)
    # A byte too few for the ranks that hold most: the last one, whose weights would fit, refuses too.
    of_one.DENSE_LIMIT = 2 * (2 * BLOCK) * (world * 2 * BLOCK - 3) * 4 - 1
    with pytest.raises(ArgumentError, match="need_weights") as raised:
        call()
    texts.append(str(raised.value))
    assert call(weights="sparse")[1] is not None
    for changed in ({"weights": "sparse" if rank else "dense"}, {"need_weights": rank > 0}):
        with pytest.raises(MismatchError) as differing:
            call(**changed)
        texts.append(str(differing.value))
    with pytest.raises(ArgumentError, match="weights") as form:
        call(weights="sparse", need_weights=False)
    return [*texts, str(form.value)]


def test_what_is_refused_is_refused_on_every_rank() -> None:
    first, *others = run_ranks(refused, 3)
    assert all(other == first for other in others)
