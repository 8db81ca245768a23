"""The operators behave as PyTorch's own: opcheck, torch.compile without graph breaks, checkpointing."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sparsetile as st
from sparsetile.adaptive import losses
from sparsetile.distributed import distributed_attention
from sparsetile.errors import BackendError
from sparsetile.kernels.select import BACKENDS
from witness import Witness

PATTERN = (st.Local(20) | st.Global(3)) & st.Causal()


def inputs(n=50, dtype=torch.float32):
    return [torch.randn(2, 4, n, 16, dtype=dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("features", ["plain", "all"])
def test_opcheck(features):
    q, k, v = inputs()
    layout = st.BlockLayout.from_pattern(PATTERN, 50, block_size=16)
    biases = (None, None, None, None, 0.25, 0.0, False)
    if features == "all":
        biases = (
            torch.randn(1, 1, layout.capacity, requires_grad=True),
            torch.randn(1, 4, 50, 50, requires_grad=True),
            torch.rand(2, 50) < 0.2,
            torch.tensor([1234567]),
            0.25,
            0.1,
            True,
        )
    geometry = [50, 50, 16, 16, 1, 1]
    args = (q, k, v, list(layout.tensors()), "", geometry, *biases, "auto")
    torch.library.opcheck(torch.ops.sparsetile.attention.default, args)
    torch.library.opcheck(
        torch.ops.sparsetile.attention.default,
        (q, k, v, [], repr(PATTERN), geometry, *biases[:0], None, *biases[1:], "auto"),
    )


def run_layout(q, k, v, layout):
    out, lse = st.sparse_attention(q * 2, k, v, layout, return_lse=True)
    return out.sin().sum() + lse.cos().sum()


def run_pattern(q, k, v, pattern):
    out = st.sparse_attention(q * 2, k, v, pattern, is_causal=True, block_size=16)
    return out.sin().sum()


@pytest.mark.parametrize("form", ["layout", "pattern"])
def test_compiles_without_graph_breaks(form):
    q, k, v = inputs()
    run = run_layout if form == "layout" else run_pattern
    argument = st.BlockLayout.from_pattern(PATTERN, 50, block_size=16) if form == "layout" else PATTERN
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(run(q, k, v, argument), (q, k, v))
    for got, want in zip(torch.autograd.grad(compiled(q, k, v, argument), (q, k, v)), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_a_pattern_made_inside_a_compiled_function_is_told_to_stay_outside():
    def run(q):
        return st.sparse_attention(q, q, q, st.Local(5) | st.Global(2), is_causal=True, block_size=16)

    with pytest.raises(Exception, match="a pattern made outside"):
        torch.compile(run, fullgraph=True, backend="aot_eager")(inputs()[0])


def test_a_pattern_from_outside_may_be_closed_over():
    def run(q):
        return st.sparse_attention(q, q, q, PATTERN, block_size=16)

    q = inputs()[0]
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(q), run(q))


def test_compiled_pattern_follows_the_length_without_a_layout_in_the_graph():
    compiled = torch.compile(run_pattern, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (33, 64, 50):
        q, k, v = inputs(n)
        torch.testing.assert_close(compiled(q, k, v, PATTERN), run_pattern(q, k, v, PATTERN))


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_meets_the_operators_and_nothing_changes():
    q, k, v = inputs()
    layout = st.BlockLayout.from_pattern(PATTERN, 50, block_size=16)
    bias = torch.randn(layout.capacity, requires_grad=True)
    wanted = st.sparse_attention(q, k, v, layout, tile_bias=bias)
    with Recorder() as recorder:
        out = st.sparse_attention(q, k, v, layout, tile_bias=bias)
        grads = torch.autograd.grad(out.sin().sum(), (q, k, v, bias))
    assert "sparsetile.attention.default" in recorder.names
    assert "sparsetile.attention_backward.default" in recorder.names
    assert torch.equal(out, wanted)
    for got, want in zip(grads, torch.autograd.grad(wanted.sin().sum(), (q, k, v, bias)), strict=True):
        assert torch.equal(got, want)


def learned(q, chosen):
    return st.BlockLayout.from_topk(chosen, q.shape[2], block_size=16, is_causal=True)


@pytest.mark.parametrize("way", ["plain", "dispatcher"])
def test_a_learned_layout_is_transposed_by_backward_alone(way):
    """Once: forward's and backward's layouts are the same, though operators take tensors alone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (torch.randn(1, 2, 30, 16, device=device).requires_grad_() for _ in range(3))
    chosen = torch.randint(-1, 2, (1, 2, 2, 2), device=device)
    bias = torch.randn(8, device=device, requires_grad=True)
    layout, other = learned(q, chosen), learned(q, chosen)
    with Recorder() if way == "dispatcher" else nullcontext():
        out = st.sparse_attention(q, k, v, layout, tile_bias=bias, backend="triton")
        made = [name for name in layout._memo if name == "transpose" or name.startswith("schedule col")]
        grads = torch.autograd.grad(out.sin().sum(), (q, k, v, bias))
    assert not made and any(name.startswith("schedule columns") for name in layout._memo)
    wanted = st.sparse_attention(q, k, v, other, tile_bias=bias, backend="reference")
    torch.testing.assert_close(out, wanted)
    for got, want in zip(grads, torch.autograd.grad(wanted.sin().sum(), (q, k, v, bias)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_learned_layouts_compile(where):
    q, k, v = inputs()
    chosen = torch.randint(-1, 4, (2, 4, 4, 2))
    bias = torch.randn(64, requires_grad=True)

    def run(q, k, v, bias, layout):
        layout = learned(q, chosen) if layout is None else layout
        return st.sparse_attention(q * 2, k, v, layout, tile_bias=bias).sin().sum()

    layout = learned(q, chosen) if where == "outside" else None
    expected = torch.autograd.grad(run(q, k, v, bias, layout), (q, k, v, bias))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        torch.autograd.grad(compiled(q, k, v, bias, layout), (q, k, v, bias)), expected, strict=True
    ):
        torch.testing.assert_close(got, want)
    assert layout is None or "transpose" not in layout._memo


def test_fake_tensors_pass():
    with FakeTensorMode():
        q = torch.randn(1, 2, 50, 16)
        out = st.sparse_attention(q, q, q, PATTERN, block_size=16)
    assert out.shape == q.shape


def test_dropout_repeats_under_activation_checkpointing():
    q, k, v = inputs()

    def run(q):
        return st.sparse_attention(q, k, v, PATTERN, block_size=16, dropout_p=0.3).sin()

    torch.manual_seed(3)
    (plain,) = torch.autograd.grad(run(q).sum(), q)
    torch.manual_seed(3)
    (replayed,) = torch.autograd.grad(checkpoint(run, q, use_reentrant=False).sum(), q)
    torch.testing.assert_close(replayed, plain, rtol=0, atol=0)


def test_gradients_through_lse_alone():
    q, k, v = (x.double().detach().requires_grad_() for x in inputs())
    _, lse = st.sparse_attention(q, k, v, st.Full(), block_size=16, return_lse=True)
    want = torch.autograd.grad((q @ k.mT * 0.25).logsumexp(-1).sum(), (q, k))
    got = torch.autograd.grad(lse.sum(), (q, k))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["layout", "pattern"])
def test_a_padding_mask_changed_before_backward_is_noticed(form):
    q, k, v = inputs()
    pattern = st.BlockLayout.from_pattern(PATTERN, 50, block_size=16) if form == "layout" else PATTERN
    padding = torch.rand(2, 50) < 0.3
    out = st.sparse_attention(q, k, v, pattern, key_padding_mask=padding, block_size=16)
    padding.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def attend(q):
    return st.sparse_attention(q, q, q, PATTERN, block_size=16)


def dilated(q):
    return st.dilated_attention(q, q, q, [16, 50], [1, 2])


def dual_number(run, q):
    with forward_ad.dual_level():
        run(forward_ad.make_dual(q, q))


@pytest.mark.parametrize("run", [attend, dilated])
@pytest.mark.parametrize(
    "differentiate",
    [
        lambda run, q: torch.func.jvp(run, (q,), (q,)),
        lambda run, q: torch.func.jacfwd(lambda x: run(x).sum())(q),
        lambda run, q: torch.func.linearize(run, q),
        lambda run, q: torch.func.grad(lambda x: run(x).sum())(q),
        lambda run, q: torch.func.vjp(run, q),
        lambda run, q: torch.vmap(run)(q[None]),
        dual_number,
    ],
    ids=["jvp", "jacfwd", "linearize", "grad", "vjp", "vmap", "dual"],
)
def test_forward_mode_and_transforms_are_refused_not_ignored(run, differentiate):
    q = torch.randn(1, 2, 50, 16)
    with pytest.raises(BackendError, match="expected backward"):
        differentiate(run, q)


def test_forward_mode_is_refused_in_compiled_code_too():
    q = torch.randn(1, 2, 50, 16)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), attend(q))
    with forward_ad.dual_level(), pytest.raises(Exception, match="BackendError"):
        compiled(forward_ad.make_dual(q, q))
    torch.testing.assert_close(compiled(q), attend(q))


def test_transforms_of_other_tensors_pass():
    q, scale = torch.randn(1, 2, 50, 16), torch.randn(3)
    _, tangent = torch.func.jvp(lambda x: attend(q) * x, (scale[0],), (scale[1],))
    torch.testing.assert_close(tangent, attend(q) * scale[1])
    torch.testing.assert_close(torch.vmap(lambda x: attend(q) * x)(scale)[2], attend(q) * scale[2])


@pytest.mark.parametrize("which", range(5), ids=["q", "k", "v", "tile_bias", "attn_bias"])
def test_gradient_of_one_input_alone(which):
    q, k, v = (x.detach().double() for x in inputs())
    layout = st.BlockLayout.from_pattern(PATTERN, 50, block_size=16)
    operands = [q, k, v, torch.randn(2, 4, layout.capacity).double(), torch.randn(2, 4, 50, 50).double()]

    def run(backend):
        *qkv, tile_bias, attn_bias = operands
        out = st.sparse_attention(*qkv, layout, tile_bias=tile_bias, attn_bias=attn_bias, backend=backend)
        assert out.requires_grad
        return torch.autograd.grad(out.square().sum(), operands[which])[0]

    operands[which] = operands[which].requires_grad_()
    torch.testing.assert_close(run("auto"), run("reference"))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_one_input_of_another_stride(which, backend):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    operands = [torch.randn(1, 2, 40, 16, device=device).requires_grad_() for _ in range(3)]
    strided = operands[which].detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    assert strided.stride(-1) != 1
    others = [*operands[:which], strided, *operands[which + 1 :]]
    # The gradient of another stride too.
    weight = torch.randn(1, 2, 16, 40, device=device).transpose(2, 3)
    want, got = (
        (
            out := st.sparse_attention(*x, PATTERN, block_size=16, backend=backend),
            *torch.autograd.grad(out, x, weight),
        )
        for x in (operands, others)
    )
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_backward_drops_what_forward_dropped():
    q, k, v = inputs(dtype=torch.float64)
    for run in (
        lambda: st.sparse_attention(q, k, v, PATTERN, dropout_p=0.4),
        lambda: st.dilated_attention(q, k, v, [16, 50], [1, 2], dropout_p=0.4),
    ):
        # Linear in v, so the gradient times v is the output, if both dropped the same weights.
        out = run()
        weight = torch.randn_like(out)
        (grad,) = torch.autograd.grad(out, v, weight)
        torch.testing.assert_close((grad * v).sum(), (out * weight).sum())


@pytest.fixture
def witness(monkeypatch):
    seen = Witness()
    monkeypatch.setitem(BACKENDS, "cpu", seen)
    return seen


@pytest.fixture
def everywhere():
    """Sets PyTorch's own flag; it is as before after the test."""
    before = torch.are_deterministic_algorithms_enabled()
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(before)


LEAN = [
    ({}, False),
    ({"memory": "auto", "deterministic": False}, False),
    ({"deterministic": True}, True),
    ({"memory": "low"}, True),
    ({"memory": "low", "deterministic": True}, True),
]


@pytest.mark.parametrize(("options", "lean"), LEAN, ids=str)
@pytest.mark.parametrize("form", ["layout", "pattern"])
@pytest.mark.parametrize("way", ["plain", "create_graph", "dispatcher", "compiled"])
def test_what_a_caller_asks_of_backward_reaches_the_backend(witness, everywhere, way, form, options, lean):
    q, k, v = inputs()
    argument = st.BlockLayout.from_pattern(PATTERN, 50, block_size=16) if form == "layout" else PATTERN

    def run(q, k, v):
        return st.sparse_attention(q, k, v, argument, block_size=16, **options).sin().sum()

    torch._dynamo.reset()
    call = torch.compile(run, fullgraph=True, backend="aot_eager") if way == "compiled" else run
    # The compiled function notices that PyTorch's own flag has changed.
    for flag in (False, True, False):
        everywhere(flag)
        with Recorder() if way == "dispatcher" else nullcontext():
            torch.autograd.grad(call(q, k, v), (q, k, v), create_graph=way == "create_graph")
        assert witness.said() == {lean or flag}


def test_backward_does_as_its_forward_was_asked(witness, everywhere):
    q, k, v = inputs()
    everywhere(True)
    out = st.sparse_attention(q, k, v, PATTERN, block_size=16)
    everywhere(False)
    out.sum().backward()
    assert witness.said() == {True}


@pytest.mark.parametrize("flag", [False, True])
def test_other_callers_follow_the_flag_of_pytorch(witness, everywhere, flag):
    everywhere(flag)
    q, k, v = inputs()
    st.dilated_attention(q, k, v, [16, 50], [1, 2]).sum().backward()
    assert witness.said() == {flag}
    row = torch.tensor([1])
    options = {"is_causal": True, "key_padding_mask": None, "scale": 0.25, "backend": "auto"}
    losses.dense_mass(*(x.detach() for x in (q, k, v)), row, 16, **options)
    assert witness.said() == {flag}


def test_a_world_of_one_gives_the_same_bits_every_run(witness):
    q, k, v = inputs()
    distributed_attention(q, k, v, PATTERN, block_size=16).sum().backward()
    assert witness.said() == {True}
    heads_last = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    st.create_block_sparse_attention("distributed", sparsity_ratio=0.5)(*heads_last).sum().backward()
    assert witness.said() == {True}
    st.create_block_sparse_attention("base", sparsity_ratio=0.5)(*heads_last).sum().backward()
    assert witness.said() == {False}
