"""The reference backend against the oracle, which shares no code with it."""

import pytest
import torch

from oracle import check, random_case, relative_error, run
from sparsetile.kernels import reference

FEATURES = ["tile_bias", "attn_bias", "padding", "dropout", "lse", "per_head", "per_batch", "gqa", "strided"]
OF_PARTS = ["padding_by_head", "placed"]
"""What only the parts of a sequence over ranks have."""


@pytest.mark.parametrize("feature", ["none", *FEATURES, *OF_PARTS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_feature(feature, dtype):
    check(reference, random_case(dtype=dtype, features={feature}, q_len=77, k_len=101))


@pytest.mark.parametrize("drop", ["per_head", "per_batch", "gqa"])
def test_all_features_together(drop):
    check(reference, random_case(dtype=torch.float64, features=set(FEATURES) - {drop, "gqa"}))


@pytest.mark.parametrize("of_head", ["gqa", "per_head"])
def test_features_of_parts_together(of_head):
    check(reference, random_case(dtype=torch.float64, features={*OF_PARTS, of_head, "tile_bias", "lse"}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 80])
def test_sixteen_bits_round_once(dtype, head_dim):
    case = random_case(dtype=dtype, head_dim=head_dim, features={"gqa", "tile_bias"})
    expected, got = case.expected(), run(reference, case)
    half_step = torch.finfo(dtype).eps / 2
    for name in ("out", "q", "k", "v"):
        assert got[name].dtype == dtype
        assert relative_error(got[name], expected[name]) <= half_step * 1.01, case.describe()


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("length", [1, "-1", "+0", "+1"])
def test_lengths_around_a_block(block, length):
    q_len = length if length == 1 else block + int(length)
    check(
        reference,
        random_case(dtype=torch.float64, block=block, q_len=q_len, k_len=q_len + 3, batch=1, heads=2),
    )


def test_keys_not_kept_do_not_leak():
    case = random_case(q_len=96, features={"padding", "attn_bias"})
    clean = run(reference, case)
    padded = case.key_padding_mask[:, None, :, None]
    case.k, case.v = case.k.masked_fill(padded, torch.nan), case.v.masked_fill(padded, torch.inf)
    dirty = run(reference, case)
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name


def test_a_row_that_attends_a_bad_key_is_nan_and_others_are_not():
    mask = torch.ones(64, 64, dtype=torch.bool).tril()
    case = random_case(q_len=64, mask=mask[None, None])
    clean = run(reference, case)["out"]
    case.v = case.v.clone()
    case.v[:, :, 40] = torch.nan
    dirty = run(reference, case)["out"]
    assert torch.equal(clean[:, :, :40], dirty[:, :, :40])
    assert dirty[:, :, 40:].isnan().all()


def test_why_not_names_the_reason():
    case = random_case(batch=1, heads=1, q_len=16, block=16)
    whole = case.q.long()
    assert "int64" in reference.why_not(whole, whole, whole, case.request())
    away = case.q.to("meta")
    assert "meta" in reference.why_not(away, away, away, case.request())
