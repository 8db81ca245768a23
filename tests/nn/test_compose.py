"""The modules inside the rest of PyTorch: compiled, exported, sharded, checkpointed, under autocast."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import sparsetile as st

KINDS = ("local_window", "dilated_sparse", "global_local", "ultra_sparse")


def module_of(kind="global_local", ratio=0.3, **options):
    config = st.SparsePatternConfig(kind, ratio, block_size=16)
    return st.BlockSparseRingDilatedAttention(sparse_config=config, **options)


def leaves(batch=2, length=120, dtype=torch.float32, **options):
    return [torch.randn(batch, length, 2, 16, dtype=dtype, requires_grad=True, **options) for _ in range(3)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiles_whole_with_equal_gradients(kind, causal):
    module = module_of(kind)
    inputs = leaves()
    expected = module(*inputs, is_causal=causal)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, weight)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    out = compiled(*inputs, is_causal=causal)
    torch.testing.assert_close(out, expected)
    for got, want in zip(torch.autograd.grad(out, inputs, weight), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_does_not_compile_again_for_other_batch_sizes():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(module_of(), fullgraph=True, backend=counter, dynamic=None)
    counts = []
    for batch in (2, 3, 5, 8):
        compiled(*leaves(batch))
        counts.append(counter.frame_count)
    # The first change of a size makes it dynamic; none after it compiles.
    assert counts[1:] == [counts[1]] * 3 and counts[1] <= 2


def test_a_batch_marked_dynamic_compiles_once():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(module_of(), fullgraph=True, backend=counter)
    for batch in (2, 3, 7):
        inputs = leaves(batch)
        for x in inputs:
            torch._dynamo.mark_dynamic(x, 0)
        compiled(*inputs)
    assert counter.frame_count == 1


def test_autocast():
    module = module_of()
    q, k, v = leaves()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(q, k, v)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), module(q, k, v), rtol=0.05, atol=0.02)
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing(dropout):
    module = module_of(dropout=dropout)
    inputs = leaves()
    weight = torch.randn_like(inputs[0])
    torch.manual_seed(3)
    plain = torch.autograd.grad(module(*inputs), inputs, weight)
    torch.manual_seed(3)
    again = torch.autograd.grad(checkpoint(module, *inputs, use_reentrant=False), inputs, weight)
    for got, want in zip(again, plain, strict=True):
        assert torch.equal(got, want)


def test_export():
    module = module_of().eval()
    inputs = [x.detach() for x in leaves()]
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, tuple(inputs), dynamic_shapes=({0: batch},) * 3)
    others = [x.detach() for x in leaves(5)]
    torch.testing.assert_close(program.module()(*others), module(*others))


def test_functional_call():
    heads = st.create_multihead_block_sparse(32, 2, batch_first=True)
    x = torch.randn(1, 60, 32)
    doubled = {name: 2 * value.detach() for name, value in heads.named_parameters()}
    out, _ = torch.func.functional_call(heads, doubled, (x, x, x), {"need_weights": False})
    heads.load_state_dict(doubled)
    torch.testing.assert_close(out, heads(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal):
    inputs = [torch.randn(1, 20, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    module = module_of("local_window")
    assert torch.autograd.gradcheck(lambda *x: module(*x, is_causal=causal), inputs)


def test_fully_shard_gives_the_same_losses(tmp_path):
    worker = [sys.executable, str(Path(__file__).parent / "fsdp_worker.py")]
    ranks = [
        subprocess.Popen(
            [*worker, *map(str, place)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for place in ((0, 1, "-"), (0, 2, tmp_path / "store"), (1, 2, tmp_path / "store"))
    ]
    outputs = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], outputs
    alone, sharded = (json.loads(outputs[i][0].splitlines()[-1]) for i in (0, 1))
    assert alone == pytest.approx(sharded, rel=1e-5) and alone[2] < alone[0]
