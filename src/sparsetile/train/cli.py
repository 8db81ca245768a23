"""``sparsetile train``: arguments, what they default to on this machine, and the run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console

from sparsetile.adaptive.config import DISTILLATIONS
from sparsetile.cli import above_zero, positive, token_count
from sparsetile.errors import ArgumentError, CheckpointError, explain
from sparsetile.layout.blocks import BLOCK_SIZES
from sparsetile.nn.adaptive import AdaptiveConfig
from sparsetile.patterns import parse_pattern
from sparsetile.train.arms import ARMS, DENSE, Arm, compared, default_pattern, named, window_of
from sparsetile.train.checkpoint import load_checkpoint
from sparsetile.train.console import introduce, leave, shown
from sparsetile.train.data import Corpus, Planting, Sequences, load_corpus
from sparsetile.train.loop import CHECKS, Emit, Settings, Trainer
from sparsetile.train.model import ModelConfig
from sparsetile.train.parallel import Parallel, joined
from sparsetile.train.process import measured, trained

_SPARSITY = 0.75
_SPAN = 64
_PLANTED = 0.25
# What one machine does in about three minutes, and the other in about seven.
_SIZES = {
    "cpu": {
        "context": 4096,
        "tokens": 4096,
        "layers": 2,
        "width": 128,
        "heads": 4,
        "kv_heads": 2,
        "block": 64,
    },
    "cuda": {
        "context": 131072,
        "tokens": 32768,
        "layers": 4,
        "width": 512,
        "heads": 8,
        "kv_heads": 2,
        "block": 128,
    },
}
_MINUTES = {"cpu": 3.0, "cuda": 7.0}
# Starting a process, importing torch, reading the data; on a GPU also compiling.
_START_SECONDS = {"cpu": 6.0, "cuda": 15.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``sparsetile train``."""
    parser.epilog = (
        "examples:\n"
        "  sparsetile train --compare\n"
        "  sparsetile train --compare --equal-time --minutes 6 --context 32K\n"
        "  sparsetile train --attention 'Local(256) | LogStrided()' --context 8K --steps 500\n"
        "  sparsetile train --attention dense --data ~/books --checkpoint run.pt\n"
        "  sparsetile train --attention dense --data ~/books --checkpoint run.pt --resume\n"
        "  sparsetile train --arms adaptive --minutes 1 --checkpoint learned.pt\n"
        "  sparsetile train --arms adaptive,pattern,dense --sparsity 0.9 --context 8K\n"
        "  torchrun --nproc-per-node 4 -m sparsetile train --context-parallel 2 --batch 2 --context 16K\n"
        "\n"
        "Sizes that are not given follow the device: context 4096 on a CPU, 131072 on a GPU."
    )
    add = parser.add_argument
    add(
        "--attention",
        metavar="PATTERN",
        help="a pattern (made causal), or 'dense'; default: fits the context",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--compare", action="store_true", help="train three arms alike: the pattern, dense, its window alone"
    )
    which.add_argument(
        "--arms",
        type=_arm_names,
        metavar="LIST",
        help="train these alike, with commas between: pattern, dense, window, adaptive (tiles are learned)",
    )
    add("--sparsity", type=float, metavar="F", help="adaptive: share of tiles left out (default 0.75)")
    add(
        "--distillation",
        choices=DISTILLATIONS,
        help="adaptive: what else teaches which tiles matter: the true mass of the kept ones (the default), "
        "or of all in a sampled row",
    )
    add("--data", metavar="PATH", help="file or folder to train on (default: Python's own standard library)")
    add("--context", type=token_count, metavar="N", help="bytes that the model sees at once: 4096, 32K")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--steps", type=positive, metavar="N", help="steps of each arm (default: fit --minutes)"
    )
    length.add_argument(
        "--equal-time", action="store_true", help="equal training time, not steps, for each arm"
    )
    add("--minutes", type=above_zero, metavar="M", help="all arms together (default: 3 on a CPU, 7 on a GPU)")
    add("--batch", type=positive, metavar="B", help="sequences in a step")
    add("--layers", type=positive, metavar="L", help="transformer layers")
    add("--width", type=positive, metavar="W", help="channels; a multiple of 8·heads")
    add("--heads", type=positive, metavar="H", help="query heads")
    add("--kv-heads", type=positive, metavar="H", help="key-value heads; divide --heads")
    add("--block", type=int, choices=BLOCK_SIZES, help="tile edge (default 64 on a CPU, 128 on a GPU)")
    add("--lr", type=above_zero, metavar="R", help="highest learning rate (default 1/width, at most 0.008)")
    add("--plant", type=_fraction, metavar="F", help="share of bytes in far repeats (default 0.25; 0: none)")
    add(
        "--context-parallel",
        type=positive,
        default=1,
        metavar="P",
        help="with torchrun: P processes share each sequence, the others the batch (default 1)",
    )
    add("--seed", type=int, default=0, metavar="S", help="of weights and data order (default 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="default: bf16 on a GPU, else fp32")
    add(
        "--checkpoint",
        metavar="FILE",
        help="save here every 30 s and at the end (several arms: one file an arm)",
    )
    add("--resume", action="store_true", help="go on from --checkpoint")
    add(
        "--out", metavar="DIR", default="runs/train", help="for train.json and train.png (default runs/train)"
    )


def _arm_names(text: str) -> list[str]:
    names = text.split(",")
    if len(set(names)) < len(names) or not set(names) <= set(ARMS):
        raise argparse.ArgumentTypeError(
            f"expected some of {', '.join(ARMS)}, once each with commas between, got {text!r}"
        )
    return names


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 0.5:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 0.5, got {text!r}")
    return value


def main(args: argparse.Namespace) -> int:
    """Trains what ``args`` ask for; 0 if every arm has a result.

    Raises:
        SparsetileError: what is wrong with the arguments, the data or a checkpoint, in one line.
    """

    def work(parallel: Parallel) -> int:
        return _alone(args) if parallel.world.size == 1 else _over_ranks(args, parallel)

    return joined(args.context_parallel, _device(args.device), work)


def _alone(args: argparse.Namespace) -> int:
    console = Console()
    settings, arms, corpus = resolve(args)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    introduce(console, settings, corpus)
    settings = _with_length(
        console,
        args,
        settings,
        lambda: measured(arms, replace(settings, checkpoint=None, resume=False), args.data),
        lambda: _saved_limit(settings, arms),
        len(arms),
    )
    results = []
    for arm in arms:
        own = _of_arm(settings, arm, arms)
        results.append(shown(console, arm, partial(_result, trained(arm, own, args.data))))
    leave(console, args, settings, corpus, Parallel(), results)
    return _code(results)


def _result(events: Iterator[dict[str, Any]], show: Emit) -> dict[str, Any]:
    for event in events:
        if event["event"] == "result":
            return dict(event["result"])
        show(event)
    raise AssertionError("a process that ends well ends with a result")


def _over_ranks(args: argparse.Namespace, parallel: Parallel) -> int:
    """One rank of several: each trains in its own process, and the first one prints and writes."""
    console = Console(quiet=not parallel.first)

    def prepared() -> tuple[Settings, Arm, Corpus]:
        settings, arms, corpus = resolve(args, parallel.dp.size)
        if len(arms) > 1:
            names = ", ".join(arm.name for arm in arms)
            fix = "Train one with --attention PATTERN, the next in a run of its own."
            _refuse(f"{parallel.world.size} processes", "one arm", names, fix)
        if parallel.first:
            Path(args.out).mkdir(parents=True, exist_ok=True)
        return settings, arms[0], corpus

    def facts(made: tuple[Settings, Arm, Corpus]) -> dict[str, object]:
        settings, arm, corpus = made
        length = {"minutes": args.minutes, "equal time": args.equal_time}
        return {**asdict(settings), "arm": arm, "data": corpus.digest, **length}

    with parallel.said_once():
        settings, arm, corpus = parallel.agreed(prepared, facts)
        introduce(console, settings, corpus)
        console.print(f"Ranks: {parallel.dp.size} × {parallel.cp.size}, batch × context")
        settings = _with_length(
            console,
            args,
            settings,
            lambda: {arm.name: Trainer(arm, settings, corpus, parallel).step_seconds()},
            lambda: parallel.of_first(lambda: _saved_limit(settings, [arm])),
            1,
        )
        trainer = Trainer(arm, settings, corpus, parallel)
        trainer.resume()
    results = [shown(console, arm, trainer.run)]
    if parallel.first:
        leave(console, args, settings, corpus, parallel, results)
    return _code(results)


def _code(results: list[dict[str, Any]]) -> int:
    return 1 if any("failed" in result for result in results) else 0


def resolve(args: argparse.Namespace, dp: int = 1) -> tuple[Settings, list[Arm], Corpus]:
    """The settings that ``args`` and this machine lead to; raises SparsetileError where they cannot be.

    ``dp``: ranks that share out the batch; by default it holds as many sequences at least.
    """
    device = _device(args.device)
    sizes = _SIZES[device]

    def size(name: str) -> int:
        given: int | None = getattr(args, name)
        return sizes[name] if given is None else given

    model = ModelConfig(size("layers"), size("width"), size("heads"), size("kv_heads"))
    context, block = size("context"), size("block")
    if args.resume and not args.checkpoint:
        raise ArgumentError(
            explain("--resume", expected="--checkpoint FILE", got="none", fix="Name the file to go on from.")
        )
    attention = args.attention or default_pattern(context, model.heads, block)
    learns = args.arms is not None and "adaptive" in args.arms
    if not learns and (args.sparsity is not None or args.distillation is not None):
        _refuse("--sparsity, --distillation", "the adaptive arm", "none", "Add --arms adaptive.")
    if args.compare:
        arms = compared(attention, context, model.heads, block)
    elif args.arms is not None:
        if args.attention is not None and not {"pattern", "window"} & set(args.arms):
            _refuse("--attention", "an arm with a pattern", ",".join(args.arms), "Add pattern to --arms.")
        sparsity = _SPARSITY if args.sparsity is None else args.sparsity
        config = AdaptiveConfig(
            sparsity,
            learnable_temperature=True,
            block_size=block,
            distillation=args.distillation or "kept",
        )
        arms = named(args.arms, attention, context, model.heads, block, config)
    else:
        if attention != DENSE:
            parse_pattern(attention)
        arms = [Arm(DENSE if attention == DENSE else "pattern", attention)]
    corpus = load_corpus(args.data)
    return (
        Settings(
            model=model,
            context=context,
            batch=args.batch or -(-max(1, sizes["tokens"] // context) // dp) * dp,
            block=block,
            lr=args.lr or min(0.008, 1.0 / model.width),
            seed=args.seed,
            device=device,
            dtype=("bf16" if device == "cuda" else "fp32") if args.dtype == "auto" else args.dtype,
            planting=_planting(args, arms, model, context, block, corpus),
            held_out_sequences=max(4, min(8, (1 << 18) // context)) if device == "cuda" else 4,
            steps=args.steps,
            checkpoint=args.checkpoint,
            resume=args.resume,
        ),
        arms,
        corpus,
    )


def _refuse(what: str, expected: str, got: str, fix: str) -> NoReturn:
    raise ArgumentError(explain(what, expected=expected, got=got, fix=fix))


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(
            explain(
                "--device",
                expected="a device of this machine",
                got="cuda, and torch sees no GPU",
                fix="Leave --device out, or ask `sparsetile doctor`.",
            )
        )
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _planting(
    args: argparse.Namespace, arms: list[Arm], model: ModelConfig, context: int, block: int, corpus: Corpus
) -> Planting | None:
    texts = [arm.attention for arm in arms if arm.attention != DENSE and arm.adaptive is None]
    window = window_of(parse_pattern(texts[0])) if texts else None
    if window is None:
        window = window_of(parse_pattern(default_pattern(context, model.heads, block))) or 0
    # A layer passes information on by a window and the three bytes of the token shift.
    far = model.layers * (window + 3) + 2
    asked = Planting(_SPAN, far, _PLANTED if args.plant is None else args.plant)
    # Where nobody asked for repeats, nothing is compared and they have no room, there are none.
    left_out = args.plant == 0 or (args.plant is None and len(arms) == 1 and not asked.fits(context))
    planting = None if left_out else asked
    Sequences(corpus, context, args.seed, planting)
    return planting


def _with_length(
    console: Console,
    args: argparse.Namespace,
    settings: Settings,
    step_seconds: Callable[[], dict[str, float]],
    saved_limit: Callable[[], dict[str, Any]],
    arms: int,
) -> Settings:
    """How long each arm trains: as asked, as the checkpoint says, or as many steps as fit the minutes."""
    if args.steps is not None:
        return settings
    minutes = args.minutes or _MINUTES[settings.device]
    training = max(60.0 * minutes - _START_SECONDS[settings.device] * (arms + 1), 15.0 * minutes)
    if args.equal_time:
        return replace(settings, seconds=training / arms)
    if args.resume:
        return replace(settings, **saved_limit())
    with console.status("Timing a step of each arm"):
        seconds = step_seconds()
    # To look at a held-out sequence costs about a third of training on it.
    looks = CHECKS * settings.held_out_sequences / 3 / settings.batch
    steps = max(int(training / sum(seconds.values()) - looks), 10)
    times = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    console.print(f"A step takes: {times}. {steps:,} steps an arm fit into {minutes:g} minutes in all.")
    return replace(settings, steps=steps)


def _of_arm(settings: Settings, arm: Arm, arms: list[Arm]) -> Settings:
    """The arm's own checkpoint; an arm that was not yet begun begins."""
    if settings.checkpoint is None:
        return settings
    path = Path(settings.checkpoint)
    if len(arms) > 1:
        path = path.with_name(f"{path.stem}-{arm.name.replace(' ', '-')}{path.suffix}")
    begun = path.exists() or len(arms) == 1
    return replace(settings, checkpoint=str(path), resume=settings.resume and begun)


def _saved_limit(settings: Settings, arms: list[Arm]) -> dict[str, Any]:
    paths = [Path(_of_arm(settings, arm, arms).checkpoint or "") for arm in arms]
    begun = [path for path in paths if path.exists()]
    if not begun:
        raise CheckpointError(
            explain(
                "--resume",
                expected=f"a checkpoint at {paths[0]}",
                got="no such file",
                fix="Check --checkpoint, or leave out --resume to start anew.",
            )
        )
    return dict(load_checkpoint(begun[0])["limit"])
