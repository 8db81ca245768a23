"""What a step starts from comes back bit for bit, as often as it is asked for."""

from __future__ import annotations

import torch
from torch import nn

from sparsetile.distributed.state import State


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.norm(nn.functional.dropout(self.layer(x), 0.5))


def test_restored_as_often_as_needed() -> None:
    model = Noisy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    others = [optimizer, schedule]

    def train(steps: int) -> list[torch.Tensor]:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(8, 5)).square().sum().backward()
            optimizer.step()
            schedule.step()
        rate = torch.tensor(optimizer.param_groups[0]["lr"])
        return [*(x.detach().clone() for x in (*model.parameters(), *model.buffers())), rate]

    fresh = State.of(0, model, others)
    first = train(2)
    begun = State.of(2, model, others)
    wanted = train(3)
    for _ in range(2):
        begun.restore(model, others)
        for got, want in zip(train(3), wanted, strict=True):
            assert torch.equal(got, want)
    fresh.restore(model, others)
    assert not optimizer.state  # as before the first step
    for got, want in zip(train(2), first, strict=True):
        assert torch.equal(got, want)
    assert begun.step == 2 and begun.device_random is None
