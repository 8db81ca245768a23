"""DistributedSparseConfig: how the distributed variant spends memory and bandwidth."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from sparsetile.distributed.call import check_node
from sparsetile.errors import ArgumentError, explain

_DENSITIES = ("local_sparsity", "global_sparsity", "inter_node_sparsity")
# The hooks, and the fields that each of them reads.
_FIELDS_OF: dict[str, tuple[str, ...]] = {
    "topk": ("gradient_compression_ratio", "gradient_warmup_steps", "bucket_cap_mb", "bucket_max_tensors"),
    "powersgd": ("gradient_warmup_steps", "powersgd_rank"),
    "bf16": (),
}


@dataclass(frozen=True)
class DistributedSparseConfig:
    """Settings of the distributed variant.

    Attributes:
        enable_memory_optimization: remote key-value tiles are not kept for backward, but sent again then: a
            layer's memory for them is free between its forward and its backward.
        max_remote_tokens: the most remote tokens (of each kv head) that an exchange brings a rank, at least a
            tile: more come in stages, one after the other. None: all at once.
        ranks_per_node: how many consecutive ranks of the group one node holds, a divisor of their number:
            what several ranks of another node need travels there once, and one sum of its gradients back.
            None: every rank receives all from its owners.
        local_sparsity, global_sparsity, inter_node_sparsity: densities by distance: the share of the tiles
            inside a rank, on other ranks of its node, and on other nodes that the module keeps (see
            ``Hierarchical``), each in [0, 1], instead of a ``sparse_config`` or ``sparsity_ratio``. All
            three, with ``ranks_per_node``, or none. A world of one is one rank: ``local_sparsity`` is of
            the whole sequence, and nothing lies elsewhere.
        gradient_compression_ratio: bytes of gradients on the wire ÷ bytes of a bf16 ring all-reduce, in (0,
            1], indices included; 1 sends them whole. Below 1 only with the hook "topk".
        gradient_hook: how data-parallel ranks average gradients: "topk" (with error feedback), PyTorch's own
            "bf16" or "powersgd", or None: "topk" if the ratio is below 1, else DistributedDataParallel as it
            is.
        gradient_warmup_steps: steps that send gradients whole before "topk" or "powersgd" begins; at least 2
            for "powersgd".
        bucket_cap_mb: MiB of gradients that "topk" sends together, unless
        bucket_max_tensors: parameters, are reached first.
        powersgd_rank: rank of the matrices that "powersgd" sends.

    Raises:
        ArgumentError: a value is not as above.
    """

    enable_memory_optimization: bool = False
    max_remote_tokens: int | None = None
    ranks_per_node: int | None = None
    local_sparsity: float | None = None
    global_sparsity: float | None = None
    inter_node_sparsity: float | None = None
    gradient_compression_ratio: float = 1.0
    gradient_hook: str | None = None
    gradient_warmup_steps: int = 0
    bucket_cap_mb: float = 25
    bucket_max_tensors: int = 32
    powersgd_rank: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.enable_memory_optimization, bool):
            raise ArgumentError(
                explain(
                    "enable_memory_optimization",
                    expected="True or False",
                    got=repr(self.enable_memory_optimization),
                    fix="Pass a bool.",
                )
            )
        most = self.max_remote_tokens
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            raise ArgumentError(
                explain(
                    "max_remote_tokens",
                    expected="None or a number of tokens, a tile or more",
                    got=repr(most),
                    fix="None brings all remote tokens at once.",
                )
            )
        check_node(self.ranks_per_node)
        self._check_densities()
        ratio = self.gradient_compression_ratio
        number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
        if not number or not math.isfinite(ratio) or not 0.0 < ratio <= 1.0:
            raise ArgumentError(
                explain(
                    "gradient_compression_ratio",
                    expected="a share of bytes in (0, 1]",
                    got=repr(ratio),
                    fix="0.1 sends a tenth, 1 sends gradients whole.",
                )
            )
        self._check_gradients()

    @property
    def densities(self) -> tuple[float, float, float] | None:
        """Inside a rank, inside a node, across nodes; None: the module's pattern knows no distance."""
        local, near, far = (getattr(self, name) for name in _DENSITIES)
        return None if local is None else (local, near, far)

    def _check_densities(self) -> None:
        for name in _DENSITIES:
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and (not number or not 0.0 <= value <= 1.0):
                raise ArgumentError(
                    explain(
                        name,
                        expected="None or a density in [0, 1]",
                        got=repr(value),
                        fix="0.05 keeps one tile in twenty.",
                    )
                )
        given = [name for name in _DENSITIES if getattr(self, name) is not None]
        if given and len(given) < len(_DENSITIES):
            raise ArgumentError(
                explain(
                    ", ".join(_DENSITIES),
                    expected="all three or none",
                    got=f"{', '.join(given)} alone",
                    fix="0 keeps nothing of a distance, 1 all.",
                )
            )
        if given and self.ranks_per_node is None:
            raise ArgumentError(
                explain(
                    "ranks_per_node",
                    expected="a number beside densities by distance",
                    got=None,
                    fix="It says which ranks are near: take the number of all ranks if they are on one node.",
                )
            )

    @property
    def hook(self) -> str | None:
        """The communication hook in effect."""
        if self.gradient_hook is None and self.gradient_compression_ratio < 1:
            return "topk"
        return self.gradient_hook

    def _check_gradients(self) -> None:
        if self.gradient_hook not in (None, *_FIELDS_OF):
            raise ArgumentError(
                explain(
                    "gradient_hook",
                    expected=f"None or one of {', '.join(map(repr, _FIELDS_OF))}",
                    got=repr(self.gradient_hook),
                    fix='"topk" honours gradient_compression_ratio.',
                )
            )
        least = {
            "gradient_warmup_steps": 2 if self.hook == "powersgd" else 0,
            "bucket_max_tensors": 1,
            "powersgd_rank": 1,
        }
        for name, lowest in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ArgumentError(
                    explain(
                        name,
                        expected=f"an int of at least {lowest}",
                        got=repr(value),
                        fix="Pass such a number.",
                    )
                )
        cap = self.bucket_cap_mb
        if isinstance(cap, bool) or not isinstance(cap, int | float) or not 0 < cap < math.inf:
            raise ArgumentError(
                explain(
                    "bucket_cap_mb", expected="MiB above 0", got=repr(cap), fix="25 is what PyTorch takes."
                )
            )
        acting = _FIELDS_OF.get(self.hook or "", ())
        for field in fields(self):
            value = getattr(self, field.name)
            idle = field.name in _FIELDS_OF["topk"] + _FIELDS_OF["powersgd"] and field.name not in acting
            if idle and value != field.default:
                raise ArgumentError(
                    explain(
                        field.name,
                        expected=f"{field.default} with gradient_hook={self.hook!r}, where it could not act",
                        got=repr(value),
                        fix="Choose the hook that it belongs to, or leave it alone.",
                    )
                )
