"""AdaptiveConfig refuses what cannot be, and counts tiles."""

import math

import pytest

import sparsetile as st
from sparsetile.adaptive.config import AdaptiveConfig
from sparsetile.errors import ArgumentError
from sparsetile.nn import adaptive


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"base_sparsity": 1.0}, "base_sparsity"),
        ({"base_sparsity": -0.1}, "base_sparsity"),
        ({"base_sparsity": math.nan}, "base_sparsity"),
        ({"base_sparsity": "0.9"}, "base_sparsity"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"learnable_temperature": 1}, "learnable_temperature"),
        ({"hidden_dim": 0}, "hidden_dim"),
        ({"hidden_dim": 8.0}, "hidden_dim"),
        ({"form": "indexer", "hidden_dim": 30}, "sub_heads"),
        ({"form": "cosine"}, "form"),
        ({"form": ["mlp"]}, "form"),
        ({"pooling": "max"}, "pooling"),
        ({"scorer_dropout": 1.0}, "scorer_dropout"),
        ({"block_size": 48}, "block_size"),
        ({"selection": "topk"}, "selection"),
        ({"p": 0.0}, "^p: expected"),
        ({"p": 1.1}, "^p: expected"),
        ({"k_min": 0}, "k_min"),
        ({"k_min": 5, "k_max": 4}, "k_max: expected None or an integer ≥ k_min = 5"),
        ({"anneal_steps": 0}, "anneal_steps"),
        ({"min_temperature": 2.0}, "min_temperature"),
        ({"query_summary": "last"}, "query_summary"),
        ({"distillation": True}, "distillation"),
        ({"sink": None}, "sink"),
    ],
)
def test_errors(settings, text):
    with pytest.raises(ArgumentError, match=text):
        AdaptiveConfig(**settings)


def test_one_class_under_its_names():
    assert st.AdaptiveConfig is AdaptiveConfig is adaptive.AdaptiveConfig
    assert AdaptiveConfig(0.0, 1e-3, True).base_sparsity == 0.0
    assert AdaptiveConfig(0.9, 1.0, True) == AdaptiveConfig(learnable_temperature=True)


def test_tiles_and_places():
    config = AdaptiveConfig(0.9)
    assert [config.tiles_for(n) for n in (1, 10, 14, 15, 25, 1024)] == [1, 1, 1, 2, 3, 102]
    assert AdaptiveConfig(0.0).tiles_for(7) == 7
    assert config.places_for(1024) == 102
    mass = AdaptiveConfig(0.9, selection="top_p", k_min=6)
    assert [mass.places_for(n) for n in (3, 10, 1024)] == [3, 6, 408]
    assert AdaptiveConfig(selection="top_p", k_max=5).places_for(1024) == 5
