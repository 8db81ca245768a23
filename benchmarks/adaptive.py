"""What a learned pattern costs on one GPU, beside a fixed pattern of as many tiles and dense attention.

``python benchmarks/adaptive.py [--out benchmarks/results] [--kv-heads 32 8] [--skip-dense]``

B1 H32 D128 bf16, sixteen 128×128 tiles a row. At 131,072 tokens: summaries and scores, selection, layout,
bias, the attention kernels with a fixed and with the chosen tiles, the module forward and forward+backward,
each by events after the L2 was overwritten, the choice also as a CUDA graph, without the host. Then the
module and the best dense backend of ``F.scaled_dot_product_attention`` from 4,096 tokens up, in the same run:
where they cross. Writes ``adaptive_<machine>.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparsetile as st
from sparsetile.adaptive.choose import choose_tiles
from sparsetile.adaptive.seen import Seen
from sparsetile.bench.measure import time_call
from sparsetile.environment import provenance
from sparsetile.layout.blocks import BlockLayout
from sparsetile.nn.adaptive import BlockSparseAdaptive
from sparsetile.patterns.budget import tiles_for

HEADS, WIDTH, BLOCK, KEPT, DTYPE = 32, 128, 128, 16, torch.bfloat16
DEVICE = torch.device("cuda", 0)
LONG = 131_072
LENGTHS = (4096, 8192, 16_384, 32_768, 65_536, LONG)
DENSE = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}


def tensors(length: int, kv_heads: int) -> list[Tensor]:
    heads = (HEADS, kv_heads, kv_heads)
    return [torch.randn(1, length, h, WIDTH, device=DEVICE, dtype=DTYPE, requires_grad=True) for h in heads]


def module_for(length: int, kv_heads: int, is_causal: bool) -> BlockSparseAdaptive:
    """Sixteen tiles a row; when causal on average, because rows keep a share of what lies before them."""
    tiles, kept = length // BLOCK, 2 * KEPT if is_causal else KEPT
    config = st.AdaptiveConfig(base_sparsity=max(0.0, 1 - kept / tiles), learnable_temperature=True)
    return BlockSparseAdaptive(config, num_heads=HEADS, num_kv_heads=kv_heads, head_dim=WIDTH, device=DEVICE)


def random_layout(length: int, density: float, is_causal: bool) -> BlockLayout:
    """As many tiles in each row as the module keeps, at random places that all heads share."""
    tiles = length // BLOCK
    row = torch.arange(tiles, device=DEVICE)
    counts = tiles_for(density, row + 1 if is_causal else torch.full_like(row, tiles))
    weight = torch.rand(1, 1, tiles, tiles, device=DEVICE)
    weight.diagonal(dim1=-2, dim2=-1).fill_(2.0)
    best = (weight.tril() if is_causal else weight).topk(int(counts.max()), -1).indices
    place = torch.arange(best.shape[-1], device=DEVICE)
    chosen = torch.where(place < counts[:, None], best, -1)
    return BlockLayout.from_topk(chosen, length, length, BLOCK, is_causal)


def both(call: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    grad = torch.randn(1, leaves[0].shape[1], HEADS, WIDTH, device=DEVICE, dtype=DTYPE)
    return lambda: torch.autograd.grad(call(), leaves, grad)


def graph_ms(call: Callable[[], object]) -> float:
    """Milliseconds of a call as a CUDA graph: what the GPU needs, however slow the host is."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    found = time_call(graph.replay, DEVICE).median_ms
    del kept
    return found


def parts(length: int, kv_heads: int, is_causal: bool) -> dict[str, Any]:
    """Milliseconds of the module's parts and of the whole."""
    module, leaves = module_for(length, kv_heads, is_causal), tensors(length, kv_heads)
    q, k = (x.detach().transpose(1, 2) for x in leaves[:2])
    fixed = random_layout(length, module.config.density, is_causal)
    trained = [*leaves, *module.parameters()]

    def attend(layout: BlockLayout, tile_bias: Tensor | None = None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in leaves)
        out = st.sparse_attention(q, k, v, layout, tile_bias=tile_bias, enable_gqa=True)
        return out.transpose(1, 2)

    def see() -> Seen:
        return Seen.of(q, k, module.scorer, module.config, is_causal=is_causal, padding=None)

    def choose(seen: Seen) -> Any:
        settings = {"threshold": module.threshold, "temperature": module.temperature, "noise": None}
        return choose_tiles(seen, module.config, module.scorer, **settings)

    found: dict[str, Any] = {"tokens": length, "kv_heads": kv_heads, "is_causal": is_causal}
    with torch.no_grad():
        module.eval()
        seen = see()
        places = choose(seen)
        found["tiles_a_row"] = places.valid.sum(-1).float().mean().item()
        assert found["tiles_a_row"] == fixed.nnz / fixed.q_blocks, "the rivals compute as many tiles"
        bias = places.to_edges(module.biases(module.scorer.pairs(seen.features, places.column)))
        calls: dict[str, Callable[[], object]] = {
            "summaries_and_features": see,
            "choose_and_layout": lambda: choose(seen),
            "summaries_choose_layout": lambda: choose(see()),
            "fixed_forward": lambda: attend(fixed),
            "chosen_forward": lambda: attend(places.layout),
            "chosen_biased_forward": lambda: attend(places.layout, bias),
            "module_forward": lambda: module(*leaves, is_causal=is_causal),
        }
        for name, call in calls.items():
            found[name] = {"ms": time_call(call, DEVICE).median_ms}
            if not name.endswith("forward"):
                found[name]["graph_ms"] = graph_ms(call)  # a few short kernels: else the host's time shows
    module.train()
    for name, call in {
        "fixed_forward_backward": both(lambda: attend(fixed), leaves),
        "module_forward_backward": both(lambda: module(*leaves, is_causal=is_causal), trained),
    }.items():
        found[name] = {"ms": time_call(call, DEVICE).median_ms}
    # All that is done besides the attention kernels: the schedule of the new layout and its bias, too.
    chosen = found["module_forward"]["ms"] - found["chosen_biased_forward"]["ms"]
    found["choosing_ms"] = chosen
    found["choosing_share_of_forward"] = chosen / found["fixed_forward"]["ms"]
    whole, plain = (found[f"{x}_forward_backward"]["ms"] for x in ("module", "fixed"))
    found["forward_backward_over_fixed"] = whole / plain
    return found


def dense(backend: SDPBackend, is_causal: bool) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
            return out.transpose(1, 2)

    return call


def against_dense(length: int, is_causal: bool) -> dict[str, Any]:
    """The module, everything included, and dense attention: forward, and forward with backward."""
    module, leaves = module_for(length, HEADS, is_causal), tensors(length, HEADS)
    found: dict[str, Any] = {"tokens": length, "is_causal": is_causal}
    calls: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "sparsetile": (lambda: module(*leaves, is_causal=is_causal), [*leaves, *module.parameters()])
    }
    for name, backend in DENSE.items():
        calls[name] = (partial(dense(backend, is_causal), *leaves), leaves)
    for name, (call, trained) in calls.items():
        with torch.no_grad():
            module.eval()
            forward = time_call(call, DEVICE, budget_ms=60.0).median_ms
        module.train()
        whole = time_call(both(call, trained), DEVICE, budget_ms=60.0).median_ms
        found[name] = {"forward_ms": forward, "forward_backward_ms": whole}
    for kind in ("forward_ms", "forward_backward_ms"):
        best = min(found[name][kind] for name in DENSE)
        found[f"times_best_dense_{kind}"] = best / found["sparsetile"][kind]
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options.add_argument("--kv-heads", type=int, nargs="+", default=[HEADS, 8])
    options.add_argument("--skip-dense", action="store_true")
    chosen = options.parse_args()
    found: dict[str, Any] = {"provenance": provenance(), "workload": "B1 H32 D128 bf16, 16 tiles a row"}
    found["parts"] = []
    for kv_heads in chosen.kv_heads:
        for is_causal in (False, True):
            found["parts"].append(parts(LONG, kv_heads, is_causal))
            print(json.dumps(found["parts"][-1], indent=1), flush=True)
    if not chosen.skip_dense:
        found["against_dense"] = []
        for is_causal in (False, True):
            for length in LENGTHS:
                found["against_dense"].append(against_dense(length, is_causal))
                print(json.dumps(found["against_dense"][-1]), flush=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(DEVICE).split()[1].lower()
    (chosen.out / f"adaptive_{name}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
