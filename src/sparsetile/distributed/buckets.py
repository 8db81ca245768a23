"""Buckets: which parameters' gradients travel together, and which rank owns which part of them.

Buckets are cut from the list of parameters alone. DistributedDataParallel has buckets of its own, which it
lays out anew after the first step, in the order in which gradients arrived; were shards cut from those, a run
that resumes would compress other shards than one that never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparsetile.distributed.wire import Message, kept_within
from sparsetile.errors import ArgumentError, explain


@dataclass(frozen=True)
class Bucket:
    """Some parameters, flattened one after the other and cut into one shard a rank.

    Attributes:
        names: of the parameters, in the order in which they lie in the bucket.
        sizes: entries of each.
        ranks: shards.
        kept: entries that a message carries of a shard; ``length`` where compression is off.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    ranks: int
    kept: int

    @property
    def entries(self) -> int:
        return sum(self.sizes)

    @property
    def length(self) -> int:
        """Entries of a shard; the last shards are padded with zeros."""
        return -(-self.entries // self.ranks)

    @property
    def to_owner(self) -> Message:
        return Message(self.length, self.kept, len(self.names))

    @property
    def from_owner(self) -> Message:
        return Message(self.length, self.kept)

    @property
    def sent_bytes(self) -> int:
        """Bytes that a rank sends to others in one compressed step (and receives: the exchange is
        symmetric).
        """
        return (self.ranks - 1) * (self.to_owner.nbytes + self.from_owner.nbytes)

    @property
    def whole_bytes(self) -> int:
        """Bytes that a rank sends to others if the bucket travels whole, in bf16."""
        return (self.ranks - 1) * 4 * self.length


def ring_bytes(entries: int, ranks: int) -> float:
    """Bytes that each rank sends in a bf16 ring all-reduce of ``entries`` numbers: 2·(W−1)/W·2 a number."""
    return 4 * entries * (ranks - 1) / ranks


def cut(
    parameters: Sequence[tuple[str, Tensor]], ranks: int, ratio: float, cap_bytes: int, max_tensors: int
) -> list[Bucket]:
    """Buckets of at most ``cap_bytes`` bytes or ``max_tensors`` tensors, whichever is reached first.

    Parameters are taken from the last to the first, about the order in which backward finishes them. A single
    parameter over ``cap_bytes`` has a bucket of its own. A bucket so small that ``ratio`` of its bytes cannot
    hold one entry a message joins its neighbour, over the limits if need be.

    Args:
        parameters: names and tensors; those without entries are left out.
        ranks: at least 2.
        ratio: bytes on the wire ÷ ``ring_bytes``, in (0, 1]; at 1 nothing is selected.
        cap_bytes: counted in the parameters' own dtypes.
        max_tensors: at least 1.

    Raises:
        ArgumentError: all parameters together are too few for ``ratio``.
    """
    groups: list[list[tuple[str, int]]] = []
    held = 0
    for name, parameter in reversed(parameters):
        entries = parameter.numel()
        if not entries:
            continue
        nbytes = entries * parameter.element_size()
        if not groups or len(groups[-1]) == max_tensors or held + nbytes > cap_bytes:
            groups.append([])
            held = 0
        groups[-1].append((name, entries))
        held += nbytes
    joined: list[list[tuple[str, int]]] = []
    for group in groups:
        if joined and min(_kept(joined[-1], ranks, ratio), _kept(group, ranks, ratio)) < 1:
            joined[-1].extend(group)
        else:
            joined.append(group)
    # The last one has no neighbour behind it, and what joined it may have brought more states than entries.
    while len(joined) > 1 and _kept(joined[-1], ranks, ratio) < 1:
        joined[-2].extend(joined.pop())
    buckets = []
    for group in joined:
        names, sizes = zip(*group, strict=True)
        kept = _kept(group, ranks, ratio)
        if kept < 1:
            raise ArgumentError(
                explain(
                    "gradient_compression_ratio",
                    expected=f"room for one entry a message: {sum(sizes)} entries over {ranks} ranks",
                    got=f"{ratio}, which is {int(ratio * ring_bytes(sum(sizes), ranks))} bytes a rank",
                    fix='So small a model gains nothing from compression; use gradient_hook="bf16".',
                )
            )
        buckets.append(Bucket(names, sizes, ranks, kept))
    return buckets


def _kept(group: list[tuple[str, int]], ranks: int, ratio: float) -> int:
    entries = sum(size for _, size in group)
    length = -(-entries // ranks)
    if ratio == 1:
        return length
    # A rank sends ranks - 1 messages of each kind, so a pair of them may weigh ratio · 4 · entries / ranks.
    return kept_within(int(ratio * 4 * entries / ranks), length, len(group))
