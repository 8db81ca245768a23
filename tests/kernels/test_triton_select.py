"""The fused scores and top-k against sorted rows of float64 scores; in the interpreter if there is no GPU."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsetile.adaptive import ImportanceScorer, gumbel, own_tiles, reach, search, select_tiles
from sparsetile.adaptive.scorer import Features
from sparsetile.errors import ArgumentError, BackendError
from sparsetile.kernels.triton_backend import device_problem
from sparsetile.kernels.triton_select import MOST_KEPT, chosen_rows, topk_rows, why_not

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("mlp", "bilinear")


def mixed(x: int) -> int:
    """lowbias32 on one Python integer."""
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def one_gumbel(seed: int, line: int, row: int, col: int) -> float:
    stream = mixed(seed % 2**32 ^ mixed(((seed >> 32) + line) % 2**32))
    bits = mixed(mixed((stream + row) % 2**32) ^ (col * 0x9E3779B1 % 2**32))
    return -math.log(-math.log((2 * (bits >> 9) + 1) / 2**24))


@dataclass
class Case:
    """Arguments of one call; ``note`` replays it. Without ``w`` it is bilinear."""

    a: Tensor
    b: Tensor
    w: Tensor | None
    k: int
    w0: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def run(self) -> tuple[Tensor, Tensor]:
        indices, scores = topk_rows(self.a, self.b, self.w, self.k, w0=self.w0, **self.options)
        shape = (*self.a.shape[:3], self.k)
        assert (indices.dtype, scores.dtype) == (torch.int32, torch.float32)
        assert tuple(indices.shape) == tuple(scores.shape) == shape
        return indices.cpu(), scores.cpu()

    def values(self) -> Tensor:
        """What is ranked, float64 ``[B, G, nq, nk]``."""
        a, b = (x.detach().cpu().double() for x in (self.a, self.b))
        groups, hidden = a.shape[1], a.shape[3]
        if self.w is None:
            s = (a[:, :, :, None] * b[:, :, None]).sum(-1)
        else:
            w = self.w.detach().cpu().double().reshape(-1, 1, 1, hidden).expand(groups, 1, 1, hidden)
            s = (torch.relu(a[:, :, :, None] + b[:, :, None]) * w).sum(-1)
        if self.w0 is not None:
            s = s + self.w0.cpu().double().reshape(-1, 1, 1)
        seed = self.options.get("noise")
        if seed is not None:
            s = s / torch.as_tensor(self.options.get("temperature", 1.0)).cpu().double().reshape(-1, 1, 1)
            for line, part in enumerate(s.flatten(0, 1).unbind(0)):
                for row in range(part.shape[0]):
                    drawn = [one_gumbel(int(seed), line, row, col) for col in range(part.shape[1])]
                    part[row] += torch.tensor(drawn, dtype=torch.float64)
        return s

    def check(self, *, exact: bool) -> None:
        """``exact``: all sums are exact, so the places must be; else neighbours may swap by rounding."""
        indices, scores = self.run()
        values = self.values()
        where = {name: self.options[name] for name in ("offset_tokens", "block")}
        nq, nk = values.shape[2:]
        last = reach(nq, nk, is_causal=self.options["is_causal"], **where).tolist()
        home = own_tiles(nq, nk, **where).tolist()
        own, sink = self.options.get("own", True), self.options.get("sink", False)
        valid = self.options.get("valid_keys")
        size = max(1.0, values[values.isfinite()].abs().max().item())
        for batch, group, row in torch.cartesian_prod(*(torch.arange(n) for n in values.shape[:3])).tolist():
            line = values[batch, group, row].tolist()
            allowed = [c for c in range(last[row] + 1) if valid is None or valid[batch, c]]
            ranked = sorted(allowed, key=lambda c: (-line[c], c))
            if sink and 0 in ranked:
                ranked = [0, *(c for c in ranked if c != 0)]
            if own:
                first = home[row] if home[row] in allowed else -1
                ranked = [first, *(c for c in ranked if c != home[row])]
            forced = own + sink
            expected = (ranked + [-1] * self.k)[: self.k]
            got = indices[batch, group, row].tolist()
            told = scores[batch, group, row].tolist()
            about = f"{self.note} row {(batch, group, row)}: {got} for {expected}"
            assert [c < 0 for c in got] == [c < 0 for c in expected], about
            kept = [c for c in got if c >= 0]
            assert len(set(kept)) == len(kept) and set(kept) <= set(allowed), about
            assert got[:forced] == expected[:forced] if not exact else got == expected, about
            for place, (g, e) in enumerate(zip(got, expected, strict=True)):
                if g < 0:
                    assert told[place] == -math.inf, about
                    continue
                assert told[place] == pytest.approx(line[g], abs=4e-6 * size), about
                assert line[g] == pytest.approx(line[e], abs=4e-6 * size), about
            tail = [s for s in told[forced:] if s > -math.inf]
            assert tail == sorted(tail, reverse=True), about


def drawn(*, whole: bool = False, dtype: torch.dtype = torch.float32, **fixed: Any) -> Case:
    """A random call. ``whole``: small integers, whose sums are exact and often equal. ``form``: one of
    ``FORMS``, drawn if it is not given. ``seed`` replays."""
    seed = fixed.pop("seed", None) or random.SystemRandom().getrandbits(32)
    gen, rng = random.Random(seed), torch.Generator().manual_seed(seed)
    form = fixed.pop("form", None) or gen.choice(FORMS)
    size = {
        "batch": gen.randint(1, 2), "groups": gen.randint(1, 2), "nq": gen.randint(1, 20),
        "nk": gen.randint(1, 90), "hidden": gen.randint(1, 20), "k": gen.randint(1, 20),
    }  # fmt: skip
    size |= {name: fixed.pop(name) for name in list(fixed) if name in size}
    batch, groups, nq, nk, hidden, k = size.values()
    block = gen.choice((16, 128))

    def values(*shape: int) -> Tensor:
        x = torch.randint(-3, 4, shape, generator=rng) if whole else torch.randn(shape, generator=rng)
        return x.float()

    options: dict[str, Any] = {
        "is_causal": gen.random() < 0.5,
        "offset_tokens": gen.choice((0, (nk - nq) * block, gen.randint(-nq * block, nk * block))),
        "block": block,
        "own": gen.random() < 0.7,
        "sink": gen.random() < 0.4,
    }
    if gen.random() < 0.4:
        options["valid_keys"] = (torch.rand(batch, nk, generator=rng) < 0.7).to(DEVICE)
    a, b = (values(batch, groups, n, hidden).to(DEVICE, dtype) for n in (nq, nk))
    w = values(gen.choice((1, groups)), hidden).to(DEVICE) if form == "mlp" else None
    w0 = values(groups).to(DEVICE) if gen.random() < 0.5 else None
    options |= fixed
    told = {name: value for name, value in options.items() if not isinstance(value, Tensor)}
    told["noise"] = options["noise"].tolist() if "noise" in options else None
    return Case(
        a, b, w, k, w0, options, f"seed={seed} whole={whole} {form} {dtype} {size} {told} fixed={list(fixed)}"
    )


def seed_tensor() -> Tensor:
    return torch.tensor([random.SystemRandom().getrandbits(62)], device=DEVICE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("_", range(3))
def test_exact_sums_and_their_ties_are_placed_exactly(form: str, dtype: torch.dtype, _: int) -> None:
    drawn(whole=True, form=form, dtype=dtype).check(exact=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noisy", [False, True])
def test_random_scores(form: str, dtype: torch.dtype, noisy: bool) -> None:
    fixed = {"noise": seed_tensor(), "temperature": 0.3} if noisy else {}
    drawn(form=form, dtype=dtype, **fixed).check(exact=False)


@pytest.mark.parametrize("k", [1, 2, 3, 8, 17, 32, 33, 64, 65, 100])
def test_any_number_of_places(k: int) -> None:
    """More than there are tiles at one time, and of more than one step's at another."""
    size = {"batch": 1, "groups": 1, "nq": 5, "hidden": 3, "k": k}
    drawn(whole=True, **size, nk=random.randint(1, k + 1), is_causal=False).check(exact=True)
    drawn(whole=True, **size, nk=random.randint(257, 300), is_causal=False).check(exact=True)


@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
def test_orders_in_which_every_tile_or_none_enters(order: str) -> None:
    nk = 530
    b = {"rising": torch.arange(nk), "falling": -torch.arange(nk), "equal": torch.zeros(nk)}[order]
    size = {"batch": 1, "groups": 1, "nq": 3, "nk": nk, "hidden": 1, "k": 20}
    case = drawn(whole=True, form="mlp", **size, is_causal=False, seed=7)
    case.a, case.w = torch.full_like(case.a, 600.0), torch.ones_like(case.w)
    case.b = b.float().reshape(case.b.shape).to(DEVICE)
    case.check(exact=True)


def test_long_causal_rows_of_ragged_length() -> None:
    """Rows of three programs, the last of which is not full, over more than one step."""
    size = {"batch": 1, "groups": 1, "nq": 37, "nk": 290, "hidden": 4, "k": 9}
    drawn(whole=True, **size, is_causal=True, block=16, offset_tokens=(290 - 37) * 16).check(exact=True)


def test_the_noise_is_that_of_select_tiles() -> None:
    """With all scores 0, what is ranked is the noise itself."""
    case = drawn(batch=2, groups=2, nq=9, nk=50, k=12, own=False, noise=seed_tensor(), is_causal=False)
    case.a, case.w, case.w0 = torch.zeros_like(case.a), None, None
    case.options |= {"sink": False, "valid_keys": None}
    indices, scores = case.run()
    line = torch.arange(4).reshape(2, 2, 1, 1)
    noise = gumbel(case.options["noise"].cpu(), line, torch.arange(9)[:, None], torch.arange(50))
    torch.testing.assert_close(scores, noise.topk(12, -1).values, rtol=0, atol=2e-6, msg=case.note)
    torch.testing.assert_close(scores, noise.gather(-1, indices.long()), rtol=0, atol=2e-6, msg=case.note)


@pytest.mark.parametrize(("form", "heads"), [("mlp", None), ("mlp", 2), ("bilinear", 2)])
def test_a_scorer_s_selection_is_that_of_select_tiles(form: str, heads: int | None) -> None:
    rng = torch.Generator().manual_seed(seed := random.SystemRandom().getrandbits(32))
    scorer = ImportanceScorer(8, 12, num_heads=heads, form=form, device=DEVICE)
    summaries = (torch.randn(2, 2, n, 8, generator=rng).to(DEVICE) for n in (10, 40))
    features = scorer.features(*summaries)
    tau = torch.tensor([0.5, 2.0][: heads or 1], device=DEVICE)
    options: dict[str, Any] = {
        "is_causal": True, "offset_tokens": 30 * 128, "block": 128, "noise": seed_tensor(), "sink": True,
        "temperature": tau, "valid_keys": (torch.rand(2, 40, generator=rng) < 0.8).to(DEVICE),
    }  # fmt: skip
    given = (features.a, features.b, scorer.output_weight, 9)
    w0 = scorer.b2.detach().reshape(-1) if form == "mlp" else None
    indices, _ = topk_rows(*given, w0=w0, **options)
    expected = select_tiles(
        lambda start, stop: scorer.rows(features, start, stop), (2, 2, 10, 40), 9, **options
    ).indices
    # Rounding may swap neighbours whose scores agree to seven digits.
    assert (indices != expected).float().mean() < 0.01, seed
    case = Case(*given, w0, options, f"seed={seed}")
    case.check(exact=False)


def test_nan_counts_as_infinite_and_infinities_are_ranked() -> None:
    nan, inf = math.nan, math.inf
    b = torch.tensor([1.0, nan, 2.0, inf, 0.0, nan, -inf, 3.0], device=DEVICE).reshape(1, 1, 8, 1)
    where = {"is_causal": False, "offset_tokens": 0, "block": 16, "own": False}
    a, w = torch.zeros(1, 1, 1, 1, device=DEVICE), torch.ones(1, device=DEVICE)
    indices, scores = topk_rows(a, b, w, 10, **where)
    assert indices.flatten().tolist() == [1, 3, 5, 7, 2, 0, 4, 6, -1, -1]
    assert scores.flatten().tolist() == [inf] * 3 + [3.0, 2.0, 1.0, 0.0, 0.0, -inf, -inf]
    indices, scores = topk_rows(a, b[:, :, 2:5], -w, 3, **where)
    assert indices.flatten().tolist() == [2, 0, 1]
    assert scores.flatten().tolist() == [0.0, -2.0, -inf]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_products_that_are_not_numbers() -> None:
    """∞·0 is none; the others are ∞, −∞, products and zeros."""
    nan, inf = math.nan, math.inf
    where = {"is_causal": False, "offset_tokens": 0, "block": 16, "own": False}
    a = torch.tensor([[2.0, 0.0], [-1.0, nan]], device=DEVICE).reshape(1, 1, 2, 2)
    b = torch.tensor([[1.0, 5.0], [-inf, 1.0], [3.0, inf], [inf, 7.0], [-2.0, nan], [0.0, -1.0]])
    indices, scores = topk_rows(a, b.reshape(1, 1, 6, 2).to(DEVICE), None, 7, **where)
    assert indices[0, 0].tolist() == [[2, 3, 4, 0, 5, 1, -1], [0, 1, 2, 3, 4, 5, -1]]
    assert scores[0, 0].tolist() == [[inf, inf, inf, 2.0, 0.0, -inf, -inf], [inf] * 6 + [-inf]]


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_element_alone_gets_the_same_bits(form: str) -> None:
    case = drawn(batch=2, groups=2, form=form, valid_keys=None)
    together = case.run()
    case.a, case.b = case.a[1:], case.b[1:]
    for alone, both in zip(case.run(), together, strict=True):
        assert torch.equal(alone, both[1:]), case.note


def test_strides_do_not_matter() -> None:
    case = drawn(batch=2, groups=2, hidden=8)
    expected = case.run()
    case.a = case.a.transpose(1, 2).contiguous().transpose(1, 2)
    case.b = case.b.mT.contiguous().mT
    case.w = None if case.w is None else case.w.mT.contiguous().mT
    if case.w0 is not None:
        case.w0 = torch.stack((case.w0, case.w0), -1)[:, 0]
    for got, want in zip(case.run(), expected, strict=True):
        assert torch.equal(got, want), case.note


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("_", range(3))
def test_the_two_levels_of_a_search_are_those_of_select_tiles(form: str, level: int, _: int) -> None:
    """Exact sums, so the places must be the same, ties included."""
    case = drawn(whole=True, form=form, own=random.random() < 0.7, nk=random.choice((5, 40, 150)))
    rng = random.Random(case.note)
    span, nk, (batch, groups, nq, _hidden) = rng.choice((2, 3, 16)), case.b.shape[2], case.a.shape
    case.options["span"] = span
    if level == 1:
        scores = case.values().float()
    else:
        count = -(-nk // span)
        kept = rng.randint(1, count)
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        runs = torch.rand(batch, groups, nq, count, generator=generator).argsort(-1)[..., :kept]
        runs = torch.where(torch.rand(runs.shape, generator=generator) < 0.2, -1, runs).int()
        case.options["within"] = runs.to(DEVICE)
        tiles = (runs.long()[..., None] * span + torch.arange(span)).flatten(-2)
        scores = case.values().float().gather(-1, tiles.clamp(0, nk - 1))
    options = {n: x.cpu() if isinstance(x, Tensor) else x for n, x in case.options.items()}
    expected = select_tiles(
        lambda start, stop: scores[:, :, start:stop], (batch, groups, nq, nk), case.k, **options
    ).indices
    assert torch.equal(case.run()[0], expected), case.note


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_bilinear_search_in_two_levels(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both levels in kernels, of features that a scorer bounds, against the same search without them."""
    gen = random.Random(seed := random.SystemRandom().getrandbits(32))
    rng = torch.Generator().manual_seed(seed)
    monkeypatch.setattr(search, "LEAST_RUNS", 2)
    scorer = ImportanceScorer(5, 8, form="bilinear").to(DEVICE)
    nq, nk = 6, 90
    given = [torch.randint(-3, 4, (1, 2, n, 8), generator=rng).float().to(DEVICE) for n in (nq, nk)]
    limit = torch.randint(1, 5, (nq,), generator=rng).to(DEVICE)
    options: dict[str, Any] = {
        "is_causal": is_causal, "offset_tokens": (nk - nq) * 128 + gen.randrange(128), "block": 128,
        "temperature": torch.tensor(1.0, device=DEVICE), "sink": gen.random() < 0.5,
        "valid_keys": (torch.rand(1, nk, generator=rng) < 0.8).to(DEVICE),
    }  # fmt: skip
    found = []
    for fused in (False, True):
        monkeypatch.setattr(search, "in_one_kernel", lambda *given, fused=fused: fused)
        found.append(search.two_level_tiles(scorer, Features(*given), 4, limit, **options))
    assert torch.equal(*found), seed


@pytest.mark.parametrize("form", FORMS)
def test_noise_and_groups_in_the_tiles_of_runs(form: str) -> None:
    size = {"batch": 2, "groups": 2, "nq": 9, "nk": 70, "hidden": 6, "k": 12}
    case = drawn(form=form, **size, noise=seed_tensor(), temperature=0.4)
    generator = torch.Generator().manual_seed(random.Random(case.note).getrandbits(32))
    runs = torch.rand(2, 2, 9, 5, generator=generator).argsort(-1)[..., :3].int()
    case.options |= {"span": 16, "within": runs.to(DEVICE)}
    indices, scores = case.run()
    values, live = case.values(), indices >= 0
    assert live.any(), case.note
    told = values.gather(-1, indices.clamp(min=0).long())
    torch.testing.assert_close(scores[live].double(), told[live], rtol=0, atol=2e-5, msg=case.note)
    options = {n: x.cpu() if isinstance(x, Tensor) else x for n, x in case.options.items()}
    tiles = (runs.long()[..., None] * 16 + torch.arange(16)).flatten(-2).clamp(0, 69)
    options |= {"noise": None, "temperature": 1.0}
    picked = values.float().gather(-1, tiles)
    expected = select_tiles(lambda *r: picked[:, :, slice(*r)], (2, 2, 9, 70), 12, **options).indices
    # Rounding may swap neighbours whose scores agree to seven digits.
    assert (indices != expected).float().mean() < 0.02, case.note


BAD: list[tuple[str, dict[str, Any]]] = [
    ("a and b", {"b": torch.zeros(1, 2, 4, 5)}),
    ("a and b", {"a": torch.zeros(1, 2, 0, 4)}),
    ("w", {"w": torch.zeros(3, 4)}),
    ("w0", {"w0": torch.zeros(3)}),
    ("k", {"k": 0}),
    ("block", {"block": 0}),
    ("temperature", {"temperature": 0.0}),
    ("temperature", {"temperature": torch.ones(3)}),
    ("noise", {"noise": torch.zeros(1)}),
    ("valid_keys", {"valid_keys": torch.ones(2, 4, dtype=torch.bool)}),
    ("w", {"w": torch.zeros(4, device="meta")}),
    ("valid_keys", {"valid_keys": torch.ones(1, 4, dtype=torch.bool, device="meta")}),
    ("span", {"span": 0}),
    ("within", {"within": torch.zeros(1, 2, 3, 0, dtype=torch.int32)}),
    ("within", {"within": torch.zeros(1, 2, 3, 2)}),
]


@pytest.mark.parametrize(("name", "wrong"), BAD)
def test_bad_arguments_say_what_is_wrong(name: str, wrong: dict[str, Any]) -> None:
    given: dict[str, Any] = {"a": torch.zeros(1, 2, 3, 4), "b": torch.zeros(1, 2, 4, 4), "w": torch.zeros(4)}
    given |= {"k": 2, "is_causal": False, "offset_tokens": 0, "block": 128}
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        topk_rows(**(given | wrong))


def test_what_the_kernel_does_not_serve_is_said_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 1, 200, 4, device=DEVICE)
    assert why_not(x, x, MOST_KEPT + 1) is None and why_not(x, x[:, :, :3], 10**6) is None
    assert "besides its own" in (why_not(x, x, MOST_KEPT + 2) or "")
    assert "besides its own" in (why_not(x, x, MOST_KEPT + 1, own=False) or "")
    assert "fp16, bf16 and fp32" in (why_not(x.double(), x.double(), 2) or "")
    assert "one dtype" in (why_not(x, x.half(), 2) or "")
    assert "'meta'" in (why_not(x.to("meta"), x.to("meta"), 2) or "")
    with pytest.raises(BackendError, match=r"float64.*select_tiles"):
        topk_rows(x.double(), x.double(), x[0, 0, 0], 2, is_causal=False, offset_tokens=0, block=128)
    # Answers about a device are kept: ask anew.
    monkeypatch.setattr("sparsetile.kernels.triton_select.device_problem", device_problem.__wrapped__)
    monkeypatch.setattr("sparsetile.kernels.triton_tiles.INTERPRETED", False)
    assert "on the CPU" in (why_not(x.cpu(), x.cpu(), 2) or "")
    monkeypatch.setattr("sparsetile.kernels.triton_backend.import_problem", lambda: "no Triton")
    assert why_not(x, x, 2) == "no Triton"


@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_graph_chooses_the_same_rows(form: str) -> None:
    a, b = (torch.randn(2, 3, n, 8, device=DEVICE) for n in (5, 9))
    w = torch.randn(8, device=DEVICE) if form == "mlp" else None
    tau = torch.tensor(0.7, device=DEVICE)
    seed = torch.tensor([random.getrandbits(60)], device=DEVICE)
    valid = torch.rand(2, 9, device=DEVICE) > 0.3
    options = {"is_causal": True, "offset_tokens": 64, "block": 16, "temperature": tau, "noise": seed}
    options |= {"sink": True, "valid_keys": valid}

    def call(a: Tensor, b: Tensor) -> Tensor:
        return chosen_rows(a, b, w, 4, **options)

    wanted = topk_rows(a, b, w, 4, **options)[0]
    assert torch.equal(call(a, b), wanted)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(a, b), wanted)


def test_importing_the_entry_leaves_triton_alone() -> None:
    code = "import sys, sparsetile.kernels.triton_select; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
