"""``sparsetile profile``: arguments, loading, progress and files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from sparsetile.cli import token_count
from sparsetile.environment import provenance
from sparsetile.errors import ArgumentError, DataError, explain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsetile.profile.run import Profile

_DENSITIES = (0.1, 0.15, 0.25, 0.4)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``sparsetile profile``."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a causal language model: name, folder, or .gguf file")
    add("--text", type=Path, required=True, metavar="FILE", help="the text to measure, from its beginning")
    add(
        "--held-out",
        type=Path,
        metavar="FILE",
        help="another text to report losses on (default: what follows in --text)",
    )
    add("--length", type=token_count, default=4096, metavar="N", help="tokens of each text (default 4096)")
    add(
        "--max-loss-increase",
        type=_share,
        metavar="P",
        help="the sparsest patterns that cost so much of the loss, on --text, at most (default 1%%)",
    )
    add("--density", type=_shares, metavar="D,…", help="the best patterns at these shares of the tiles")
    add(
        "--compare", action="store_true", help="single patterns, smaller and adaptive tiles, oracle beside it"
    )
    add("--block", type=int, default=128, choices=(16, 32, 64, 128), help="tile edge (default 128)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
    add("--dtype", choices=("auto", *_DTYPES), default="auto", help="default: bf16 on a GPU, else fp32")
    add("--out", type=Path, default=Path("runs/profile"), metavar="DIR", help="default runs/profile")


def _share(text: str) -> float:
    """``1%``, ``0.01``."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 10:
        raise argparse.ArgumentTypeError(f"expected a share like 1% or 0.01, got {text!r}")
    return value


def _shares(text: str) -> tuple[float, ...]:
    values = tuple(_share(part.strip()) for part in text.split(","))
    if max(values) > 1:
        raise argparse.ArgumentTypeError(f"expected densities up to 100%, got {text!r}")
    return values


def main(args: argparse.Namespace) -> int:
    """Measures, chooses, reports; 0.

    Raises:
        SparsetileError: what is wrong with the arguments, the model or the texts, in one line.
    """
    try:
        import transformers
    except ImportError:
        raise ArgumentError(
            explain(
                "sparsetile profile",
                expected="transformers",
                got="an environment without it",
                fix="Install it with: pip install 'sparsetile[hf]'.",
            )
        ) from None
    from sparsetile.profile import report, run

    console = Console(highlight=False)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model, text, held_out = load(args)
    args.out.mkdir(parents=True, exist_ok=True)
    about = {
        "model": Path(args.model).name,
        "text": args.text.name,
        "held_out": (args.held_out or args.text).name,
        "length": args.length,
        "block_size": args.block,
    }
    with _bar(console, "measuring", model.config.num_hidden_layers) as done:
        profile = run.Profile.of(model, text, args.block, about, done)
    densities = args.density or _DENSITIES
    console.print(report.mass_table(profile, densities))
    dense = run.dense_loss(model, held_out)
    console.print(f"\nDense loss: {profile.dense:.4f} nats a token of {about['text']}, {dense:.4f} held out.")

    def say(line: str) -> None:
        console.print(line, style="dim", soft_wrap=True)

    rows: list[dict[str, Any]] = []
    if args.density is None or args.max_loss_increase is not None:
        target = args.max_loss_increase or 0.01
        pick = run.search(profile, text, target, say)
        wanted = f"a loss at most {target:.3g} of the dense one above it"
        _recommend(console, args.out, "pattern", profile, pick, held_out, dense, wanted)
        chosen = [pick]
    else:
        chosen = [profile.pick(density) for density in densities]
        for density, pick in zip(densities, chosen, strict=True):
            name = f"pattern-{density:.3g}"
            _recommend(console, args.out, name, profile, pick, held_out, dense, f"{density:.0%} of the tiles")
    if args.compare:
        small = None
        if args.block > 16:
            with _bar(console, "measuring smaller tiles", model.config.num_hidden_layers) as done:
                small = run.Profile.of(model, text, args.block // 2, about, done)
        rows = run.compare(profile, held_out, densities, small, say)
        console.print(report.loss_table(rows, dense))
        for line in report.claims(rows):
            console.print(line)
    result = {
        "about": about,
        "provenance": provenance(),
        "dense": dense,
        "dense_measured": profile.dense,
        "rows": rows,
        "claims": report.claims(rows),
        "mass": {
            repr(single.pattern): float(profile.mass[..., profile.tried.index(single)].mean())
            for density in densities
            for single in profile.singles(density)
        },
    }
    report.write_json(args.out / "profile.json", result)
    if rows:
        (args.out / "profile.md").write_text(report.markdown(result), encoding="utf-8")
    shown = f"{profile.density(chosen[0]):.0%} of the tiles"
    title = f"{about['model']}, {args.length:,} tokens of {about['text']}, {shown}"
    missing = report.picture(args.out / "profile.png", profile, chosen[0], title)
    console.print(missing or f"Picture: {args.out / 'profile.png'}", soft_wrap=True)
    console.print(f"Results: {args.out / 'profile.json'}", soft_wrap=True)
    return 0


def _recommend(
    console: Console,
    folder: Path,
    name: str,
    profile: Profile,
    pick: Tensor,
    held_out: Tensor,
    dense: float,
    wanted: str,
) -> None:
    """Writes the settings of a choice, and says what it costs on the held-out text."""
    from sparsetile.profile import report
    from sparsetile.profile.evaluate import loss_under

    path = folder / f"{name}.json"
    report.write_settings(path, profile, pick)
    loss = loss_under(profile.model, held_out, profile.settings(pick))
    console.print(
        f"\nFor {wanted}: {profile.density(pick):.1%} of the causal triangle's tiles, "
        f"{float(profile.mass_of(pick).mean()):.3f} of the mass, loss {loss:.4f} held out "
        f"({loss / dense - 1:+.2%}).\n  {report.kinds(profile, pick)}",
        soft_wrap=True,
    )
    console.print(f'  use(model, "{path}")', soft_wrap=True)


@contextmanager
def _bar(console: Console, what: str, layers: int) -> Iterator[Any]:
    columns = (TextColumn(what), BarColumn(30), TextColumn("{task.completed}/{task.total} layers"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=layers)
        yield lambda: progress.advance(task)


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, Tensor, Tensor]:
    """The model, and the tokens ``[1, N]`` to measure and to hold out.

    Raises:
        ArgumentError: no such device, or a model that transformers cannot load.
        DataError: a text too short.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sparsetile.integrations.transformers import register

    register()
    device = _device(args.device)
    dtype = _DTYPES.get(args.dtype, torch.float32 if device == "cpu" else torch.bfloat16)
    source, more = str(args.model), {}
    if source.endswith(".gguf"):
        source, more = str(Path(source).parent), {"gguf_file": Path(source).name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **more)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **more)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ArgumentError(
            explain(
                f"model {args.model!r}",
                expected="a causal language model that transformers loads",
                got=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
                fix="Check the name; a .gguf file needs the packages gguf and accelerate.",
            )
        ) from None
    model.eval()  # type: ignore[no-untyped-call]
    model.to(torch.device(device))  # type: ignore[arg-type]
    texts = [_tokens(tokenizer, args.text)]
    if args.held_out is not None:
        texts.append(_tokens(tokenizer, args.held_out))
    else:
        texts = [texts[0], texts[0][args.length :]]
    for path, tokens in zip((args.text, args.held_out or args.text), texts, strict=True):
        if tokens.numel() < args.length:
            raise DataError(
                explain(
                    f"text {path}",
                    expected=f"{args.length:,} tokens"
                    + ("" if args.held_out else " to measure and as many to hold out"),
                    got=f"{tokens.numel():,}" + (" of them left" if tokens is not texts[0] else ""),
                    fix="Give a longer text, another --held-out, or a smaller --length.",
                )
            )
    first, second = (tokens[None, : args.length].to(device) for tokens in texts)
    return model, first, second


def _tokens(tokenizer: Any, path: Path) -> Tensor:
    text = path.read_text(encoding="utf-8", errors="replace")
    tokens: Tensor = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return tokens


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
