"""The Hopper backend on its GPU: all cells of ``gradient_matrix.py``, and what an emulator cannot show."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import sparsetile as st
from gpu.gradient_matrix import SERVED, cell
from oracle import Case, random_case, run
from sparsetile.errors import BackendError
from sparsetile.kernels import hopper_backend, triton_backend
from sparsetile.kernels.request import Request
from sparsetile.layout.blocks import BlockLayout
from sparsetile.patterns.base import Pattern

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]


@pytest.fixture(autouse=True)
def short_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five products a tile wherever they fit, also where they do not pay."""
    monkeypatch.setattr("sparsetile.kernels.hopper_launch.LONG_ROW", 0)


ASKED = {"tile_bias_grad": False, "attn_bias_grad": False}


@pytest.mark.parametrize(
    ("head_dim", "dtype", "block", "feature"), list(itertools.product(*SERVED["hopper"]))
)
def test_cells(head_dim: int, dtype: str, block: int, feature: str) -> None:
    for lean in (False, True):
        result = cell(head_dim, dtype, block, feature, name="hopper", lean=lean)
        assert result["passed"], result


def test_auto_chooses_it() -> None:
    x = torch.randn(1, 2, 512, 64, device="cuda", dtype=torch.bfloat16)
    got = st.sparse_attention(x, x, x, st.Local(100))
    assert torch.equal(got, st.sparse_attention(x, x, x, st.Local(100), backend="hopper"))
    with pytest.raises(BackendError, match="no dense bias"):
        st.sparse_attention(
            x, x, x, st.Local(100), attn_bias=torch.zeros(1, 1, 512, 512, device="cuda"), backend="hopper"
        )


def by_pattern(head_dim: int, block: int, pattern: Pattern, length: int, **sizes: int) -> Case:
    layout = BlockLayout.from_pattern(pattern, q_len=length, k_len=length, block_size=block, device="cuda")
    return case_on(layout, head_dim, **sizes)


def case_on(
    layout: BlockLayout, head_dim: int, heads: int = 4, batch: int = 1, key_heads: int | None = None
) -> Case:
    case = random_case(block=layout.block_q, head_dim=head_dim, dtype=torch.bfloat16, q_len=8, device="cuda")
    q, k, v, grad = (
        torch.randn(batch, own, length, head_dim, device="cuda", dtype=torch.bfloat16)
        for own, length in (
            (heads, layout.q_len),
            (key_heads or heads, layout.k_len),
            (key_heads or heads, layout.k_len),
            (heads, layout.q_len),
        )
    )
    return Case(**{**case.__dict__, "q": q, "k": k, "v": v, "grad_out": grad, "layout": layout})


@pytest.mark.parametrize("head_dim", [40, 64, 96, 128])
@pytest.mark.parametrize("block", [64, 128])
def test_rows_of_all_lengths_agree_with_the_triton_backend(head_dim: int, block: int) -> None:
    """Many items a program, of many lengths, split and not, and again: the same bits, if asked for."""
    pattern = (st.Local(150) | st.Global(70) | st.Random(0.03)) & st.Causal()
    case = by_pattern(head_dim, block, pattern, 12_000)
    got, expected = run(hopper_backend, case), run(triton_backend, case)
    for name in got:
        error = (got[name].double() - expected[name].double()).norm() / expected[name].double().norm()
        assert error < 4e-3, (name, error)
    for _ in range(25):
        again = run(hopper_backend, case)
        for name in got:
            # Only dQ is added up in no fixed order, where it is at all.
            assert torch.equal(again[name], got[name]) or name == "q", name
        assert (again["q"].double() - got["q"].double()).norm() < 3e-4 * got["q"].double().norm()
    lean = replace(case, lean=True)
    got = run(hopper_backend, lean)
    for name in got:
        error = (got[name].double() - expected[name].double()).norm() / expected[name].double().norm()
        assert error < 4e-3, (name, error)
    for _ in range(25):
        again = run(hopper_backend, lean)
        for name in got:
            assert torch.equal(again[name], got[name]), name


def test_recorded_launches_answer_for_their_own_tensors() -> None:
    layout = BlockLayout.from_pattern(st.Local(300), q_len=1111, block_size=64, device="cuda")
    for head_dim in (64, 64, 80, 64, 80):
        case = case_on(layout, head_dim)
        got, expected = run(hopper_backend, case), run(triton_backend, case)
        for name in got:
            assert (got[name].double() - expected[name].double()).norm() < 4e-3 * expected[
                name
            ].double().norm()


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("block", [64, 128])
def test_padded_batches_agree_with_the_triton_backend(head_dim: int, block: int) -> None:
    """Recorded and not, with another mask every time; what ignored keys hold means nothing."""
    pattern = (st.Local(700) | st.Global(70)) & st.Causal()
    layout = BlockLayout.from_pattern(pattern, q_len=5000, block_size=block, device="cuda")
    for lengths in ((5000, 3100), (4097, 64), (0, 2500)):
        case = case_on(layout, head_dim, batch=2)
        padding = torch.arange(5000, device="cuda") >= torch.tensor(lengths, device="cuda")[:, None]
        padding[1] |= torch.rand(5000, device="cuda") < 0.01
        hidden = padding[:, None, :, None]
        case.k, case.v = case.k.masked_fill(hidden, torch.nan), case.v.masked_fill(hidden, torch.nan)
        for lean in (False, True):
            case = replace(case, key_padding_mask=padding, lean=lean)
            got, expected = run(hopper_backend, case), run(triton_backend, case)
            assert torch.equal(got["lse"] == -torch.inf, expected["lse"] == -torch.inf)
            for name in got:
                x, y = (each[name].double().nan_to_num(neginf=0.0) for each in (got, expected))
                assert not got[name].isnan().any()
                assert (x - y).norm() < 4e-3 * y.norm(), name


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("block", [64, 128])
def test_dropout_agrees_with_the_triton_backend(head_dim: int, block: int) -> None:
    """Long rows, split ones, groups of heads, recorded and not; another seed every time."""
    pattern = (st.Local(700) | st.Global(70)) & st.Causal()
    layout = BlockLayout.from_pattern(pattern, q_len=5000, block_size=block, device="cuda")
    for p in (0.1, 0.1, 0.6):
        seed = torch.randint(2**62, (1,), device="cuda")
        case = replace(case_on(layout, head_dim, heads=4, key_heads=2), dropout_p=p, dropout_seed=seed)
        for lean in (False, True):
            case = replace(case, lean=lean)
            got, expected = run(hopper_backend, case), run(triton_backend, case)
            for name in got:
                x, y = (each[name].double().nan_to_num(neginf=0.0) for each in (got, expected))
                assert not got[name].isnan().any()
                assert (x - y).norm() < 4e-3 * y.norm(), name


def test_a_graph_replays_forward_and_backward() -> None:
    case = by_pattern(64, 128, st.Local(300) & st.Causal(), 3000)
    for _ in range(2):  # the second call plays what the first has recorded
        eager = run(hopper_backend, case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(hopper_backend, case)
    for _ in range(3):
        for x in captured.values():
            x.zero_()
        graph.replay()
        torch.cuda.synchronize()
        for name in eager:
            assert torch.equal(captured[name], eager[name]) or name == "q", name
        assert (captured["q"].double() - eager["q"].double()).norm() < 3e-4 * eager["q"].double().norm()


def test_a_layout_made_on_the_device_needs_no_sync() -> None:
    q = torch.randn(1, 4, 1024, 64, device="cuda", dtype=torch.bfloat16)
    chosen = torch.randint(0, 8, (1, 4, 8, 3), device="cuda")
    hopper_backend.forward(q, q, q, Request(BlockLayout.from_topk(chosen, 1024), 0.125))  # compiles
    fresh = Request(BlockLayout.from_topk(chosen, 1024), 0.125)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = hopper_backend.forward(q, q, q, fresh)
        hopper_backend.backward(q, None, q, q, q, out, lse, fresh, **ASKED)
    finally:
        torch.cuda.set_sync_debug_mode("default")
