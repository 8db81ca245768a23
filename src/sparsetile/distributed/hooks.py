"""Which communication hook DistributedDataParallel averages gradients with."""

# No `from __future__ import annotations`: DistributedDataParallel compares the hook's annotations as objects.

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from sparsetile.distributed.config import DistributedSparseConfig
from sparsetile.distributed.gradients import GradientExchange
from sparsetile.errors import ArgumentError, explain


def compress_gradients(
    model: DistributedDataParallel, config: DistributedSparseConfig
) -> GradientExchange | Any:
    """Registers the communication hook that ``config`` names. Call it once, on every rank, before the first
    step.

    Args:
        model: its parameters have gradients in fp32, bf16 or fp16.
        config: ``hook`` decides: ``"topk"`` uses ``gradient_compression_ratio``, ``gradient_warmup_steps``,
            ``bucket_cap_mb`` and ``bucket_max_tensors``; ``"bf16"`` is PyTorch's own; ``"powersgd"``
            PyTorch's own, with ``powersgd_rank`` and ``gradient_warmup_steps``.

    Returns:
        The ``GradientExchange`` for ``"topk"``, PyTorch's ``PowerSGDState`` for ``"powersgd"``, else None.

    Raises:
        MismatchError, ArgumentError: as ``GradientExchange``.
        ArgumentError: ``"powersgd"`` for a model on the CPU, where it deadlocks.
    """
    if config.hook is None:
        return None
    parameters = [
        (name, parameter)
        for name, parameter in model.module.named_parameters()
        if parameter.requires_grad and name not in model.parameters_to_ignore
    ]
    group = model.process_group
    on_host = bool(parameters) and parameters[0][1].device.type == "cpu"
    if config.hook == "bf16":
        model.register_comm_hook(group, _bf16_on_host if on_host else bf16_compress_hook)
        return None
    if config.hook == "powersgd":
        if on_host:
            # It starts collectives from callbacks, whose order differs between ranks if there are several
            # buckets; NCCL's streams stand that, gloo's ranks wait for each other until they time out.
            raise ArgumentError(
                explain(
                    "gradient_hook",
                    expected='"topk" or "bf16" for a model on the CPU',
                    got='"powersgd", which deadlocks over gloo',
                    fix="Use PyTorch's PowerSGD on GPUs with NCCL.",
                )
            )
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

        state = powerSGD_hook.PowerSGDState(
            group, config.powersgd_rank, start_powerSGD_iter=config.gradient_warmup_steps
        )
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return state
    exchange = GradientExchange(
        parameters,
        group,
        ratio=config.gradient_compression_ratio,
        warmup_steps=config.gradient_warmup_steps,
        cap_bytes=int(config.bucket_cap_mb * 2**20),
        max_tensors=config.bucket_max_tensors,
    )
    model.register_comm_hook(exchange, _on_bucket)
    return exchange


def _on_bucket(
    exchange: GradientExchange,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> Future[Tensor]:
    return exchange.take(bucket)


def _bf16_on_host(
    group: dist.ProcessGroup,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> Future[Tensor]:
    """PyTorch's hook under another name: DistributedDataParallel refuses that one without NCCL, for the
    sake of NCCL before 2.10; gloo adds bf16 well.
    """
    return bf16_compress_hook(group, bucket)
