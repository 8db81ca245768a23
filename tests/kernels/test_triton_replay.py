"""Recorded launches: repeated calls find them, other calls do not, and answers are those of the new tensors.

The interpreter compiles nothing, so a stand-in plays the compiled kernel: it takes the positional arguments
and pointers that a compiled kernel would take, and hands them to the interpreter.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from oracle import Case, check, random_case, run
from sparsetile.kernels import triton_backend, triton_replay
from sparsetile.kernels.triton_config import override
from sparsetile.kernels.triton_launch import Launch
from sparsetile.kernels.triton_replay import Recording, Recordings, recordings_of

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the real kernels"
)

_STREAM = 7


class Compiled:
    """Starts a launch's kernel from pointers; knows shapes and dtypes, but holds no tensor."""

    def __init__(self, launch: Launch) -> None:
        self.kernel, self.options = launch.kernel, launch.options
        values = [launch.arguments[name] for name in launch.kernel.arg_names]
        self.fixed = [None if isinstance(x, Tensor) else (x,) for x in values]
        self.views = [
            (x.dtype, x.shape, x.stride(), x.data_ptr() % 16) if isinstance(x, Tensor) else None
            for x in values
        ]

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def start(*arguments: Any, stream: int) -> None:
            assert stream == _STREAM
            assert len(arguments) == len(self.fixed)
            given = [self.tensor(i, x) if self.views[i] else x for i, x in enumerate(arguments)]
            assert all(own is None or own == (x,) for own, x in zip(self.fixed, given, strict=True))
            self.kernel[grid](*given, **self.options)

        return start

    def tensor(self, index: int, pointer: int) -> Tensor:
        dtype, shape, stride, alignment = self.views[index]
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        assert pointer and pointer % 16 == alignment
        count = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(pointer)
        return torch.frombuffer(memory, dtype=dtype).as_strided(shape, stride)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Recordings that were played, in order; kernels seem to be compiled."""
    plain_run, plain_play, seen = Launch.run, Recording.play, []

    def launch_run(launch: Launch) -> Compiled | None:
        plain_run(launch)
        return Compiled(launch) if launch.programs else None

    def play(recording: Recording, *arguments: Any) -> None:
        seen.append(recording)
        plain_play(recording, *arguments)

    monkeypatch.setattr(triton_replay, "current_stream", lambda device: _STREAM)
    monkeypatch.setattr(Launch, "run", launch_run)
    monkeypatch.setattr(Recording, "play", play)
    return seen


def fresh(x: Tensor | None) -> Tensor | None:
    """Other numbers in other memory, with the same shape and strides."""
    if x is None:
        return None
    count = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return torch.randn(count).to(x.dtype).as_strided(x.shape, x.stride())


def other_values(case: Case) -> Case:
    names = ("q", "k", "v", "grad_out", "grad_lse", "attn_bias", "tile_bias")
    new = {name: fresh(getattr(case, name)) for name in names}
    if case.k_tiles is not None:
        new["q_tiles"], new["k_tiles"] = torch.randint_like(case.q_tiles, 99), case.k_tiles + 1
    return replace(case, **new)


@pytest.mark.parametrize("chunk", [1, 1000])
@pytest.mark.parametrize(
    "features",
    [
        set(),
        {"gqa", "strided", "lse"},
        {"per_head", "tile_bias", "attn_bias", "padding", "dropout", "lse"},
        {"placed", "padding_by_head"},
    ],
    ids=lambda features: "+".join(sorted(features)) or "plain",
)
def test_a_repeated_call_answers_for_its_own_tensors(
    played: list[Recording], monkeypatch: pytest.MonkeyPatch, features: set[str], chunk: int
) -> None:
    monkeypatch.setattr("sparsetile.kernels.triton_launch.chunk_for", lambda *_, **__: chunk)
    case = random_case(block=16, q_len=20, k_len=40, batch=1, heads=2, head_dim=16, features=features)
    check(triton_backend, case)
    assert not played and len(recordings_of(case.layout)) == 2
    again = other_values(case)
    got = run(triton_backend, again)
    assert len(played) == 2 and bool(played[0].scratch) == bool(played[0].steps[1:])
    case.layout._memo.clear()
    expected = run(triton_backend, again)
    assert len(played) == 2
    for name in expected:
        assert torch.equal(got[name], expected[name]), (name, case.describe())


def test_one_tensor_in_three_places_is_not_taken_for_one(played: list[Recording]) -> None:
    case = random_case(block=16, q_len=20, k_len=20, batch=1, heads=2, head_dim=16)
    run(triton_backend, replace(case, k=case.q, v=case.q))
    got = run(triton_backend, case)
    assert len(played) == 2
    case.layout._memo.clear()
    expected = run(triton_backend, case)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def shifted(x: Tensor) -> Tensor:
    """The same numbers and strides, 8 bytes past an address that 16 divides."""
    padded = torch.empty(x.numel() + 8)
    skip = (8 - padded.data_ptr()) % 16 // 4
    return padded[skip : skip + x.numel()].view(x.shape).copy_(x)


CHANGES: dict[str, Callable[[Case], Case]] = {
    "strides": lambda c: replace(c, q=c.q.transpose(1, 2).contiguous().transpose(1, 2)),
    "dtype": lambda c: replace(c, **{n: getattr(c, n).half() for n in ("q", "k", "v", "grad_out")}),
    "alignment": lambda c: replace(c, v=shifted(c.v)),
    "scale": lambda c: replace(c, scale=c.scale * 2),
    "negative scale": lambda c: replace(c, scale=-c.scale),
    "batch": lambda c: replace(
        c,
        mask=c.mask,
        **{n: getattr(c, n).repeat(2, 1, 1, 1) for n in ("q", "k", "v", "grad_out")},
    ),
    "grouped heads": lambda c: replace(c, k=c.k[:, :1].contiguous(), v=c.v[:, :1].contiguous()),
    "padding": lambda c: replace(c, key_padding_mask=torch.zeros(1, c.k.shape[2], dtype=torch.bool)),
    "dropout": lambda c: replace(c, dropout_p=0.5, dropout_seed=torch.tensor([7])),
    "padding by head": lambda c: replace(
        c, key_padding_mask=torch.zeros(1, 2, c.k.shape[2], dtype=torch.bool)
    ),
    "places": lambda c: replace(
        c,
        dropout_p=0.5,
        dropout_seed=torch.tensor([7]),
        q_tiles=torch.arange(9)[-c.layout.q_blocks :],
        k_tiles=torch.arange(9)[None, -c.layout.k_blocks :],
    ),
    "tile bias": lambda c: replace(c, tile_bias=torch.randn(1, 1, c.layout.capacity)),
    "attention bias": lambda c: replace(c, attn_bias=torch.randn(1, 1, c.q.shape[2], c.k.shape[2])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_kind_of_call_is_prepared_anew(played: list[Recording], change: str) -> None:
    case = random_case(block=16, q_len=20, batch=1, heads=2, head_dim=16, features=set())
    changed = CHANGES[change](case)
    recordings = recordings_of(case.layout)
    run(triton_backend, case)
    assert len(recordings) == 2
    check(triton_backend, changed)
    assert not played and len(recordings) == 4
    run(triton_backend, changed)
    run(triton_backend, case)
    assert len(played) == 4 and len(recordings) == 4


def test_dropout_probabilities_and_gradient_requests_are_kinds(played: list[Recording]) -> None:
    case = random_case(block=16, q_len=20, batch=1, heads=2, head_dim=16, features={"tile_bias", "dropout"})
    request = case.request()
    out, lse = triton_backend.forward(case.q, case.k, case.v, request)
    triton_backend.forward(case.q, case.k, case.v, replace(request, dropout_p=request.dropout_p / 2))
    given = (case.q, case.k, case.v, out, lse, request)
    asked = {"tile_bias_grad": False, "attn_bias_grad": False}
    for more in ({}, {"tile_bias_grad": True}, {"attn_bias_grad": True}):
        triton_backend.backward(case.grad_out, None, *given, **asked | more)
    triton_backend.backward(case.grad_out, torch.randn(lse.shape), *given, **asked)
    assert not played and len(recordings_of(case.layout)) == 6


def test_tuning_neither_records_nor_plays(played: list[Recording]) -> None:
    case = random_case(block=16, q_len=20, batch=1, heads=2, head_dim=16)
    with override(chunk=1):
        run(triton_backend, case)
    assert not recordings_of(case.layout)
    run(triton_backend, case)
    with override(chunk=1):
        run(triton_backend, case)
    assert not played and len(recordings_of(case.layout)) == 2


def test_recordings_keep_no_tensor_of_a_call(played: list[Recording]) -> None:
    case = random_case(
        block=16, q_len=40, heads=2, head_dim=16, features={"tile_bias", "padding", "dropout", "lse"}
    )
    layout = case.layout
    alive = [
        weakref.ref(x)
        for x in (case.q, case.k, case.grad_out, case.tile_bias, case.dropout_seed)
        if x is not None
    ]
    run(triton_backend, case)
    assert len(recordings_of(layout)) == 2
    del case
    gc.collect()
    assert not [x for x in alive if x() is not None]


def test_their_number_is_bounded(played: list[Recording]) -> None:
    case = random_case(block=16, q_len=16, batch=1, heads=1, head_dim=16)
    for step in range(70):
        triton_backend.forward(case.q, case.k, case.v, replace(case.request(), scale=1.0 + step))
    assert 0 < len(recordings_of(case.layout)) <= 64


def test_layouts_with_recordings_can_be_copied_and_pickled(played: list[Recording]) -> None:
    recordings: Recordings = Recordings()
    recordings.keep("kind", Recording((), (), 0, False, ()))
    for copied in (copy.deepcopy(recordings), pickle.loads(pickle.dumps(recordings))):
        assert type(copied) is Recordings and not copied
    assert len(recordings) == 1


def test_the_interpreter_records_nothing() -> None:
    case = random_case(block=16, q_len=20, batch=1, heads=2, head_dim=16)
    run(triton_backend, case)
    assert not recordings_of(case.layout)


class Described:
    """A compiled kernel with a launcher that takes descriptors apart as Triton's own does."""

    def __init__(self, seen: list[list[Any]]) -> None:
        from triton.backends.nvidia import driver

        # Triton 3.6 hands a kernel's arguments over behind so many others, 3.7 as one tuple.
        self.others: int = getattr(driver, "_BASE_ARGS_FORMAT_LEN", 0)
        signature = {0: "*fp32", 1: "tensordesc<bf16[1,1,64,64]>", 2: "i32", 3: "tensordesc<bf16[1,1,64,64]>"}

        def raw(*arguments: Any) -> None:
            seen.append(list(arguments[self.others :] if self.others else arguments[-1]))

        self._run = SimpleNamespace(launch=driver.wrap_handle_tensordesc(raw, signature, ["first", "second"]))

    run = property(lambda self: self._run)

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        if self.others:
            return lambda *arguments, stream: self.run.launch(*[None] * self.others, *arguments)
        return lambda *arguments, stream: self.run.launch(None, arguments)


def test_tensors_behind_descriptors_are_mapped_once_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.nvidia import driver

    made: list[tuple[int, str]] = []

    def make(like: Any, how: str) -> list[Any]:
        made.append((like.base.data_ptr(), how))
        return [("map", like.base.data_ptr(), how), *like.shape, *like.strides]

    monkeypatch.setattr(driver, "make_tensordesc_arg", make)
    monkeypatch.setattr(triton_replay, "current_stream", lambda device: _STREAM)
    seen: list[list[Any]] = []
    monkeypatch.setattr(Launch, "run", lambda launch: Described(seen))
    x, out, lse = torch.zeros(8), torch.zeros(8), torch.zeros(8)

    def descriptor(of: Tensor) -> Any:
        sizes = {"shape": [1, 1, 2, 4], "strides": [8, 8, 4, 1], "padding": "zero"}
        return SimpleNamespace(base=of, block_shape=[1, 1, 64, 64], **sizes)

    arguments = {"lse": lse, "q": descriptor(x), "count": 3, "out": descriptor(out)}
    kernel = SimpleNamespace(arg_names=list(arguments))
    recording = triton_replay.record([Launch(kernel, 5, arguments, {})], ("q", "out", "lse"))
    for q_at, out_at in ((64, 128), (64, 256), (192, 128)):
        recording.play([q_at, out_at, 512], torch.device("cpu"))
        sizes = [1, 1, 2, 4, 8, 8, 4, 1]
        first, second = ("map", q_at, "first"), ("map", out_at, "second")
        assert seen.pop() == [512, first, *sizes, 3, second, *sizes]
    assert sorted(made) == [(64, "first"), (128, "second"), (192, "first"), (256, "second")]


def test_a_launcher_that_is_not_known_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = SimpleNamespace(run=SimpleNamespace(launch=lambda *_: None))
    monkeypatch.setattr(Launch, "run", lambda launch: compiled)
    arguments = {"q": SimpleNamespace(base=torch.zeros(8), block_shape=[8])}
    launch = Launch(SimpleNamespace(arg_names=["q"]), 1, arguments, {})
    assert triton_replay.record([launch], ("q",)) is None


def test_no_counter_is_handed_out_twice() -> None:
    """From several threads, over the ends of blocks; each is a zero, in memory that stays
    until the next block is used up."""
    counters = triton_replay.Counters(torch.device("cpu"))
    taken: list[int] = []

    def take() -> None:
        for _ in range(3000):
            pointer = counters.take()
            # Read, then spoiled as a kernel would: a second call that got it would see it.
            number = ctypes.c_int32.from_address(pointer)
            assert number.value == 0
            number.value = 1
            taken.append(pointer)

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 9000
    before, now = counters.blocks
    assert before is not None and now is not None and before.data_ptr() != now.data_ptr()
    assert int(before.sum()) == 4096 and int(now.sum()) == 9000 - 2 * 4096


def test_the_default_stream_alone_takes_from_the_shared_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other streams end, and may be captured into a graph, which comes back to what it has used."""
    started: list[int] = []
    step = triton_replay.Step(lambda *given, stream: started.append(given[0]), [None], ((0, -1),), ())
    recording = Recording((step,), (), 0, True, ())
    device = torch.device("cpu")
    for stream, shared in ((0, True), (7, False)):
        monkeypatch.setattr(triton_replay, "current_stream", lambda device, stream=stream: stream)
        recording.play([], device)
        block = triton_replay.counters_of(device).blocks[1]
        assert block is not None
        assert (block.data_ptr() <= started[-1] < block.data_ptr() + block.nbytes) == shared
