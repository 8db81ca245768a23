"""``sparsetile plan``: what a pattern costs on any number of ranks, from the plan alone."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from sparsetile.cli import positive, token_count
from sparsetile.distributed.plan import Plan, PlanReport, check_stage, make_plan
from sparsetile.distributed.sharding import Sharding, choose_sharding
from sparsetile.errors import ArgumentError, explain
from sparsetile.layout.blocks import BLOCK_SIZES, BlockLayout
from sparsetile.patterns import Causal, Hierarchical, Pattern, parse_pattern
from sparsetile.viz import byte_size, tokens

_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_ROWS = 16  # ranks listed before the rest are left out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``plan``."""
    parser.add_argument("pattern", metavar="PATTERN", help="as 'Local(2048) | Global(64)'")
    parser.add_argument(
        "--length", type=token_count, required=True, metavar="N", help="tokens of the sequence: 64K, 16M"
    )
    parser.add_argument(
        "--ranks", type=_numbers, required=True, metavar="W,…", help="processes: 64, or several: 2,8,64,1024"
    )
    parser.add_argument("--causal", action="store_true", help="also forbid keys after the query")
    parser.add_argument("--block", type=int, default=128, choices=BLOCK_SIZES, help="tile edge (default 128)")
    parser.add_argument(
        "--sharding",
        choices=("auto", "contiguous", "balanced"),
        default="auto",
        help="auto: contiguous, unless the busiest rank then has over 1.25 × the mean of the tiles",
    )
    parser.add_argument(
        "--ranks-per-node", type=positive, metavar="n", help="between nodes one copy of a tile travels"
    )
    parser.add_argument(
        "--max-remote-tokens", type=token_count, metavar="M", help="largest buffer of a stage, in tokens"
    )
    sizes = parser.add_argument_group("sizes of one layer")
    sizes.add_argument("--kv-heads", type=positive, default=8, metavar="G", help="default 8")
    sizes.add_argument("--heads", type=positive, metavar="H", help="query heads (default: the kv heads)")
    sizes.add_argument("--head-dim", type=positive, default=128, metavar="D", help="default 128")
    sizes.add_argument("--dtype", choices=tuple(_BYTES), default="bf16", help="default bf16")
    sizes.add_argument("--batch", type=positive, default=1, metavar="B", help="default 1")
    parser.set_defaults(run=main)


@dataclass(frozen=True, eq=False)
class _Planned:
    plan: Plan
    report: PlanReport
    seconds: float


def main(options: argparse.Namespace) -> int:
    """Print the plan of the pattern for each number of ranks; the details of it if there is one."""
    heads = options.kv_heads if options.heads is None else options.heads
    if heads % options.kv_heads:
        raise ArgumentError(
            explain(
                "--heads",
                expected=f"a multiple of the {options.kv_heads} kv heads",
                got=heads,
                fix="Each kv head serves as many query heads.",
            )
        )
    if options.ranks_per_node is not None:
        for ranks in options.ranks:
            if ranks > options.ranks_per_node and ranks % options.ranks_per_node:
                raise ArgumentError(
                    explain(
                        "--ranks-per-node",
                        expected=f"a divisor of {ranks} ranks",
                        got=options.ranks_per_node,
                        fix="Every node holds as many ranks.",
                    )
                )
    if options.max_remote_tokens is not None:
        check_stage("--max-remote-tokens", options.max_remote_tokens, options.block)
    begun = time.perf_counter()
    pattern = parse_pattern(options.pattern)
    if options.causal:
        pattern = pattern & Causal()
    machine = _hierarchical(pattern)
    for ranks in options.ranks:
        _check_machine(machine, ranks, options)
    layout = BlockLayout.from_pattern(pattern, options.length, block_size=options.block, heads=heads)
    built = time.perf_counter() - begun
    planned = [_plan(layout, ranks, heads, machine, options) for ranks in options.ranks]

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    title = f"{options.pattern}, causal" if options.causal else options.pattern
    sizes = f"{tokens(options.length)} tokens, {layout.nnz:,} tiles of {options.block}"
    console.print(f"[bold]{escape(title)}[/]: {sizes}, laid out in {built:.2g} s", soft_wrap=True)
    layer = f"{options.kv_heads} kv heads × {options.head_dim}, {options.dtype}, batch {options.batch}"
    console.print(
        f"Keys and values of one layer ({layer}) that the forward pass brings to a rank; backward returns as "
        "many gradients.",
        soft_wrap=True,
    )
    console.print(_worlds(planned))
    if len(planned) == 1:
        _details(console, planned[0])
    return 0


def _hierarchical(pattern: Pattern) -> Hierarchical | None:
    """The part of a pattern that says where tiles live, if it has one."""
    if isinstance(pattern, Hierarchical):
        return pattern
    return next(filter(None, map(_hierarchical, pattern.children)), None)


def _check_machine(machine: Hierarchical | None, ranks: int, options: argparse.Namespace) -> None:
    """Raises ArgumentError if the pattern is of another machine than the one asked about."""
    if machine is None:
        return
    here = (ranks, options.ranks_per_node or ranks)
    there = (machine.ranks, machine.ranks_per_node or machine.ranks)
    if there != here or options.sharding != "auto":
        sharding = "" if options.sharding == "auto" else f", --sharding {options.sharding}"
        raise ArgumentError(
            explain(
                "a Hierarchical pattern",
                expected=f"--ranks {there[0]} --ranks-per-node {there[1]} and its own order of chunks",
                got=f"--ranks {here[0]} --ranks-per-node {here[1]}{sharding}",
                fix="Its densities are of one machine and one sharding.",
            )
        )


def _plan(
    layout: BlockLayout, ranks: int, heads: int, machine: Hierarchical | None, options: argparse.Namespace
) -> _Planned:
    begun = time.perf_counter()
    if machine is not None:
        sharding = Sharding(options.length, ranks, options.block, machine.order)
    elif options.sharding == "auto":
        sharding = choose_sharding(layout, ranks)
    else:
        sharding = getattr(Sharding, options.sharding)(options.length, ranks, options.block)
    node = options.ranks_per_node
    plan = make_plan(
        layout,
        sharding,
        kv_heads=options.kv_heads,
        group_size=heads // options.kv_heads,
        ranks_per_node=None if node is None or node >= ranks else node,
        max_remote_tokens=options.max_remote_tokens,
    )
    report = plan.report(options.head_dim, _BYTES[options.dtype], options.batch)
    return _Planned(plan, report, time.perf_counter() - begun)


def _worlds(planned: list[_Planned]) -> Table:
    """One row for each number of ranks."""
    nodes = any(p.plan.ranks_per_node is not None for p in planned)
    table = Table(box=None, pad_edge=False, header_style="dim")
    names = ["ranks", "sharding", "tokens each", "received, mean", "most", "÷ attended", "ring, all-gather"]
    names += ["less by", *(["between nodes", "one copy less by"] if nodes else [])]
    names += ["busiest ÷ mean", "stages", "buffer", "plan"]
    for name in names:
        table.add_column(name, justify="left" if name == "sharding" else "right")
    for p in planned:
        plan, report, sharding = p.plan, p.report, p.plan.sharding
        crossing = []
        if nodes:
            crossing = ["–", "–"]
        if plan.ranks_per_node is not None:
            node = plan.ranks_per_node
            ratio = _ratio(report.crossing_directly.sum(), report.crossing.sum())
            crossing = [f"{byte_size(float(report.crossing.double().mean() * node))} a node", ratio]
        table.add_row(
            str(sharding.ranks),
            _name(sharding),
            tokens(-(-sharding.length // sharding.ranks)),
            byte_size(float(report.received.double().mean())),
            byte_size(int(report.received.max())),
            f"{report.excess:.3f}",
            byte_size(int(report.circulated.max())),
            _ratio(report.circulated.sum(), report.received.sum()),
            *crossing,
            f"{report.balance:.2f}",
            str(report.stages),
            byte_size(int(report.buffer.max())),
            f"{p.seconds:.2g} s",
        )
    return table


def _details(console: Console, planned: _Planned) -> None:
    """The ranks that receive most, and what all must agree on."""
    plan, report, ranks = planned.plan, planned.report, planned.plan.sharding.ranks
    order = torch.argsort(report.received, descending=True, stable=True)[:_ROWS].sort().values.tolist()
    heading = "each rank" if ranks <= _ROWS else f"the {_ROWS} of {ranks} ranks that receive most"
    table = Table(box=None, pad_edge=False, header_style="dim", title=heading, title_justify="left")
    for name in ("rank", "tokens", "received", "from ranks", "sent", "to ranks", "buffer", "tiles"):
        table.add_column(name, justify="right")
    for rank in order:
        table.add_row(
            str(rank),
            str(plan.sharding.tokens_of(rank)),
            byte_size(int(report.received[rank])),
            _partners(plan.recv_counts(rank)),
            byte_size(int(report.sent[rank])),
            _partners(plan.send_counts(rank)),
            byte_size(int(report.buffer[rank])),
            f"{int(report.tiles[rank]):,}",
        )
    console.print()
    console.print(table)
    what = "one tile of all kv heads" if plan.heads_together else "one tile of one kv head"
    console.print(f"\n{plan.units:,} units travel, each {what}; plan {plan.hash}", soft_wrap=True)


def _name(sharding: Sharding) -> str:
    if sharding.order is None:
        return "contiguous"
    balanced = Sharding.balanced(sharding.length, sharding.ranks, sharding.block)
    return "balanced" if sharding == balanced else "dealt"


def _partners(counts: Tensor) -> str:
    return str(int((counts.sum(0) > 0).sum()))


def _ratio(more: Tensor, less: Tensor) -> str:
    if not int(less):
        return "–"
    ratio = int(more) / int(less)
    return f"{ratio:,.0f}×" if ratio >= 100 else f"{ratio:.3g}×"


def _numbers(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]
