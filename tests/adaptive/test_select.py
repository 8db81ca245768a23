"""Selection against loops over rows and, for where rows stand, over tokens; noise against plain integers."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pattern_draws import runs
from sparsetile.adaptive import ImportanceScorer, gumbel, own_tiles, reach, select_tiles
from sparsetile.adaptive.select import CHUNK_SCORES
from sparsetile.errors import ArgumentError
from sparsetile.layout import BlockLayout


def seen(q_len, k_len, block, is_causal):
    """Per row the key tiles that some query of it may see, token by token."""
    offset = k_len - q_len
    rows = []
    for start in range(0, q_len, block):
        last = min(start + block, q_len) - 1 + offset
        rows.append([t for t in range(-(-k_len // block)) if not is_causal or t * block <= last])
    return rows


def mixed(x):
    """lowbias32 on one Python integer."""
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def one_gumbel(seed, line, row, col):
    stream = mixed(seed % 2**32 ^ mixed(((seed >> 32) + line) % 2**32))
    bits = mixed(mixed((stream + row) % 2**32) ^ (col * 0x9E3779B1 % 2**32))
    return -math.log(-math.log((2 * (bits >> 9) + 1) / 2**24))


def one_row(values, logits, choices, own, sink, places, top_p, k_min):
    """Key tiles in order, −1 = unused; and whether rounding may end ``top_p`` one place sooner or later."""
    order = sorted(choices, key=lambda c: (-values[c], c))
    if sink and 0 in order:
        order = [0, *(c for c in order if c != 0)]
    if own is not None:
        order = [own if own in choices else -1, *(c for c in order if c != own)]
    order = (order + [-1] * places)[:places]
    if top_p is None:
        return order, False
    peak = max((logits[c] for c in choices), default=0.0)
    total = sum(math.exp(logits[c] - peak) for c in choices)
    kept, mass, close = [], 0.0, False
    for place, c in enumerate(order):
        close |= abs(mass - top_p) < 1e-5
        kept.append(c if place < k_min or mass < top_p else -1)
        mass += math.exp(logits[c] - peak) / total if c >= 0 else 0.0
    return kept, close


@runs(150)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.integers(1, 140),
    st.none() | st.integers(1, 140),
    st.integers(1, 12),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, None, 0.3, 0.8, 1.0]),
    st.integers(1, 12),
    st.booleans(),
    st.floats(0.2, 4.0),
    st.integers(0, 2**61),
)
def test_selection_is_the_definition(
    lead, k_len, q_len, k, is_causal, sink, own, padded, noisy, top_p, k_min, ties, tau, seed
):
    q_len, block = q_len or k_len, 16
    rng = torch.Generator().manual_seed(seed)
    nq, nk = -(-q_len // block), -(-k_len // block)
    shape = (*lead, nq, nk)
    scores = torch.randn(shape, generator=rng) * 2
    if ties:
        scores = scores.round()
    valid = torch.rand((lead[0], nk), generator=rng) < 0.7 if padded else None
    noise = torch.tensor([seed]) if noisy else None
    bounds = {} if top_p is None else {"top_p": top_p, "k_min": min(k_min, k)}
    chosen = select_tiles(
        lambda start, stop: scores[:, :, start:stop],
        shape,
        k,
        is_causal=is_causal,
        offset_tokens=k_len - q_len,
        block=block,
        temperature=tau,
        noise=noise,
        sink=sink,
        own=own,
        valid_keys=valid,
        **bounds,
    ).indices
    assert chosen.dtype == torch.int32 and chosen.shape == (*lead, nq, k)
    allowed = seen(q_len, k_len, block, is_causal)
    for b in range(lead[0]):
        for g in range(lead[1]):
            for i in range(nq):
                choices = [c for c in allowed[i] if valid is None or valid[b, c]]
                # Divided and added in float32, as equal values must stay equal.
                logits = scores[b, g, i] / tau if noisy or top_p else scores[b, g, i]
                values = logits
                if noisy:
                    values = values + gumbel(
                        noise, torch.tensor(b * lead[1] + g), torch.tensor(i), torch.arange(nk)
                    )
                home = min(max((i * block + k_len - q_len) // block, 0), nk - 1) if own else None
                expected, close = one_row(
                    values.tolist(), logits.tolist(), choices, home, sink, k, top_p, bounds.get("k_min")
                )
                if not close:
                    assert chosen[b, g, i].tolist() == expected


@runs(60)
@given(st.integers(1, 200), st.none() | st.integers(1, 200), st.sampled_from([8, 16, 32]), st.booleans())
def test_rows_stand_where_their_tokens_do(k_len, q_len, block, is_causal):
    q_len = q_len or k_len
    nq, nk = -(-q_len // block), -(-k_len // block)
    where = {"offset_tokens": k_len - q_len, "block": block}
    last = reach(nq, nk, is_causal=is_causal, **where).tolist()
    assert [list(range(r + 1)) for r in last] == seen(q_len, k_len, block, is_causal)
    for i, home in enumerate(own_tiles(nq, nk, **where).tolist()):
        for query in range(i * block, min((i + 1) * block, q_len)):
            # Whoever sees any key sees one of the own tile.
            position = query + k_len - q_len
            assert not is_causal or position < 0 or home * block <= position
        if i * block + k_len - q_len >= 0:
            assert home * block <= i * block + k_len - q_len < (home + 1) * block


@runs(40)
@given(st.integers(1, 300), st.none() | st.integers(1, 300), st.integers(1, 6), st.integers(0, 2**40))
def test_a_layout_drops_nothing_of_a_causal_selection(k_len, q_len, k, seed):
    q_len = q_len or k_len
    nq, nk = -(-q_len // 32), -(-k_len // 32)
    scores = torch.randn((2, 3, nq, nk), generator=torch.Generator().manual_seed(seed))
    chosen = select_tiles(
        lambda a, b: scores[:, :, a:b],
        (2, 3, nq, nk),
        k,
        is_causal=True,
        offset_tokens=k_len - q_len,
        block=32,
        sink=True,
    ).indices
    layout = BlockLayout.from_topk(chosen, q_len, k_len, 32, is_causal=True)
    counts = (chosen >= 0).sum(-1).flatten()
    assert torch.equal(layout.row_counts().long(), counts)
    choices = torch.tensor([len(row) for row in seen(q_len, k_len, 32, True)])
    assert torch.equal(counts.view(6, nq), choices.clamp(max=k).expand(6, nq))


def causal(scores, k, **more):
    where = {"is_causal": True, "offset_tokens": 0, "block": 128}
    return select_tiles(lambda a, b: scores[:, :, a:b], tuple(scores.shape), k, **where | more).indices


OPTIONS = [
    {},
    {"noise": torch.tensor([7**20])},
    {"sink": True, "top_p": 0.7, "k_min": 2, "k_max": 5},
    {"noise": torch.tensor([3]), "top_p": 0.9, "temperature": torch.tensor([0.5, 2.0])},
    {"own": False, "is_causal": False, "noise": torch.tensor([11]), "temperature": 0.3},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_chunks_change_nothing(options):
    scores = torch.randn(2, 2, 37, 37)
    whole = causal(scores, 6, **options)
    for chunk in (1, 5, 36, 37, 1000):
        assert torch.equal(causal(scores, 6, chunk=chunk, **options), whole)


@pytest.mark.parametrize("form", ["mlp", "bilinear", "indexer"])
def test_a_neighbour_in_the_batch_changes_nothing(form):
    scorer = ImportanceScorer(16, 8, form=form)
    q, k = torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 16)
    valid = torch.ones(2, 20, dtype=torch.bool)

    def chosen(q, k, valid):
        features = scorer.features(q, k)
        scores = scorer.rows(features, 0, 20).detach()
        noise = torch.tensor([int(seed)])
        return scores, causal(scores, 5, noise=noise, top_p=0.9, valid_keys=valid, sink=True)

    seed = torch.randint(2**60, ())
    scores, first = chosen(q, k, valid)
    alone_scores, alone = chosen(q[:1], k[:1], valid[:1])
    q[1], k[1], valid[1] = 1e9, torch.nan, torch.rand(20) < 0.5
    changed_scores, changed = chosen(q, k, valid)
    for other_scores, other in ((alone_scores, alone), (changed_scores, changed)):
        assert torch.equal(scores[0], other_scores[0])
        assert torch.equal(first[0], other[0])


def test_equal_scores_rise_by_index_and_zeros_are_equal():
    scores = torch.zeros(1, 1, 9, 300)
    scores[..., 5::2] = -0.0
    chosen = causal(scores, 40, is_causal=False)
    for i, row in enumerate(chosen[0, 0].tolist()):
        assert row == [i, *(c for c in range(41) if c != i)][:40]


def test_scores_without_bounds():
    scores = torch.tensor([-torch.inf, 3.0, torch.nan, torch.inf, -3e38, -torch.nan, 3e38])
    chosen = causal(scores.expand(1, 1, 1, 7), 9, is_causal=False)
    # The own tile first; NaN is not hidden; −∞ is a score like others.
    assert chosen.flatten().tolist() == [0, 2, 3, 5, 6, 1, 4, -1, -1]
    assert causal(scores.expand(1, 1, 1, 7), 7, own=False, is_causal=False)[..., -1].item() == 0


def test_a_row_cut_short_is_what_a_smaller_k_chooses():
    scores, noise = torch.randn(1, 2, 12, 12), torch.tensor([99])
    full = causal(scores, 9, noise=noise, sink=True)
    assert torch.equal(full[..., :4], causal(scores, 4, noise=noise, sink=True))
    limit = torch.randint(0, 10, (12,))
    cut = causal(scores, 9, noise=noise, sink=True, limit=limit)
    for i, most in enumerate(limit.tolist()):
        assert torch.equal(cut[:, :, i, :most], full[:, :, i, :most])
        assert (cut[:, :, i, most:] == -1).all()
    each = limit.expand(1, 2, 12)
    assert torch.equal(causal(scores, 9, noise=noise, sink=True, limit=each), cut)


def test_easy_rows_keep_fewer_tiles():
    scores = torch.zeros(1, 1, 2, 64)
    scores[0, 0, 0, 10] = 20.0
    chosen = causal(scores, 64, is_causal=False, own=False, top_p=0.9)
    assert (chosen[0, 0] >= 0).sum(-1).tolist() == [1, 58]  # 57/64 is less than 0.9, 58/64 is not
    for top_p, places in ((0.8906, 57), (0.8907, 58)):  # 57/64 = 0.890625
        chosen = causal(scores, 64, is_causal=False, own=False, top_p=top_p)
        assert (chosen[0, 0] >= 0).sum(-1).tolist() == [1, places]
    bounded = causal(scores, 64, is_causal=False, own=False, top_p=0.9, k_min=3, k_max=20)
    assert bounded.shape[-1] == 20
    assert (bounded[0, 0] >= 0).sum(-1).tolist() == [3, 20]


def test_noise_is_the_stated_hash():
    seed = int(torch.randint(2**62, ()))
    line, row = torch.tensor([0, 3, 2**20])[:, None, None], torch.tensor([0, 1, 2**31 + 5])[:, None]
    col = torch.tensor([0, 1, 77, 131071])
    got = gumbel(torch.tensor([seed]), line, row, col)
    assert got.dtype == torch.float32 and got.shape == (3, 3, 4)
    expected = [
        [[one_gumbel(seed, b, i, c) for c in col.tolist()] for i in row.flatten().tolist()]
        for b in line.flatten().tolist()
    ]
    torch.testing.assert_close(got.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-5)


def unmixed(x):
    """The number that ``mixed`` takes to x."""
    x ^= x >> 16
    x = x * pow(0x846CA68B, -1, 2**32) % 2**32
    x ^= x >> 15 ^ x >> 30
    x = x * pow(0x7FEB352D, -1, 2**32) % 2**32
    return x ^ (x >> 16)


@pytest.mark.parametrize("bits", [0, 2**32 - 1])
def test_noise_is_finite_at_its_ends(bits):
    seed, line, row = int(torch.randint(2**62, ())), 3, 14
    stream = mixed(seed % 2**32 ^ mixed(((seed >> 32) + line) % 2**32))
    col = (mixed((stream + row) % 2**32) ^ unmixed(bits)) * pow(0x9E3779B1, -1, 2**32) % 2**32
    got = gumbel(torch.tensor([seed]), torch.tensor(line), torch.tensor(row), torch.tensor([col]))
    expected = -math.log(math.log(2**24)) if bits == 0 else -math.log(-math.log1p(-(2.0**-24)))
    assert got.item() == pytest.approx(expected, rel=1e-6)


def test_noise_is_gumbel_and_independent():
    seed = torch.tensor([2024])
    draw = gumbel(
        seed, torch.arange(4)[:, None, None], torch.arange(250)[:, None], torch.arange(400)
    ).double()
    flat = draw.flatten().sort().values
    n = flat.numel()
    assert flat[0] > -2.9 and flat[-1] < 16.7
    # Kolmogorov-Smirnov: 1.95/√n is passed by one in a thousand.
    distance = (flat.neg().exp().neg().exp() - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 1.95 / math.sqrt(n)
    deviation = math.pi / math.sqrt(6)
    assert abs(draw.mean() - 0.5772156649) < 4 * deviation / math.sqrt(n)
    assert abs(draw.std() - deviation) < 4 * 1.05 * deviation / math.sqrt(n)
    centred = (draw - draw.mean()) / draw.std()
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(1, 2), centred.roll((1, 1), (1, 2))):
        assert abs((centred * other).mean()) < 4.5 / math.sqrt(n)
    again = gumbel(seed + 1, torch.tensor(0), torch.arange(250)[:, None], torch.arange(400)).double()
    assert abs(((again - again.mean()) * centred[0]).mean()) < 4.5 * deviation / math.sqrt(100_000)


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_noisy_top_k_draws_without_replacement_from_the_softmax(tau):
    n, rows = 5, 40_000
    scores = torch.tensor([1.5, 0.0, -1.0, 0.7, 0.2])
    p = (scores / tau).softmax(0).double()
    chosen = select_tiles(
        lambda a, b: scores.expand(1, 1, b - a, n),
        (1, 1, rows, n),
        2,
        is_causal=False,
        offset_tokens=0,
        block=128,
        temperature=tau,
        noise=torch.tensor([123456789]),
        own=False,
    ).indices[0, 0]
    counts = torch.bincount(chosen[:, 0] * n + chosen[:, 1], minlength=n * n).view(n, n).double()
    expected = rows * p[:, None] * p / (1 - p[:, None])
    expected.fill_diagonal_(0.0)
    assert not counts.diagonal().any()
    off = ~torch.eye(n, dtype=torch.bool)
    chi_square = ((counts - expected)[off] ** 2 / expected[off]).sum()
    assert chi_square < 43.8  # 19 degrees of freedom: exceeded once in a thousand


@pytest.mark.parametrize("options", OPTIONS)
def test_nothing_is_read_back_to_the_host(options):
    # Fake tensors hold no values, so any attempt to look at one raises.
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        made = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
        scorer = ImportanceScorer(16, 8, form="mlp")
        features = scorer.features(torch.empty(2, 2, 30, 16), torch.empty(2, 2, 30, 16))
        chosen = select_tiles(
            lambda a, b: scorer.rows(features, a, b),
            (2, 2, 30, 30),
            6,
            **{"is_causal": True, "offset_tokens": 5, "block": 16} | made,
            valid_keys=torch.empty((2, 30), dtype=torch.bool),
            limit=torch.empty(30, dtype=torch.int64),
            chunk=7,
        ).indices
        assert chosen.shape == (2, 2, 30, options.get("k_max", 6))
        assert scorer.pairs(features, chosen.clamp(min=0).long()).shape == chosen.shape


class Live(TorchDispatchMode):
    """Bytes of the storages made under it that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage.nbytes())
        return out

    def freed(self, size):
        self.now -= size


@pytest.mark.parametrize("form", ["mlp", "bilinear", "indexer"])
def test_memory_is_the_kept_tiles_and_one_chunk(form):
    nq, nk, hidden = 4096, 8192, 8
    with FakeTensorMode():
        scorer = ImportanceScorer(32, hidden, form=form)
        q, k = torch.empty(1, 1, nq, 32), torch.empty(1, 1, nk, 32)
        with Live() as live, torch.no_grad():
            features = scorer.features(q, k)
            kept = select_tiles(
                lambda a, b: scorer.rows(features, a, b),
                (1, 1, nq, nk),
                16,
                is_causal=True,
                offset_tokens=(nk - nq) * 128,
                block=128,
                noise=torch.zeros(1, dtype=torch.int64),
                top_p=0.9,
            )
            assert live.now >= kept.indices.numel() * 4 + (nq + nk) * hidden * 4
    # All scores at once would be 128 MiB, and hidden times that 1 GiB.
    assert CHUNK_SCORES * 4 < live.peak < 80 * 2**20


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"k": 0}, "k"),
        ({"k": 2.0}, "k"),
        ({"shape": (1, 1, 0, 4)}, "shape"),
        ({"shape": (1, 4, 4)}, "shape"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": True}, "top_p"),
        ({"top_p": 0.5, "k_min": 3}, "k_min, k_max"),
        ({"top_p": 0.5, "k_min": 0}, "k_min, k_max"),
        ({"top_p": 0.5, "k_min": 5, "k_max": 4}, "k_min, k_max"),
        ({"top_p": 0.5, "k_max": 0}, "k_min, k_max"),
        ({"k_max": 4}, "k_min, k_max"),
        ({"valid_keys": torch.ones(1, 3, dtype=torch.bool)}, "valid_keys"),
        ({"valid_keys": torch.ones(1, 4)}, "valid_keys"),
        ({"chunk": 0}, "chunk"),
        ({"shape": (1, 2, 4, 4)}, r"scorer_rows\(start, stop\)"),
    ],
)
def test_bad_arguments(change, name):
    good = {"shape": (1, 1, 4, 4), "k": 2, "is_causal": True, "offset_tokens": 0, "block": 128}
    with pytest.raises(ArgumentError, match=rf"^{name}: expected .*, got "):
        select_tiles(lambda a, b: torch.zeros(1, 1, b - a, 4), **good | change)
