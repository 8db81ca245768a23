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
