"""A named backend serves or raises; auto walks one order; the dense reference never runs unasked."""

import pytest
import torch

import sparsetile as st
from sparsetile.errors import BackendError
from sparsetile.kernels.request import Request
from sparsetile.kernels.select import AUTO, BACKENDS, choose


def request(device="cpu"):
    return Request(
        layout=st.BlockLayout.from_pattern(st.Local(3), 20, block_size=16, device=device), scale=1.0
    )


def test_auto_takes_the_first_that_serves():
    q = torch.randn(1, 1, 20, 16)
    assert choose("auto", q, q, q, request()) is BACKENDS["cpu"]
    assert choose("reference", q, q, q, request()) is BACKENDS["reference"]


def test_auto_raises_with_every_reason_instead_of_going_dense():
    q = torch.randn(1, 1, 20, 16, device="meta")
    with pytest.raises(BackendError) as caught:
        choose("auto", q, q, q, request())
    for name in AUTO:
        assert f"{name}: " in str(caught.value)
    assert "reference" not in AUTO


@pytest.mark.parametrize("name", ["cpu", "hopper", "triton"])
def test_named_backend_raises_its_own_reason(name):
    q = torch.randn(1, 1, 20, 16, device="meta")
    reason = BACKENDS[name].why_not(q, q, q, request())
    assert reason
    with pytest.raises(BackendError, match=name) as caught:
        choose(name, q, q, q, request())
    assert reason in str(caught.value)
