"""ImportanceScorer: how much a query tile wants a key tile, from their summaries alone.

Every form is split into a part of the query tile and a part of the key tile (:class:`Features`), which are
made once in O(tiles·hidden); a score then costs O(hidden) and no concatenated pair is ever formed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetile.errors import ArgumentError, explain
from sparsetile.kernels.triton_backend import device_problem

FORMS = ("mlp", "bilinear", "indexer")


class Features(NamedTuple):
    """The two halves of the scores; float32 (float64 if the scorer's parameters are).

    Attributes:
        a: ``[B, G, nq, hidden]``, of the query tiles (b₁ of the MLP included).
        b: ``[B, G, nk, hidden]``, of the key tiles.
        gates: ``[B, G, nq, sub_heads]``, the w_j(q̄) of the form ``"indexer"``; None for the others.
    """

    a: Tensor
    b: Tensor
    gates: Tensor | None = None


class ImportanceScorer(nn.Module):
    """Scores of (query tile, key tile) pairs from summaries q̄, k̄ of width d.

    ``form``::

        mlp        s = w₂·ReLU(W_q q̄ + W_k k̄ + b₁) + b₂
        bilinear   s = q̄ᵀ W k̄ / √d,   W = Uᵀ V with U, V [hidden, d]
        indexer    s = Σ_j w_j(q̄) · ReLU(q̄_jᵀ k̄_j) / √(J·c),   q̄_j = W_q,j q̄,  k̄_j = W_k,j k̄,  w(q̄) = W_w q̄

    ``mlp`` is exactly Linear(2d → hidden) · ReLU · Dropout · Linear(hidden → 1) on the concatenation [q̄, k̄],
    and starts as those layers do. ``bilinear`` has rank ≤ hidden and starts at U = V with orthonormal rows
    (columns, if hidden > d), so that its first scores are MoBA's q̄·k̄ (arXiv:2502.13189), projected if
    hidden < d. ``indexer`` is the lightning indexer of DeepSeek Sparse Attention (DeepSeek-V3.2, 2025, eq. 1)
    with J = ``sub_heads`` heads of width c = hidden / J; there one key serves all heads, here each has its
    own.

    Dropout falls on the terms of the sum over hidden (over j in ``indexer``), in training and in
    :meth:`pairs` alone: selection by :meth:`rows` never sees it.

    Parameters are ``[…]``, or ``[num_heads, …]`` if ``num_heads`` is given. Scores and features are computed
    in float32 (float64 if the parameters are float64), also under autocast.

    Args:
        d_head: width d of the summaries; for ``"max_min"`` pooling twice the head dimension.
        hidden_dim: width of the features.
        num_heads: None: one scorer for all selection groups; else the number G of groups, each with its own.
        dropout: in [0, 1).
        form: ``"mlp"``, ``"bilinear"`` or ``"indexer"``.
        sub_heads: of ``"indexer"``; must divide ``hidden_dim``.

    Raises:
        ArgumentError: an argument is not as above.
    """

    def __init__(
        self,
        d_head: int,
        hidden_dim: int,
        *,
        num_heads: int | None = None,
        dropout: float = 0.0,
        form: str = "mlp",
        sub_heads: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_scorer(d_head, hidden_dim, num_heads, dropout, form, sub_heads)
        self.d_head, self.hidden_dim, self.num_heads = d_head, hidden_dim, num_heads
        self.dropout, self.form = float(dropout), form
        self.sub_heads = sub_heads if form == "indexer" else 1
        shapes: dict[str, tuple[int, ...]] = {"w_q": (hidden_dim, d_head), "w_k": (hidden_dim, d_head)}
        if form == "mlp":
            shapes |= {"b1": (hidden_dim,), "w2": (hidden_dim,), "b2": ()}
        elif form == "indexer":
            shapes |= {"w_gate": (sub_heads, d_head)}
        lead = () if num_heads is None else (num_heads,)
        for name, shape in shapes.items():
            self.register_parameter(
                name, nn.Parameter(torch.empty((*lead, *shape), device=device, dtype=dtype))
            )
        self.reset_parameters()

    w_q: nn.Parameter
    w_k: nn.Parameter
    b1: nn.Parameter
    w2: nn.Parameter
    b2: nn.Parameter
    w_gate: nn.Parameter

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all parameters anew, from PyTorch's generator."""
        if self.form == "bilinear":
            each = [self.w_q] if self.num_heads is None else list(self.w_q.unbind(0))
            for weight in each:
                # QR knows no half precision.
                start = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
                weight.copy_(nn.init.orthogonal_(start))
            self.w_k.copy_(self.w_q)
            return
        # nn.Linear's bound is 1/√inputs; the first layer's inputs are q̄ and k̄ together.
        inputs = 2 * self.d_head if self.form == "mlp" else self.d_head
        for name, parameter in self.named_parameters():
            bound = 1 / math.sqrt(self.hidden_dim if name in ("w2", "b2") else inputs)
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        heads = "shared" if self.num_heads is None else f"heads={self.num_heads}"
        return f"{self.form}, {self.d_head} → {self.hidden_dim}, {heads}, dropout={self.dropout}"

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.w_q.dtype == torch.float64 else torch.float32

    @property
    def output_weight(self) -> Tensor | None:
        """w₂ of the form ``"mlp"``, ``[num_heads or 1, hidden]`` in the features' dtype; others: None."""
        return self._wide(self.w2).reshape(-1, self.hidden_dim) if self.form == "mlp" else None

    def features(self, q: Tensor, k: Tensor) -> Features:
        """The halves of all scores of query tiles with summaries ``q`` ``[B, G, nq, d]`` and key tiles with
        summaries ``k`` ``[B, G, nk, d]``: O((nq + nk)·d·hidden) time, O((nq + nk)·hidden) memory.

        Raises:
            ArgumentError: shapes do not fit each other or the scorer.
        """
        self._check_summaries(q, k)
        with torch.autocast(q.device.type, enabled=False):
            q, k = self._wide(q), self._wide(k)
            a, b = q @ self._wide(self.w_q).mT, k @ self._wide(self.w_k).mT
            if self.form == "mlp":
                return Features(a + self._wide(self.b1).unsqueeze(-2), b)
            if self.form == "bilinear":
                return Features(a / math.sqrt(self.d_head), b)
            # √(J·c) = √hidden.
            return Features(a, b, q @ self._wide(self.w_gate).mT / math.sqrt(self.hidden_dim))

    def rows(self, features: Features, start: int, stop: int) -> Tensor:
        """Scores of query tiles ``start`` to ``stop`` with every key tile, ``[B, G, stop − start, nk]``.

        Without gradients, memory is that of two such tensors, whatever hidden is; with them (it is
        differentiable), autograd keeps hidden times as much. Dropout is not applied.
        """
        a, b, gates = features.a[:, :, start:stop], features.b, features.gates
        with torch.autocast(a.device.type, enabled=False):
            if self.form == "bilinear":
                return a @ b.mT
            if self.form == "indexer":
                assert gates is not None
                gates = gates[:, :, start:stop]
                a, b = (torch.unflatten(x, -1, (gates.shape[-1], -1)) for x in (a, b))
                score = torch.zeros((), dtype=a.dtype, device=a.device)
                for j in range(gates.shape[-1]):
                    score = score + (a[..., j, :] @ b[..., j, :].mT).relu() * gates[..., j, None]
                return score
            weight = self.output_weight
            assert weight is not None
            return (
                _mlp_rows(a, b.mT.contiguous(), weight.mT[..., None, None])
                + self._wide(self.b2)[..., None, None]
            )

    def pairs(self, features: Features, column: Tensor, *, dropped: bool = True) -> Tensor:
        """Scores of a few key tiles of each query tile, with gradient to features and parameters, in
        O(B·G·nq·n·hidden) time and memory.

        Args:
            column: integers ``[B, G, nq, n]``, key tiles, all in range.
            dropped: with dropout in training.

        Returns:
            ``[B, G, nq, n]``, equal to the entries of :meth:`rows` up to rounding (without dropout). The
            gradient is summed in a fixed order, so it is bitwise equal run to run.
        """
        if self._in_one_kernel(features, dropped):
            from sparsetile.kernels.triton_pairs import pair_scores

            shift = self._wide(self.b2).view(-1) if self.form == "mlp" else None
            return pair_scores(features.a, features.b, self.output_weight, shift, column)
        batch, groups, nk, _ = features.b.shape
        line = torch.arange(batch * groups, device=column.device).view(batch, groups, 1, 1)
        # F.embedding, because its backward adds in a fixed order; that of plain indexing uses atomics.
        b = F.embedding(line * nk + column, features.b.flatten(0, 2))
        a = features.a[..., None, :]
        with torch.autocast(b.device.type, enabled=False):
            if self.form == "bilinear":
                return self._dropped(a * b, dropped).sum(-1)
            if self.form == "indexer":
                assert features.gates is not None
                terms = torch.unflatten(a * b, -1, (self.sub_heads, -1)).sum(-1).relu()
                return (self._dropped(terms, dropped) * features.gates[..., None, :]).sum(-1)
            weight, bias = self._wide(self.w2), self._wide(self.b2)
            hidden = self._dropped((a + b).relu(), dropped)
            if self.num_heads is None:
                return hidden @ weight + bias
            return (hidden * weight[:, None, None]).sum(-1) + bias[:, None, None]

    def has_kernels(self, features: Features) -> bool:
        """Whether there are Triton kernels for such features: fp32 ones on a GPU, of all forms but the
        indexer."""
        return features.a.is_cuda and features.a.dtype == torch.float32 and self.form != "indexer"

    def _in_one_kernel(self, features: Features, dropped: bool) -> bool:
        """Whether a Triton kernel serves :meth:`pairs`: where nobody wants a gradient."""
        a = features.a
        if not self.has_kernels(features) or torch.compiler.is_compiling():
            return False
        if self.training and dropped and self.dropout > 0.0:
            return False
        leaves = (a, features.b, self.w2, self.b2) if self.form == "mlp" else (a, features.b)
        differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
        return not differentiable and device_problem(a.device, "features") is None

    def _dropped(self, x: Tensor, wanted: bool) -> Tensor:
        return F.dropout(x, self.dropout, self.training and wanted)

    def _wide(self, x: Tensor) -> Tensor:
        return x.to(self.compute_dtype)

    def _check_summaries(self, q: Tensor, k: Tensor) -> None:
        fits = q.dim() == k.dim() == 4 and q.shape[:2] == k.shape[:2] and q.shape[-1] == k.shape[-1]
        lead = f"[B, {'G' if self.num_heads is None else self.num_heads}, "
        if not fits or q.shape[-1] != self.d_head or self.num_heads not in (None, q.shape[1]):
            raise ArgumentError(
                explain(
                    "features(q, k)",
                    expected=f"summaries {lead}nq, {self.d_head}] and {lead}nk, {self.d_head}]",
                    got=f"{list(q.shape)} and {list(k.shape)}",
                    fix="Pool with tile_summaries, and average queries over a group with group_queries.",
                )
            )


def _mlp_rows(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Σ_j w_j·ReLU(a_j + b_j): a ``[B, G, r, h]``, b ``[B, G, h, n]``, weight ``[h, G or 1, 1, 1]``."""
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (a, b, weight))
    if needs_grad:
        score = torch.zeros((), dtype=a.dtype, device=a.device)
        for j in range(a.shape[-1]):
            score = torch.addcmul(score, (a[..., j, None] + b[..., j, None, :]).relu(), weight[j])
        return score
    score = a.new_zeros((*a.shape[:-1], b.shape[-1]))
    term = torch.empty_like(score)
    for j in range(a.shape[-1]):
        torch.add(a[..., j, None], b[..., j, None, :], out=term)
        score.addcmul_(term.relu_(), weight[j])
    return score


def check_scorer(
    d_head: object, hidden_dim: object, num_heads: object, dropout: object, form: object, sub_heads: object
) -> None:
    """Raises ArgumentError for what :class:`ImportanceScorer` cannot be made of."""

    def count(value: object) -> bool:
        return type(value) is int and value >= 1

    if not count(d_head):
        _refuse("d_head", "an integer ≥ 1", d_head, "Give the width of the summaries.")
    if not count(hidden_dim):
        _refuse("hidden_dim", "an integer ≥ 1", hidden_dim, "32 is the usual choice.")
    if num_heads is not None and not count(num_heads):
        _refuse("num_heads", "None or an integer ≥ 1", num_heads, "None shares one scorer among all groups.")
    number = isinstance(dropout, int | float) and not isinstance(dropout, bool)
    if not number or not 0.0 <= dropout < 1.0:  # type: ignore[operator]
        _refuse("dropout", "a number in [0, 1)", dropout, "0.0 turns it off.")
    if form not in FORMS:
        _refuse("form", f"one of {', '.join(FORMS)}", form, "'mlp' is the usual choice.")
    if form == "indexer" and (not count(sub_heads) or hidden_dim % sub_heads):  # type: ignore[operator]
        _refuse("sub_heads", f"a divisor of hidden_dim {hidden_dim}", sub_heads, "Change one of the two.")


def _refuse(what: str, expected: str, got: object, fix: str) -> None:
    raise ArgumentError(explain(what, expected=expected, got=repr(got), fix=fix))
