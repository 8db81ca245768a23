"""Compiles the Triton kernels for GPUs that need not be there: ``cross_compile.py < cases.json``.

A process of its own, without ``TRITON_INTERPRET``: the interpreter replaces kernels when they are imported.
Reads a list of cases ``[kernel, head_dim, dtype, target, options]`` and prints, one JSON line a case,
registers, spilled bytes and shared memory as the target's own tools count them; for NVIDIA's GPUs also how
many instructions inside loops load or store what was spilled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

TARGETS = {
    "sm_80": ("cuda", 80, 32, "ampere"),
    "sm_90": ("cuda", 90, 32, "hopper"),
    "sm_100": ("cuda", 100, 32, "blackwell"),
    "gfx942": ("hip", "gfx942", 64, "amd"),
}
_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


def launch_of(kernel: str, head_dim: int, dtype: str, target: str, options: dict[str, Any]) -> Any:
    """The launch that a small call makes. Options: ``block``, ``whole`` (no partial tiles), ``short``
    (at most two tiles a row), ``biased`` (a tile bias alone), ``featured`` (everything, with GQA), ``placed``
    (dropout and padding of a part of a longer sequence, with GQA), ``padded`` and ``dropped`` (padding, or
    dropout, alone); of ``topk``,
    whose head_dim is hidden: see ``selection_of``; of ``rows`` and ``places``, whose head_dim is the places
    of a row: see ``layout_of``."""
    if kernel in ("rows", "places"):
        return layout_of(kernel, head_dim, getattr(torch, dtype), options)
    if kernel == "decode":
        return decode_launch_of(torch.zeros(2, 8, 1, head_dim, dtype=getattr(torch, dtype)), target, options)
    from sparsetile.kernels import triton_launch
    from sparsetile.kernels.request import Request
    from sparsetile.kernels.triton_config import Target
    from sparsetile.layout.blocks import BlockLayout

    block, heads = options.get("block", 128), 4
    length = 256 if options.get("short") else 1024
    mask = torch.ones(1, 1, length, length, dtype=torch.bool)
    layout = BlockLayout.from_dense_mask(mask if options.get("whole") else mask.tril(), block)
    featured = options.get("featured", False)
    placed = options.get("placed", False)
    padded = featured or placed or options.get("padded", False)
    dropped = featured or placed or options.get("dropped", False)
    biased = featured or options.get("biased", False)
    q = torch.zeros(1, heads, length, head_dim, dtype=getattr(torch, dtype))
    k = q[:, : heads // 2] if featured or placed else q
    padding = torch.zeros(1, *([heads // 2] if placed else []), length, dtype=torch.bool)
    tiles = torch.zeros(heads // 2, length // block, dtype=torch.int64)
    statistic = torch.zeros(1, heads, length)
    tile = torch.zeros(1, 1, layout.capacity) if biased else None
    request = Request(
        layout,
        0.1,
        dropout_p=0.1 if dropped else 0.0,
        seed=torch.zeros(1, dtype=torch.int64) if dropped else None,
        key_padding_mask=padding if padded else None,
        attn_bias=torch.zeros(1, 1, length, length, dtype=q.dtype) if featured else None,
        tile_bias=tile,
        q_tiles=tiles[0] if placed else None,
        k_tiles=tiles if placed else None,
    )
    on = Target(TARGETS[target][3], 1)  # type: ignore[arg-type]
    if kernel == "topk":
        return selection_of(head_dim, q.dtype, options)
    if kernel.startswith("hopper"):
        return hopper_launch_of(kernel, q, request, options, on)
    if kernel == "forward":
        return triton_launch.forward_launches(q, k, k, q, statistic, request, on)[0]
    if kernel in ("delta", "backward"):
        parts = triton_launch.tile_grad_parts(layout)
        tile_grad = torch.zeros(parts, 1, heads, layout.capacity) if biased else None
        bias_grad = torch.zeros(1, heads, length, length) if featured else None
        saved = (q, statistic, q, statistic if featured else None)
        arguments = (q, k, k, *saved, q, k, k, tile_grad, bias_grad, request, on)
        return triton_launch.backward_launches(*arguments)[kernel == "backward"]
    raise ValueError(f"no kernel {kernel!r}")


def decode_launch_of(q: torch.Tensor, target: str, options: dict[str, Any]) -> Any:
    """``merge``, the kernel that merges; ``queries``, so many new tokens; ``padded``: padding of both kinds;
    ``paged``; ``by_head``: a pattern for each head; ``direct``: one split."""
    from sparsetile.decode import decode_layout
    from sparsetile.kernels import triton_decode_launch
    from sparsetile.kernels.decode_request import DecodeRequest
    from sparsetile.kernels.triton_config import Target
    from sparsetile.patterns import Local, Random

    q = q.expand(-1, -1, options.get("queries", 1), -1).contiguous()
    batch, heads, q_len, width = q.shape
    by_head = options.get("by_head", False)
    layout = decode_layout(Random(0.1, by_head=True) if by_head else Local(999, 0), 4096, heads=heads)
    paged, padded = options.get("paged", False), options.get("padded", False)
    lengths = torch.full((batch,), 4096, dtype=torch.int32)
    cache = q.new_empty((16, heads // 4, 256, width) if paged else (batch, heads // 4, 4096, width))
    pages = torch.zeros((batch, 16), dtype=torch.int32) if paged else None
    padding = torch.zeros((batch, 4096), dtype=torch.uint8) if padded else None
    request = DecodeRequest(
        layout,
        lengths,
        lengths.long() if padded else None,
        pages,
        None if padding is None else padding.bool(),
        q_len,
        4096,
        256 if paged else 0,
        0.1,
    )
    on = Target(TARGETS[target][3], 1)  # type: ignore[arg-type]
    shape = triton_decode_launch.Shape.of(q, cache.shape[1], layout, on)
    strides = (*q.stride()[:3], *cache.stride()[:3], *cache.stride()[:3])
    parts = None if options.get("direct") else (q.new_empty(4096, dtype=torch.float32),) * 2
    made = triton_decode_launch.launches(
        (q, cache, cache, q, q[..., 0].float(), lengths, request.starts, pages, padding),
        (*strides, 16 if paged else 0, 4096 if padded else 0, 4096),
        parts,
        1 if parts is None else 4,
        shape,
        request,
        on,
    )
    return made["merge" in options]


def hopper_launch_of(kernel: str, q: torch.Tensor, request: Any, options: dict[str, Any], on: Any) -> Any:
    """Options: ``lean``, the two kernels of backward; ``at``, which of its launches; ``split``, rows and
    columns in parts; ``group``, so many query heads a key head, summed in the program."""
    from sparsetile.kernels import hopper_launch
    from sparsetile.kernels.triton_config import override

    hopper_launch.LONG_ROW = 0  # five products wherever they fit: the rows here are short
    request.lean = options.get("lean", False)
    k = q[:, :: options.get("group", 1)]
    statistic = torch.zeros(q.shape[:3])
    with override(chunk=1 if options.get("split") else 10**6):
        if kernel in ("hopper padding", "hopper forward"):
            launches = hopper_launch.forward_launches(q, k, k, q, statistic, request, on)
            return launches[request.key_padding_mask is not None and kernel == "hopper forward"]
        tile_grad = None
        if request.tile_bias is not None:
            parts = hopper_launch.tile_grad_parts(request.layout)
            tile_grad = torch.zeros(parts, 1, q.shape[1], request.layout.capacity)
        saved = (q, statistic, q, None)
        launches = hopper_launch.backward_launches(q, k, k, *saved, q, k, k, tile_grad, None, request, on)
    return [launch for launch in launches if "maxnreg" in launch.options][options.get("at", 0)]


def selection_of(hidden: int, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """The launch of ``topk_rows``. Options: ``k``, ``tiles`` (of queries and of keys), ``featured`` (noise, a
    learned temperature, the sink and a mask), ``bilinear`` (no weights), ``level`` of two: 1 over runs, 2
    over their tiles."""
    from sparsetile.kernels import triton_select

    k, tiles, featured = options.get("k", 16), options.get("tiles", 1024), options.get("featured", False)
    rows = torch.zeros(1, 32, tiles, hidden, dtype=dtype)
    weight, seed = torch.zeros(32, hidden), torch.zeros(1, dtype=torch.int64)
    given = (weight, weight[:, 0], torch.ones(32)) if featured else (weight, None, 1.0)
    if options.get("bilinear", False):
        given = (None, *given[1:])
    noise, valid = (seed, torch.ones(1, tiles, dtype=torch.bool)) if featured else (None, None)
    out = torch.zeros(1, 32, tiles, k, dtype=torch.int32), torch.zeros(1, 32, tiles, k)
    level = options.get("level", 0)
    within = torch.zeros(1, 32, tiles, 32, dtype=torch.int32) if level == 2 else None
    return triton_select.launch(
        rows, rows, *given, noise, valid, within, *out, 0, 128, 16 if level else 1,
        is_causal=True, own=True, sink=featured,
    )  # fmt: skip


def layout_of(kernel: str, k: int, kind: torch.dtype, options: dict[str, Any]) -> Any:
    """A launch that makes a layout of learned indices. Options: ``block``, ``whole`` (not causal), ``long``
    (row starts past 2³¹ tiles)."""
    from sparsetile.kernels import triton_layout
    from sparsetile.layout.topk import Cuts, Sizes

    block, is_causal = options.get("block", 128), not options.get("whole", False)
    sizes = Sizes(1000, 1000, block, block, is_causal)
    cuts, rows = Cuts.of(sizes), 4 * sizes.q_blocks
    starts = torch.int64 if options.get("long") else torch.int32
    given = torch.zeros(1, 2, sizes.q_blocks, k, dtype=kind)
    column, valid, indptr = given.long(), given.bool(), torch.zeros(rows + 1, dtype=starts)
    masks = torch.zeros(cuts.masks, block, -(-block // 32), dtype=torch.int32)
    if kernel == "rows":
        return triton_layout.rows_launch(given, column, valid, indptr, masks, 2, sizes, cuts)
    flat = torch.zeros(rows * k, dtype=torch.int32)
    slot, items = torch.zeros(1, 2, 2, sizes.q_blocks, k).long(), torch.zeros(6, rows, dtype=starts)
    return triton_layout.places_launch(column, indptr, flat, flat, slot, items, cuts)


def compiled(launch: Any, target: str) -> Any:
    """What ``triton.compile`` makes of a launch's arguments, specialised as at run time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    signature: dict[str, str] = {}
    constants: dict[tuple[int], object] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.arguments[name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[index,] = "constexpr", value
        elif hasattr(value, "block_shape"):
            kind = f"{_NAMES[value.base.dtype]}{value.block_shape}".replace(" ", "")
            signature[name] = f"tensordesc<{kind},{value.layout!r}>"
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[index,] = "*" + _NAMES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[index,] = "constexpr", 1
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[index,] = [["tt.divisibility", 16]]
    kind = GluonASTSource if isinstance(launch.kernel, GluonJITFunction) else ASTSource
    source = kind(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[target][:3]), options=launch.options)


def usage(binary: Any, target: str) -> dict[str, int]:
    """Registers and spilled (or otherwise local) bytes of a thread, shared bytes of a block."""
    import triton

    shared = int(binary.metadata.shared)
    if target.startswith("gfx"):
        text = binary.asm["amdgcn"]
        count = {
            name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]
            for name in ("vgpr_count", "vgpr_spill_count")
        }
        return {"registers": count["vgpr_count"], "spilled": 4 * count["vgpr_spill_count"], "shared": shared}
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    commands = [str(tools / "cuobjdump"), "--dump-resource-usage"], [str(tools / "nvdisasm"), "-c"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text, code = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in commands
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    counts = {"registers": int(found[1]), "spilled": int(found[2]), "shared": shared}
    return counts | {"spills_in_loops": spills_in_loops(code)}


def spills_in_loops(code: str) -> int:
    """Loads and stores of local memory between the target of a jump back and the jump, in what ``nvdisasm``
    prints. Outside of loops a spill costs little: ptxas parks values there to fit one more block on an SM."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            lines.append(instruction[1])
    assert any("EXIT" in line for line in lines), code[:1000]
    jumps = [(re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line), at) for at, line in enumerate(lines)]
    loops = [(labels[jump[1]], at) for jump, at in jumps if jump is not None and labels[jump[1]] <= at]
    local = [at for at, line in enumerate(lines) if re.search(r"\b(LDL|STL)\b", line)]
    return sum(any(first <= at <= last for first, last in loops) for at in local)


def main() -> None:
    for case in json.load(sys.stdin):
        kernel, head_dim, dtype, target, options = case
        launch = launch_of(kernel, head_dim, dtype, target, options)
        names = (
            "M",
            "N",
            "ROWS",
            "SLOTS",
            "LANES",
            "KEPT",
            "ROWS_M",
            "ROWS_N",
            "COLUMNS_M",
            "COLUMNS_N",
            "PLACES",
        )
        tiles = [launch.arguments[name] for name in names if name in launch.arguments]
        tiles += launch.options.values()
        print(
            json.dumps({"case": case, "tiles": tiles, **usage(compiled(launch, target), target)}), flush=True
        )


if __name__ == "__main__":
    main()
