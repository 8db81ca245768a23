"""The Triton kernels compiled, without a GPU, for each GPU that they promise: they fit and do not spill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
SHARED_BYTES = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""What a block may use. sm_80 has 163 KB, but its choices serve sm_86 and sm_89 too, which have 99."""

KERNELS = ("forward", "backward")
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
DTYPES = ("float16", "bfloat16", "float32")


def compile_all(cases: list[list[Any]]) -> list[dict[str, Any]]:
    """Results in the order of the cases, from two processes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "src")

    def half(part: list[list[Any]]) -> list[dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "cross_compile.py")],
            input=json.dumps(part),
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, (
            f"after {len(done.stdout.splitlines())} of {part}:\n{done.stderr[-3000:]}"
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(2) as pool:
        even, odd = pool.map(half, (cases[::2], cases[1::2]))
    results: list[dict[str, Any]] = [{}] * len(cases)
    results[::2], results[1::2] = even, odd
    return results


def assert_fit(results: list[dict[str, Any]]) -> None:
    too_big = [r for r in results if r["shared"] > SHARED_BYTES[r["case"][3]]]
    assert not too_big, too_big


@pytest.mark.parametrize("dtype", DTYPES)
def test_hopper_compiles_every_head_dim_without_spills(dtype: str) -> None:
    results = compile_all([[kernel, dim, dtype, "sm_90", {}] for kernel in KERNELS for dim in HEAD_DIMS])
    assert len(results) == len(KERNELS) * len(HEAD_DIMS)
    assert_fit(results)
    spilled = [r for r in results if r["spilled"] and r["case"][1] <= 128]
    assert not spilled, spilled


def test_hopper_choices_for_whole_tiles_and_short_rows_do_not_spill() -> None:
    whole = [[kernel, dim, "bfloat16", "sm_90", {"whole": True}] for kernel in KERNELS for dim in (64, 128)]
    short = [["backward", 128, "bfloat16", "sm_90", {"short": True, "whole": w}] for w in (True, False)]
    results = compile_all(whole + short)
    assert_fit(results)
    assert not [r for r in results if r["spilled"]], results


def test_hopper_s_own_kernels_fit_and_spill_next_to_nothing() -> None:
    """Every kernel in every form that a multiprocessor has room for; a tile bias costs the backward a few
    registers more than there are."""
    cases = [["hopper forward", dim, "bfloat16", "sm_90", {}] for dim in (64, 128)]
    cases += [["hopper forward", 128, "float16", "sm_90", {"split": True, "biased": True}]]
    cases += [["hopper forward", 64, "bfloat16", "sm_90", {"block": 64}]]
    for dim in (64, 128):
        cases += [["hopper backward", dim, "bfloat16", "sm_90", {"split": True}]]
        cases += [["hopper backward", dim, "bfloat16", "sm_90", {"lean": True, "at": at}] for at in (0, 1)]
        small = {"block": 64, "group": 2}
        cases += [["hopper backward", dim, "bfloat16", "sm_90", {**small, "at": at}] for at in (0, 1)]
    cases += [[f"hopper {way}", 96, "bfloat16", "sm_90", {"split": True}] for way in ("forward", "backward")]
    biased = [["hopper backward", 128, "bfloat16", "sm_90", {"biased": True}]]
    results = compile_all(cases + biased)
    assert_fit(results)
    assert not [r for r in results if r["case"][4].get("block") == 64 and r["shared"] > 115_712], results
    assert not [r for r in results[: len(cases)] if r["spilled"] > 64], results
    assert not [r for r in results[len(cases) :] if r["spilled"] > 96], results


def test_a_tile_bias_keeps_the_shapes_and_does_not_spill() -> None:
    """The tiles are those of the call without it, and no byte of shared memory comes on top: the sums of its
    gradient stay within a warp."""
    results = compile_all(
        [
            ["backward", 128, "bfloat16", "sm_90", {}],
            ["backward", 128, "bfloat16", "sm_90", {"biased": True}],
            ["backward", 128, "bfloat16", "sm_90", {"biased": True, "whole": True}],
            ["backward", 64, "bfloat16", "sm_90", {"biased": True}],
            ["forward", 64, "bfloat16", "sm_90", {"biased": True, "whole": True}],
            ["forward", 128, "bfloat16", "sm_90", {"biased": True}],
        ]
    )
    assert_fit(results)
    assert not [r for r in results if r["spilled"]], results
    plain, biased = results[:2]
    assert biased["tiles"] == plain["tiles"] and biased["shared"] == plain["shared"], results


def test_other_targets_features_and_blocks() -> None:
    """A sample in which every target, kernel, dtype, head_dim and block size occurs."""
    results = compile_all(
        [
            ["forward", 64, "bfloat16", "sm_80", {}],
            ["backward", 128, "float16", "sm_80", {}],
            ["backward", 256, "bfloat16", "sm_80", {"featured": True}],
            ["backward", 96, "float32", "sm_80", {"block": 32}],
            ["forward", 128, "bfloat16", "sm_100", {"featured": True}],
            ["backward", 64, "bfloat16", "sm_100", {}],
            ["backward", 80, "float16", "sm_100", {"block": 64}],
            ["backward", 128, "float32", "sm_100", {}],
            ["forward", 128, "bfloat16", "gfx942", {}],
            ["backward", 16, "float32", "gfx942", {"block": 16}],
            ["backward", 256, "float16", "gfx942", {}],
            ["backward", 128, "bfloat16", "gfx942", {"featured": True}],
            ["forward", 256, "bfloat16", "sm_90", {"featured": True}],
            ["forward", 128, "bfloat16", "sm_90", {"placed": True}],
            ["backward", 128, "bfloat16", "sm_90", {"placed": True}],
            ["backward", 64, "float16", "gfx942", {"placed": True}],
            ["backward", 128, "bfloat16", "sm_90", {"featured": True}],
            ["delta", 128, "bfloat16", "sm_90", {}],
            ["delta", 80, "float32", "gfx942", {"featured": True}],
            ["forward", 32, "float16", "sm_90", {"block": 16}],
        ]
    )
    assert_fit(results)


def test_selection_fits_and_does_not_spill() -> None:
    featured = {"featured": True}
    results = compile_all(
        [
            ["topk", 32, "float32", "sm_90", {"k": 16}],
            ["topk", 32, "bfloat16", "sm_90", {"k": 16, **featured}],
            ["topk", 64, "float32", "sm_90", {"k": 32, **featured}],
            ["topk", 64, "bfloat16", "sm_90", {"k": 32}],
            ["topk", 64, "float32", "sm_90", {"k": 65, **featured}],
            ["topk", 64, "float32", "sm_90", {"k": 129, **featured}],
            ["topk", 30, "float16", "sm_90", {"k": 2, "tiles": 60, **featured}],
            ["topk", 64, "float32", "sm_80", {"k": 32, **featured}],
            ["topk", 64, "bfloat16", "sm_80", {"k": 32}],
            ["topk", 32, "float32", "gfx942", {"k": 16, **featured}],
            ["topk", 64, "bfloat16", "gfx942", {"k": 32}],
            ["topk", 64, "float32", "sm_90", {"k": 32, "level": 2, **featured}],
            ["topk", 64, "bfloat16", "sm_80", {"k": 32, "level": 2, **featured}],
        ]
    )
    assert_fit(results)
    assert not [r for r in results if r["spilled"]], results


def test_bilinear_selection_does_not_spill_in_a_loop() -> None:
    featured = {"featured": True, "bilinear": True}
    results = compile_all(
        [
            ["topk", 32, "float32", "sm_90", {"k": 16, "bilinear": True}],
            ["topk", 64, "float32", "sm_90", {"k": 32, "bilinear": True}],
            ["topk", 64, "float32", "sm_90", {"k": 32, **featured}],
            ["topk", 32, "bfloat16", "sm_80", {"k": 32, **featured}],
            ["topk", 64, "float32", "sm_80", {"k": 16, **featured}],
            ["topk", 128, "float32", "sm_90", {"k": 32, "level": 1, "bilinear": True}],
            ["topk", 64, "float32", "sm_90", {"k": 32, "level": 2, "bilinear": True}],
            ["topk", 64, "float32", "sm_80", {"k": 32, "level": 2, **featured}],
        ]
    )
    assert_fit(results)
    assert not [r for r in results if r["spills_in_loops"] or r["spilled"] > 64], results


def test_layouts_of_learned_indices_fit_and_do_not_spill() -> None:
    results = compile_all(
        [
            ["rows", 16, "int32", "sm_90", {}],
            ["places", 16, "int32", "sm_90", {}],
            ["rows", 129, "int64", "sm_90", {}],
            ["places", 129, "int32", "sm_90", {"long": True}],
            ["rows", 128, "int32", "sm_80", {"block": 16}],
            ["places", 128, "int32", "sm_80", {}],
            ["rows", 1, "int32", "sm_80", {"whole": True}],
            ["places", 1, "int32", "sm_80", {"whole": True}],
            ["rows", 33, "int32", "sm_100", {"long": True}],
            ["places", 33, "int32", "sm_100", {}],
            ["rows", 16, "int32", "gfx942", {}],
            ["places", 16, "int32", "gfx942", {}],
        ]
    )
    assert_fit(results)
    assert not [r for r in results if r["spilled"]], results
