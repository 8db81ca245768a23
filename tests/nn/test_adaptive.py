"""BlockSparseAdaptive: what it keeps, what may not change its results, and the rest of PyTorch around it."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sparsetile as st
from adaptive_oracle import BLOCK, fresh, inputs, made, tail_padding, tiles_of
from sparsetile.errors import ArgumentError
from sparsetile.nn.adaptive import BlockSparseAdaptive


def test_noise_in_training_alone():
    fresh()
    q, k, v = inputs(q_len=320, k_len=320)
    module = made(q, k)
    outs = [module(q, k, v) for _ in range(2)]
    assert not torch.equal(*outs)
    quiet = made(q, k, exploration=False)
    assert torch.equal(quiet(q, k, v), quiet(q, k, v))
    module.eval()
    assert torch.equal(module(q, k, v), module(q, k, v))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("selection", ["top_k", "top_p"])
def test_a_neighbour_in_the_batch_changes_nothing(training, selection):
    draw = fresh()
    q, k, v = (x.detach() for x in inputs(batch=3))
    module = made(q, k, selection=selection, dropout=0.2, scorer_dropout=0.1).train(training)
    padding = tail_padding(3, 150, 90, 150, 33)
    kept = draw.randrange(3)
    torch.manual_seed(1)
    before = module(q, k, v, is_causal=draw.random() < 0.5, key_padding_mask=padding)
    is_causal = module._last.geometry[-1]
    others = torch.arange(3) != kept
    for x in (q, k, v):
        x[others] = 5 * torch.randn_like(x[others])
    padding[others] = torch.rand(2, 150) < 0.5
    torch.manual_seed(1)
    after = module(q, k, v, is_causal=is_causal, key_padding_mask=padding)
    assert torch.equal(before[kept], after[kept])
    assert not torch.equal(before[others], after[others])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"selection": "top_p", "p": 0.6},
        {"selection": "top_p", "p": 0.6, "q_len": 61},
        {"sink": True, "q_len": 83, "pooling": "max_min"},
        {"pooling": "lse", "per_query_head": True, "q_len": 118, "form": "indexer"},
    ],
)
def test_the_future_changes_nothing(settings, training):
    draw = fresh()
    settings = dict(settings)
    k_len = 150
    q_len = settings.pop("q_len", k_len)
    q, k, v = (x.detach() for x in inputs(q_len=q_len))
    module = made(q, k, **settings).train(training)
    for _ in range(4):
        now = draw.randrange(q_len - 1)
        torch.manual_seed(1)
        before = module(q, k, v, is_causal=True)
        later = [x.clone() for x in (q, k, v)]
        for x, first in zip(later, (now + 1, *(now + 1 + k_len - q_len,) * 2), strict=True):
            x[:, first:] = 4 * torch.randn_like(x[:, first:])
        torch.manual_seed(1)
        after = module(*later, is_causal=True)
        assert torch.equal(before[:, : now + 1], after[:, : now + 1]), now
        assert not torch.equal(before[:, now + 1 :], after[:, now + 1 :])


def test_a_whole_tile_of_queries_chooses_if_asked_to():
    fresh()
    q, k, v = (x.detach() for x in inputs(q_len=640, k_len=640))
    module = made(q, k, query_summary="tile").eval()
    module(q, k, v, is_causal=True)
    before = module.last_layout
    q[:, 630:] = 30 * torch.randn_like(q[:, 630:])
    module(q, k, v, is_causal=True)
    assert not torch.equal(before.indices, module.last_layout.indices)


def test_base_sparsity_is_what_is_kept():
    fresh()
    q, k, v = inputs(batch=2, q_len=800, k_len=800, heads=2)
    module = made(q, k, base_sparsity=0.9)
    module(q, k, v)
    assert module.last_layout.nnz == 2 * 2 * 50 * 5
    assert module.last_density.item() == pytest.approx(0.1)
    assert (module.last_tiles == 5).all()
    module(q, k, v, is_causal=True)
    wanted = torch.tensor([max(1, math.floor(0.1 * t + 0.5)) for t in range(1, 51)])
    assert (module.last_tiles == wanted).all()
    grid = tiles_of(module.last_layout, 2, 2)
    assert grid.diagonal(dim1=-2, dim2=-1).all() and not grid.triu(1).any()
    # Queries that start inside a tile lie over two, which both count.
    q, k, v = inputs(q_len=200, k_len=805, heads=2)
    module(q, k, v, is_causal=True)
    reach = [(min(16 * (i + 1), 200) + 604) // 16 + 1 for i in range(13)]
    wanted = torch.tensor([max(2 if i < 12 else 1, math.floor(0.1 * t + 0.5)) for i, t in enumerate(reach)])
    assert torch.equal(module.last_tiles, wanted.expand_as(module.last_tiles))


def test_top_p_keeps_what_the_mass_needs_within_its_bounds():
    fresh()
    q, k, v = inputs(q_len=480, k_len=480)
    module = made(q, k, selection="top_p", p=0.5, k_min=2, k_max=9).eval()
    with torch.no_grad():
        module.log_temperature.fill_(math.log(100.0))  # flat: half of the mass is half of the tiles
    module(q, k, v)
    assert (module.last_tiles == 9).all() and module.last_density.item() == pytest.approx(0.3)
    module.log_temperature.fill_(math.log(1e-3))  # one tile has all the mass, and is in place 1 at the latest
    module(q, k, v)
    assert (module.last_tiles == 2).all()
    assert module.last_layout.nnz == 2 * 4 * 30 * 2
    with pytest.raises(ArgumentError, match="in training"):
        module.sparsity_loss()


def test_padded_tiles_are_never_chosen_and_change_nothing():
    fresh()
    q, k, v = (x.detach() for x in inputs(k_len=150))
    padding = tail_padding(2, 150, 60, 111)
    module = made(q, k).eval()
    out = module(q, k, v, key_padding_mask=padding)
    grid = tiles_of(module.last_layout, 2, 4)
    assert not grid[0, ..., 4:].any() and not grid[1, ..., 7:].any()
    density = module.last_density.item()
    assert density == pytest.approx(grid.sum().item() / (4 * 10 * (4 + 7)))
    for x in (q, k, v):
        x[padding] = math.nan
    live = ~padding
    assert torch.equal(module(q, k, v, key_padding_mask=padding)[live], out[live])


def test_dropout_acts_in_training_alone():
    fresh()
    q, k, v = inputs()
    module = made(q, k, dropout=0.4, exploration=False)
    assert not torch.equal(module(q, k, v), module(q, k, v))
    module.eval()
    assert torch.equal(module(q, k, v), module(q, k, v))


def test_autocast():
    fresh()
    q, k, v = inputs(q_len=320, k_len=320)
    module = made(q, k, learnable_temperature=True, distillation="kept", exploration=False)
    plain = module(q, k, v)
    tiles = module.last_layout.indices
    with torch.autocast("cpu", torch.bfloat16):
        out = module(q, k, v)
    # Scores stay in fp32, so the tiles are those of the call without.
    assert out.dtype == torch.bfloat16 and torch.equal(module.last_layout.indices, tiles)
    torch.testing.assert_close(out.float(), plain, rtol=0.05, atol=0.03)
    (out.float().square().sum() + module.distillation_loss()).backward()
    assert all(p.grad.abs().max() > 0 for n, p in module.named_parameters())


@pytest.mark.parametrize(
    "settings", [{}, {"selection": "top_p"}, {"distillation": "kept"}, {"distillation": "sampled"}]
)
def test_nobody_waits_for_the_device(settings):
    # Fake tensors have no values: what asks for one raises.
    with FakeTensorMode():
        q, k, v = inputs()
        padding = torch.zeros(2, 150, dtype=torch.bool)
        module = BlockSparseAdaptive(
            st.AdaptiveConfig(0.5, 1.0, True, block_size=BLOCK, anneal_steps=10, **settings),
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
        )
        for is_causal in (False, True):
            module.anneal(3)
            out = module(q, k, v, is_causal=is_causal, key_padding_mask=padding)
            loss = out.square().sum()
            if "distillation" in settings:
                loss = loss + module.distillation_loss()
            if "selection" in settings:
                loss = loss + module.sparsity_loss()
            loss.backward()
            assert module.last_density.shape == () and module.last_tiles.shape == (2, 2, 10)


@pytest.mark.parametrize("lazy", [False, True])
def test_compiles_whole(lazy):
    fresh()
    q, k, v = inputs()
    module = made(q, k, learnable_temperature=True, selection="top_p", distillation="sampled")
    if lazy:
        # Drawing its parameters moves the generator, so noise and all must not depend on that.
        module = BlockSparseAdaptive(module.config).eval()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    out = compiled(q, k, v, is_causal=True)
    weight = torch.randn_like(out)
    leaves = [q, k, v, *module.parameters()]
    got = torch.autograd.grad(out, leaves, weight)
    torch.manual_seed(2)
    expected = module(q, k, v, is_causal=True)
    torch.testing.assert_close(out, expected)
    for a, b in zip(got, torch.autograd.grad(expected, leaves, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_no_layout_belongs_to_lengths_alone():
    fresh()
    q, k, v = inputs()
    module = made(q, k)
    for view in (module.layout_for, module.density_for):
        with pytest.raises(ArgumentError, match="chooses tiles for each input"):
            view(150)
    for name in ("last_layout", "last_density", "last_tiles"):
        with pytest.raises(ArgumentError, match="Call the module first"):
            getattr(module, name)
    module(q, k, v, is_causal=True)
    module.last_layout.validate()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m, q, k, v: m(q[..., :8], k[..., :8], v[..., :8]), "head_dim 16"),
        (lambda m, q, k, v: m(q[:, :, :2], k, v), "4 heads, 2 key-value heads"),
        (lambda m, q, k, v: m(q[0], k[0], v[0]), r"\[B, N, H, D\]"),
        (lambda m, q, k, v: m(q, k[:1], v), "shapes"),
        (lambda m, q, k, v: m(q, k, v, torch.ones(2, 150).bool()), "is_causal"),
        (lambda m, q, k, v: m(q, k, v, key_padding_mask=torch.ones(2, 9).bool()), "key_padding_mask"),
        (lambda m, q, k, v: m(q, k, v, weights="sparse"), "weights"),
        (lambda m, q, k, v: m(*(x.to("meta") for x in (q, k, v))), "where the parameters are"),
        (lambda m, q, k, v: m.distillation_loss(), "'none'"),
        (lambda m, q, k, v: m.sparsity_loss(), "fixed number"),
        (lambda m, q, k, v: m.anneal(-1), "step"),
        (lambda m, q, k, v: BlockSparseAdaptive({}), "AdaptiveConfig"),
        (lambda m, q, k, v: BlockSparseAdaptive(dropout=1.0), "dropout"),
        (lambda m, q, k, v: BlockSparseAdaptive(num_heads=0), "num_heads"),
        (lambda m, q, k, v: BlockSparseAdaptive(num_heads=4, num_kv_heads=3), "divisor"),
        (lambda m, q, k, v: BlockSparseAdaptive(num_kv_heads=3), "divisor"),
    ],
)
def test_errors(call, text):
    q, k, v = inputs()
    with pytest.raises(ArgumentError, match=text):
        call(made(q, k), q, k, v)
