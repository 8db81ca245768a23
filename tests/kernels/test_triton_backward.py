"""The Triton backward in its interpreter, on the CPU: every gradient against the float64 oracle."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from oracle import check, random_case, relative_error, run
from sparsetile.kernels import triton_backend
from sparsetile.kernels.triton_backward import turn_of
from sparsetile.kernels.triton_config import Target, override
from sparsetile.kernels.triton_table import Pair, Tiles
from sparsetile.layout.blocks import BlockLayout
from sparsetile.layout.schedule import Direction, schedule

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the real kernels"
)


@pytest.mark.parametrize("head_dim", [1, 12, 16, 35, 64, 80, 96, 128, 256])
def test_head_dims(head_dim: int) -> None:
    check(triton_backend, random_case(head_dim=head_dim, block=32, q_len=40, batch=1, heads=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_dense_attention_written_in_it(dtype: torch.dtype) -> None:
    case = random_case(dtype=dtype, block=16, q_len=70, batch=1, heads=2, features={"gqa"})
    expected, got = case.expected(), run(triton_backend, case)
    q, k, v = (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
    kept = case.mask.any(-1, keepdim=True)
    logits = (q @ k.repeat_interleave(2, 1).transpose(2, 3) * case.scale).masked_fill(
        ~case.mask & kept, -math.inf
    )
    out = (logits.softmax(-1) * kept) @ v.repeat_interleave(2, 1)
    grads = torch.autograd.grad(out, (q, k, v), case.grad_out)
    # Where GPUs round to bf16 the interpreter cuts bits off, which doubles the error.
    cut = 2 if dtype == torch.bfloat16 else 1
    for name, dense in zip(("out", "q", "k", "v"), (out.detach(), *grads), strict=True):
        error, limit = (torch.dist(x.double(), expected[name]).item() for x in (got[name], dense))
        assert error <= 1.2 * cut * limit, f"{name}: {error:.3g} against {limit:.3g}; {case.describe()}"


@pytest.mark.parametrize("block", [16, 64, 128])
def test_blocks_with_ragged_tails(block: int) -> None:
    check(triton_backend, random_case(block=block, q_len=2 * block - 3, k_len=block + 5, batch=1, heads=1))


@pytest.mark.parametrize(
    "features",
    [
        {"lse"},
        {"padding"},
        {"dropout"},
        {"attn_bias"},
        {"tile_bias"},
        {"gqa", "strided"},
        {"gqa", "per_head"},
        {"per_batch", "tile_bias", "lse"},
        {"per_batch", "per_head", "gqa", "tile_bias", "attn_bias", "padding", "dropout", "lse", "strided"},
        {"gqa", "tile_bias", "attn_bias", "padding", "dropout", "lse"},
        {"placed"},
        {"padding_by_head", "gqa"},
        {"placed", "padding_by_head", "per_head", "gqa", "tile_bias", "lse"},
    ],
    ids=lambda features: "+".join(sorted(features)),
)
def test_features(features: set[str]) -> None:
    check(triton_backend, random_case(block=16, q_len=37, head_dim=16, features=features))


def test_group_summed_inside_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few multiprocessors the column pass walks all query heads of a key head in one program."""
    monkeypatch.setattr(triton_backend, "target_of", lambda device: Target("hopper", 1))
    features = {"tile_bias", "padding", "lse"}
    check(
        triton_backend, random_case(block=16, q_len=40, heads=4, key_heads=1, head_dim=16, features=features)
    )
    features = {"placed", "padding_by_head"}
    check(
        triton_backend, random_case(block=16, q_len=40, heads=4, key_heads=2, head_dim=16, features=features)
    )


@pytest.mark.parametrize(
    "features",
    [{"gqa", "tile_bias"}, {"per_head", "padding"}, {"per_batch", "dropout"}, {"placed", "padding_by_head"}],
)
def test_split_rows_and_columns(features: set[str]) -> None:
    case = random_case(block=16, q_len=40, k_len=50, heads=2, head_dim=16, features=features)
    with override(chunk=1):
        check(triton_backend, case)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("features", "chunk"),
    [({"gqa"}, 1), ({"per_head", "lse"}, 2), ({"per_batch", "padding"}, 9), ({"attn_bias"}, 3)],
)
def test_tile_bias_of_minus_infinity(features: set[str], chunk: int, whole: bool) -> None:
    """Such a tile is as good as not kept. Tiles of one or of two steps, in items of 1 … 9 tiles; where all
    tiles are whole, a row's biases stand in its own order."""
    batch, length = 2 if "per_batch" in features else 1, 96 if whole else 83
    shape = (batch, 2 if "per_head" in features else 1, 3, 3)
    mask = (torch.rand(shape) < 0.7).repeat_interleave(32, 2).repeat_interleave(32, 3) if whole else None
    sizes = {"block": 32, "q_len": length, "head_dim": 16, "batch": batch, "heads": 2}
    case = random_case(**sizes, features=features | {"tile_bias"}, mask=mask)
    assert case.tile_bias is not None and (case.layout.masks.shape[0] == 0) == whole
    case.tile_bias[torch.rand(case.tile_bias.shape) < 0.4] = -math.inf
    steps = Pair((32, 16), (16, 32), 4, 1) if chunk % 2 else Pair((32, 32), (32, 32), 4, 1)
    with override(backward=steps, chunk=chunk):
        check(triton_backend, case)


@pytest.mark.parametrize("keys", [16, 32])
def test_tile_bias_of_tiles_that_a_model_chose(keys: int) -> None:
    """``from_topk``, causal: a layout a head, with room for more entries than it has tiles; every row's whole
    tiles are followed by its diagonal. Tiles of two steps and of one."""
    length, heads, blocks = 150, 2, 5
    order = torch.rand(1, heads, blocks, blocks)
    order.diagonal(dim1=2, dim2=3).fill_(2)
    chosen = order.argsort(-1, descending=True)[..., :4]
    chosen[:, 0, 0] = -1  # a row without tiles
    chosen[:, 1, 3, 1] = -1
    layout = BlockLayout.from_topk(chosen, length, length, 32, is_causal=True)
    mask = torch.stack([layout.to_dense(head) for head in range(heads)])[None]
    case = random_case(block=32, q_len=length, batch=1, heads=heads, head_dim=16, mask=mask, features={"lse"})
    bias = torch.nn.functional.logsigmoid(3 * torch.randn(1, 1, layout.capacity))
    with override(forward=Tiles(32, keys, 4, 1), backward=Pair((32, keys), (keys, 32), 4, 1)):
        check(triton_backend, replace(case, layout=layout, tile_bias=bias))


def test_layouts_counted_in_int64() -> None:
    """As past 2³¹ tiles, where row starts, schedules and the loops over them are int64."""
    case = random_case(block=32, q_len=70, head_dim=16, batch=1, heads=2, features={"tile_bias"})
    turned = case.layout.transpose
    turned = turned._replace(indptr=turned.indptr.long(), edges=turned.edges.long())
    wide = {"indptr": case.layout.indptr.long(), "given": turned}
    with override(backward=Pair((32, 32), (16, 16), 4, 1), chunk=1):
        check(triton_backend, replace(case, layout=replace(case.layout, **wide, _memo={})))


@pytest.mark.parametrize(("block_q", "block_k"), [(16, 64), (128, 16)])
def test_oblong_blocks(block_q: int, block_k: int) -> None:
    case = random_case(block=32, q_len=100, k_len=130, batch=1, heads=1, features={"padding"})
    check(triton_backend, replace(case, layout=BlockLayout.from_dense_mask(case.mask, (block_q, block_k))))


def test_schedules_that_only_bound_their_items() -> None:
    """Without counts on the host a schedule ends in empty items and empty splits, which do nothing."""
    case = random_case(block=16, q_len=40, head_dim=16, heads=2, features={"gqa", "tile_bias"})
    directions: tuple[Direction, ...] = ("rows", "columns")
    for direction in directions:
        exact = schedule(case.layout, direction, 1)
        items = torch.cat([exact.items, exact.items.new_tensor([[-1, 0, 0, 0, -1, 0]]).T.expand(6, 7)], 1)
        splits = torch.cat([exact.splits, exact.splits.new_zeros(3, 4)], 1)
        bound = replace(exact, items=items, splits=splits, slots=exact.slots + 3, long_items=0)
        case.layout._memo[f"schedule {direction} 1"] = bound
        assert schedule(case.layout, direction, 1) is bound
    with override(chunk=1):
        check(triton_backend, case)


@triton.jit
def record_turn(record, row_first, row_rest, column_first, column_rest, families):  # type: ignore[no-untyped-def]
    program = tl.program_id(0)
    family, is_row, long, index = turn_of(program, row_first, row_rest, column_first, column_rest, families)
    at = record + 4 * program
    tl.store(at, family)
    tl.store(at + 1, is_row)
    tl.store(at + 2, long)
    tl.store(at + 3, index)


@pytest.mark.parametrize("counts", [(0, 12, 0, 5), (3, 8, 2, 16), (4, 0, 0, 7), (0, 0, 6, 1), (5, 2, 0, 0)])
def test_turns(counts: tuple[int, int, int, int]) -> None:
    """Long programs of all families first; then families in order, rows and columns in proportion."""
    families, (long_rows, rows, long_columns, columns) = 3, counts
    record = torch.full((families * sum(counts), 4), -1, dtype=torch.int32)
    record_turn[(len(record),)](record, *counts, families)
    turns = [tuple(turn) for turn in record.tolist()]
    assert len(set(turns)) == len(turns)
    long_part, rest = (
        turns[: families * (long_rows + long_columns)],
        turns[families * (long_rows + long_columns) :],
    )
    for part, long, of_rows, of_columns in (
        (long_part, 1, long_rows, long_columns),
        (rest, 0, rows, columns),
    ):
        assert [turn[0] for turn in part] == sorted(turn[0] for turn in part)
        assert all(turn[2] == long for turn in part)
        for family in range(families):
            own = [turn for turn in part if turn[0] == family]
            assert [turn[3] for turn in own if turn[1]] == list(range(of_rows))
            assert [turn[3] for turn in own if not turn[1]] == list(range(of_columns))
            done = 0
            for place, turn in enumerate(own):
                done += turn[1]
                assert abs(done - (place + 1) * of_rows / len(own)) < 1


@pytest.mark.parametrize("group", [1, 3])
def test_every_program_of_a_launch_has_one_turn(monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    """Items of several programs, long ones first, families of one and of several heads: all is covered once.

    Outputs begin as NaN, so what no program wrote would show.
    """
    target = Target("hopper", 1 if group > 1 else 132)
    monkeypatch.setattr(triton_backend, "target_of", lambda device: target)
    plain = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **o: plain(*a, **o).fill_(math.nan if o["dtype"].is_floating_point else 0)
    )
    mask = torch.ones(1, 1, 150, 170, dtype=torch.bool)
    mask[..., 64:, 64:] = torch.rand(86, 106) > 0.5
    mask[..., 64:96, 96:] = False
    case = random_case(block=32, q_len=150, k_len=170, batch=2, heads=2 * group, mask=mask, head_dim=16)
    key_heads = case.k.shape[1] // group
    case = replace(case, k=case.k[:, :key_heads].contiguous(), v=case.v[:, :key_heads].contiguous())
    with override(backward=Pair((16, 32), (32, 16), 4, 1), chunk=3):
        check(triton_backend, case)


def test_the_same_bits_every_time() -> None:
    case = random_case(
        block=16, q_len=40, heads=2, head_dim=16, features={"gqa", "tile_bias", "dropout", "lse"}
    )
    with override(chunk=1):
        first, second = run(triton_backend, case), run(triton_backend, case)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_rows_and_columns_without_tiles_get_zero_gradients() -> None:
    mask = torch.zeros(1, 1, 50, 50, dtype=torch.bool)
    mask[..., 20:23, 5:9] = True
    case = random_case(block=16, q_len=50, batch=1, heads=2, mask=mask, features={"lse"})
    assert case.grad_lse is not None
    case.grad_lse[:, :, :20] = math.nan
    got = run(triton_backend, case)
    assert (got["q"][:, :, ~mask[0, 0].any(1)] == 0).all()
    for name in ("k", "v"):
        assert (got[name][:, :, ~mask[0, 0].any(0)] == 0).all()


def test_an_expanded_gradient_serves() -> None:
    case = random_case(block=16, q_len=40, head_dim=16, batch=1, heads=2)
    request = case.request()
    out, lse = triton_backend.forward(case.q, case.k, case.v, request)
    given = (case.q, case.k, case.v, out, lse, request)
    one = torch.ones(())
    answers = [
        triton_backend.backward(grad_out, None, *given, tile_bias_grad=False, attn_bias_grad=False)
        for grad_out in (one.expand(out.shape), one.repeat(*out.shape))
    ]
    for got, expected in zip(answers[0][:3], answers[1][:3], strict=True):
        assert torch.equal(got, expected)


def test_the_future_changes_nothing() -> None:
    """Causal: keys and queries after position t leave outputs up to t, and their gradients, bit for bit."""
    length, t = 60, 33
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    case = random_case(block=16, q_len=length, head_dim=16, batch=1, heads=2, mask=mask)
    case.grad_out[:, :, t:] = 0
    before = run(triton_backend, case)
    for x in (case.q, case.k, case.v):
        x[:, :, t:] += 3
    after = run(triton_backend, case)
    for name in ("out", "lse", "q", "k", "v"):
        assert torch.equal(before[name][:, :, :t], after[name][:, :, :t]), name
    assert relative_error(before["out"], case.expected()["out"]) > 1e-3
