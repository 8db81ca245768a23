"""Runs Gluon kernels for Hopper in Python: partitions are threads, copies and products happen as late as
they may.

A buffer that is freed too early, a barrier that waits for the wrong phase or an accumulator that is read
before its wait gives a wrong result or a deadline here, as it does (sometimes) on the GPU.
"""

import threading
from collections import deque
from contextlib import contextmanager
from types import SimpleNamespace

import torch

DEADLINE = 20.0


class Barrier:
    def __init__(self):
        self.condition, self.count, self.pending, self.bytes, self.phase = threading.Condition(), 0, 0, 0, 0

    def change(self, arrivals=0, more=0):
        with self.condition:
            self.pending -= arrivals
            self.bytes += more
            assert self.pending >= 0, "more arrivals than were announced"
            if self.pending == 0 and self.bytes == 0:
                self.phase ^= 1
                self.pending = self.count
                self.condition.notify_all()

    def wait(self, parity):
        with self.condition:
            if not self.condition.wait_for(lambda: self.phase != int(parity), DEADLINE):
                raise TimeoutError(f"a phase {int(parity)} that does not end")


class Barriers(list):
    def index(self, i):
        return self[int(i)]


class Smem:
    def __init__(self, data):
        self.data = data

    dtype = property(lambda self: self.data.dtype)
    shape = property(lambda self: self.data.shape)

    def index(self, i):
        assert 0 <= int(i) < self.data.shape[0]
        return Smem(self.data[int(i)])

    def reshape(self, shape):
        return Smem(self.data.view(*shape))

    def _reinterpret(self, kind, shape, layout):
        return Smem(self.data.view(-1).view(kind).view(*[value(n) for n in shape]))

    def permute(self, order):
        return Smem(self.data.permute(*order))

    def slice(self, start, length, dim=0):
        assert start + length <= self.data.shape[dim]
        return Smem(self.data.narrow(dim, start, length))

    def load(self, layout):
        return self.data.clone()

    def store(self, value):
        assert value.shape == self.data.shape, (value.shape, self.data.shape)
        self.data.copy_(value)


class Pointer:
    def __init__(self, tensor, offset=0):
        self.tensor, self.offset = tensor, offset

    def __add__(self, more):
        return Pointer(self.tensor, self.offset + more)


class Token:
    def __init__(self, run):
        self.run, self.value = run, None

    def finish(self):
        if self.run is not None:
            self.value, self.run = self.run(), None


local = threading.local()


def queue(name):
    if not hasattr(local, name):
        setattr(local, name, deque())
    return getattr(local, name)


def value(x):
    return x.value if type(x).__name__ == "constexpr" else x


def tensor(x):
    return x if isinstance(x, torch.Tensor) else torch.tensor(x)


def load(pointer, mask=None, other=0):
    flat, at = pointer.tensor, torch.as_tensor(pointer.offset).long()
    if mask is None:
        assert bool(((at >= 0) & (at < flat.numel())).all()), "a load out of bounds"
        return flat[at]
    mask = mask.expand(torch.broadcast_shapes(mask.shape, at.shape))
    at = at.expand(mask.shape)
    assert bool(((at >= 0) & (at < flat.numel()))[mask].all()), "a load out of bounds"
    return torch.where(mask, flat[torch.where(mask, at, 0)], torch.tensor(other, dtype=flat.dtype))


def store(pointer, what, mask=None):
    flat, at = pointer.tensor, torch.as_tensor(pointer.offset).long()
    at, what = torch.broadcast_tensors(at, what)
    keep = torch.ones_like(at, dtype=torch.bool) if mask is None else mask.expand(at.shape)
    assert bool(((at >= 0) & (at < flat.numel()))[keep].all()), "a store out of bounds"
    flat[at[keep]] = what[keep].to(flat.dtype)


atomic = threading.Lock()


def atomic_add(pointer, more):
    with atomic:
        before = int(pointer.tensor[pointer.offset])
        pointer.tensor[pointer.offset] = before + more
    return before


def warp_specialize(parts, warps, registers):
    failed = []

    def run(function, args):
        try:
            function(*(value(x) for x in args))
        except BaseException as problem:
            failed.append(problem)

    threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if failed:
        raise failed[0]


def allocate(kind, shape, layout):
    if layout == "barrier":
        return Barriers(Barrier() for _ in range(shape[0])) if len(shape) == 2 else Barrier()
    made = torch.empty([value(n) for n in shape], dtype=kind)
    return Smem(made.fill_(float("nan")) if kind.is_floating_point else made.fill_(-7))


def box(desc, coord):
    """(region of the tensor, region of the box) that overlap, and the offsets."""
    inside, of_box = [], []
    for size, first, length in zip(desc.shape, coord, desc.block_shape, strict=True):
        first = int(first)
        low, high = min(max(first, 0), size), min(max(first + length, 0), size)
        inside.append(slice(low, high))
        of_box.append(slice(low - first, high - first) if high > low else slice(0, 0))
    return tuple(inside), tuple(of_box)


def copy_in(desc, coord, barrier, into):
    coord = [int(c) for c in coord]
    assert tuple(into.shape) == tuple(desc.block_shape), (into.shape, desc.block_shape)
    into.data.fill_(float("nan"))

    def arrive():
        inside, of_box = box(desc, coord)
        into.data.zero_()
        into.data[of_box] = desc.base[inside]
        barrier.change(more=-into.data.numel() * into.data.element_size())

    threading.Timer(float(torch.rand(()) * 0.003), arrive).start()


def copy_out(desc, coord, source):
    coord = [int(c) for c in coord]

    def leave():
        inside, of_box = box(desc, coord)
        desc.base[inside] = source.data[of_box]

    queue("stores").append(leave)


adding = threading.Lock()


def add_out(desc, coord, source):
    coord = [int(c) for c in coord]

    def leave():
        inside, of_box = box(desc, coord)
        with adding:
            desc.base[inside] += source.data[of_box]

    queue("stores").append(leave)


def store_wait(pendings):
    while len(queue("stores")) > pendings:
        queue("stores").popleft()()


def expect(barrier, count):
    with barrier.condition:
        barrier.bytes += count
    barrier.change(arrivals=1)


def init(barrier, count):
    barrier.count = barrier.pending = count


def mma(a, b, acc, *, use_acc=True, is_async=False):
    def run():
        left = (a.data if isinstance(a, Smem) else a).float()
        before = acc.value if isinstance(acc, Token) else acc
        product = left @ b.data.float()
        assert product.shape == before.shape, (product.shape, before.shape)
        return product + before if use_acc else product

    token = Token(run)
    queue("products").append(token)
    if is_async:
        return token
    return mma_wait(0, deps=[token])


def mma_wait(outstanding=0, deps=None):
    while len(queue("products")) > outstanding:
        queue("products").popleft().finish()
    found = []
    for each in deps:
        if isinstance(each, Token):
            assert each.run is None, "a result that no wait has brought"
            each = each.value
        found.append(each)
    return found[0] if len(found) == 1 else tuple(found)


def shaped(*_, **__):
    return "layout"


def pick(condition, a, b):
    if isinstance(condition, bool) or condition.dim() == 0:
        # Never NaN from the side that was not taken, which a product with 0 would give.
        return torch.where(torch.as_tensor(condition), tensor(a), tensor(b))
    return torch.where(condition, tensor(a), tensor(b))


def of_two(function, scalar):
    def run(a, b):
        if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
            return function(tensor(a), tensor(b))
        return scalar(a, b)

    return run


GL = SimpleNamespace(
    load=load,
    store=store,
    atomic_add=atomic_add,
    warp_specialize=warp_specialize,
    allocate_shared_memory=allocate,
    arange=lambda a, b, layout=None: torch.arange(value(a), value(b), dtype=torch.int32),
    zeros=lambda shape, kind, layout: torch.zeros([value(n) for n in shape], dtype=kind),
    full=lambda shape, x, kind, layout: torch.full([value(n) for n in shape], x, dtype=kind),
    where=pick,
    maximum=of_two(torch.maximum, max),
    minimum=of_two(torch.minimum, min),
    exp2=torch.exp2,
    abs=torch.abs,
    log2=torch.log2,
    sum=lambda x, axis: x.sum(axis, dtype=x.dtype),
    max=lambda x, axis: x.amax(axis),
    convert_layout=lambda x, layout: x,
    static_range=range,
    reshape=lambda x, shape: x.reshape([value(n) for n in shape]),
    constexpr=value,
    float32=torch.float32,
    int32=torch.int32,
    int64=torch.int64,
    BlockedLayout=shaped,
    SliceLayout=shaped,
    DotOperandLayout=shaped,
    NVMMADistributedLayout=shaped,
    SwizzledSharedLayout=shaped,
    NVMMASharedLayout=shaped,
)
MBARRIER = SimpleNamespace(
    MBarrierLayout=lambda: "barrier",
    init=init,
    expect=expect,
    wait=lambda barrier, parity, pred=True: barrier.wait(parity) if pred else None,
    arrive=lambda barrier, count=1, pred=True: barrier.change(arrivals=count) if pred else None,
)
TMA = SimpleNamespace(
    async_copy_global_to_shared=copy_in, async_copy_shared_to_global=copy_out, store_wait=store_wait
)
FAKES = {
    "gl": GL,
    "mbarrier": MBARRIER,
    "tma": TMA,
    "warpgroup_mma": mma,
    "warpgroup_mma_wait": mma_wait,
    "fence_async_shared": lambda: None,
    "warps_of": lambda x: torch.arange(len(x)),
    "tma_add": add_out,
    # Unsigned integers are int64 tensors.
    "word": lambda x: torch.as_tensor(x).long() & 0xFFFFFFFF,
    "wide": lambda x: x,
}


@contextmanager
def emulated(*modules):
    saved = [dict(vars(module)) for module in modules]
    try:
        for module in modules:
            for name, x in list(vars(module).items()):
                if name in FAKES:
                    setattr(module, name, FAKES[name])
                elif type(x).__name__ == "GluonJITFunction":
                    setattr(module, name, Started(x.fn) if name.endswith("_kernel") else x.fn)
                elif type(x).__name__ == "constexpr":
                    setattr(module, name, x.value)
        yield
    finally:
        for module, names in zip(modules, saved, strict=True):
            vars(module).update(names)


class Started:
    """kernel[grid](**arguments)"""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, grid):
        def run(**arguments):
            for option in ("num_warps", "maxnreg"):
                arguments.pop(option)
            given = {}
            for name, x in arguments.items():
                if isinstance(x, torch.Tensor):
                    assert x.is_contiguous()
                    x = Pointer(x.view(-1))
                elif hasattr(x, "block_shape"):
                    x = SimpleNamespace(
                        base=x.base,
                        shape=x.shape,
                        block_shape=x.block_shape,
                        dtype=x.base.dtype,
                        layout=x.layout,
                    )
                given[name] = x
            threads, failed = [], []

            def program():
                try:
                    self.function(**given)
                except BaseException as problem:
                    failed.append(problem)

            for _ in range(min(3, grid[0])):
                threads.append(threading.Thread(target=program, daemon=True))
                threads[-1].start()
            for each in threads:
                each.join()
            if failed:
                raise failed[0]

        return run
