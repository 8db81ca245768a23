"""Patterns by name: their natural sizes, their budgets, and the values that are refused."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pattern_draws import runs
from sparsetile.errors import PatternError
from sparsetile.layout import BlockLayout
from sparsetile.patterns import Budget, Causal, Dilated, Global, Local, LogStrided, parse_pattern
from sparsetile.patterns.budget import KINDS
from sparsetile.patterns.config import SparsePatternConfig


@pytest.mark.parametrize(
    ("config", "both_ways", "causal"),
    [
        (SparsePatternConfig("local_window"), Local(256, 255), Local(511, 0)),
        (SparsePatternConfig("local_window", local_window_size=1), Local(0, 0), Local(0, 0)),
        (SparsePatternConfig("local_window", local_window_size=5), Local(2, 2), Local(4, 0)),
        (
            SparsePatternConfig("global_local", local_window_size=100, global_tokens=7),
            Local(50, 49) | Global(7, rows=False),
            Local(99, 0) | Global(7, rows=False),
        ),
        (SparsePatternConfig("global_local", global_tokens=0), Local(256, 255), Local(511, 0)),
        (SparsePatternConfig("ultra_sparse"), *[LogStrided(2) | Global(64, rows=False)] * 2),
        (
            SparsePatternConfig("ultra_sparse", global_tokens=0),
            *[LogStrided(2) | Global(1, rows=False)] * 2,
        ),
        (SparsePatternConfig(), *[Dilated(512, 1) | Dilated(1024, 4)] * 2),
        (SparsePatternConfig(Local(3) | Global(1)), *[Local(3) | Global(1)] * 2),
    ],
    ids=str,
)
def test_without_a_ratio(config, both_ways, causal):
    branches = ([512, 1024], [1, 4])
    assert config.pattern(False, *branches) == both_ways
    assert config.pattern(True, *branches) == causal & Causal()


@pytest.mark.parametrize("size", [1, 2, 5, 64, 512])
def test_a_window_has_its_size(size):
    config = SparsePatternConfig("local_window", local_window_size=size)
    for is_causal in (False, True):
        layout = BlockLayout.from_pattern(config.pattern(is_causal), 1400, block_size=16)
        assert int(layout.to_dense()[700].sum()) == size


def test_with_a_ratio():
    branches = ((512, 1024), (1, 4))
    for kind in KINDS:
        config = SparsePatternConfig(kind, 0.05)
        given_branches = branches if kind == "dilated_sparse" else (None, None)
        made = Budget(kind, 0.05, False, None, *given_branches)
        assert config.pattern(False, *branches) == made
        causal = Budget(kind, 0.05, True, None, *given_branches) & Causal()
        assert config.pattern(True, *branches) == causal
    assert SparsePatternConfig("ultra_sparse", 1, global_tokens=3).pattern() == Budget(
        "ultra_sparse", 1.0, global_tokens=3
    )


@st.composite
def configs(draw: st.DrawFn) -> SparsePatternConfig:
    kind = draw(st.sampled_from([*KINDS, Local(5) | Global(2)]))
    ratio = draw(st.none() | st.floats(1e-6, 1)) if kind in KINDS else None
    sizes = {"block_size": draw(st.sampled_from([16, 32, 64, 128]))}
    if ratio is None and kind in ("local_window", "global_local"):
        sizes["local_window_size"] = draw(st.integers(1, 900))
    if kind in ("global_local", "ultra_sparse"):
        sizes["global_tokens"] = draw(st.integers(0, 300))
    return SparsePatternConfig(kind, ratio, **sizes)


@runs(80)
@given(configs(), st.booleans(), st.integers(1, 700), st.integers(1, 700), st.data())
def test_patterns_are_text_and_keep_causality(config, is_causal, q_len, k_len, data):
    lengths = data.draw(st.lists(st.integers(1, 900), min_size=1, max_size=3))
    rates = [data.draw(st.integers(1, min(5, length))) for length in lengths]
    made = config.pattern(is_causal, lengths, rates)
    again = parse_pattern(repr(made))
    assert again == made and repr(again) == repr(made) and hash(again) == hash(made)
    dense = BlockLayout.from_pattern(made, q_len, k_len, config.block_size).to_dense()
    offset = k_len - q_len
    assert not (is_causal and dense.triu(offset + 1).any())
    # Every query that stands at a key sees that key.
    own = torch.arange(max(0, -offset), q_len)
    assert dense[own, own + offset].all()


@runs(20)
@given(configs())
def test_configs_are_values(config):
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config and hash(again) == hash(config) and again.pattern() == config.pattern()


def test_every_argument_acts():
    def layout(*arguments, **named):
        branches = named.pop("branches", ((2048,), (1,)))
        return BlockLayout.from_pattern(
            SparsePatternConfig(*arguments, **named).pattern(False, *branches), 4096
        )

    def differ(a, b):
        return a.nnz != b.nnz or not torch.equal(a.indices, b.indices)

    assert differ(layout("local_window"), layout("local_window", local_window_size=900))
    assert differ(layout("global_local"), layout("global_local", local_window_size=900))
    assert differ(layout("global_local"), layout("global_local", global_tokens=400))
    assert differ(layout("global_local", 0.3), layout("global_local", 0.3, global_tokens=400))
    assert differ(layout("ultra_sparse"), layout("ultra_sparse", global_tokens=400))
    assert differ(layout("ultra_sparse", 0.3), layout("ultra_sparse", 0.3, global_tokens=400))
    for ratio in (None, 0.2):
        base = layout("dilated_sparse", ratio)
        for branches in (([1024], [1]), ([2048], [2]), ([2048, 4096], [1, 2])):
            assert differ(base, layout("dilated_sparse", ratio, branches=branches))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SparsePatternConfig("local"), "one of 'local_window', 'dilated_sparse', .*got 'local'"),
        (lambda: SparsePatternConfig(None), "got None"),
        (lambda: SparsePatternConfig(Budget), "one of"),
        (lambda: SparsePatternConfig(sparsity_ratio=0), "0 < density ≤ 1, got 0"),
        (lambda: SparsePatternConfig(sparsity_ratio=-0.1), "got -0.1"),
        (lambda: SparsePatternConfig(sparsity_ratio=1.5), "got 1.5"),
        (lambda: SparsePatternConfig(sparsity_ratio=math.nan), "got nan"),
        (lambda: SparsePatternConfig(sparsity_ratio=math.inf), "got inf"),
        (lambda: SparsePatternConfig(sparsity_ratio=True), "got True"),
        (lambda: SparsePatternConfig(Local(3), 0.1), r"None beside Local\(.*its own density, got 0.1"),
        (lambda: SparsePatternConfig(block_size=48), r"one of \(16, 32, 64, 128\), got 48"),
        (lambda: SparsePatternConfig(block_size=64.0), "got 64.0"),
        (lambda: SparsePatternConfig("local_window", local_window_size=0), "≥ 1, got 0"),
        (lambda: SparsePatternConfig("local_window", local_window_size=2.5), "got 2.5"),
        (lambda: SparsePatternConfig("global_local", global_tokens=-1), "≥ 0, got -1"),
        (
            lambda: SparsePatternConfig("local_window", 0.1, local_window_size=256),
            "sparsity_ratio sets the size of the window, got 256",
        ),
        (lambda: SparsePatternConfig("global_local", 0.1, local_window_size=256), "sets the size"),
        (lambda: SparsePatternConfig(local_window_size=256), "'dilated_sparse' has no window"),
        (lambda: SparsePatternConfig("ultra_sparse", local_window_size=256), "has no window"),
        (lambda: SparsePatternConfig(Local(3), local_window_size=256), "a Pattern has no window"),
        (lambda: SparsePatternConfig(global_tokens=3), "'dilated_sparse' has no global tokens"),
        (lambda: SparsePatternConfig("local_window", global_tokens=0), "has no global tokens"),
        (lambda: SparsePatternConfig(Local(3), global_tokens=3), "a Pattern has no global tokens"),
        (lambda: SparsePatternConfig().pattern(False, [1, 2], [1]), "as many rates as lengths"),
        (lambda: SparsePatternConfig("local_window").pattern(True, [4], [5]), "no rate above"),
        (lambda: SparsePatternConfig().pattern(False, [], []), "not empty"),
    ],
)
def test_errors(make, says):
    with pytest.raises(PatternError, match=says) as caught:
        make()
    assert ": expected " in str(caught.value) and ", got " in str(caught.value)
