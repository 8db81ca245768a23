"""BlockSparseAdaptive: the variant that learns, for the input at hand, which tiles it keeps."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from sparsetile.adaptive import losses
from sparsetile.adaptive.choose import choose_tiles
from sparsetile.adaptive.coarse import add_coarse
from sparsetile.adaptive.config import AdaptiveConfig
from sparsetile.adaptive.places import Places
from sparsetile.adaptive.seen import Seen
from sparsetile.adaptive.summaries import summary_dim
from sparsetile.arguments import check_flag, check_mask, check_settings, check_tensors, check_tokens_first
from sparsetile.errors import ArgumentError, explain
from sparsetile.functional import sparse_attention
from sparsetile.kernels.dropout import draw_seed
from sparsetile.kernels.select import check_name
from sparsetile.nn.adaptive_weights import chosen_weights
from sparsetile.nn.remembered import Last, Remembering
from sparsetile.nn.weights import check_dense_size, check_form

__all__ = ["AdaptiveConfig", "BlockSparseAdaptive"]

_SAMPLED_ROWS = 8
"""Rows of each group that the flatness of scores is taken over."""


class BlockSparseAdaptive(Remembering):
    """Block-sparse attention whose tiles are chosen for each input by a learned scorer.

    For each batch element and selection group (a key-value head with its query heads, or each query head)::

        s_ij = scorer(q̄_i, k̄_j)                      q̄, k̄: summaries of query tile i and key tile j
        S_i  = own tile ∪ top-k of s_ij / τ           (+ Gumbel noise in training)
        β_ij = log σ((s_ij − θ) / τ)  for j ∈ S_i;    0 for the own tile
        out  = softmax over the keys of S_i of (scale·q·k + β_ij), times v

    The selection passes no gradient, the bias β does: ∂L/∂β_ij is the sum of the gradients of the tile's
    logits, which the kernels deliver exactly. So scorer, θ, τ and, through the summaries, q and k get the
    true gradient of the loss given the tiles that were kept. θ starts where σ((0 − θ)/τ) = 0.9.

    In evaluation there is no noise: the same input gives the same bits. Nothing of a neighbour in the batch
    enters a result.

    With ``coarse=True`` attention over one pooled key and value of every tile that a query sees is added,
    ``out + σ(g)·coarse``: see :func:`sparsetile.adaptive.coarse.add_coarse`.

    **Causal calls** choose for a whole tile of queries at once, so what chooses must not know what comes
    after the tile's first query: the tile is judged by its first query alone (``query_summary="auto"``) and
    from key tiles that end before it. A tile that reaches beyond the first query (the own one; two if
    Nk − Nq is no multiple of the block) is kept always, with β = 0 and unscored. So every output depends on
    its past alone, exactly. ``query_summary="tile"`` judges by all queries of a tile in causal calls, too:
    then later queries of a tile have a say in which past tiles its earlier ones see. No key or value of the
    future is read, but a model that generates token by token cannot do the same.

    Parameters take their sizes from the first forward, by PyTorch's convention for lazy modules, and lie on
    the device of its input; or at once if ``num_heads`` and ``head_dim`` are given.

    Args:
        config: settings; default ``AdaptiveConfig()``, which keeps 10 %.
        num_heads, head_dim: query heads H and width D, if they shall be fixed at once.
        num_kv_heads: key-value heads; default ``num_heads``.
        scale: factor on query·key; default 1/√D.
        dropout: share of the softmax weights that training drops, in [0, 1).
        backend: as in :func:`sparsetile.sparse_attention`.
        device, dtype: of the parameters.

    Raises:
        ArgumentError: an argument is not as above.

    Example:
        >>> import torch, sparsetile as st
        >>> attention = st.create_adaptive_block_sparse(base_sparsity=0.9)
        >>> q = k = v = torch.randn(2, 4096, 4, 64)
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([2, 4096, 4, 64])
    """

    def __init__(
        self,
        config: AdaptiveConfig | None = None,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = AdaptiveConfig() if config is None else config
        if not isinstance(config, AdaptiveConfig):
            raise ArgumentError(
                explain(
                    "config",
                    expected="an AdaptiveConfig or None",
                    got=type(config).__name__,
                    fix="E.g. AdaptiveConfig(base_sparsity=0.9).",
                )
            )
        check_settings(scale, dropout)
        check_name(backend)
        super().__init__(config, num_heads, head_dim, num_kv_heads, device, dtype)
        self.scale, self.dropout, self.backend = scale, dropout, backend

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        *,
        average_attn_weights: bool = True,
        weights: Literal["dense", "sparse"] = "dense",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention over the keys of the chosen tiles. No host sync, unless sparse weights are asked for.

        Args:
            q: ``[B, Nq, H, D]``.
            k, v: ``[B, Nk, Hkv, D]``, H a multiple of Hkv.
            is_causal: also forbid keys after the query; with Nq ≠ Nk the last query stands at the last key.
            key_padding_mask: bool ``[B, Nk]``, True = ignore this key. A tile of such keys alone is never
                chosen.
            need_weights: also return the softmax weights (before dropout), see ``weights``. Not with
                ``coarse=True``, whose output is no one softmax.
            average_attn_weights: the mean over heads instead of each head's own.
            weights: ``"dense"``: ``[B, Nq, Nk]`` (or ``[B, H, Nq, Nk]``), up to a size; ``"sparse"``: a
                ``torch.sparse_bsr`` tensor of the tiles that any batch element or head keeps.

        Returns:
            ``[B, Nq, H, D]`` in q's dtype, or a pair with the weights.

        Raises:
            ArgumentError: inputs that do not fit each other, or the sizes and device of the parameters.
            BackendError: as :func:`sparsetile.sparse_attention`.
        """
        check_tokens_first(q, k, v, "sparse_attention")
        check_flag("is_causal", is_causal)
        self._check_inputs(q, k, v, key_padding_mask)
        check_form(weights, need_weights)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if need_weights and weights == "dense":
            check_dense_size(q, k.shape[2])
        out, shares = self.attend(
            q,
            k,
            v,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            dropout=self.dropout if self.training else 0.0,
            form=weights if need_weights else None,
            average=average_attn_weights,
        )
        return out.transpose(1, 2) if shares is None else (out.transpose(1, 2), shares)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        is_causal: bool,
        key_padding_mask: Tensor | None,
        dropout: float,
        form: str | None,
        average: bool,
        key_bias: Tensor | None = None,
        config: AdaptiveConfig | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """:meth:`forward` without its checks, heads first, with a dropout of the caller's.

        Args:
            q, k, v: ``[B, H, Nq, D]``, ``[B, Hkv, Nk, D]``.
            form: of the weights, or None for none.
            key_bias: ``[B, Nk]``, added to the logits of each key; the choice of tiles does not know it.
            config: of this call, with the module's shapes of parameters; default: the module's own.

        Returns:
            ``[B, H, Nq, D]``, and the weights or None.
        """
        config = self.config if config is None else config
        scale = 1.0 / math.sqrt(q.shape[3]) if self.scale is None else self.scale
        if config.coarse and form is not None:
            raise ArgumentError(
                explain(
                    "need_weights",
                    expected="False with coarse=True, whose output is a sum of two softmaxes",
                    got=True,
                    fix="Pass need_weights=False; last_tiles and last_layout tell what was kept.",
                )
            )
        seen = Seen.of(q, k, self.scorer, config, is_causal=is_causal, padding=key_padding_mask)
        q, k = seen.q, seen.k
        places = choose_tiles(
            seen,
            config,
            self.scorer,
            threshold=self.threshold,
            temperature=self.temperature,
            noise=draw_seed(q.device) if self.training and config.exploration else None,
        )
        unscored = seen.unscored(places.column, seen.own[:, None])
        bias = self.biases(self.scorer.pairs(seen.features, places.column)).masked_fill(unscored, 0.0)
        tile_bias = places.to_edges(bias).to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        out, lse = sparse_attention(
            q,
            k,
            v,
            places.layout,
            tile_bias=tile_bias,
            scale=scale,
            dropout_p=dropout,
            key_padding_mask=key_padding_mask,
            attn_bias=losses.for_queries(key_bias, q.shape[2]),
            enable_gqa=True,
            backend=self.backend,
            return_lse=True,
        )
        distillation = sparsity = None
        if self.training and torch.is_grad_enabled():
            q, k, v = q.to(out.dtype), k.to(out.dtype), v.to(out.dtype)  # as autocast had them
            options: dict[str, Any] = {
                "key_padding_mask": key_padding_mask,
                "key_bias": key_bias,
                "scale": scale,
                "backend": self.backend,
            }
            if config.distillation == "kept":
                mass = losses.kept_mass(q, k, v, out, lse, places.layout, tile_bias, **options)
                distillation = self._kept_divergence(seen, places, mass)
            elif config.distillation == "sampled":
                distillation = self._sampled_divergence(seen, q, k, v, options)
            if config.selection == "top_p":
                sparsity = self._excess(seen, places)
        geometry = (seen.heads, seen.q_len, seen.k_len, seen.block, seen.is_causal)
        chosen = torch.where(places.valid, places.column, -1)
        self._last = Last(chosen, geometry, _density(seen, places), distillation, sparsity)
        if self.coarse_gate is not None:
            out = add_coarse(
                out,
                q,
                k,
                v,
                self.coarse_gate,
                block=seen.block,
                is_causal=is_causal,
                key_padding_mask=key_padding_mask,
                key_bias=key_bias,
                scale=scale,
                dropout=dropout,
                backend=self.backend,
            )
        if form is None:
            return out, None
        return out, chosen_weights(
            q.to(out.dtype),
            k.to(out.dtype),
            lse,
            places,
            bias,
            form=form,
            average=average,
            is_causal=is_causal,
            scale=scale,
            key_padding_mask=key_padding_mask,
            key_bias=key_bias,
        )

    def _check_inputs(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> None:
        heads, _, k_len, head_dim = check_tensors(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True
        )
        check_mask(padding, q.transpose(1, 2), k_len)
        kv_heads, groups = k.shape[2], self.scorer.num_heads
        width = self.scorer.d_head // summary_dim(1, self.config.pooling)
        given = (self.num_heads or heads, self.num_kv_heads or kv_heads)
        fits = given == (heads, kv_heads) and groups in (None, self.groups_of(heads, kv_heads))
        if head_dim != width or not fits:
            parts = [f"head_dim {width}"]
            if groups is not None:
                parts.append(f"{groups} selection groups")
            if self.num_heads is not None:
                parts.append(f"{given[0]} heads, {given[1]} key-value heads")
            raise ArgumentError(
                explain(
                    "q, k, v",
                    expected=f"{', '.join(parts)}, as the parameters were made for",
                    got=f"q {list(q.shape)}, k {list(k.shape)}",
                    fix="Make another module for other sizes.",
                )
            )
        if self.threshold.device != q.device:
            raise ArgumentError(
                explain(
                    "q",
                    expected=f"a tensor on {self.threshold.device}, where the parameters are",
                    got=str(q.device),
                    fix=f"Move the module with .to({str(q.device)!r}).",
                )
            )

    # -- what the losses are taken of ---------------------------------------------------------------

    def _kept_divergence(self, seen: Seen, places: Places, mass: Tensor) -> Tensor:
        features = self.scorer.features(seen.q_sum.detach(), seen.k_sum.detach())
        logits = self.scorer.pairs(features, places.column) / self.temperature.detach()
        counted = places.valid & ~seen.unscored(places.column, seen.own[:, None])
        return losses.divergence(places.from_edges(mass), logits, counted)

    def _sampled_divergence(
        self, seen: Seen, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
    ) -> Tensor:
        batch, groups, nq, nk = seen.shape
        row = torch.randint(nq, (1,), device=q.device)
        mass = losses.dense_mass(q, k, v, row, seen.block, is_causal=seen.is_causal, **options)
        mass = torch.unflatten(mass, 1, (groups, -1)).sum(2)[:, :, None]
        features = self.scorer.features(seen.q_sum.index_select(2, row).detach(), seen.k_sum.detach())
        column = torch.arange(nk, device=q.device).expand(batch, groups, 1, nk)
        logits = self.scorer.pairs(features, column) / self.temperature.detach()
        counted = seen.allowed(row) & ~seen.unscored(column, seen.own[row])
        return losses.divergence(mass, logits, counted)

    def _excess(self, seen: Seen, places: Places) -> Tensor:
        batch, groups, nq, nk = seen.shape
        device, count = seen.own.device, min(_SAMPLED_ROWS, nq)
        shift = torch.randint(nq, (1,), device=device)
        rows = (torch.arange(count, device=device) * nq // count + shift) % nq
        column = torch.arange(nk, device=device)
        scores = self.scorer.pairs(seen.rows_of(rows), column.expand(batch, groups, count, nk))
        allowed, own = seen.allowed(rows), seen.own[rows][:, None]
        if seen.is_causal:
            # As in the selection: the own tile is on the verge, a second one has no mass.
            verge = self.threshold.to(scores.dtype).view(-1, 1, 1)
            scores, allowed = torch.where(column == own, verge, scores), allowed & (column <= own)
        flatness = -losses.log_spread(scores / self.temperature, allowed)
        used = _density(seen, places).to(flatness.dtype)
        return (used + (flatness - flatness.detach()) - self.config.density).square()

    def extra_repr(self) -> str:
        return f"{self.config!r}\nchosen: {self.chosen}" if self.chosen else repr(self.config)


def _density(seen: Seen, places: Places) -> Tensor:
    # Every head of a group has the group's tiles.
    choices = seen.choices() * places.slot.shape[2]
    return places.layout.indptr[-1] / (
        choices.clamp(min=1) if isinstance(choices, Tensor) else max(choices, 1)
    )
