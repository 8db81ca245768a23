"""BlockSparseRingMultiheadDilatedAttention: a drop-in for ``nn.MultiheadAttention``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetile.arguments import check_types
from sparsetile.errors import ArgumentError, explain
from sparsetile.functional import merge_attention, sparse_attention
from sparsetile.kernels.select import check_name
from sparsetile.layout.blocks import BlockLayout
from sparsetile.nn.adaptive import AdaptiveConfig, BlockSparseAdaptive
from sparsetile.nn.learned import across, attend_chosen, kept_by, refuse_mask
from sparsetile.nn.masks import Masks, MultiheadError, check_inputs, masks_of
from sparsetile.nn.plan import Planned, SparsePlan
from sparsetile.nn.weights import (
    check_dense_size,
    check_form,
    dense_weights,
    scaled_logits,
    sparse_weights,
)
from sparsetile.patterns import Pattern
from sparsetile.patterns.config import SparsePatternConfig


class BlockSparseRingMultiheadDilatedAttention(Planned, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` that attends the keys of its pattern, or of the tiles that it learns, alone.

    Constructor, parameters, initialisation, state dict, forward arguments and results are those of
    ``nn.MultiheadAttention`` (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2). The output is the one it
    gives under the pattern's mask; with density 1 it is its output. See ``docs/multihead.md``.

    With an :class:`AdaptiveConfig` the submodule ``learned``, a :class:`BlockSparseAdaptive`, chooses the
    tiles of every input: its parameters, losses and views are there. Then ``attn_mask`` may be the causal
    mask alone (with ``is_causal=True`` and L = S), and no keys are appended. Where ``key`` is not the very
    tensor that ``query`` is, a tile of queries is judged by its first (``query_summary="auto"``), so that a
    decoder's later queries have no say in what its earlier ones see.

    It differs in three places: a query that may attend no key gets attention 0 (then the output projection)
    where ``nn.MultiheadAttention`` gives NaN; weights that were asked for are those of the kept keys, 0
    elsewhere; and the fused inference path of ``nn.TransformerEncoderLayer`` never runs, since it would
    attend every key.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device,
            dtype: as in ``nn.MultiheadAttention``. The keys that ``add_bias_kv`` and ``add_zero_attn`` append
            are always attended; the pattern is laid over the others.
        sparsity_ratio: the density, in (0, 1]; default 0.1.
        segment_lengths, dilation_rates: branches of a ``"dilated_sparse"`` pattern (tokens, tiles); without
            them the pattern is ``"global_local"``.
        sparse_config: kind, density and sizes of the pattern, instead of ``sparsity_ratio``; or an
            :class:`AdaptiveConfig`: tiles are learned.
        backend: as in :func:`sparsetile.sparse_attention`.

    Attributes:
        plan: the fixed pattern's; absent where tiles are learned.
        learned: what chooses the tiles, or None.

    Raises:
        PatternError: impossible branches, density or sizes.
        ArgumentError: an unknown backend; learned tiles with ``add_bias_kv`` or ``add_zero_attn``.

    Example:
        >>> import torch, sparsetile as st
        >>> attention = st.BlockSparseRingMultiheadDilatedAttention(64, 4, batch_first=True)
        >>> x = torch.randn(2, 1024, 64)
        >>> out, _ = attention(x, x, x, need_weights=False)
        >>> out.shape
        torch.Size([2, 1024, 64])
    """

    backend: str
    learned: BlockSparseAdaptive | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        sparsity_ratio: float | None = None,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        sparse_config: SparsePatternConfig | AdaptiveConfig | None = None,
        backend: str = "auto",
    ) -> None:
        kept = kept_by(segment_lengths, dilation_rates, sparse_config, sparsity_ratio)
        check_name(backend)
        if isinstance(kept, AdaptiveConfig) and (add_bias_kv or add_zero_attn):
            raise ArgumentError(
                explain(
                    "add_bias_kv, add_zero_attn",
                    expected="False beside an AdaptiveConfig",
                    got=f"{add_bias_kv}, {add_zero_attn}",
                    fix="The keys that these append lie in no tile that could be chosen.",
                )
            )
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        self._follow(kept, backend)

    def _follow(self, kept: SparsePlan | AdaptiveConfig, backend: str) -> None:
        """Makes a constructed ``nn.MultiheadAttention`` attend the keys of a plan, or of tiles it learns."""
        self.backend = backend
        self.learned = None
        if isinstance(kept, SparsePlan):
            self.plan = kept
        else:
            self._across = across(kept)
            weight = self.out_proj.weight
            self.learned = BlockSparseAdaptive(
                kept,
                num_heads=self.num_heads,
                head_dim=self.head_dim,
                backend=backend,
                device=weight.device,
                dtype=weight.dtype,
            ).train(self.training)
        # nn.TransformerEncoderLayer and nn.TransformerEncoder read this of their attention before they run
        # fused dense attention on its weights in its place. Here `in_proj_weight` says what this said.
        self._qkv_same_embed_dim = False

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def layout_for(
        self,
        q_len: int,
        k_len: int | None = None,
        is_causal: bool = False,
        *,
        heads: int | None = None,
        device: torch.device | str | None = None,
    ) -> BlockLayout:
        """The layout that a forward of these lengths uses; see :meth:`Planned.layout_for`.

        Raises:
            ArgumentError: tiles are learned: see ``learned.last_layout``.
        """
        if self.learned is not None:
            self.learned.layout_for()
        heads = self.num_heads if heads is None else heads
        return super().layout_for(q_len, k_len, is_causal, heads=heads, device=device)

    def extra_repr(self) -> str:
        return super().extra_repr() if self.learned is None else self.chosen

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        weights: str = "dense",
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``query`` over the kept keys; arguments and results as ``nn.MultiheadAttention``'s.

        Args:
            query: ``[L, E]``, ``[L, B, E]``, or with ``batch_first`` ``[B, L, E]``.
            key, value: the same with S keys and ``kdim``, ``vdim`` features.
            key_padding_mask: ``[B, S]`` (``[S]`` unbatched); bool: True = ignore the key; float: added.
            need_weights: also return the weights. That takes memory in L·S; pass False if you do not use
                them.
            attn_mask: ``[L, S]`` or ``[B·H, L, S]``; bool: True = not allowed; float: added to the logits.
                It acts within the pattern, and takes memory in L·S. With learned tiles only beside
                ``is_causal=True``, with L = S.
            average_attn_weights: the mean over heads instead of each head's own.
            is_causal: a hint that ``attn_mask``, which must be given, is the causal mask. For L = S the
                causal pattern then replaces the mask.
            weights: ``"dense"``; or ``"sparse"``: weights as a ``torch.sparse_bsr`` tensor of the kept tiles,
                before dropout and without gradient, its lengths rounded up to the block size.

        Returns:
            output in query's shape, and the weights or None: ``[B, L, S]``, per head ``[B, H, L, S]``,
            unbatched without B, one or two keys more with ``add_bias_kv`` and ``add_zero_attn``.

        Raises:
            MultiheadError: shapes, dtypes or hints that ``nn.MultiheadAttention`` rejects too.
            ArgumentError: dense weights past 1 GiB; sparse weights of a module with appended keys; with
                learned tiles another mask than the causal one.
        """
        check_form(weights, need_weights)
        if not (type(query) is type(key) is type(value) is Tensor):
            check_types(query=query, key=key, value=value)
        if query.is_nested or key.is_nested or value.is_nested:
            masked = key_padding_mask is not None or attn_mask is not None
            return self._attend_nested(query, key, value, masked or need_weights), None
        batched, fused = query.dim() == 3, self.in_proj_weight is not None
        check_inputs(query, key, value, self.embed_dim, self.batch_first, fused)
        # [B, H, N, D] views of whatever order the input has.
        width = (self.num_heads, self.head_dim)
        heads = [x.view(*x.shape[:-1], *width) for x in self._project(query, key, value)]
        if not batched:
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in heads)
        elif self.batch_first:
            q, k, v = (x.transpose(1, 2) for x in heads)
        else:
            q, k, v = (x.permute(1, 2, 0, 3) for x in heads)
        masks = masks_of(
            q,
            k.shape[2],
            batched=batched,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            is_causal=is_causal,
        )
        if self.learned is not None and attn_mask is not None and not masks.is_causal:
            refuse_mask(attn_mask, q.shape[2], k.shape[2])
        form = weights if need_weights else None
        out, shares = self._attend(q, k, v, masks, form, average_attn_weights, key is query)
        if not batched:
            out = out.squeeze(0).transpose(0, 1).flatten(1)
        elif self.batch_first:
            out = out.transpose(1, 2).flatten(2)
        else:
            out = out.permute(2, 0, 1, 3).flatten(2)
        out = F.linear(out, self.out_proj.weight, self.out_proj.bias)
        if shares is not None and not batched:
            shares = shares.squeeze(0) if shares.layout is torch.strided else _only(shares)
        return out, shares

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """Query, key and value after their input projections, in one product where they are one tensor."""
        weight, bias, width = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if weight is None:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            rows = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            return [F.linear(x, w, b) for x, w, b in zip((query, key, value), rows, biases, strict=True)]
        if query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, -1)
        q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
        q = F.linear(query, weight[:width], q_bias)
        if key is value:
            return [q, *F.linear(key, weight[width:], kv_bias).chunk(2, -1)]
        k_bias, v_bias = (None, None) if kv_bias is None else kv_bias.chunk(2)
        k_rows, v_rows = weight[width:].chunk(2)
        return [q, F.linear(key, k_rows, k_bias), F.linear(value, v_rows, v_bias)]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, masks: Masks, form: str | None, average: bool, itself: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(``[B, H, L, D]``, the weights in that form or None); ``itself``: keys are the queries' tokens."""
        appended = self._appended(q)
        dropout = self.dropout if self.training else 0.0
        # Weights that are dropped out must be those that made the output, so they make it themselves.
        by_weights = form == "dense" and dropout > 0.0
        if form == "dense":
            check_dense_size(q, k.shape[2] + (0 if appended is None else appended[0].shape[2]))
        elif form == "sparse" and appended is not None:
            raise ArgumentError(
                explain(
                    'weights="sparse"',
                    expected="a module without add_bias_kv and add_zero_attn",
                    got="one with",
                    fix="The keys that these append lie in no tile; dense weights show them.",
                )
            )
        shares: Tensor | None
        if self.learned is not None:
            config = self.learned.config if itself else self._across
            call = (self.learned, config, q, k, v, masks, 0.0 if by_weights else dropout)
            out, shares = attend_chosen(*call, form, average and form == "sparse")
        else:
            pattern = self.plan.attended(masks.is_causal)
            out, lse = self._kept(q, k, v, pattern, masks, 0.0 if by_weights else dropout)
            if appended is not None:
                logits = scaled_logits(q, appended[0])
                own = F.dropout(logits.softmax(-1), 0.0 if by_weights else dropout).to(out.dtype)
                out, lse = merge_attention((out, lse), (own @ appended[1], logits.logsumexp(-1)))
            options: dict[str, Any] = {
                "key_padding_mask": masks.padding,
                "attn_bias": masks.bias,
                "block_size": self.plan.block_size,
            }
            shares = None
            if form == "sparse":
                shares = sparse_weights(q, k, lse, pattern, average=average, **options)
            elif form == "dense":
                shares = dense_weights(q, k, pattern, appended=appended and appended[0], **options)
        if form != "dense" or shares is None:
            return out, shares
        if by_weights:
            shares = F.dropout(shares, dropout)
            if appended is not None:
                v = torch.cat((v, appended[1].expand(len(v), -1, -1, -1)), 2)
            out = shares @ v
        return out, shares.mean(1) if average else shares

    def _kept(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern | str, masks: Masks, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """Attention over the keys of the pattern, and its log-sum-exp."""
        if not q.numel() or not k.numel():
            dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
            return q * 0.0, q.new_full(q.shape[:3], -torch.inf, dtype=dtype)
        self.warn_of_density(q, k, masks.is_causal)
        out, lse = sparse_attention(
            q,
            k,
            v,
            pattern,
            # The kernels' dropout keeps some weights; F.dropout(p=1) keeps none.
            dropout_p=dropout if dropout < 1.0 else 0.0,
            key_padding_mask=masks.padding,
            attn_bias=masks.bias,
            block_size=self.plan.block_size,
            backend=self.backend,
            return_lse=True,
        )
        return out if dropout < 1.0 else F.dropout(out, dropout), lse

    def _appended(self, q: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values ``[1, H, 1 or 2, D]`` of ``add_bias_kv`` and ``add_zero_attn``, or None."""
        keys: list[Tensor] = []
        values: list[Tensor] = []
        shape = (1, self.num_heads, 1, self.head_dim)
        if self.bias_k is not None and self.bias_v is not None:
            keys.append(self.bias_k.view(shape).to(q.dtype))
            values.append(self.bias_v.view(shape).to(q.dtype))
        if self.add_zero_attn:
            keys.append(q.new_zeros(shape))
            values.append(q.new_zeros(shape))
        return (torch.cat(keys, 2), torch.cat(values, 2)) if keys else None

    def _attend_nested(self, query: Tensor, key: Tensor, value: Tensor, more: bool) -> Tensor:
        """Self-attention over a batch of sequences of different lengths, padded for the while."""
        strided = query.is_nested and query.layout is torch.strided
        if not strided or query is not key or key is not value or not self.batch_first or more:
            raise MultiheadError(
                explain(
                    "nested tensors",
                    expected="self-attention of one strided nested tensor, batch_first=True, "
                    "need_weights=False and no masks",
                    got=f"query nested {query.is_nested}, key {key.is_nested}, value {value.is_nested}, "
                    f"batch_first={self.batch_first}",
                    fix="Pass a padded tensor and a key_padding_mask.",
                )
            )
        lengths = [len(x) for x in query.unbind()]
        padded = torch.nested.to_padded_tensor(query, 0.0)
        place = torch.arange(padded.shape[1], device=padded.device)
        beyond = place >= torch.tensor(lengths, device=padded.device)[:, None]
        out, _ = self.forward(padded, padded, padded, beyond, need_weights=False)
        return torch.nested.as_nested_tensor([x[:n] for x, n in zip(out, lengths, strict=True)])


def _only(weights: Tensor) -> Tensor:
    """The one batch element of a ``torch.sparse_bsr`` tensor, which cannot be squeezed."""
    return torch.sparse_bsr_tensor(
        weights.crow_indices()[0],
        weights.col_indices()[0],
        weights.values()[0],
        size=weights.shape[1:],
        check_invariants=False,
    )
