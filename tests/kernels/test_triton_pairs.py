"""Scores of chosen pairs in one kernel against the scorer's own; in the interpreter if there is no GPU."""

from __future__ import annotations

import random

import pytest
import torch

from sparsetile.adaptive import ImportanceScorer
from sparsetile.adaptive.scorer import Features

pytest.importorskip("triton")

from sparsetile.kernels.triton_pairs import pair_scores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("form", ["mlp", "bilinear"])
@pytest.mark.parametrize("hidden", [1, 20, 32, 100])
@pytest.mark.parametrize("shared", [False, True])
def test_scores_are_those_of_pairs(form: str, hidden: int, shared: bool) -> None:
    seed = random.getrandbits(40)
    torch.manual_seed(seed)
    scorer = ImportanceScorer(12, hidden, num_heads=None if shared else 3, form=form).to(DEVICE)
    q, k = torch.randn(2, 3, 7, 12, device=DEVICE), torch.randn(2, 3, 9, 12, device=DEVICE)
    column = torch.randint(9, (2, 3, 7, 5), device=DEVICE)
    features = scorer.features(q, k)
    expected = scorer.pairs(features, column)  # with a gradient, hence not by the kernel
    assert expected.requires_grad
    layer = (scorer.output_weight.detach(), scorer.b2.detach().view(-1)) if form == "mlp" else (None, None)
    got = pair_scores(features.a.detach(), features.b.detach(), *layer, column)
    exact = scorer.double().pairs(
        Features(features.a.detach().double(), features.b.detach().double()), column
    )
    torch.testing.assert_close(got.double(), exact.detach(), rtol=1e-5, atol=1e-5, msg=f"seed {seed}")
    scorer.float()
    torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-5, msg=f"seed {seed}")
    if DEVICE == "cuda":
        with torch.no_grad():
            assert torch.equal(scorer.pairs(features, column), got)


def test_nan_stays_nan() -> None:
    a, b = torch.zeros(1, 1, 2, 4, device=DEVICE), torch.zeros(1, 1, 3, 4, device=DEVICE)
    b[0, 0, 1, 2] = torch.nan
    w, shift = torch.ones(1, 4, device=DEVICE), torch.zeros(1, device=DEVICE)
    column = torch.tensor([[[[0, 1], [2, 0]]]], device=DEVICE)
    for layer in ((w, shift), (None, None)):
        assert pair_scores(a, b, *layer, column).isnan().view(-1).tolist() == [False, True, False, False]
