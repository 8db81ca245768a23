"""Launches that were prepared once and are started again: what a repeated call costs the host.

Preparing a launch (schedule, strides, sixty named arguments, Triton's own look at each of them) takes the
host longer than a short sequence takes the GPU. The first call of a kind keeps its compiled kernels and their
arguments; the next one only puts its own pointers in.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparsetile.kernels.triton_launch import Launch
    from sparsetile.layout.blocks import BlockLayout

_HIP = torch.version.hip is not None
_MEMO = "triton_recordings"
_MOST = 64
"""Kinds of calls that one layout keeps."""

_ALIGNMENT = 256
_OF_SCHEDULE = ("items", "others", "mask_ids", "edges")
_OF_LAYOUT = frozenset(
    ("masks", "splits", *(side + name for side in ("", "row_", "column_") for name in _OF_SCHEDULE))
)
_SCRATCH = frozenset(
    (
        *("part_out", "part_lse", "part_dk", "part_dv", "part_dq", "members_dk", "members_dv"),
        *("lse2", "delta", "dq_sum", "row_counter", "column_counter"),
        *("kept_words", "kept_notes", "kept_k", "kept_v"),
    )
)
_COUNTER = "counter"
"""The scratch that is to hold a zero of int32 when the first kernel starts."""


def current_stream(device: torch.device) -> int:
    """The handle of PyTorch's current stream on ``device``."""
    handle: int = torch._C._cuda_getCurrentRawStream(device.index)
    return handle


class Recordings(dict[object, "Recording"]):
    """The recordings of a layout by kind of call. Copies and pickles are empty: kernels live in a process."""

    def __reduce__(self) -> tuple[type[Recordings], tuple[()]]:
        return Recordings, ()

    def keep(self, key: object, recording: Recording) -> None:
        if len(self) >= _MOST:
            self.clear()
        self[key] = recording


class TensorMaps(dict[int, Any]):
    """What the hardware's copies read of a tensor, by the tensor's pointer: made once for each.

    PyTorch's allocator hands out the same few addresses step after step, and making one takes the host 5 µs.
    """

    def __init__(self, like: Any, how: Any) -> None:
        """``like``: Triton's TensorDescriptor of a tensor of that kind; ``how``: its layout as compiled."""
        super().__init__()
        self.like, self.how = like, how

    def __missing__(self, pointer: int) -> Any:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        if len(self) >= _MOST:
            self.clear()
        made = self[pointer] = make_tensordesc_arg(_At(self.like, pointer), self.how)[0]
        return made


class _At:
    """A descriptor as Triton's launcher reads it, of a tensor that lies at ``pointer``."""

    def __init__(self, like: Any, pointer: int) -> None:
        self.base, self.data_ptr = self, lambda: pointer
        self.shape, self.strides, self.padding = like.shape, like.strides, like.padding
        self.round_f32_to_tf32 = False


def _taken_apart(compiled: Any) -> tuple[Any, list[Any]] | None:
    """(the compiled kernel, started with tensor maps, sizes and strides in place of descriptors; the layout
    of each). None if Triton's launcher is not what it was in 3.6 and 3.7: then nothing can be recorded."""
    translate = compiled.run.launch
    if getattr(translate, "__closure__", None) is None:
        return None
    inside = dict(zip(translate.__code__.co_freevars, translate.__closure__, strict=True))
    if not {"launcher", "tensordesc_meta"} <= inside.keys():
        return None
    other, started = copy.copy(compiled), copy.copy(compiled.run)
    started.launch = inside["launcher"].cell_contents
    other._run = started
    return other, list(inside["tensordesc_meta"].cell_contents)


class Counters:
    """Zeros of int32 on one device, each for one call on the default stream: thousands share the kernel that
    sets them.

    On that stream alone, for it never ends, and is never captured into a graph, which would come back to a
    counter that it has used.
    """

    COUNT = 4096

    def __init__(self, device: torch.device) -> None:
        self.device, self.lock = device, threading.Lock()
        self.rest: Iterator[int] = iter(())
        # The block before, too: another thread may have its last counter and not have started its kernel.
        self.blocks: tuple[Tensor | None, Tensor | None] = (None, None)

    def take(self) -> int:
        """The pointer of a zero that no other call gets."""
        pointer = next(self.rest, None)
        if pointer is None:
            with self.lock:
                pointer = next(self.rest, None)
                if pointer is None:
                    block = torch.zeros(self.COUNT, dtype=torch.int32, device=self.device)
                    self.blocks = (self.blocks[1], block)
                    first = block.data_ptr()
                    rest = iter(range(first, first + block.nbytes, block.element_size()))
                    pointer = next(rest)
                    self.rest = rest
        return pointer


counters_of = lru_cache(maxsize=None)(Counters)


@dataclass(frozen=True, eq=False)
class Step:
    """One compiled kernel on its grid, its arguments in order, and which of them every call brings anew:
    ``places`` as pointers, ``described`` as tensor maps."""

    start: Callable[..., object]
    arguments: list[Any]
    places: tuple[tuple[int, int], ...]
    described: tuple[tuple[int, int, TensorMaps], ...]


@dataclass(frozen=True, eq=False)
class Recording:
    """The launches of one kind of call.

    Attributes:
        steps: in the order in which they run.
        offsets: where each scratch buffer begins in the one that ``play`` allocates, in bytes.
        scratch: its size in bytes.
        counted: whether a counter of int32, zero at the start, is the last pointer.
        kept: the layout's tensors, whose pointers stand among the arguments.
    """

    steps: tuple[Step, ...]
    offsets: tuple[int, ...]
    scratch: int
    counted: bool
    kept: tuple[Tensor, ...]

    def play(self, pointers: list[int], device: torch.device) -> None:
        """Start the kernels on the current stream of ``device``; ``pointers`` in the order of the names that
        were recorded."""
        if self.scratch:
            buffer = torch.empty(self.scratch, dtype=torch.uint8, device=device)
            first = buffer.data_ptr()
            pointers = pointers + [first + offset for offset in self.offsets]
        # Asked once, and straight: Triton asks at every start, for the current device too.
        stream = current_stream(device)
        if self.counted and stream == 0:
            pointers = [*pointers, counters_of(device).take()]
        elif self.counted:
            counter = torch.zeros(1, dtype=torch.int32, device=device)
            pointers = [*pointers, counter.data_ptr()]
        for step in self.steps:
            arguments = step.arguments.copy()
            for place, source in step.places:
                arguments[place] = pointers[source]
            for place, source, maps in step.described:
                arguments[place] = maps[pointers[source]]
            step.start(*arguments, stream=stream)


def recordings_of(layout: BlockLayout) -> Recordings:
    known = layout._memo.get(_MEMO)
    if not isinstance(known, Recordings):
        known = layout._memo[_MEMO] = Recordings()
    return known


def kind_of(tensors: Iterable[Tensor | None], *others: object) -> tuple[tuple[object, ...], list[int]]:
    """(key, pointers): all that a launch, and Triton's specialisation of its kernel, takes from its inputs.

    Shapes and strides stand whole in the key, hence so do their divisibility and width; of a pointer Triton
    asks whether 16 divides it, and on AMD whether its memory ends within 2 GB. None counts as pointer 0.
    """
    key: list[object] = list(others)
    pointers: list[int] = []
    for x in tensors:
        if x is None:
            key.append(None)
            pointers.append(0)
        else:
            pointer = x.data_ptr()
            key += (x.dtype, x.shape, x.stride(), pointer % 16 == 0)
            pointers.append(pointer)
            if _HIP:
                key.append(x.untyped_storage().nbytes() < 2**31)
    return tuple(key), pointers


def record(launches: Sequence[Launch], names: Sequence[str]) -> Recording | None:
    """Run the launches and record them; None where they are not compiled (in the interpreter).

    Args:
        launches: as made by ``triton_launch``.
        names: the tensors that every call brings, as the kernels (or ``Launch.names``) call them.
    """
    sources = {name: index for index, name in enumerate(names)}
    offsets: list[int] = []
    kept: list[Tensor] = []
    steps: list[Step] = []
    scratch, counted, recorded = 0, False, True
    for launch in launches:
        if not launch.programs:
            continue
        compiled = launch.run()
        if compiled is None:
            recorded = False
            continue
        arguments: list[Any] = []
        places: list[tuple[int, int]] = []
        described: list[tuple[int, int, TensorMaps]] = []
        layouts: list[Any] = []
        if any(hasattr(value, "block_shape") for value in launch.arguments.values()):
            apart = _taken_apart(compiled)
            if apart is None:
                recorded = False
                continue
            compiled, layouts = apart
        for parameter in launch.kernel.arg_names:
            value = launch.arguments[parameter]
            descriptor = value if hasattr(value, "block_shape") else None
            tensor = value if descriptor is None else descriptor.base
            if isinstance(tensor, Tensor):
                name = launch.names.get(parameter, parameter)
                if name in _OF_LAYOUT:
                    kept.append(tensor)
                    arguments.append(tensor.data_ptr())
                    continue
                if name == _COUNTER:
                    counted = True
                    sources[name] = -1
                elif name in _SCRATCH and name not in sources:
                    sources[name] = len(names) + len(offsets)
                    offsets.append(scratch)
                    scratch += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
                if descriptor is None:
                    places.append((len(arguments), sources[name]))
                else:
                    maps = TensorMaps(descriptor, layouts[len(described)])
                    described.append((len(arguments), sources[name], maps))
                value = None
            arguments.append(value)
            if descriptor is not None:
                arguments += [*descriptor.shape, *descriptor.strides]
        start = compiled[launch.programs, 1, 1]
        steps.append(Step(start, arguments, tuple(places), tuple(described)))
    if not recorded:
        return None
    return Recording(tuple(steps), tuple(offsets), scratch, counted, tuple(kept))
