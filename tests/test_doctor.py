"""doctor: every backend is asked, run and checked; what is broken is said."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from sparsetile import doctor
from sparsetile.kernels.select import BACKENDS


def test_every_backend_is_reported_on_the_cpu():
    findings = {finding.backend: finding for finding in doctor.examine(torch.device("cpu"))}
    assert set(findings) == set(BACKENDS)
    assert findings["cpu"].state == findings["reference"].state == "works"
    assert findings["triton"].state in ("works", "not here")


def test_reasons_are_the_backends_own(monkeypatch):
    monkeypatch.setattr(BACKENDS["triton"], "why_not", lambda q, k, v, request: "no [GPU] here")
    output = io.StringIO()
    assert doctor.run(Console(file=output, width=200)) == 0
    assert "no [GPU] here" in output.getvalue()
    assert torch.__version__ in output.getvalue()


@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_a_broken_backend_is_an_error(fault, monkeypatch):
    honest = BACKENDS["cpu"].forward

    def forward(*arguments, **options):
        if fault == "raises":
            raise RuntimeError("two\nlines")
        out, lse = honest(*arguments, **options)
        return out * 1.001, lse

    monkeypatch.setattr(BACKENDS["cpu"], "forward", forward)
    output = io.StringIO()
    assert doctor.run(Console(file=output, width=200)) == 1
    assert "broken" in output.getvalue()
    if fault == "raises":
        assert "RuntimeError: two lines" in output.getvalue()
