"""The command ``sparsetile``: doctor, show, bench, plan, train, recall, mixed, profile.

Bad input and failures end with one line on stderr and a non-zero exit code: 2 for bad usage or input, 1 for
what failed, 130 after Ctrl-C. A traceback is a bug.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from sparsetile._version import __version__
from sparsetile.errors import ArgumentError, SparsetileError, explain

if TYPE_CHECKING:
    from rich.console import Console

    from sparsetile.layout.blocks import BlockLayout

_MOST_TOKENS = 1 << 40  # positions of pairs must fit int64 with room to spare
_DESCRIPTION = "Block-sparse attention for PyTorch: look at patterns, check this machine, measure, train."
_COMMANDS = {
    "doctor": (
        "versions, devices, and what each backend can do here",
        "examples:\n  sparsetile doctor",
    ),
    "show": (
        "draw a pattern's layout and print what it costs",
        "examples:\n"
        "  sparsetile show 'Local(2048) | Global(64)' --length 64K\n"
        "  sparsetile show 'Local(4096) | Global(128)' --length 1M --causal --png layout.png\n"
        "  sparsetile show 'LogStrided()' --length 8192 --block 64\n"
        "  sparsetile show ultra_sparse --length 128K --causal\n"
        "  sparsetile show --run runs/train --head 1\n"
        "  sparsetile show --adaptive learned.pt --text README.md --png kept.png\n",
    ),
    "bench": (
        "time, memory and error of every backend against dense attention and its rivals",
        "examples:\n"
        "  sparsetile bench --quick\n"
        "  sparsetile bench --lengths 8K,32K --patterns local,random --densities 0.02,0.1 --out results\n"
        "  sparsetile bench --patterns 'Local(1024) | Global(64)' --lengths 16K --backends cpu,dense\n"
        "  sparsetile bench --table baselines --device cuda --out benchmarks/results\n"
        "  sparsetile bench --replot benchmarks/results/bench.json\n"
        "  sparsetile bench --tune --head-dim 64,128 --minutes 3 --out tuned\n",
    ),
    "plan": (
        "what a pattern costs on many ranks: bytes, balance, stages; nothing is sent",
        "examples:\n"
        "  sparsetile plan 'Local(4096) | Global(64)' --length 1M --ranks 64 --causal\n"
        "  sparsetile plan 'Local(4096) | Global(64)' --length 16M --ranks 2,8,64,1024 --ranks-per-node 8\n"
        "  sparsetile plan 'Local(2048) | Anchored(1048576, 8)' --length 1M --ranks 16\n"
        "  sparsetile plan 'Hierarchical(16, 8)' --length 1M --ranks 16 --ranks-per-node 8\n",
    ),
    "train": (
        "train a byte-level language model with a pattern, or compare it with dense attention",
        "examples:\n"
        "  sparsetile train --compare\n"
        "  sparsetile train --attention 'Local(512) | Global(16)' --context 8192 --steps 500\n",
    ),
    "recall": (
        "whether learned tiles hold what a query asks for, next to other ways of choosing them",
        "examples:\n  sparsetile recall\n",
    ),
    "mixed": (
        "whether a share of the mass needs fewer tiles than a fixed number, on easy and hard inputs",
        "examples:\n  sparsetile mixed\n",
    ),
    "profile": (
        "which pattern each head of a trained model can do with, and what that costs on real text",
        "examples:\n"
        "  sparsetile profile HuggingFaceTB/SmolLM2-135M --text book.txt --max-loss-increase 1%\n"
        "  sparsetile profile model.gguf --text a.py --held-out b.py --density 15%,25%,40% --compare\n"
        "  sparsetile profile ./checkpoint --text book.txt --length 16K --device cuda --dtype bf16\n",
    ),
}


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See: {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``argv`` is ``sys.argv[1:]`` by default."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = _parse(arguments)
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except SystemExit as stop:
        # argparse leaves this way after --help (0) and after its one-line errors (2).
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except BrokenPipeError:
        # The reader (head, less) has left: there is nobody to tell, and nothing may be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SparsetileError as error:
        return _fail(str(error), 2 if isinstance(error, ValueError) else 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 1)
    except MemoryError:
        return _fail("out of memory. Choose a shorter length, a larger block, or a sparser pattern.", 1)
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        return _fail(f"{error} Choose a shorter length, a larger block, or a sparser pattern.", 1)


def token_count(text: str) -> int:
    """A positive number of tokens: ``4096``, ``64K`` (binary thousands), ``1M``.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    units = {"k": 1 << 10, "m": 1 << 20}
    unit = units.get(text[-1:].lower(), 1)
    digits = text if unit == 1 else text[:-1]
    try:
        count = int(digits) * unit
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number of tokens like 4096, 64K or 1M, got {text!r}"
        ) from None
    if not 1 <= count <= _MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"expected 1 to {_MOST_TOKENS:,} tokens, got {text!r}")
    return count


def positive(text: str) -> int:
    """A whole number above 0. Raises argparse.ArgumentTypeError if it is none."""
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return count


def above_zero(text: str) -> float:
    """A finite number above 0. Raises argparse.ArgumentTypeError if it is none."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="sparsetile", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"sparsetile {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_Parser)
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    fillers: dict[str, Callable[[argparse.ArgumentParser], None]] = {
        "doctor": _doctor_arguments,
        "show": _show_arguments,
        "bench": _delegate("sparsetile.bench.cli"),
        "plan": _delegate("sparsetile.distributed.cli"),
        "train": _delegate("sparsetile.train.cli"),
        "recall": _delegate("sparsetile.recall.cli"),
        "mixed": _delegate("sparsetile.recall.mixed_cli"),
        "profile": _delegate("sparsetile.profile.cli"),
    }
    for name, (summary, examples) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        # Only the command that runs needs its arguments, and some take long to import.
        if name == chosen:
            fillers[name](command)
    return parser.parse_args(arguments)


def _delegate(module_name: str) -> Callable[[argparse.ArgumentParser], None]:
    def fill(parser: argparse.ArgumentParser) -> None:
        module = importlib.import_module(module_name)
        module.add_arguments(parser)
        parser.set_defaults(run=module.main)

    return fill


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_doctor)


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    from sparsetile.layout.blocks import BLOCK_SIZES

    parser.add_argument(
        "pattern", nargs="?", metavar="PATTERN", help="as 'Local(2048) | Global(64)', or a preset"
    )
    parser.add_argument("--length", type=token_count, metavar="N", help="query tokens: 4096, 64K, 1M")
    parser.add_argument(
        "--run", dest="folder", metavar="DIR", help="draw what `train --out DIR` trained with"
    )
    parser.add_argument(
        "--adaptive",
        metavar="CHECKPOINT",
        help="draw what a model of `train --arms adaptive` keeps of a text, over dense attention's mass",
    )
    parser.add_argument("--text", metavar="FILE", help="the text for --adaptive, its first --length bytes")
    parser.add_argument("--keys", type=token_count, metavar="N", help="key tokens, if not as many as queries")
    parser.add_argument("--causal", action="store_true", help="also forbid keys after the query")
    parser.add_argument("--block", type=int, default=128, choices=BLOCK_SIZES, help="tile edge (default 128)")
    parser.add_argument("--heads", type=positive, default=1, metavar="H", help="query heads (default 1)")
    parser.add_argument("--head", type=int, default=0, metavar="h", help="the head to draw (default 0)")
    parser.add_argument("--head-dim", type=positive, default=128, metavar="D", help="for FLOPs (default 128)")
    parser.add_argument(
        "--png",
        metavar="FILE",
        help="also write a picture (needs matplotlib); with --adaptive the default is learned.png",
    )
    parser.set_defaults(run=_show, unset=vars(parser.parse_args([])))


def _doctor(_options: argparse.Namespace) -> int:
    from rich.console import Console

    from sparsetile import doctor

    return doctor.run(Console(highlight=False, width=None if sys.stdout.isatty() else 200))


def _show(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape

    if options.adaptive is not None or options.text is not None:
        return _show_adaptive(options)
    from sparsetile import viz
    from sparsetile.facts import describe

    if options.folder is not None:
        _take_run(options)
    elif options.pattern is None or options.length is None:
        raise ArgumentError(
            explain(
                "show",
                expected="PATTERN and --length N, or --run DIR, or --adaptive CHECKPOINT and --text FILE",
                got=f"PATTERN {options.pattern}, --length {options.length}",
                fix="For example: sparsetile show 'Local(2048)' --length 64K.",
            )
        )
    layout, title = _layout(options)
    head = options.head if layout.heads > 1 else 0
    if options.png is not None:
        viz.save_png(layout, options.png, title=title, head=head)
    console = Console(highlight=False)
    colour = console.color_system in ("truecolor", "256")
    about = describe(layout, head=head)
    console.print(f"[bold]{escape(title)}[/]" + (f", head {head}" if layout.heads > 1 else ""))
    width = max(8, min(64, console.width - 10))
    console.print(viz.draw(layout, width=width, colour=colour, head=head), soft_wrap=True)
    console.print(viz.legend(colour))
    console.print()
    _print_facts(console, viz.fact_rows(about, options.head_dim))
    if options.png is not None:
        console.print(f"\nwrote {options.png}", soft_wrap=True)
    return 0


def _show_adaptive(options: argparse.Namespace) -> int:
    from rich.console import Console

    from sparsetile.train import look

    used = ("adaptive", "text", "length", "png")
    others = [name for name, unset in options.unset.items() if getattr(options, name) != unset]
    others = [name for name in others if name not in used]
    if options.adaptive is None or options.text is None or others:
        given = [name for name in ("adaptive", "text") if getattr(options, name) is not None]
        names = {"pattern": "PATTERN", "folder": "--run"}
        words = [names.get(name, f"--{name.replace('_', '-')}") for name in [*given, *others]]
        raise ArgumentError(
            explain(
                "show --adaptive",
                expected="--adaptive CHECKPOINT and --text FILE, with --length and --png at most",
                got=", ".join(words),
                fix="The checkpoint knows its pattern, tiles and heads.",
            )
        )
    look.show(Console(highlight=False), options.adaptive, options.text, options.length, options.png)
    return 0


def _print_facts(console: Console, rows: list[tuple[str, str]]) -> None:
    # No table: its cells would be cut or wrapped to the width of a narrow terminal, and padded in a pipe.
    margin = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(f"[dim]{name:<{margin}}[/]  {value}", soft_wrap=True)


def _take_run(options: argparse.Namespace) -> None:
    """Fill in the pattern, causal, and the sizes of a training run from its ``train.json``."""
    path = os.path.join(options.folder, "train.json")
    if options.pattern is not None or options.length is not None:
        raise ArgumentError(
            explain(
                "show --run", expected="no PATTERN and no --length beside it", got="both", fix="Drop one."
            )
        )
    with open(path, encoding="utf-8") as file:
        try:
            run = json.load(file)
            texts = [arm["attention"] for arm in run["arms"]]
            patterns = [text for text in texts if text != "dense" and not text.startswith("adaptive(")]
            settings = run["settings"]
            options.length, options.block = settings["context"], settings["block"]
            options.heads = settings["model"]["heads"]
            options.head_dim = settings["model"]["width"] // options.heads
        except (ValueError, KeyError, TypeError) as problem:
            raise ArgumentError(
                explain(
                    path,
                    expected="the results that `sparsetile train` writes",
                    got=f"a file in which this is missing or broken: {problem}",
                    fix="Train again with --out DIR.",
                )
            ) from None
    if not patterns:
        raise ArgumentError(
            explain(
                path,
                expected="an arm with a pattern",
                got="learned tiles" if any(text != "dense" for text in texts) else "dense only",
                fix="Train with --attention PATTERN; learned tiles: show --adaptive CHECKPOINT --text FILE.",
            )
        )
    options.pattern, options.causal = patterns[0], True


def _layout(options: argparse.Namespace) -> tuple[BlockLayout, str]:
    from sparsetile.layout.blocks import BlockLayout
    from sparsetile.nn.presets import PRESETS
    from sparsetile.patterns import Causal, parse_pattern

    if not 0 <= options.head < options.heads:
        raise ArgumentError(
            explain(
                "--head",
                expected=f"a number from 0 to {options.heads - 1}",
                got=options.head,
                fix="Give --heads as many heads as the model has.",
            )
        )
    title = f"{options.pattern}, causal" if options.causal else options.pattern
    if options.pattern in PRESETS:
        pattern = PRESETS[options.pattern].pattern_for(options.causal)
    else:
        pattern = parse_pattern(options.pattern)
        if options.causal:
            pattern = pattern & Causal()
    k_len = options.length if options.keys is None else options.keys
    layout = BlockLayout.from_pattern(
        pattern,
        q_len=options.length,
        k_len=k_len,
        block_size=options.block,
        device="cpu",
        heads=options.heads,
    )
    return layout, title


def _fail(message: str, code: int) -> int:
    print(f"sparsetile: {' '.join(message.split())}", file=sys.stderr)
    return code
