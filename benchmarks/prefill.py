"""Prefill of a language model in transformers: sparse attention by pattern against ``sdpa``, in one run.

``python benchmarks/prefill.py [--device cuda] [--lengths 8192] [--gguf FILE] [--profile FILE] [--out DIR]``

The model has the sizes of SmolLM2-135M (Allal et al. 2025, arXiv:2502.02737): its weights where ``--gguf``
names them, else random ones, which take as long. Past 8,192 tokens it is for speed alone: the weights never
saw such positions. A call computes one sequence, fills a fresh cache and gives the logits of the last token.
Before a pattern is timed, every key is kept once, and the logits must be those of ``sdpa``. Writes
``prefill_<machine>.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sparsetile.environment import provenance
from sparsetile.integrations.settings import layer_settings
from sparsetile.integrations.transformers import use
from sparsetile.layout.cache import cached_layout
from sparsetile.patterns import Causal

PATTERNS = {
    "window 1,024, sinks": "Local(1024, 0) | Global(128, rows=False)",
    "window 4,096, sinks": "Local(4096, 0) | Global(128, rows=False)",
}
SIZES = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "rope_theta": 100000.0,
}
MOST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Of the logits, relative to the largest, after thirty layers."""


def built(args: argparse.Namespace, length: int) -> Any:
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    if args.gguf is not None:
        folder, name = str(args.gguf.parent), args.gguf.name
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype)
    else:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=max(8192, length))).to(dtype)
    return model.eval().to(args.device)


def prefill(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=tokens, use_cache=True, logits_to_keep=1).logits
    return logits


def seconds(model: Any, tokens: torch.Tensor, rounds: int) -> float:
    """Median of ``rounds`` calls after one that warms up."""
    prefill(model, tokens)
    taken = []
    for _ in range(rounds):
        if tokens.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        prefill(model, tokens)
        if tokens.is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def density(settings: dict[str, Any], length: int, layers: int, heads: int) -> float:
    """Share of the causal triangle's tiles, a mean over layers."""
    shares = []
    for layer in range(layers):
        own = layer_settings(settings, layer)
        layout = cached_layout(own.causal & Causal(), length, length, own.block_size, "cpu", heads)
        shares.append(layout.causal_density)
    return statistics.mean(shares)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", default="8192", help="tokens, joined by commas (default 8192)")
    parser.add_argument("--gguf", type=Path, help="the model's weights; random ones without")
    parser.add_argument("--profile", type=Path, help="a pattern file of `sparsetile profile` to time, too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    cases: dict[str, dict[str, Any]] = {name: {"pattern": text} for name, text in PATTERNS.items()}
    if args.profile is not None:
        cases["heads' own"] = json.loads(args.profile.read_text())
    console, rows = Console(highlight=False), []
    for length in map(int, args.lengths.split(",")):
        model = built(args, length)
        tokens = torch.randint(3, 49152, (1, length), device=args.device)
        model.set_attn_implementation("sdpa")
        dense, expected = seconds(model, tokens, args.rounds), prefill(model, tokens)
        rows.append({"length": length, "attention": "sdpa", "density": 1.0, "seconds": dense})
        use(model, pattern="Full()")
        error = float((prefill(model, tokens) - expected).abs().max() / expected.abs().max())
        assert error <= MOST_ERROR[model.dtype], error
        for name, settings in cases.items():
            use(model, settings)
            taken = seconds(model, tokens, args.rounds)
            share = density(settings, length, SIZES["num_hidden_layers"], SIZES["num_attention_heads"])
            rows.append(
                {"length": length, "attention": name, "density": share, "seconds": taken, "error_at_1": error}
            )
        del model
    table = Table(
        "tokens", "attention", "tiles", "prefill, s", "× sdpa", title="Prefill, SmolLM2-135M's sizes, batch 1"
    )
    whole = {row["length"]: row["seconds"] for row in rows if row["attention"] == "sdpa"}
    for row in rows:
        ratio = f"{whole[row['length']] / row['seconds']:.2f}"
        share = f"{row['density']:.1%}"
        table.add_row(f"{row['length']:,}", row["attention"], share, f"{row['seconds']:.3f}", ratio)
    console.print(table)
    result = {
        "provenance": provenance(),
        "weights": "random" if args.gguf is None else args.gguf.name,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"prefill_{'cpu' if args.device == 'cpu' else 'h200'}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
