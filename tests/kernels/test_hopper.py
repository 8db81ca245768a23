"""The kernels for Hopper in an emulator, on the CPU: output and gradients against the float64 oracle."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import gluon_on_cpu
from gluon_on_cpu import emulated
from gpu.gradient_matrix import RATIO, dense_answers
from oracle import FLOOR, Case, random_case, relative_error, run, spread_error
from sparsetile.kernels import (
    hopper_backend,
    hopper_columns,
    hopper_dropout,
    hopper_five,
    hopper_forward,
    hopper_launch,
    hopper_rows,
    hopper_tiles,
    triton_backend,
    triton_launch,
    triton_replay,
)
from sparsetile.kernels.triton_config import Target, override
from sparsetile.kernels.triton_launch import Launch

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the real kernels"
)


NOTHING = Launch(None, 0, {}, {})


@pytest.fixture(autouse=True)
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hopper_backend, "device_problem", lambda device: None)
    monkeypatch.setattr(hopper_launch, "LONG_ROW", 0)
    with emulated(hopper_tiles, hopper_dropout, hopper_forward, hopper_rows, hopper_columns, hopper_five):
        yield


def redrawn(case: Case, turn: int) -> Case:
    """The same layout with other operands."""
    rng = torch.Generator().manual_seed(case.seed + turn + 1)
    names = ("q", "k", "v", "grad_out", "tile_bias")
    given = {name: getattr(case, name) for name in names}
    return replace(
        case, **{name: torch.randn(x.shape, generator=rng).to(x.dtype) for name, x in given.items()}
    )


def tile_bias_errors(backend: object, case: Case, lean: bool) -> tuple[float, float]:
    """Of ``backend`` and of dense attention."""
    exact, unit = case.expected()["tile_bias"], case.unit("tile_bias")
    answers = run(backend, replace(spoiled(case), lean=lean)), dense_answers(case, fused=False)
    ours, rival = (spread_error(x["tile_bias"], exact, unit) for x in answers)
    return ours, rival


def check(backend: object, case: Case) -> None:
    """Asserts that the summed errors are at most 1.2 times those of dense attention written out in the case's
    dtype, which rounds the weights as tensor cores want them, or one rounding; the log-sum-exp's as fp32.
    Both forms of backward. Keys that a padding mask ignores are NaN where the backend reads them."""
    expected, dense = case.expected(), dense_answers(case, fused=False)
    for lean in (False, True):
        got = run(backend, replace(spoiled(case), lean=lean))
        if case.key_padding_mask is not None:
            assert not got["k"][ignored(case)].any() and not got["v"][ignored(case)].any()
        assert relative_error(got["lse"], expected["lse"]) <= FLOOR[torch.float32], case.describe()
        for name in expected.keys() - {"lse"}:
            exact, unit = expected[name], case.unit(name)
            assert got[name].shape == exact.shape
            error, rival = (spread_error(x[name], exact, unit) for x in (got, dense))
            limit = max(RATIO * rival, FLOOR[case.q.dtype] / 2)
            if name == "tile_bias" and error > limit:
                # A few sums where nearly everything cancels: chance says which is nearer. So by eight cases.
                pairs = [tile_bias_errors(backend, redrawn(case, turn), lean) for turn in range(8)]
                error, rival = (math.sqrt(sum(x * x for x in each) / 8) for each in zip(*pairs, strict=True))
                limit = max(RATIO * rival, FLOOR[case.q.dtype] / 2)
            assert error <= limit, f"{name}, lean={lean}: {error:.3g} above {limit:.3g}; {case.describe()}"


def ignored(case: Case) -> torch.Tensor:
    """Of a padding mask: bool ``[B, Hkv, Nk]``."""
    assert case.key_padding_mask is not None
    mask = case.key_padding_mask
    return (mask[:, None] if mask.dim() == 2 else mask).expand(case.k.shape[:3])


def spoiled(case: Case) -> Case:
    if case.key_padding_mask is None:
        return case
    hidden = ignored(case)[..., None]
    return replace(case, k=case.k.masked_fill(hidden, torch.nan), v=case.v.masked_fill(hidden, torch.inf))


def case_of(block: int, head_dim: int, features: set[str] = frozenset(), **sizes: Any) -> Case:
    sizes = {"q_len": 2 * block - 9, "k_len": 2 * block + 5, "batch": 1, "heads": 2, **sizes}
    dtype = sizes.pop("dtype", torch.bfloat16)
    return random_case(block=block, head_dim=head_dim, dtype=dtype, features=features, **sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block", [64, 128])
def test_output_and_gradients(block: int, head_dim: int, dtype: torch.dtype) -> None:
    check(hopper_backend, case_of(block, head_dim, {"strided"}, dtype=dtype))


def test_the_emulator_s_copies_end_where_the_hardware_s_do() -> None:
    """Past a tensor's end zeros come, which count as bytes, and nothing is stored or added."""
    memory = torch.randn(6, 10)
    tensor = memory[:5, :8]
    place = SimpleNamespace(base=tensor, shape=tensor.shape, block_shape=(4, 16))
    full, got = gluon_on_cpu.Barrier(), gluon_on_cpu.Smem(torch.full((4, 16), torch.nan))
    gluon_on_cpu.init(full, 1)
    gluon_on_cpu.expect(full, 4 * 16 * 4)
    gluon_on_cpu.copy_in(place, (3, 4), full, got)
    full.wait(0)
    assert torch.equal(got.data[:2, :4], tensor[3:, 4:])
    assert got.data.count_nonzero() == 8
    for send, factor in ((gluon_on_cpu.copy_out, 0), (gluon_on_cpu.add_out, 1)):
        expected = memory.clone()
        expected[3:5, 4:8] = factor * expected[3:5, 4:8] + 7.0
        send(place, (3, 4), gluon_on_cpu.Smem(torch.full((4, 16), 7.0)))
        send(place, (3, 8), gluon_on_cpu.Smem(torch.full((4, 16), 9.0)))
        gluon_on_cpu.store_wait(0)
        assert torch.equal(memory, expected)


@pytest.mark.parametrize(
    ("head_dim", "block", "dtype", "features"),
    [
        (96, 128, torch.bfloat16, {"strided"}),
        (80, 128, torch.float16, {"tile_bias", "lse"}),
        (32, 128, torch.float16, {"gqa"}),
        (96, 64, torch.float16, {"gqa", "per_head"}),
        (80, 64, torch.bfloat16, {"strided", "lse"}),
        (32, 64, torch.float16, {"tile_bias", "per_batch"}),
        (8, 128, torch.float16, set()),
        (72, 128, torch.bfloat16, set()),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1000])
def test_head_dims_narrower_than_their_buffers(
    head_dim: int, block: int, dtype: torch.dtype, features: set[str], chunk: int
) -> None:
    """With rows and columns in parts, too, which are as wide as the tensors."""
    if chunk == 1:
        dtype = torch.float16  # see test_features
    with override(chunk=chunk):
        check(hopper_backend, case_of(block, head_dim, features, dtype=dtype))


@pytest.mark.parametrize(
    "features",
    [
        {"lse", "tile_bias"},
        {"gqa", "per_head"},
        {"per_batch", "tile_bias", "lse"},
        {"per_batch", "per_head", "gqa", "tile_bias", "lse", "strided"},
    ],
    ids=lambda features: "+".join(sorted(features)),
)
def test_features(features: set[str]) -> None:
    # fp16: parts are summed by kernels of the interpreter, which cuts bits off where a GPU rounds to bf16.
    heads = 4 if "gqa" in features else 2
    check(hopper_backend, case_of(64, 64, features, batch=2, heads=heads, dtype=torch.float16))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_tile_bias_at_the_larger_tile(head_dim: int) -> None:
    check(hopper_backend, case_of(128, head_dim, {"tile_bias", "lse"}, dtype=torch.float16))


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("features", [{"gqa", "tile_bias"}, {"per_head", "lse"}, {"per_batch"}])
def test_split_rows_and_columns(block: int, features: set[str]) -> None:
    case = case_of(block, 64, features, q_len=3 * block - 1, dtype=torch.float16)
    with override(chunk=1):
        check(hopper_backend, case)


@pytest.mark.parametrize("block", [64, 128])
def test_group_summed_inside_the_program(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """With few multiprocessors a column walks all query heads of a key head."""
    monkeypatch.setattr(hopper_backend, "target_of", lambda device: Target("hopper", 1))
    check(hopper_backend, case_of(block, 64, {"tile_bias"}, heads=4, key_heads=2))
    check(hopper_backend, case_of(block, 128, {"tile_bias"}, heads=4, key_heads=1, k_len=300))
    check(hopper_backend, case_of(block, 40, heads=4, key_heads=2))


@pytest.mark.parametrize(
    ("change", "five"),
    [
        ({}, True),
        ({"lean": True}, False),
        ({"block": 64}, False),
        ({"long": 4}, False),
        ({"most": 200}, False),
        ({"features": {"tile_bias"}}, False),
        ({"features": {"tile_bias"}, "head_dim": 128}, True),
    ],
)
def test_which_form_of_backward_serves(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], five: bool
) -> None:
    given = {"block": 128, "head_dim": 64, "features": set(), "lean": False, "long": 0, "most": 247, **change}
    monkeypatch.setattr(hopper_launch, "LONG_ROW", given["long"])
    monkeypatch.setattr(hopper_launch, "MOST_QUERIES", given["most"])
    case = case_of(given["block"], given["head_dim"], given["features"])
    kernels: list[str] = []
    monkeypatch.setattr(
        hopper_launch, "_launch", lambda kernel, *_: kernels.append(kernel.function.__name__) or NOTHING
    )
    run(hopper_backend, replace(case, lean=given["lean"]))
    assert kernels[1:] == (["five_kernel"] if five else ["columns_kernel", "rows_kernel"])


@pytest.mark.parametrize(
    ("block", "head_dim", "features", "chunk"),
    [
        (128, 64, {"padding", "strided"}, 1000),
        (128, 128, {"padding", "gqa", "lse"}, 1),
        (128, 80, {"padding_by_head", "tile_bias"}, 1000),
        (64, 64, {"padding_by_head", "gqa", "per_head", "per_batch", "lse"}, 1000),
        (64, 128, {"padding_by_head", "tile_bias"}, 1),
    ],
)
def test_key_padding(block: int, head_dim: int, features: set[str], chunk: int) -> None:
    heads = 4 if "gqa" in features else 2
    case = case_of(block, head_dim, features, batch=2, heads=heads, dtype=torch.float16)
    assert case.key_padding_mask is not None
    # A batch element without keys; and of the other some of the first tile's, all of the next, none after.
    case.key_padding_mask[0] = True
    case.key_padding_mask[1, ..., block : 2 * block] = False
    case.key_padding_mask[1, ..., 2 * block :] = True
    with override(chunk=chunk):
        check(hopper_backend, case)


@pytest.mark.parametrize(
    ("block", "head_dim", "features", "chunk"),
    [
        (128, 64, {"dropout", "strided"}, 1000),
        (128, 128, {"dropout", "gqa", "lse"}, 1),
        (128, 80, {"dropout", "padding_by_head"}, 1000),
        (128, 128, {"dropout", "tile_bias"}, 1000),
        (64, 64, {"dropout", "placed", "gqa", "per_batch", "lse"}, 1000),
        (64, 128, {"dropout", "placed", "tile_bias"}, 1),
        (128, 64, {"dropout", "placed", "gqa"}, 1000),
    ],
)
def test_dropout(block: int, head_dim: int, features: set[str], chunk: int) -> None:
    """The very weights that every backend drops, in all kernels."""
    heads = 4 if "gqa" in features else 2
    case = case_of(block, head_dim, features, batch=2, heads=heads, dtype=torch.float16)
    assert case.dropout_p > 0 and case.dropout_seed is not None
    with override(chunk=chunk):
        check(hopper_backend, case)


@pytest.mark.parametrize(("block", "head_dim"), [(128, 64), (64, 128)])
def test_dropout_in_programs_of_a_group_s_heads(
    block: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where few multiprocessors leave a column of all its query heads to one program."""
    monkeypatch.setattr(hopper_backend, "target_of", lambda device: Target("hopper", 1))
    case = case_of(block, head_dim, {"dropout", "gqa"}, batch=2, heads=4, dtype=torch.float16)
    assert triton_launch.heads_a_program(case.k, case.q, case.layout, Target("hopper", 1)) == 2
    check(hopper_backend, case)


def test_key_padding_in_whole_tiles_and_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of padding at the end, where no tile is partial; the rows that attend only such tiles are empty."""
    monkeypatch.setattr(hopper_backend, "target_of", lambda device: Target("hopper", 1))
    mask = torch.ones(1, 1, 256, 384, dtype=torch.bool)
    mask[:, :, 128:, :256] = False
    for block, head_dim in ((128, 64), (64, 64)):
        sizes = {"q_len": 256, "k_len": 384, "batch": 2, "heads": 2, "key_heads": 1, "mask": mask}
        case = case_of(block, head_dim, {"padding"}, dtype=torch.float16, **sizes)
        assert case.key_padding_mask is not None
        case.key_padding_mask[:] = torch.arange(384) >= torch.tensor([[150], [384]])
        check(hopper_backend, case)


def test_every_tensor_has_a_name_that_recordings_know() -> None:
    case = case_of(128, 128, {"padding", "tile_bias", "gqa", "lse"})
    q, k, v, target = case.q, case.k, case.v, Target("hopper", 132)
    known = {*triton_replay._OF_LAYOUT, *triton_replay._SCRATCH, triton_replay._COUNTER}
    statistic, owned = torch.zeros(q.shape[:3]), torch.zeros(8, 1, 1, case.layout.capacity)
    with override(chunk=1):
        for lean in (False, True):
            request = replace(case, lean=lean).request()
            launches = hopper_launch.forward_launches(q, k, v, q, statistic, request, target)
            given = (q, statistic, q, statistic, q, k, v, owned, None, request, target)
            called = [(launch, triton_backend._FORWARD) for launch in launches]
            launches = hopper_launch.backward_launches(q, k, v, *given)
            called += [(launch, triton_backend._BACKWARD) for launch in launches]
            for launch, names in called:
                for name, value in launch.arguments.items():
                    if isinstance(value, torch.Tensor) or hasattr(value, "block_shape"):
                        assert launch.names.get(name, name) in known | set(names), name


def test_empty_rows_columns_and_layouts() -> None:
    case = case_of(64, 64, q_len=200, k_len=260, dtype=torch.float16)
    for mask in (torch.zeros_like(case.mask), case.mask & (torch.arange(260) // 64 == 2)):
        check(hopper_backend, random_case_of(case, mask))


def random_case_of(case: Case, mask: torch.Tensor) -> Case:
    sizes = {"block": case.block, "head_dim": case.q.shape[3], "dtype": case.q.dtype, "mask": mask}
    return random_case(q_len=mask.shape[2], k_len=mask.shape[3], batch=1, heads=2, **sizes)


def test_tile_bias_of_minus_infinity() -> None:
    """Such a tile is as good as not kept."""
    case = case_of(64, 64, {"tile_bias"}, q_len=200, dtype=torch.float16)
    assert case.tile_bias is not None
    forbidden = torch.rand_like(case.tile_bias) < 0.5
    check(hopper_backend, replace(case, tile_bias=case.tile_bias.masked_fill(forbidden, -torch.inf)))


def test_two_runs_give_the_same_bits() -> None:
    case = replace(case_of(128, 64, {"gqa", "lse"}, q_len=300, heads=4), lean=True)
    first, second = run(hopper_backend, case), run(hopper_backend, case)
    for name in first:
        assert torch.equal(first[name], second[name]), (name, case.describe())


def test_a_gradient_without_strides_is_copied() -> None:
    """As the backward of a sum makes it."""
    case = case_of(64, 64, dtype=torch.float16)
    ones = torch.ones((), dtype=case.q.dtype).expand(case.q.shape)
    check(hopper_backend, replace(case, grad_out=ones))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 136}, "head_dim 8 to 128 in multiples of 8, not 136"),
        ({"head_dim": 60}, "head_dim 8 to 128 in multiples of 8, not 60"),
        ({"dtype": torch.float32}, "fp16 and bf16, not torch.float32"),
        ({"block": 32}, "not 32×32"),
        ({"features": {"attn_bias"}}, "no dense bias"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_left_to_other_backends(change: dict[str, Any], reason: str) -> None:
    given = {"block": 64, "head_dim": 64, **change}
    case = case_of(given.pop("block"), given.pop("head_dim"), given.pop("features", set()), **given)
    assert reason in (hopper_backend.why_not(case.q, case.k, case.v, case.request()) or "")


def test_scales_and_strides_that_are_not_served() -> None:
    case = case_of(64, 64, {"strided"})
    q, k, v = case.q, case.k, case.v
    for scale in (0.0, -1.0):
        assert "scale above 0" in hopper_backend.why_not(q, k, v, replace(case, scale=scale).request())
    odd = torch.empty(k.numel() + 1, dtype=k.dtype)[1:].view(k.shape)
    wide = torch.empty(*k.shape[:3], 65, dtype=k.dtype)[..., :64]
    for other in (odd, wide, k[:, :1].expand(k.shape)):
        assert "multiples of 16 bytes" in hopper_backend.why_not(q, other, v, case.request())
        assert "multiples of 16 bytes" in hopper_backend.why_not(q, k, other, case.request())
    one = k[:, :1, :1].as_strided((1, 1, 1, 64), (3, 5, 7, 1))
    assert hopper_backend.why_not(one, one, one, case.request()) is None


def test_it_says_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    case = case_of(64, 64)
    assert "compute capability 9.0" in hopper_backend.why_not(case.q, case.k, case.v, case.request())
