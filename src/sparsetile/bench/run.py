"""The measuring loop: every rival on every case, one row each, saved after each row."""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsetile.bench import accuracy
from sparsetile.bench.cases import Case
from sparsetile.bench.measure import MEMORY_KIND, ceilings, peak_memory, time_call
from sparsetile.bench.rivals import Attention, Rival, UnavailableError, one_line
from sparsetile.environment import provenance
from sparsetile.facts import describe
from sparsetile.layout.blocks import BlockLayout

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What to measure, where, and how long.

    Attributes:
        budget_ms: about how long one timing repeats its call.
        samples: queries whose rows are checked against float64.
        seed: draws inputs, random tiles and the sample.
        arguments: the command line, recorded as it is.
    """

    cases: list[Case]
    rivals: list[Rival]
    device: torch.device
    budget_ms: float
    samples: int
    seed: int
    arguments: list[str]


@dataclass
class _Inputs:
    """Tensors of one shape, and the exact rows of dense attention on them, causal or not."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    sample: accuracy.Sample
    dense: dict[bool, accuracy.Exact] = field(default_factory=dict)


def measure(plan: Plan, path: Path, done: Callable[[Row], None] = lambda row: None) -> dict[str, Any]:
    """Measure ``plan`` and keep the result so far in ``path`` (JSON) after every row.

    A rival that cannot take part, runs out of memory or raises is a row with that reason; the run goes on.
    ``done`` is called with each row. Raises OSError if ``path`` cannot be written.
    """
    result: dict[str, Any] = {
        "provenance": provenance(),
        "device": str(plan.device),
        "arguments": plan.arguments,
        "seed": plan.seed,
        "memory": MEMORY_KIND[plan.device.type],
        "ceilings": ceilings(plan.device),
        "error": f"relative Frobenius error against float64, {plan.samples} sampled queries",
        "rows": [],
    }
    save(result, path)
    generator = torch.Generator().manual_seed(plan.seed)
    inputs: _Inputs | None = None
    shape: tuple[object, ...] = ()
    shared: dict[tuple[str, bool], Row] = {}
    for case in plan.cases:
        if (case.shape, case.dtype) != shape:
            inputs, shape, shared = None, (case.shape, case.dtype), {}
            _free(plan.device)
        about: Row = {"case": case.record()}
        failure: str | None = None
        layout: BlockLayout | None = None
        causal = False
        try:
            layout = case.layout(torch.device("cpu"), generator)
            causal = _is_causal(layout)
            about["causal_density"] = layout.causal_density if causal else None
            start = time.perf_counter()
            layout = layout.to(plan.device)
            about |= {"density": layout.density, "tiles": layout.nnz, "layout_bytes": layout.nbytes}
            about["layout_to_device_ms"] = (time.perf_counter() - start) * 1e3
            inputs = inputs or _draw(case, plan, generator)
        except (RuntimeError, MemoryError) as error:
            failure = one_line(error)
        reference: accuracy.Exact | None = None
        for rival in plan.rivals:
            if (rival.name, causal) in shared:
                measured = shared[rival.name, causal] | {"shared": True}
            elif failure is not None or layout is None or inputs is None:
                measured = {"status": "failed", "reason": failure}
            else:
                if rival.dense:
                    if causal not in inputs.dense:
                        inputs.dense[causal] = _exact(inputs, None, causal)
                    exact = inputs.dense[causal]
                else:
                    exact = reference = reference or _exact(inputs, layout, causal)
                measured = _measure_rival(rival, layout, causal, inputs, exact, plan)
                if rival.dense:
                    shared[rival.name, causal] = measured
            row = about | {"rival": rival.name, "dense": rival.dense} | measured
            result["rows"].append(row)
            save(result, path)
            done(row)
            _free(plan.device)
    return result


def save(result: dict[str, Any], path: Path) -> None:
    """Write ``result`` as JSON; a reader, or a crash, never sees half a file."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(_finite(result), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _measure_rival(
    rival: Rival, layout: BlockLayout, causal: bool, inputs: _Inputs, exact: accuracy.Exact, plan: Plan
) -> Row:
    row: Row = {"status": "ok", "reason": None, "forward": None, "backward": None, "errors": {}}
    row["backward_reason"] = rival.no_backward(plan.device)
    trains = row["backward_reason"] is None
    q, k, v = (tensor.detach().requires_grad_(trains) for tensor in (inputs.q, inputs.k, inputs.v))
    try:
        attend = rival.prepare(layout, q, k, v, causal=causal)
        start = time.perf_counter()
        out = attend(q, k, v)
        _synchronize(plan.device)
        row["first_call_s"] = time.perf_counter() - start
        row["errors"]["out"] = accuracy.output_error(out.detach(), exact)
        row["forward"] = asdict(time_call(lambda: attend(q, k, v), plan.device, plan.budget_ms))
        del out
        row["forward_bytes"] = peak_memory(lambda: attend(q, k, v), plan.device)
    except UnavailableError as error:
        return row | {"status": "unavailable", "reason": str(error)}
    except Exception as error:  # whatever a rival throws is its result
        return row | {"status": "failed", "reason": one_line(error)}
    if trains:
        try:
            row |= _measure_backward(attend, (q, k, v), inputs, exact, row["errors"], plan)
        except Exception as error:
            row["backward_reason"] = one_line(error)
    return row


def _measure_backward(
    attend: Attention,
    leaves: tuple[Tensor, Tensor, Tensor],
    inputs: _Inputs,
    exact: accuracy.Exact,
    errors: dict[str, float],
    plan: Plan,
) -> Row:
    sampled = accuracy.sparse_gradient(inputs.sample, inputs.grad)
    dq, dk, dv = torch.autograd.grad(attend(*leaves), leaves, sampled)
    errors |= accuracy.gradient_errors(dq, dk, dv, exact)
    del dq, dk, dv, sampled
    out = attend(*leaves)
    backward = partial(torch.autograd.grad, out, leaves, inputs.grad, retain_graph=True)
    times = time_call(backward, plan.device, plan.budget_ms)
    del out, backward
    both = peak_memory(lambda: torch.autograd.grad(attend(*leaves), leaves, inputs.grad), plan.device)
    return {"backward": asdict(times), "training_bytes": both}


def _draw(case: Case, plan: Plan, generator: torch.Generator) -> _Inputs:
    draws = torch.Generator(device=plan.device).manual_seed(plan.seed)
    dtype = getattr(torch, case.dtype)
    q, k, v, grad = (
        torch.randn(case.shape, device=plan.device, dtype=dtype, generator=draws) for _ in range(4)
    )
    return _Inputs(q, k, v, grad, accuracy.draw_sample(q, plan.samples, generator))


def _exact(inputs: _Inputs, layout: BlockLayout | None, causal: bool) -> accuracy.Exact:
    tensors = (inputs.q, inputs.k, inputs.v, inputs.grad)
    return accuracy.exact(*tensors, inputs.sample, layout, causal=causal)


def _is_causal(layout: BlockLayout) -> bool:
    """Whether no head keeps a key after its query."""
    return all(describe(layout, head=head).causal_density is not None for head in range(layout.heads))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
