"""The factory: the interface as it was announced, and what it says to everything else."""

import pytest
import torch
import torch.distributed as dist

import sparsetile as st
from sparsetile.errors import ArgumentError, PatternError
from sparsetile.nn import factory
from sparsetile.nn.adaptive import BlockSparseAdaptive
from sparsetile.nn.presets import PRESETS, Preset


def test_the_announced_interface():
    base = st.create_block_sparse_attention(
        variant="base", segment_lengths=[2048], dilation_rates=[1], sparsity_ratio=0.01
    )
    x = torch.randn(1, 500, 2, 16)
    assert base(x, x, x).shape == x.shape
    multihead = st.create_multihead_block_sparse(embed_dim=768, num_heads=12, sparsity_ratio=0.05)
    y = torch.randn(20, 1, 768)
    assert multihead(y, y, y)[0].shape == y.shape
    for name in ("ultra_sparse", "local", "dilated", "global_local", "adaptive_standard"):
        assert st.get_block_sparse_preset(name).name == name
    assert isinstance(st.create_block_sparse_attention(variant="auto"), st.BlockSparseRingDilatedAttention)
    adaptive = st.create_adaptive_block_sparse(base_sparsity=0.9, temperature=1.0, learnable_temperature=True)
    assert adaptive(x, x, x).shape == x.shape
    distributed = st.create_block_sparse_attention(
        variant="distributed",
        distributed_config=st.DistributedSparseConfig(
            enable_memory_optimization=True, gradient_compression_ratio=0.1
        ),
    )
    assert distributed(x, x, x).shape == x.shape


def test_auto_chooses_and_says_why(tmp_path):
    assert "embed_dim is given" in repr(st.create_block_sparse_attention(embed_dim=32, num_heads=2))
    base = st.create_block_sparse_attention(sparsity_ratio=0.3)
    assert "variant='base' by 'auto': no embed_dim" in repr(base)
    assert "auto" not in repr(st.create_block_sparse_attention("base"))
    adaptive = st.create_block_sparse_attention(adaptive_config=st.AdaptiveConfig())
    assert "variant='adaptive' by 'auto': adaptive_config is given" in repr(adaptive)
    spread = st.create_block_sparse_attention(distributed_config=st.DistributedSparseConfig())
    assert "variant='distributed' by 'auto': distributed_config is given" in repr(spread)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        in_a_group = st.create_block_sparse_attention()
        assert "variant='distributed' by 'auto': a process group is initialised" in repr(in_a_group)
        assert isinstance(st.create_block_sparse_attention("base"), st.BlockSparseRingDilatedAttention)
    finally:
        dist.destroy_process_group()


def test_options_reach_the_module():
    module = st.create_block_sparse_attention("base", dropout=0.2, backend="cpu", scale=2.0)
    assert (module.dropout, module.backend, module.scale) == (0.2, "cpu", 2.0)
    multihead = st.create_multihead_block_sparse(32, 2, batch_first=True, bias=False, kdim=8)
    assert multihead.batch_first and multihead.in_proj_bias is None and multihead.kdim == 8


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: st.create_block_sparse_attention("bse"), ArgumentError, "'base'"),
        (lambda: st.create_block_sparse_attention("bse"), ArgumentError, "Did you mean"),
        (lambda: st.create_block_sparse_attention(None), ArgumentError, "one of"),
        (
            lambda: st.create_block_sparse_attention("base", droput=0.1),
            ArgumentError,
            "Did you mean 'dropout'",
        ),
        (lambda: st.create_block_sparse_attention("base", kdim=3), ArgumentError, "options among"),
        (lambda: st.create_multihead_block_sparse(32, 2, colour=1), ArgumentError, "colour"),
        (lambda: st.create_block_sparse_attention("base", embed_dim=32), ArgumentError, "'multihead'"),
        (lambda: st.create_block_sparse_attention("multihead"), ArgumentError, "embed_dim and num_heads"),
        (lambda: st.create_block_sparse_attention(embed_dim=32), ArgumentError, "num_heads"),
        (
            lambda: st.create_block_sparse_attention("base", adaptive_config=st.AdaptiveConfig()),
            ArgumentError,
            "'adaptive'",
        ),
        (lambda: st.create_block_sparse_attention("base", sparsity_ratio=1.5), PatternError, "1.5"),
        (lambda: st.create_adaptive_block_sparse(base_sparsity=1.0), ArgumentError, "base_sparsity"),
        (lambda: st.create_adaptive_block_sparse(selektion="top_p"), ArgumentError, "options among"),
        (lambda: st.create_adaptive_block_sparse(dropot=0.1), ArgumentError, "Did you mean 'dropout'"),
        (
            lambda: st.create_adaptive_block_sparse(sparsity_ratio=0.1),
            ArgumentError,
            "belongs to variant 'base'",
        ),
        (
            lambda: st.create_block_sparse_attention("base", num_heads=2),
            ArgumentError,
            "'multihead' or 'adap",
        ),
        (lambda: st.create_block_sparse_attention(distributed_config={}), ArgumentError, "got {}"),
        (lambda: st.create_block_sparse_attention(adaptive_config=0.9), ArgumentError, "AdaptiveConfig"),
        (lambda: st.get_block_sparse_preset(["local"]), ArgumentError, "one of"),
        (lambda: st.get_block_sparse_preset("locale"), ArgumentError, "Did you mean 'local'"),
        (lambda: st.get_block_sparse_preset("zzz"), ArgumentError, "'adaptive_standard'"),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.variant == "base"])
def test_fixed_presets_make_modules_and_are_as_sparse_as_said(name):
    preset = st.get_block_sparse_preset(name)
    assert isinstance(preset, Preset) and preset.when and preset.reach
    module = preset.create()
    for causal in (False, True):
        assert module.plan.pattern_for(causal) == preset.pattern_for(causal)
        # Any fixed preset is well below dense at 128K tokens.
        assert module.density_for(131_072, is_causal=causal).realised < 0.1
    heads = preset.create(embed_dim=32, num_heads=2, dropout=0.1)
    assert isinstance(heads, st.BlockSparseRingMultiheadDilatedAttention) and heads.dropout == 0.1
    with pytest.raises(AttributeError):
        preset.when = "never"
    assert hash(preset) == hash(st.get_block_sparse_preset(name))


def test_the_adaptive_preset_is_a_value():
    preset = st.get_block_sparse_preset("adaptive_standard")
    assert preset.adaptive_config == st.AdaptiveConfig(0.9, 1.0, True)
    with pytest.raises(ArgumentError, match="learns it"):
        preset.pattern_for()
    module = preset.create(dropout=0.1)
    assert isinstance(module, BlockSparseAdaptive) and module.config == preset.adaptive_config
    x = torch.randn(1, 200, 2, 16)
    assert module(x, x, x, is_causal=True).shape == x.shape and module.dropout == 0.1


def test_options_of_the_adaptive_variant_reach_config_and_module():
    module = st.create_adaptive_block_sparse(
        0.5, hidden_dim=8, selection="top_p", num_heads=4, num_kv_heads=2, head_dim=16, scale=0.3
    )
    assert module.config == st.AdaptiveConfig(0.5, hidden_dim=8, selection="top_p")
    assert module.scale == 0.3 and module.scorer.w_q.shape == (8, 16)


def test_names_of_variants_are_known():
    assert factory.VARIANTS == ("auto", "base", "multihead", "distributed", "adaptive")
