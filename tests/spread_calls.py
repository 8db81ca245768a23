"""Calls of attention over one whole sequence, by one process and by ranks that share it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import sparsetile as st
from sparsetile.distributed import Sharding, distributed_attention, unshard_sequence

BLOCK = 16


@dataclass
class Case:
    """One call over the whole sequence; ``seed`` draws its tensors."""

    seed: int
    pattern: Any
    length: int
    heads: int = 2
    kv_heads: int = 2
    is_causal: bool = False
    order: str = "contiguous"
    most: int | None = None
    padded: bool = False
    dropout: float = 0.0
    biased: bool = False
    bias_shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float64
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        torch.manual_seed(self.seed)
        made = {
            "q": torch.randn(2, self.heads, self.length, 8, dtype=self.dtype),
            "k": torch.randn(2, self.kv_heads, self.length, 8, dtype=self.dtype),
            "v": torch.randn(2, self.kv_heads, self.length, 8, dtype=self.dtype),
            "grad": torch.randn(2, self.heads, self.length, 8, dtype=self.dtype),
            "grad_lse": torch.randn(2, self.heads, self.length, dtype=self.dtype),
        }
        if self.biased:
            made["bias"] = torch.randn(*self.bias_shape, self.layout().capacity, dtype=self.dtype)
        return made

    def layout(self) -> Any:
        if not self.biased:
            return self.pattern
        pattern = self.pattern & st.Causal() if self.is_causal else self.pattern
        return st.BlockLayout.from_pattern(pattern, self.length, block_size=BLOCK, heads=self.heads)

    def mask(self) -> Tensor | None:
        torch.manual_seed(self.seed + 1)
        return torch.rand(2, self.length) < 0.3 if self.padded else None

    def common(self) -> dict[str, Any]:
        return {
            "is_causal": self.is_causal and not self.biased,
            "dropout_p": self.dropout,
            "block_size": BLOCK,
            "enable_gqa": True,
            "return_lse": True,
        }


def loss(out: Tensor, lse: Tensor, made: dict[str, Tensor]) -> Tensor:
    return (out * made["grad"]).sum() + (lse * made["grad_lse"]).masked_fill(lse.isinf(), 0.0).sum()


def alone(case: Case) -> dict[str, Tensor]:
    """The single process."""
    made = case.tensors()
    leaves = {name: x.requires_grad_() for name, x in made.items() if not name.startswith("grad")}
    bias, mask = leaves.get("bias"), case.mask()
    torch.manual_seed(case.seed + 2)  # dropout's seed is drawn next
    out, lse = st.sparse_attention(
        leaves["q"], leaves["k"], leaves["v"], case.layout(), key_padding_mask=mask, tile_bias=bias,
        **case.common(),
    )  # fmt: skip
    grads = torch.autograd.grad(loss(out, lse, made), list(leaves.values()))
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(leaves, grads, strict=True))}


def on_rank(rank: int, world: int, cases: list[Case]) -> list[dict[str, Tensor]]:
    """The same over ranks, put together again."""
    found = []
    for case in cases:
        made = case.tensors()
        cut = Sharding.balanced if case.order == "balanced" else Sharding.contiguous
        where = cut(case.length, world, BLOCK)
        pieces = {
            name: x.index_select(2, where.positions_of(rank)) for name, x in made.items() if name != "bias"
        }
        leaves = {name: pieces[name].requires_grad_() for name in "qkv"}
        if case.biased:
            leaves["bias"] = made["bias"].requires_grad_()
        mask = case.mask()
        torch.manual_seed(case.seed + 2 + rank)  # of the draws of all ranks that of rank 0 counts
        out, lse = distributed_attention(
            leaves["q"], leaves["k"], leaves["v"], case.layout(), order=case.order,
            key_padding_mask=None if mask is None else mask[:, where.positions_of(rank)],
            tile_bias=leaves.get("bias"), max_remote_tokens=case.most, **case.common(), **case.options,
        )  # fmt: skip
        of_leaves = torch.autograd.grad(loss(out, lse, pieces), list(leaves.values()))
        grads = dict(zip(leaves, of_leaves, strict=True))
        whole = {"out": unshard_sequence(out, 2, where), "lse": unshard_sequence(lse, 2, where)}
        whole |= {name: unshard_sequence(grads[name], 2, where) for name in "qkv"}
        if case.biased:
            torch.distributed.all_reduce(grads["bias"])
            whole["bias"] = grads["bias"]
        found.append({name: x.detach() for name, x in whole.items()})
    return found
