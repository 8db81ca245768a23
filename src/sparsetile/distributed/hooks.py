"""What DistributedDataParallel and FSDP2 average gradients with."""

# No `from __future__ import annotations`: DistributedDataParallel compares the hook's annotations as objects.

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import FSDPModule
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from sparsetile.distributed.config import DistributedSparseConfig
from sparsetile.distributed.gradients import GradientExchange
from sparsetile.distributed.reduce_scatter import ShardedGradients
from sparsetile.errors import ArgumentError, explain


def compress_gradients(
    model: DistributedDataParallel | FSDPModule, config: DistributedSparseConfig
) -> GradientExchange | ShardedGradients | Any:
    """Registers what ``config`` names for averaging gradients. Call it once, on every rank, before the first
    step.

    Args:
        model: its parameters have gradients in fp32, bf16 or fp16. Of a model under ``fully_shard`` every
            group's reduce-scatter is compressed; parameters are gathered as before.
        config: ``hook`` decides: ``"topk"`` uses ``gradient_compression_ratio``, ``gradient_warmup_steps``,
            ``bucket_cap_mb`` and ``bucket_max_tensors`` (not under ``fully_shard``, whose groups are its
            own); ``"bf16"`` is PyTorch's own; ``"powersgd"`` PyTorch's own, with ``powersgd_rank`` and
            ``gradient_warmup_steps``.

    Returns:
        For ``"topk"`` the ``GradientExchange``, or the ``ShardedGradients`` of an FSDP model; PyTorch's
        ``PowerSGDState`` for ``"powersgd"``, else None.

    Raises:
        MismatchError, ArgumentError: as ``GradientExchange``.
        ArgumentError: ``"powersgd"`` for a model on the CPU, where it deadlocks; for an FSDP model a hook
            other than ``"topk"``, or limits of buckets.
    """
    if config.hook is None:
        return None
    if isinstance(model, FSDPModule):
        _check_sharded(config)
        return ShardedGradients(model, config.gradient_compression_ratio, config.gradient_warmup_steps)
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


def _check_sharded(config: DistributedSparseConfig) -> None:
    if config.hook != "topk":
        raise ArgumentError(
            explain(
                "gradient_hook",
                expected='"topk" under fully_shard',
                got=repr(config.hook),
                fix="For bf16 pass fully_shard a MixedPrecisionPolicy(reduce_dtype=torch.bfloat16).",
            )
        )
    plain = DistributedSparseConfig()
    for name in ("bucket_cap_mb", "bucket_max_tensors"):
        if getattr(config, name) != getattr(plain, name):
            raise ArgumentError(
                explain(
                    name,
                    expected=f"{getattr(plain, name)} under fully_shard, where it could not act",
                    got=getattr(config, name),
                    fix="FSDP sends together what one fully_shard call holds.",
                )
            )


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
