"""``sparsetile doctor``: what is installed, and what each backend can do on this machine."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from sparsetile.environment import installed, provenance
from sparsetile.functional import sparse_attention
from sparsetile.kernels.request import Request
from sparsetile.kernels.select import BACKENDS
from sparsetile.layout.blocks import BlockLayout
from sparsetile.patterns import Causal, Global, Local
from sparsetile.viz import byte_size

# Largest relative error, against float64, that rounding alone explains in the probe below.
_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Finding:
    """What one backend does with a small call on one device.

    ``state`` is ``"works"``, ``"not here"`` (``detail`` is the backend's own ``why_not``) or ``"broken"``:
    it said that it serves the call, and failed or returned wrong numbers.
    """

    device: str
    backend: str
    state: str
    detail: str


def run(console: Console) -> int:
    """Print the report. 0 unless a backend that claims to serve a call is broken."""
    record = provenance()
    machine = record["machine"]
    console.print("[bold]versions[/]")
    table = _grid()
    for name, version in record["versions"].items():
        if name in ("cuda", "hip") and version is None:
            continue
        table.add_row(name.replace("_", "-"), version or "[dim]not installed[/]")
    table.add_row("commit", record["commit"] or "[dim]not a git checkout[/]")
    console.print(table)

    console.print("\n[bold]machine[/]")
    table = _grid()
    memory = byte_size(machine["memory"]) if machine["memory"] else "unknown"
    table.add_row("cpu", f"{machine['cpu']}, {machine['cores']} cores, {machine['cpu_capability']}, {memory}")
    for index, device in enumerate(machine["devices"]):
        table.add_row(
            f"cuda:{index}",
            f"{device['name']}, sm_{device['capability'].replace('.', '')}, {byte_size(device['memory'])}",
        )
    if not machine["devices"]:
        table.add_row("gpu", "[dim]none that torch can use[/]")
    console.print(table)

    console.print("\n[bold]backends[/]")
    findings = [finding for device in _devices() for finding in examine(device)]
    table = _grid()
    colours = {"works": "green", "not here": "dim", "broken": "bold red"}
    for finding in findings:
        table.add_row(
            finding.device,
            finding.backend,
            f"[{colours[finding.state]}]{finding.state}[/]",
            escape(finding.detail),
        )
    console.print(table)

    console.print("\n[bold]optional[/]")
    table = _grid()
    for name, present, purpose in _optional():
        table.add_row(name, "[green]yes[/]" if present else "[dim]no[/]", purpose)
    console.print(table)
    return 1 if any(finding.state == "broken" for finding in findings) else 0


def examine(device: torch.device) -> list[Finding]:
    """Ask every backend for a small call on ``device``, run those that accept, and check them in float64."""
    length, head_dim = 150, 64
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    pattern = (Local(40) | Global(8)) & Causal()
    layout = BlockLayout.from_pattern(pattern, q_len=length, k_len=length, block_size=64, device=device)
    inputs = [torch.randn(1, 2, length, head_dim, device=device, dtype=dtype) for _ in range(4)]
    q, k, v, grad = inputs
    exact = _gradients([x.double() for x in inputs], layout, "reference")
    request = Request(layout=layout, scale=head_dim**-0.5)
    findings = []
    for name, backend in BACKENDS.items():
        reason = backend.why_not(q, k, v, request)
        if reason is not None:
            findings.append(Finding(str(device), name, "not here", reason))
            continue
        # Whatever a driver, a compiler or a kernel throws here is the finding.
        try:
            got = _gradients([q, k, v, grad], layout, name)
        except Exception as error:
            line = " ".join(f"{type(error).__name__}: {error}".split())
            findings.append(Finding(str(device), name, "broken", line))
            continue
        error_size = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True))
        measured = f"forward and backward within {error_size:.1e} of float64 ({str(dtype)[6:]})"
        state = "works" if error_size <= _ROUNDING[dtype] else "broken"
        findings.append(Finding(str(device), name, state, measured))
    return findings


def _gradients(inputs: list[Tensor], layout: BlockLayout, backend: str) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out = sparse_attention(q, k, v, layout, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])]


def _devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return found


def _optional() -> list[tuple[str, bool, str]]:
    compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl"))
    return [
        ("matplotlib", installed("matplotlib") is not None, "plots: show --png, bench, train"),
        ("C++ compiler", compiler, "FlexAttention on CPU as a rival in bench"),
        (
            "flash-attn-4",
            installed("flash-attn-4") is not None,
            "FlashAttention 4 as a rival in bench (CUDA)",
        ),
    ]


def _grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    return table
