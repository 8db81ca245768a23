"""Buckets hold every parameter once, within their limits, and their bytes keep to the ratio."""

import random
from fractions import Fraction

import pytest
import torch

from sparsetile.distributed.buckets import cut, ring_bytes
from sparsetile.errors import ArgumentError


def drawn(rng, tensors, largest):
    """Parameters without memory, biases and matrices mixed, the last of them possibly tiny."""
    return [
        (
            f"p{i}",
            torch.empty(rng.choice((1, 7, rng.randint(1, 300), rng.randint(1, largest))), device="meta"),
        )
        for i in range(tensors)
    ]


@pytest.mark.parametrize("ranks", range(2, 17))
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.37, 0.99])
def test_bytes_keep_to_the_ratio(ranks, ratio):
    """Of each bucket, not just of all together; states and indices count."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for _ in range(5):
        parameters = [*drawn(rng, rng.randint(0, 90), 200_000), ("big", torch.empty(300_000, device="meta"))]
        buckets = cut(parameters, ranks, ratio, rng.randint(1, 10**6), rng.randint(1, 40))
        assert sorted(name for b in buckets for name in b.names) == sorted(name for name, _ in parameters), (
            seed
        )
        for bucket in buckets:
            # Exactly: a bucket may fill its share to the last byte.
            whole = Fraction(4 * bucket.entries * (ranks - 1), ranks)
            share = Fraction(str(ratio)) * whole
            assert ring_bytes(bucket.entries, ranks) == pytest.approx(float(whole))
            assert 1 <= bucket.kept <= bucket.length and bucket.sent_bytes <= share, seed
            if bucket.entries > 10**5:
                assert bucket.sent_bytes > 0.98 * share - 8 * ranks, seed


def test_limits():
    parameters = [(f"p{i}", torch.empty(10_000, dtype=torch.bfloat16, device="meta")) for i in range(70)]
    by_tensors = cut(parameters, 4, 0.1, 25 * 2**20, 32)
    assert [len(b.names) for b in by_tensors] == [32, 32, 6]
    assert by_tensors[0].names[:2] == ("p69", "p68")
    by_bytes = cut(parameters, 4, 0.1, 60_000, 32)
    assert {len(b.names) for b in by_bytes} == {1, 3}
    big = [("big", torch.empty(10**6, device="meta")), *parameters]
    assert cut(big, 4, 0.1, 60_000, 32)[-1].names == ("big",)


def test_small_tensors_join_a_neighbour():
    small = [(f"s{i}", torch.empty(3, device="meta")) for i in range(2)]
    big = ("big", torch.empty(10**5, device="meta"))
    for parameters in ([*small, big], [big, *small], [small[0], big, small[1]]):
        (bucket,) = cut(parameters, 8, 0.1, 100, 1)
        assert len(bucket.names) == 3 and bucket.sent_bytes <= 0.1 * ring_bytes(bucket.entries, 8)


def test_empty_parameters_are_left_out():
    parameters = [("none", torch.empty(0, device="meta")), ("some", torch.empty(10**4, device="meta"))]
    assert [b.names for b in cut(parameters, 2, 0.1, 10**6, 32)] == [("some",)]


def test_too_small_a_model():
    with pytest.raises(ArgumentError, match="60 entries over 16 ranks"):
        cut([("w", torch.empty(60, device="meta"))], 16, 0.1, 10**6, 32)


def test_whole():
    (bucket,) = cut([("w", torch.empty(1001, device="meta"))], 4, 1.0, 10**6, 32)
    assert bucket.kept == bucket.length == 251 and bucket.whole_bytes == 3 * 4 * 251


def test_a_last_bucket_that_is_too_small_joins_the_one_before() -> None:
    # From the last parameter to the first: one that holds, a small one that just does, and crumbs.
    crumbs = [(f"crumb{i}", torch.empty(1, device="meta")) for i in range(4)]
    parameters = [
        *crumbs,
        ("small", torch.empty(43, device="meta")),
        ("big", torch.empty(5000, device="meta")),
    ]
    (bucket,) = cut(parameters, 7, 0.37, 4 * 43, 64)
    assert bucket.names[0] == "big" and len(bucket.names) == 6 and bucket.kept >= 1
