"""The search in two levels against loops over rows; where it must be the full search; what it finds."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from adaptive_oracle import fresh, made
from pattern_draws import runs
from sparsetile.adaptive import ImportanceScorer, gumbel, own_tiles, reach, search, select_tiles
from sparsetile.adaptive.config import AdaptiveConfig
from sparsetile.adaptive.scorer import FORMS, Features
from sparsetile.adaptive.search import bounds_of_runs, two_level_tiles
from sparsetile.errors import ArgumentError

BLOCK = 16


def whole(scorer, rng, shape, nq, nk):
    """Features and weights of small integers, whose sums are exact."""

    def draw(*size):
        return torch.randint(-3, 4, size, generator=rng).float()

    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.copy_(draw(*parameter.shape))
    gates = draw(*shape, nq, scorer.sub_heads) if scorer.form == "indexer" else None
    return Features(draw(*shape, nq, 8), draw(*shape, nk, 8), gates)


def one_row(order, best, own, sink):
    """``order`` by falling value, with the forced ones first; −1 in place 0 without an own one."""
    ranked = sorted(order, key=lambda c: (-best[c], c))
    if sink and 0 in ranked:
        ranked = [0, *(c for c in ranked if c != 0)]
    return [own if own in order else -1, *(c for c in ranked if c != own)]


def bounds_written_out(scorer, features, ranges, b, g):
    """The most that a score of query tile i can be with features of a key tile between ``ranges[1]`` and
    ``ranges[0]`` ``[G, runs, 8]``: one product at a time, ``[nq, runs]``."""
    own = 0 if scorer.num_heads is None else g
    weight = None if scorer.form != "mlp" else scorer.output_weight[own]
    out = []
    for i in range(features.a.shape[2]):
        a, row = features.a[b, g, i], []
        for most, least in zip(ranges[0, g], ranges[1, g], strict=True):
            if scorer.form == "mlp":
                ends = [weight * torch.relu(a + x) for x in (most, least)]
                row.append(torch.maximum(*ends).sum() + scorer.b2.reshape(-1)[own])
                continue
            ends = torch.stack((a * most, a * least))
            high, low = ends.amax(0), ends.amin(0)
            if scorer.form == "bilinear":
                row.append(high.sum())
                continue
            total = torch.zeros(())
            for j, gate in enumerate(features.gates[b, g, i]):
                part = slice(4 * j, 4 * j + 4)
                total += max(gate * torch.relu(high[part].sum()), gate * torch.relu(low[part].sum()))
            row.append(total)
        out.append(torch.stack(row))
    return torch.stack(out).detach()


@runs(40)
@given(
    st.sampled_from(FORMS),
    st.sampled_from([None, 2]),
    st.integers(1, 700),
    st.none() | st.integers(1, 400),
    st.sampled_from([2, 4]),
    st.integers(1, 3),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**61),
)
def test_search_is_the_definition(
    form, heads, k_len, q_len, span, least, k, is_causal, sink, padded, noisy, seed
):
    rng = torch.Generator().manual_seed(seed)
    q_len = q_len or k_len
    nq, nk = -(-q_len // BLOCK), -(-k_len // BLOCK)
    scorer = ImportanceScorer(5, 8, form=form, num_heads=heads, dropout=0.5, sub_heads=2)
    features = whole(scorer, rng, (2, 2), nq, nk)
    valid = torch.rand(2, nk, generator=rng) < 0.7 if padded else None
    noise = torch.tensor([seed]) if noisy else None
    limit = torch.randint(1, k + 1, (nq,), generator=rng)
    where = {"offset_tokens": k_len - q_len, "block": BLOCK}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "SPAN", span)
        patch.setattr(search, "LEAST_RUNS", least)
        patch.setattr(search, "_CHUNK_TERMS", random.choice([1, 2**14]))
        got = two_level_tiles(
            scorer, features, k, limit, is_causal=is_causal, temperature=torch.tensor(2.0), noise=noise,
            sink=sink, valid_keys=valid, **where,
        )  # fmt: skip
    assert got.dtype == torch.int32 and got.shape == (2, 2, nq, k)
    count = -(-nk // span)
    last = reach(nq, nk, is_causal=is_causal, **where).tolist()
    home = own_tiles(nq, nk, **where).tolist()
    for b in range(2):
        live = [c for c in range(nk) if valid is None or valid[b, c]]
        ranges = torch.zeros(2, 2, count, 8)
        for run in {c // span for c in live}:
            inside = features.b[b, :, [c for c in live if c // span == run]]
            ranges[0, :, run], ranges[1, :, run] = inside.amax(1), inside.amin(1)
        bounds = [bounds_written_out(scorer, features, ranges, b, g) for g in range(2)]
        tiles_of = scorer.rows(features, 0, nq)[b]
        for g in range(2):
            for i in range(nq):
                far = min(last[i], home[i]) if is_causal else nk - 1
                values = []
                for x, turn in ((bounds[g][i], search._OF_RUNS), (tiles_of[g, i], 0)):
                    if noise is not None:
                        at = (torch.tensor(2 * b + g), torch.tensor(i), torch.arange(len(x)))
                        x = gumbel(noise ^ turn, *at) + x / 2.0
                    values.append(x.tolist())
                choices = [c for c in live if c <= far]
                # A run without a key that counts is none; of the own one there may be keys past the own tile.
                known = {c // span for c in live}
                open_ = [r for r in range(count) if r in known and r <= math.floor(far / span)]
                kept = one_row(open_, values[0], home[i] // span, sink)
                kept = kept[: max(least, 2 * int(limit[i]))]
                choices = [c for c in choices if c // span in kept]
                expected = one_row(choices, values[1], home[i], sink)
                expected = (expected + [-1] * k)[:k]
                expected = [c if place < limit[i] else -1 for place, c in enumerate(expected)]
                assert got[b, g, i].tolist() == expected, (b, g, i)


@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_of_up_to_512_tiles_are_searched_in_full(is_causal):
    seed = fresh().getrandbits(60)
    rng = torch.Generator().manual_seed(seed)
    scorer = ImportanceScorer(5, 8)
    nk = 700 if is_causal else 512
    features = whole(scorer, rng, (1, 2), nk, nk)
    where = {
        "is_causal": is_causal, "offset_tokens": 0, "block": 128, "temperature": torch.tensor(1.0),
        "noise": torch.tensor([seed]), "valid_keys": torch.rand(1, nk, generator=rng) < 0.9, "sink": True,
    }  # fmt: skip
    limit = torch.full((nk,), 9)
    two = two_level_tiles(scorer, features, 9, limit, **where)
    full = select_tiles(lambda *r: scorer.rows(features, *r).detach(), (1, 2, nk, nk), 9, **where).indices
    assert torch.equal(two[:, :, :512], full[:, :, :512])
    assert is_causal == (not torch.equal(two, full))


def test_the_future_and_the_length_change_nothing():
    draw = fresh()
    scorer = ImportanceScorer(5, 8)
    n = 900
    a, b = torch.randn(2, 1, 2, n, 8)
    where = {"is_causal": True, "offset_tokens": 0, "block": 128, "temperature": torch.tensor(1.0)}
    limit = torch.full((n,), 7)
    before = two_level_tiles(scorer, Features(a, b), 7, limit, **where)
    assert (before[:, :, 40:] >= 0).all()
    for now in (draw.randrange(600, n - 1), 799, 800):
        later = b.clone()
        # The own tile is kept for its place, so its features count for nothing either.
        later[:, :, now:] = 5 * torch.randn_like(later[:, :, now:])
        after = two_level_tiles(scorer, Features(a, later), 7, limit, **where)
        assert torch.equal(before[:, :, : now + 1], after[:, :, : now + 1]), now
        short = Features(a[:, :, : now + 1], b[:, :, : now + 1])
        cut = two_level_tiles(scorer, short, 7, limit[: now + 1], **where)
        assert torch.equal(cut, before[:, :, : now + 1]), now


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", [None, 3])
def test_no_tile_scores_above_the_bound_of_its_run(form, heads):
    rng = torch.Generator().manual_seed(fresh().getrandbits(60))
    scorer = ImportanceScorer(12, 8, form=form, num_heads=heads)
    features = scorer.features(*(torch.randn(2, 3, n, 12, generator=rng) for n in (30, 150)))
    features = Features(*(None if x is None else x.detach() for x in features))
    valid = torch.rand(2, 150, generator=rng) < 0.5
    bounds = scorer.rows(bounds_of_runs(scorer, features, ~valid), 0, 30).detach()
    scores = scorer.rows(features, 0, 30).detach().masked_fill(~valid[:, None, None], -math.inf)
    best = torch.nn.functional.pad(scores, (0, 10), value=-math.inf).unflatten(-1, (-1, 16)).amax(-1)
    assert (best <= bounds + 1e-5).all()


@pytest.mark.parametrize("form", ["mlp", "bilinear"])
def test_it_finds_most_of_what_the_full_search_does(form):
    """Key tiles as text has them: each like its neighbours (correlation 0.97 from tile to tile)."""
    fresh()
    n, k = 4096, 16
    scorer = ImportanceScorer(32, 32, form=form)
    keys = torch.randn(1, 1, n, 32)
    for i in range(1, n):
        keys[:, :, i] = 0.97 * keys[:, :, i - 1] + math.sqrt(1 - 0.97**2) * keys[:, :, i]
    features = scorer.features(torch.randn(1, 1, 64, 32), keys)
    where = {"is_causal": False, "offset_tokens": 0, "block": 128, "temperature": torch.tensor(1.0)}
    two = two_level_tiles(scorer, features, k, torch.full((64,), k), **where)
    full = select_tiles(lambda *r: scorer.rows(features, *r), (1, 1, 64, n), k, **where).indices
    found = (full[..., None] == two[..., None, :]).any(-1).float().mean().item()
    assert found > 0.85, found


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_kernels_choose_the_same(is_causal, monkeypatch):
    """One for each level, in the interpreter; sums are exact, so the choice is, too."""
    pytest.importorskip("triton")
    draw = fresh()
    rng = torch.Generator().manual_seed(draw.getrandbits(60))
    monkeypatch.setattr(search, "LEAST_RUNS", 2)
    scorer = ImportanceScorer(5, 8)
    nq, nk = 6, 90
    features = whole(scorer, rng, (1, 1), nq, nk)
    valid = torch.rand(1, nk, generator=rng) < 0.8
    limit = torch.randint(1, 5, (nq,), generator=rng)
    where = {
        "is_causal": is_causal, "offset_tokens": (nk - nq) * 128 + draw.randrange(128), "block": 128,
        "temperature": torch.tensor(1.0), "sink": True, "valid_keys": valid,
    }  # fmt: skip
    expected = two_level_tiles(scorer, features, 4, limit, **where)
    monkeypatch.setattr(search, "in_one_kernel", lambda *given: True)
    assert torch.equal(two_level_tiles(scorer, features, 4, limit, **where), expected)


@pytest.mark.parametrize("neighbours", [0.0, 0.9])
def test_it_finds_a_tile_that_stands_out(neighbours):
    """One tile ten deviations above the others, that are as random, or as like their neighbours."""
    fresh()
    n, k = 8192, 16
    scorer = ImportanceScorer(64, 64, form="bilinear")
    keys, queries = torch.randn(n, 64), torch.randn(128, 64)
    for i in range(1, n):
        keys[i] = neighbours * keys[i - 1] + math.sqrt(1 - neighbours**2) * keys[i]
    place = torch.randperm(n)[:128]
    keys[place] += 10 * queries / queries.norm(dim=1, keepdim=True)
    features = scorer.features(queries[None, None], keys[None, None])
    where = {"is_causal": False, "offset_tokens": 0, "block": 128, "temperature": torch.tensor(1.0)}
    chosen = two_level_tiles(scorer, features, k, torch.full((128,), k), **where)
    assert (chosen[0, 0] == place[:, None]).any(-1).float().mean() > 0.9


def test_noise_gives_every_tile_its_chance():
    seed = fresh().getrandbits(40)
    scorer = ImportanceScorer(5, 8)
    n, times = 1024, 400
    features = Features(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, n, 8))
    where = {"is_causal": False, "offset_tokens": 0, "block": 128, "temperature": torch.tensor(1.0)}
    seen = torch.zeros(n)
    for step in range(times):
        noise = torch.tensor([seed + step])
        chosen = two_level_tiles(scorer, features, 16, torch.tensor([16]), noise=noise, **where)
        seen[chosen.long().flatten()] += 1
    # 15 of 1024 at each draw, but for the own tile: binomial, so six deviations bound all 1023.
    share, others = 15 / 1023, seen[1:] / times
    assert seen[0] == times and others.sum().item() == pytest.approx(15)
    # The own run is kept always, so its tiles have twice the chance of others.
    far = others[15:].view(63, 16).mean(1)
    assert (far - far.mean()).abs().max() < 6 * math.sqrt(share / (16 * times)), seed
    assert (others[15:] > 0).float().mean() > 0.9


def test_in_the_module_long_rows_are_searched_in_two_levels():
    draw = fresh()
    tokens = 16 * 600 - 5
    q, k, v = torch.randn(3, 1, tokens, 1, 8)
    module = made(q, k, base_sparsity=0.98, search="two_level", learnable_temperature=True)
    full = made(q, k, base_sparsity=0.98, search="full", learnable_temperature=True)
    full.load_state_dict(module.state_dict())
    module.eval(), full.eval()
    outs = [m(q, k, v, is_causal=True).detach() for m in (module, full)]
    assert torch.equal(outs[0][:, : 16 * 512], outs[1][:, : 16 * 512]) and not torch.equal(*outs)
    assert torch.equal(module.last_tiles, full.last_tiles)
    now = draw.randrange(16 * 520, tokens - 1)
    later = [torch.cat((x[:, : now + 1], torch.randn_like(x[:, now + 1 :])), 1) for x in (q, k, v)]
    assert torch.equal(module(*later, is_causal=True)[:, : now + 1], outs[0][:, : now + 1])
    padding = torch.rand(1, tokens) < 0.3
    # Queries that start inside a tile, ignored keys, noise, gradients.
    out = module.train()(q[:, 7:], k, v, is_causal=True, key_padding_mask=padding)
    out.square().sum().backward()
    assert all(x.grad.abs().max() > 0 for x in module.parameters())
    module.last_layout.validate()


def test_which_search():
    low = AdaptiveConfig(0.98)
    assert [low.search_for(n) for n in (1, 8192, 8193, 20_000)] == ["full", "full", "two_level", "two_level"]
    assert AdaptiveConfig(0.95).search_for(8193) == AdaptiveConfig(1 - 1 / 32).search_for(8193) == "full"
    assert AdaptiveConfig(0.98, search="full").search_for(8193) == "full"
    assert AdaptiveConfig(search="two_level").search_for(3) == "two_level"
    assert AdaptiveConfig(0.98, selection="top_p").search_for(8193) == "full"
    with pytest.raises(ArgumentError, match=r"^search: expected 'auto' or 'full' with selection='top_p'"):
        AdaptiveConfig(0.98, selection="top_p", search="two_level")
    with pytest.raises(ArgumentError, match=r"^search: expected one of 'auto'"):
        AdaptiveConfig(search="fast")


def test_mass_needs_all_tiles():
    where = {"is_causal": False, "offset_tokens": 0, "block": 16, "top_p": 0.5}
    for how in ({"span": 2}, {"within": torch.zeros(1, 1, 3, 1, dtype=torch.int32)}):
        with pytest.raises(ArgumentError, match=r"^top_p: expected None in a search of two levels"):
            select_tiles(lambda *r: torch.zeros(1, 1, 3, 3), (1, 1, 3, 3), 2, **where, **how)


def test_nobody_waits_for_the_device():
    with FakeTensorMode():
        scorer = ImportanceScorer(5, 8)
        features = scorer.features(torch.zeros(1, 2, 700, 5), torch.zeros(1, 2, 700, 5))
        chosen = two_level_tiles(
            scorer, features, 16, torch.ones(700).long(), is_causal=True, offset_tokens=0, block=128,
            temperature=torch.tensor(1.0), noise=torch.zeros(1).long(), sink=True,
            valid_keys=torch.ones(1, 700).bool(),
        )  # fmt: skip
        assert chosen.shape == (1, 2, 700, 16)
