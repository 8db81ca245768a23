"""Memory that is lent from stream to stream on a GPU."""

from __future__ import annotations

import pytest
import torch

from sparsetile.distributed.pool import BufferPool

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def test_the_next_borrower_waits_on_its_own_stream() -> None:
    pool = BufferPool("cuda")
    size = 1 << 24
    totals = torch.zeros(3, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(3)]
    weight = torch.rand(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    for step in range(30):
        with torch.cuda.stream(streams[step % 3]), pool.lease((size,)) as x:
            for _ in range(3):
                weight @ weight  # keeps the stream busy: who does not wait, writes too early
            x.fill_(float(step))
            totals[step % 3] += (x - step).abs().sum()
            if step % 7 == 0:
                pool.trim()
    torch.cuda.synchronize()
    assert totals.tolist() == [0.0] * 3
    assert pool.statistics().live_bytes == 0 and pool.statistics().allocations < 30


def test_pressure_is_that_of_the_device() -> None:
    pool = BufferPool("cuda")
    free = torch.cuda.mem_get_info()[0]
    for lease in [pool.lease((free // 4,), torch.uint8) for _ in range(2)]:
        lease.release()
    # What waits is of no use for a size this large, and must make room for it.
    with pool.lease((int(0.6 * free),), torch.uint8):
        assert pool.statistics().trimmed_bytes > 0 and pool.statistics().allocations == 3
