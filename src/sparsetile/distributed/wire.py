"""What gradients look like on the wire: which entries are sent, and in which bytes.

A *message* carries the ``kept`` largest entries of one *shard* (``length`` numbers, the part of a bucket that
one rank owns). All sizes are known before any gradient is, so no rank has to ask another how much is coming:

==================  ======================  =======================================================
part                bytes                   meaning
==================  ======================  =======================================================
values              2 · kept                bf16
places              kept                    position of each entry in its block of 255, ascending
counts              ⌈length / 255⌉          entries of each block
states              ⌈tensors / 4⌉           two bits a tensor: ``ZERO``, ``LIVE`` or ``BROKEN``
==================  ======================  =======================================================

Blocks are 255 wide, so that a position (0 … 254) and a count (0 … 255) both fit one byte. An entry costs
three bytes and every position 1/255 of one, where a plain 32-bit index would make an entry cost six.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 255


@dataclass(frozen=True)
class Message:
    """The form of one message.

    Attributes:
        length: entries of the shard.
        kept: entries sent, at most ``length``.
        tensors: tensors whose states travel along; 0 sends none.
    """

    length: int
    kept: int
    tensors: int = 0

    @property
    def blocks(self) -> int:
        return math.ceil(self.length / BLOCK)

    @property
    def states(self) -> int:
        """Bytes of the states."""
        return math.ceil(self.tensors / 4)

    @property
    def nbytes(self) -> int:
        return 3 * self.kept + self.blocks + self.states

    def pack(self, values: Tensor, places: Tensor, codes: Tensor | None = None) -> Tensor:
        """Messages of S shards.

        Args:
            values: bf16 [S, kept].
            places: int64 [S, kept], ascending in each row, from 0 to ``length - 1``.
            codes: int64 [tensors], ``ZERO``, ``LIVE`` or ``BROKEN``; every message carries all of them.

        Returns:
            uint8 [S, nbytes].
        """
        shards = places.shape[0]
        borders = torch.arange(self.blocks + 1, device=places.device) * BLOCK
        counts = torch.searchsorted(places, borders.expand(shards, -1).contiguous()).diff(dim=1)
        parts = [
            values.contiguous().view(torch.uint8),
            (places % BLOCK).to(torch.uint8),
            counts.to(torch.uint8),
        ]
        if codes is not None:
            fours = torch.nn.functional.pad(codes, (0, 4 * self.states - self.tensors)).view(-1, 4)
            weights = 4 ** torch.arange(4, device=codes.device)
            parts.append((fours * weights).sum(1).to(torch.uint8).expand(shards, -1))
        return torch.cat(parts, dim=1)

    def unpack(self, messages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What ``pack`` was given: values fp32 [S, kept], places int64 [S, kept], codes int64 [S,
        tensors].
        """
        shards, kept, blocks = messages.shape[0], self.kept, self.blocks
        values, places, counts, states = messages.split_with_sizes(
            [2 * kept, kept, blocks, self.states], dim=1
        )
        starts = (torch.arange(blocks, device=messages.device) * BLOCK).repeat(shards)
        # With output_size given nothing is read back from a device.
        begin = starts.repeat_interleave(counts.reshape(-1).long(), output_size=shards * kept)
        shifts = torch.arange(0, 8, 2, device=messages.device)
        codes = (states.long().unsqueeze(-1) >> shifts & 3).view(shards, -1)[:, : self.tensors]
        # Cloned, as one row of an odd number of bytes is contiguous and yet no view of bf16.
        numbers = values.clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()
        return numbers, begin.view(shards, kept) + places, codes


def kept_within(budget: int, length: int, tensors: int) -> int:
    """Entries that may be kept if a message to the owner and one from the owner have ``budget`` bytes
    together.

    The first carries the states of ``tensors`` tensors, the second none. At most ``length``; 0 or less: the
    budget is too small for a single entry.
    """
    fixed = Message(length, 0, tensors).nbytes + Message(length, 0).nbytes
    return min(length, (budget - fixed) // 6)
