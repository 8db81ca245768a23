"""Places: values by place and values by tile of the layout are the same values."""

import random

import pytest
import torch

from sparsetile.adaptive.places import Places


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_to_edges_and_back(groups):
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    batch, heads, q_len, k_len, block, k = 2, 4, 90, 150, 16, 5
    shape = (batch, groups, 6, k)
    chosen = torch.rand(*shape[:3], 10).argsort(-1)[..., :k].to(torch.int32)
    chosen = chosen.masked_fill(torch.rand(shape) < 0.3, -1)
    places = Places.of(chosen, heads, q_len, k_len, block, False)
    places.layout.validate()
    assert torch.equal(places.valid.sum(-1), (chosen >= 0).sum(-1))
    # Each pair of row and key block has a value of its own.
    values = torch.randn(batch, groups, 6, 10, dtype=torch.float64)
    at_place = values.gather(-1, places.column).requires_grad_()
    edges = places.to_edges(at_place)
    line, col = places.layout.rows_and_columns()
    grid = values.repeat_interleave(heads // groups if groups > 1 else 1, 1).flatten(0, 2)
    assert torch.equal(edges[0, 0, : places.layout.nnz], grid[line, col])
    weight = torch.randn_like(edges)
    (grad,) = torch.autograd.grad((edges * weight).sum(), at_place)
    torch.testing.assert_close(grad, places.from_edges(weight))
    assert (grad[~places.valid] == 0).all()
    # What an unused place holds reaches nobody.
    broken = at_place.masked_fill(~places.valid, torch.nan)
    assert torch.equal(places.to_edges(broken), edges) and not edges[0, 0, places.layout.nnz :].any()
    (grad,) = torch.autograd.grad((places.to_edges(broken) * weight).sum(), at_place)
    torch.testing.assert_close(grad, places.from_edges(weight))


def test_nothing_is_read_back_to_the_host():
    # Meta tensors hold no values, so any attempt to look at one raises.
    for is_causal in (False, True):
        chosen = torch.empty((2, 2, 6, 5), dtype=torch.int32, device="meta")
        places = Places.of(chosen, 4, 90, 150, 16, is_causal)
        assert places.slot.shape == (2, 2, 2, 6, 5) and places.layout.capacity == 240
        edges = places.to_edges(torch.empty(chosen.shape, device="meta"))
        assert places.from_edges(edges).shape == chosen.shape


def test_rows_at_the_start_of_a_causal_call_keep_fewer_tiles():
    """Own tile and as many before as there are: as a selection has it, with −1 in the places left."""
    rows, k = 6, 4
    chosen = torch.arange(rows)[:, None] - torch.arange(k)
    places = Places.of(chosen.clamp(min=-1).view(1, 1, rows, k).int(), 2, 90, 90, 16, True)
    counts = torch.arange(1, rows + 1).clamp(max=k)
    assert places.layout.row_counts().tolist() == counts.tolist()
    assert torch.equal(places.valid.sum(-1)[0, 0], counts)
    bias = torch.randn(1, 1, rows, k)
    kept = [bias[0, 0, row, :count] for row, count in enumerate(counts)]
    assert torch.equal(places.to_edges(bias)[0, 0, : places.layout.nnz], torch.cat(kept))
