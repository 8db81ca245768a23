"""The layouts of a call: of the whole sequence, of the parts of a rank, of its rows; each is kept with what
it is made from."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetile import op
from sparsetile.distributed.plan import make_plan
from sparsetile.distributed.rank_plan import RankPlan, rows_of
from sparsetile.distributed.sharding import Sharding
from sparsetile.functional import causal_of
from sparsetile.layout.blocks import BlockLayout
from sparsetile.layout.build import Rows
from sparsetile.layout.cache import cached_layout
from sparsetile.patterns import Pattern


def layout_of(
    pattern: Pattern | str | BlockLayout, is_causal: bool, length: int, block: int, heads: int
) -> BlockLayout:
    """The layout of the whole sequence, on the CPU."""
    if isinstance(pattern, BlockLayout):
        known = pattern._memo.get("on the cpu")
        if not isinstance(known, BlockLayout):
            # Kept with the layout, as the plan is with this one: read from a device once.
            known = pattern.to("cpu")
            if known is not pattern:
                pattern._memo["on the cpu"] = known
        return known
    if isinstance(pattern, str):
        pattern = op.parsed(pattern)
    return cached_layout(causal_of(pattern) if is_causal else pattern, length, None, block, "cpu", heads)


def plan_of(
    layout: BlockLayout,
    where: Sharding,
    rank: int,
    query: Tensor,
    key: Tensor,
    max_remote_tokens: int | None,
    ranks_per_node: int | None,
) -> RankPlan:
    """This rank's plan on its device; kept with the layout, so the next call finds it."""
    heads, kv_heads = query.shape[1], key.shape[1]
    name = f"plan {where} {rank} {heads} {kv_heads} {max_remote_tokens} {ranks_per_node} {query.device}"
    known = layout._memo.get(name)
    if not isinstance(known, RankPlan):
        # Made in inference mode, autograd could not keep it for the backward of a later call.
        with torch.inference_mode(False):
            made = make_plan(
                layout,
                where,
                kv_heads=kv_heads,
                group_size=heads // kv_heads,
                ranks_per_node=ranks_per_node,
                max_remote_tokens=max_remote_tokens,
            )
            known = layout._memo[name] = made.for_rank(rank).to(query.device)
    return known


def rows_layout(layout: BlockLayout, where: Sharding, rank: int, device: torch.device) -> BlockLayout:
    """The rows of this rank's tokens × the whole sequence, on ``device``; kept with the layout."""
    name = f"rows {where} {rank} {device}"
    known = layout._memo.get(name)
    if not isinstance(known, BlockLayout):
        with torch.inference_mode(False), torch.device("cpu"):
            edges, row = rows_of(layout, where.tiles_of(rank))
            column, mask_ids = layout.indices[edges].long(), layout.mask_ids[edges]
            known = BlockLayout._of(
                Rows(row, column, mask_ids, layout.masks),
                where.tokens_of(rank),
                where.length,
                where.block,
                where.block,
                heads=layout.heads,
            ).to(device)
        layout._memo[name] = known
    return known
