"""The CPU backend against the oracle: gradients, features, leaks, causality, determinism, workspace."""

import math
import random

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from oracle import check, random_case, run
from sparsetile.kernels import cpu, reference
from sparsetile.kernels.cpu_backward import _windows
from sparsetile.kernels.cpu_plan import chunks, first_at_least, layout_plan
from sparsetile.kernels.cpu_scores import Scores
from sparsetile.kernels.request import Request
from sparsetile.layout.blocks import BlockLayout

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HEAD_DIMS = [16, 32, 64, 80, 96, 128, 256]
BLOCKS = [16, 32, 64, 128]
FEATURES = ["tile_bias", "attn_bias", "padding", "dropout", "lse", "per_head", "per_batch", "gqa", "strided"]
FEATURES += ["padding_by_head", "placed"]


def length_for(block):
    """A few tiles and a ragged tail."""
    return 2 * block + random.randint(1, block - 1) if block >= 64 else 90 + random.randint(0, 40)


@pytest.mark.parametrize("feature", ["none", *FEATURES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_by_dtype(feature, dtype):
    check(cpu, random_case(dtype=dtype, features={feature}, q_len=length_for(32), k_len=length_for(32)))


@pytest.mark.parametrize("feature", ["none", *FEATURES])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_feature_by_head_dim(feature, head_dim):
    check(cpu, random_case(head_dim=head_dim, features={feature}, q_len=length_for(32)))


@pytest.mark.parametrize("feature", ["none", *FEATURES])
@pytest.mark.parametrize("block", BLOCKS)
def test_feature_by_block(feature, block):
    check(cpu, random_case(block=block, features={feature}, q_len=length_for(block), k_len=length_for(block)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_block_and_head_dim_by_dtype(dtype, block):
    for head_dim in HEAD_DIMS:
        check(
            cpu, random_case(dtype=dtype, block=block, head_dim=head_dim, batch=1, heads=2, q_len=block + 7)
        )


@pytest.mark.parametrize("trial", range(24))
def test_combinations_of_features(trial):
    features = set(random.sample(FEATURES, random.randint(2, 6)))
    if "per_head" in features:
        features.discard("gqa")
    check(
        cpu,
        random_case(
            dtype=random.choice([torch.float32, torch.float64]),
            block=random.choice([16, 32, 64]),
            head_dim=random.choice([16, 64, 80]),
            q_len=random.randint(1, 200),
            k_len=random.randint(1, 200),
            features=features,
        ),
    )


@pytest.mark.parametrize("layout_heads", [1, 6])
def test_several_query_heads_read_one_key_head(layout_heads):
    for key_heads in (1, 2, 3):
        features = {"per_head"} if layout_heads > 1 else set()
        check(cpu, random_case(heads=6, key_heads=key_heads, features=features | {"tile_bias", "dropout"}))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("length", ["1", "-1", "+0", "+1"])
def test_lengths_around_a_block(block, length):
    q_len = 1 if length == "1" else block + int(length)
    for k_len in (1, q_len, block + 1):
        check(cpu, random_case(dtype=torch.float64, block=block, q_len=q_len, k_len=k_len, batch=1, heads=2))


def test_one_tile_rows_and_whole_tiles():
    tiles = torch.eye(5, dtype=torch.bool)[torch.randperm(5)]
    mask = tiles.repeat_interleave(32, 0).repeat_interleave(32, 1)
    check(cpu, random_case(q_len=160, mask=mask[None, None]))


@pytest.mark.parametrize("backend", [cpu, reference])
def test_nothing_allowed_anywhere(backend):
    case = random_case(mask=torch.zeros(1, 1, 100, 100, dtype=torch.bool))
    got = run(backend, case)
    assert (got["lse"] == -math.inf).all()
    for name in ("out", "q", "k", "v"):
        assert (got[name] == 0).all(), name


def test_empty_rows_in_kept_tiles():
    mask = torch.rand(1, 1, 100, 100) < 0.5
    mask[..., ::3, :] = False
    case = random_case(mask=mask, features={"lse", "dropout"})
    check(cpu, case)
    got = run(cpu, case)
    assert (got["out"][:, :, ::3] == 0).all()
    assert (got["lse"][:, :, ::3] == -math.inf).all()
    assert (got["q"][:, :, ::3] == 0).all()


def test_rows_longer_than_a_chunk(monkeypatch):
    """A row of many steps of the online softmax; large logits make the running maximum move."""
    tiles = global_and_local(70)
    mask = tiles.repeat_interleave(16, 0).repeat_interleave(16, 1)[None, None]
    case = random_case(head_dim=256, block=16, q_len=1120, mask=mask, batch=1, heads=1, features={"lse"})
    case.q = case.q * 8
    monkeypatch.setattr("sparsetile.kernels.cpu_scores.tile_budget", lambda *_: (32, 64))
    scores = Scores(case.q, case.k, case.v, case.request())
    cut = chunks(case.layout, layout_plan(case.layout), scores.unfolded, scores.budget)
    assert max(sum(1 for _ in chunk.steps()) for chunk in cut) >= 3
    check(cpu, case)


def test_every_tile_is_computed_once_and_chunks_are_large():
    case = random_case(block=16, q_len=1600, batch=2, heads=4, features={"gqa"}, head_dim=64)
    scores = Scores(case.q, case.k, case.v, case.request())
    plan = layout_plan(case.layout)
    seen, sizes = [], []
    for chunk in chunks(case.layout, plan, scores.unfolded, scores.budget):
        for step in chunk.steps():
            pairs = chunk.queries[..., None] * 10_000 + step.keys[:, :, None, :]
            seen.append(pairs.flatten())
            sizes.append(pairs.numel())
    ids = torch.cat(seen)
    assert ids.unique().numel() == ids.numel() == case.layout.nnz * 8
    assert max(sizes) <= scores.budget[1]
    assert sum(sizes) / len(sizes) >= 32


@pytest.mark.parametrize(
    "features", [{"padding"}, {"attn_bias"}, {"padding", "attn_bias", "lse", "dropout"}, set()]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_keys_not_kept_do_not_leak(features, value):
    """Keys that no row of a batch element may attend hold NaN or inf: nothing changes, not one bit."""
    case = random_case(q_len=110, features=features)
    case.mask[..., 5:9] = False
    case.layout = BlockLayout.from_dense_mask(case.mask, case.block)
    if case.attn_bias is not None:
        case.attn_bias[..., 12:15] = -math.inf
    clean = run(cpu, case)
    ignored = torch.zeros(2, 110, dtype=torch.bool)
    ignored[:, 5:9] = True
    if case.key_padding_mask is not None:
        ignored |= case.key_padding_mask
    if case.attn_bias is not None:
        ignored[:, 12:15] = True
    case.k = case.k.masked_fill(ignored[:, None, :, None], value)
    case.v = case.v.masked_fill(ignored[:, None, :, None], value)
    dirty = run(cpu, case)
    for name, expected in clean.items():
        assert torch.equal(expected, dirty[name]), f"{name}; {case.describe()}"


def test_tiles_not_kept_and_tails_do_not_leak():
    """NaN in key tiles that a row does not keep, and in memory past the tail."""
    storage = torch.full((2, 4, 130, 32), math.nan)
    mask = torch.rand(1, 1, 100, 100) < 0.6
    mask[..., :32, 32:64] = False
    mask[..., 32:, :] = mask[..., 32:, :] & (torch.arange(100) < 32)
    case = random_case(q_len=100, mask=mask)
    clean = run(cpu, case)
    case.k = storage.clone()[:, :, :100].copy_(case.k)
    case.v = storage.clone()[:, :, :100].copy_(case.v)
    for name, value in run(cpu, case).items():
        assert torch.equal(clean[name], value), name
    case.k[:, :, 32:64] = math.nan
    case.v[:, :, 32:64] = math.inf
    dirty = run(cpu, case)
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name


def test_a_bad_key_reaches_the_rows_that_attend_it_and_no_others():
    """Also in backward: rows that are NaN must not spoil gradients of keys that they do not attend."""
    mask = torch.ones(96, 96, dtype=torch.bool).tril()
    case = random_case(q_len=96, mask=mask[None, None])
    clean = run(cpu, case)
    case.k = case.k.clone()
    case.k[:, :, 40] = math.nan
    dirty = run(cpu, case)
    for name in ("out", "lse", "q"):
        assert torch.equal(clean[name][:, :, :40], dirty[name][:, :, :40]), name
        assert dirty[name][:, :, 40:].isnan().all(), name
    window = torch.ones(96, 96, dtype=torch.bool).tril().triu(-3)
    case = random_case(q_len=96, mask=window[None, None])
    case.k = case.k.clone()
    case.k[:, :, 40] = math.nan
    dirty = run(cpu, case)
    for name in ("k", "v"):
        assert dirty[name][:, :, :37].isfinite().all() and dirty[name][:, :, 44:].isfinite().all(), name


@pytest.mark.parametrize("block", [16, 64])
def test_the_future_does_not_change_the_past(block):
    length = 200
    case = random_case(
        block=block, q_len=length, mask=torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    )
    before = run(cpu, case)
    cut = random.randint(1, length - 1)
    case.k, case.v = case.k.clone(), case.v.clone()
    case.k[:, :, cut:] += 3 * torch.randn_like(case.k[:, :, cut:])
    case.v[:, :, cut:] += 3 * torch.randn_like(case.v[:, :, cut:])
    after = run(cpu, case)
    for name in ("out", "lse", "q"):
        assert torch.equal(before[name][:, :, :cut], after[name][:, :, :cut]), name
        assert not torch.equal(before[name][:, :, cut:], after[name][:, :, cut:]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_equal_from_run_to_run(dtype):
    case = random_case(dtype=dtype, q_len=150, features={"gqa", "tile_bias", "dropout"})
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first, second = run(cpu, case), run(cpu, case)
        for name, value in second.items():
            assert torch.equal(first[name], value), name
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("features", [set(), {"per_head", "per_batch"}, {"gqa", "tile_bias", "dropout"}])
@pytest.mark.parametrize("keep", ["batch", "heads", "blocks"])
def test_sixteen_bit_gradients_by_windows(monkeypatch, features, keep):
    """Sums of dK and dV that do not fit the budget run window after window, with the same result."""
    case = random_case(dtype=torch.bfloat16, batch=3, features=features, q_len=250)
    whole = run(cpu, case)
    tile = 2 * 4 * case.block * case.q.shape[3]
    blocks, heads = case.layout.k_blocks, case.k.shape[1]
    fit = {"batch": blocks * heads * 2, "heads": blocks * 2, "blocks": 3}[keep]
    monkeypatch.setattr("sparsetile.kernels.cpu_backward._SUM_BYTES", tile * fit)
    scores = Scores(case.q, case.k, case.v, case.request())
    windows = _windows(scores, bounded=True)
    assert len(windows) > 1
    assert all(len(w.batch) * len(w.heads) * len(w.blocks) <= fit for w in windows)
    check(cpu, case)
    for name, value in run(cpu, case).items():
        assert torch.allclose(whole[name].float(), value.float(), rtol=2**-7, atol=1e-4), name


def test_first_tile_at_or_past_a_column():
    case = random_case(q_len=300, block=16, features={"per_head"})
    layout = case.layout
    for column in (0, 3, 10, layout.k_blocks):
        found = first_at_least(layout, column).tolist()
        indptr, indices = layout.indptr.tolist(), layout.indices.tolist()
        for row, at in enumerate(found):
            start, stop = indptr[row], indptr[row + 1]
            assert at == start + sum(c < column for c in indices[start:stop])


class PeakBytes(TorchDispatchMode):
    """Peak of the bytes of storages made under the mode and still alive; views of ``inputs`` do not count."""

    def __init__(self, *inputs):
        super().__init__()
        self.inputs = {x.untyped_storage()._cdata for x in inputs}
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, torch.Tensor):
                storage = item.untyped_storage()
                if storage._cdata not in self.inputs:
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def measured_workspace(batch, heads, key_heads, length, head_dim, block, dtype, tiles, dropout_p=0.0):
    """Peak bytes of forward and backward beyond outputs, gradients and row statistics."""
    q = torch.randn(batch, heads, length, head_dim).to(dtype)
    k = torch.randn(batch, key_heads, length, head_dim).to(dtype)
    layout = BlockLayout.from_block_mask(tiles, length, block_size=block)
    seed = torch.tensor([5]) if dropout_p else None
    request = Request(layout, head_dim**-0.5, dropout_p=dropout_p, seed=seed)
    rows = batch * heads * length * (8 if dtype == torch.float64 else 4)
    with PeakBytes(q, k, *layout.tensors()) as forward:
        out, lse = cpu.forward(q, k, k, request)
    with PeakBytes(q, k, out, lse, *layout.tensors()) as backward:
        cpu.backward(out, lse, q, k, k, out, lse, request, tile_bias_grad=False, attn_bias_grad=False)
    return forward.peak - out.nbytes - rows, backward.peak - q.nbytes - 2 * k.nbytes - rows


def global_and_local(blocks):
    """Rows and columns of every length: two global rows, two global columns, a window."""
    at = torch.arange(blocks)
    near = (at[:, None] - at).abs() <= 2
    near[:2] = True
    near[:, :2] = True
    return near


@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "length", "head_dim", "block", "dtype", "dropout_p"),
    [
        (1, 1, 1, 65536, 16, 128, torch.float32, 0.0),
        (1, 2, 2, 16384, 64, 128, torch.bfloat16, 0.0),
        (1, 1, 1, 16384, 256, 128, torch.bfloat16, 0.0),
        (1, 1, 1, 8192, 256, 128, torch.float64, 0.1),
        (1, 32, 1, 1024, 64, 128, torch.float32, 0.1),
        (2, 2, 1, 2048, 256, 16, torch.float32, 0.1),
    ],
)
def test_workspace_is_bounded(batch, heads, key_heads, length, head_dim, block, dtype, dropout_p):
    tiles = global_and_local(length // block)
    used = measured_workspace(batch, heads, key_heads, length, head_dim, block, dtype, tiles, dropout_p)
    print([f"{x / 2**20:.1f} MiB" for x in used])
    assert max(used) <= 64 * 2**20


def test_workspace_of_one_tile_rows():
    """The largest buffers a tile: as many query tiles as key tiles, all of head dimension 256."""
    for dtype in (torch.float64, torch.float16):
        used = measured_workspace(1, 1, 1, 8192, 256, 128, dtype, torch.eye(64, dtype=torch.bool), 0.1)
        assert max(used) <= 64 * 2**20


def test_workspace_does_not_grow_with_length():
    short, long = (
        measured_workspace(1, 2, 2, n, 32, 64, torch.float32, global_and_local(n // 64))
        for n in (8192, 32768)
    )
    assert max(long) <= 1.1 * max(short) + 2**20


def test_why_not_names_the_reason():
    case = random_case(batch=1, heads=1, q_len=16, block=16)
    request = case.request()
    assert cpu.why_not(case.q, case.k, case.v, request) is None
    away = case.q.to("meta")
    assert "meta" in cpu.why_not(away, away, away, request)
    whole = case.q.long()
    assert "int64" in cpu.why_not(whole, whole, whole, request)
    assert "bfloat16" in cpu.why_not(case.q, case.k.bfloat16(), case.v, request)
