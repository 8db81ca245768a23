"""Scored: the parameters of a module that chooses its tiles, with sizes that may wait for the first input."""

from __future__ import annotations

import math
import warnings
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter, is_lazy

from sparsetile.adaptive import coarse
from sparsetile.adaptive.config import AdaptiveConfig
from sparsetile.adaptive.losses import log_odds
from sparsetile.adaptive.scorer import ImportanceScorer
from sparsetile.adaptive.summaries import summary_dim
from sparsetile.arguments import check_tokens_first
from sparsetile.errors import ArgumentError, CheckpointError, explain
from sparsetile.nn.plan import Planned

_START = log_odds(0.9)


class Scored(LazyModuleMixin, Planned):
    """Scorer, threshold θ and temperature τ, by PyTorch's convention for lazy modules.

    Without ``num_heads`` and ``head_dim`` the parameters wait for the first forward. The objects stay when
    they get their sizes, so an optimizer may hold them before.

    Attributes:
        scorer: see :class:`ImportanceScorer`; one for all groups, or with ``share_heads=False`` one each.
        threshold: θ, ``[1]``, or ``[G]`` with ``share_heads=False``.
        log_temperature: log τ, a scalar; a parameter if it is learnable, else a buffer.
        coarse_gate: g of the coarse branch, shaped as θ; None with ``coarse=False``.
    """

    scorer: ImportanceScorer
    threshold: nn.Parameter
    log_temperature: Tensor
    coarse_gate: nn.Parameter | None

    def __init__(
        self,
        config: AdaptiveConfig,
        num_heads: int | None,
        head_dim: int | None,
        num_kv_heads: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        _check_sizes(num_heads, head_dim, num_kv_heads)
        with warnings.catch_warnings():
            # PyTorch warns that lazy modules are new; they have been there since version 1.8.
            warnings.simplefilter("ignore", UserWarning)
            super().__init__()
        self.config = config
        self.num_heads, self.head_dim = num_heads, head_dim
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        log_temperature = torch.tensor(math.log(config.temperature), device=device, dtype=dtype)
        if config.learnable_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)
        if num_heads is not None and head_dim is not None:
            assert self.num_kv_heads is not None
            groups = self.groups_of(num_heads, self.num_kv_heads)
            self.scorer = self._scorer_of(head_dim, groups, device=device, dtype=dtype)
            self.threshold = nn.Parameter(self._first_threshold(groups, device, dtype))
            self.coarse_gate = (
                nn.Parameter(self._first_gate(groups, device, dtype)) if config.coarse else None
            )
            self._infer_parameters(self, (), None)  # nothing waits: this takes the hooks away
            return
        self.threshold = _waiting(device, dtype)
        self.coarse_gate = _waiting(device, dtype) if config.coarse else None
        # Which parameters a scorer has does not depend on sizes.
        self.scorer = self._scorer_of(1, 1, device="meta")
        for name, _ in list(self.scorer.named_parameters()):
            setattr(self.scorer, name, _waiting(device, dtype))

    def _scorer_of(self, head_dim: int, groups: int, **place: Any) -> ImportanceScorer:
        config = self.config
        return ImportanceScorer(
            summary_dim(head_dim, config.pooling),
            config.hidden_dim,
            num_heads=None if config.share_heads else groups,
            dropout=config.scorer_dropout,
            form=config.form,
            sub_heads=config.sub_heads,
            **place,
        )

    def _first_threshold(
        self, groups: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> Tensor:
        shape = (1 if self.config.share_heads else groups,)
        return torch.full(shape, -_START * self.config.temperature, device=device, dtype=dtype)

    def _first_gate(
        self, groups: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> Tensor:
        shape = (1 if self.config.share_heads else groups,)
        return torch.full(shape, log_odds(coarse.START), device=device, dtype=dtype)

    def groups_of(self, heads: int, kv_heads: int) -> int:
        """Selection groups of a call."""
        return heads if self.config.per_query_head else kv_heads

    # -- sizes ----------------------------------------------------------------------------------------

    def has_uninitialized_params(self) -> bool:
        """Whether parameters still wait for the first forward to know their sizes."""
        return any(is_lazy(x) for x in self.parameters())

    def initialize_parameters(self, *args: Any, **kwargs: Any) -> None:
        """Gives waiting parameters their sizes, by q ``[B, Nq, H, D]`` and k ``[B, Nk, Hkv, D]`` of a
        forward's arguments, and brings them to q's device."""
        if self.has_uninitialized_params():
            named = dict(zip(("q", "k"), args, strict=False)) | kwargs
            q, k = named["q"], named["k"]
            check_tokens_first(q, k, k, "sparse_attention")
            self._materialize(q.shape[3], self.groups_of(q.shape[2], k.shape[2]), q.device)

    @torch.no_grad()
    def _materialize(self, head_dim: int, groups: int, device: torch.device | None = None) -> None:
        dtype = self.threshold.data.dtype
        device = self.threshold.data.device if device is None else device
        drawn = self._scorer_of(head_dim, groups, device=device, dtype=dtype).train(self.training)
        waiting = dict(self.scorer.named_parameters())
        for name, value in list(drawn.named_parameters()):
            _fill(waiting[name], value)
            setattr(drawn, name, waiting[name])
        self.scorer = drawn
        _fill(self.threshold, self._first_threshold(groups, device, dtype))
        if self.coarse_gate is not None:
            _fill(self.coarse_gate, self._first_gate(groups, device, dtype))
        self.log_temperature.data = self.log_temperature.data.to(device)

    # -- checkpoints ----------------------------------------------------------------------------------

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        new = {name: state_dict.get(prefix + name) for name in self.state_dict()}
        first = new["scorer.w_q"]
        if isinstance(first, Tensor) and not is_lazy(first) and self.has_uninitialized_params():
            shared, hidden = self.config.share_heads, self.config.hidden_dim
            if first.dim() != (2 if shared else 3) or first.shape[-2] != hidden:
                expected = f"[{'' if shared else 'groups, '}{hidden}, width of a tile's summary]"
                _refuse_checkpoint(f"{prefix}scorer.w_q", expected, list(first.shape))
            self._materialize(first.shape[-1] // summary_dim(1, self.config.pooling), first.shape[0])
        if not self.has_uninitialized_params():
            for name, own in self.state_dict().items():
                value = new[name]
                if value is not None and is_lazy(value):
                    _refuse_checkpoint(prefix + name, list(own.shape), "no size: saved before a forward")
                if value is not None and value.shape != own.shape:
                    _refuse_checkpoint(prefix + name, list(own.shape), list(value.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # -- temperature ----------------------------------------------------------------------------------

    @property
    def temperature(self) -> Tensor:
        """τ, a scalar; fp32, or float64 if the parameters are."""
        return self.log_temperature.to(self.scorer.compute_dtype).exp()

    @torch.no_grad()
    def anneal(self, step: int) -> float:
        """Brings τ to the schedule's value at a training step, and returns that value::

            τ(step) = τ₀ · (τ_min / τ₀)^min(step / anneal_steps, 1)

        a geometric descent from ``temperature`` to ``min_temperature`` (:class:`AdaptiveConfig`). A learnable
        τ moves freely between τ_min and τ(step): the schedule is its ceiling. Without ``anneal_steps``
        nothing changes. No host sync.

        Raises:
            ArgumentError: a step below 0.
        """
        value = self.config.temperature_at(step)
        if self.config.anneal_steps is not None and self.config.learnable_temperature:
            self.log_temperature.clamp_(math.log(self.config.end_temperature), math.log(value))
        elif self.config.anneal_steps is not None:
            self.log_temperature.fill_(math.log(value))
        return value

    # -- scores ---------------------------------------------------------------------------------------

    def biases(self, scores: Tensor) -> Tensor:
        """``β = log σ((s − θ)/τ)`` of scores ``[B, G, rows, n]``."""
        threshold = self.threshold.to(scores.dtype).view(-1, 1, 1)
        return F.logsigmoid((scores - threshold) / self.temperature)


class _Waiting(UninitializedParameter):
    """A parameter without a size yet; ``state_dict`` detaches what it saves, and of this that is itself."""

    def detach(self) -> Tensor:
        return self


def _waiting(device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Parameter:
    made: Any = _Waiting
    parameter: nn.Parameter = made(device=device, dtype=dtype)
    return parameter


def _fill(waiting: nn.Parameter, value: Tensor) -> None:
    """Gives a waiting parameter a size and a value; the object stays."""
    assert isinstance(waiting, UninitializedParameter)
    waiting.materialize(tuple(value.shape), device=value.device, dtype=value.dtype)
    waiting.copy_(value)


def _check_sizes(num_heads: object, head_dim: object, num_kv_heads: object) -> None:
    sizes = {"num_heads": num_heads, "head_dim": head_dim, "num_kv_heads": num_kv_heads}
    for name, value in sizes.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ArgumentError(
                explain(
                    name,
                    expected="None or an integer ≥ 1",
                    got=repr(value),
                    fix="Leave it out, and the first forward says.",
                )
            )
    if num_kv_heads is not None:
        assert isinstance(num_kv_heads, int)
        if not isinstance(num_heads, int) or num_heads % num_kv_heads:
            raise ArgumentError(
                explain(
                    "num_kv_heads",
                    expected="a divisor of num_heads, given too",
                    got=f"num_heads={num_heads!r}, num_kv_heads={num_kv_heads!r}",
                    fix="Query heads come in groups that share a key-value head.",
                )
            )


def _refuse_checkpoint(name: str, expected: object, got: object) -> NoReturn:
    raise CheckpointError(
        explain(
            f"checkpoint, {name}",
            expected=f"shape {expected}" if isinstance(expected, list) else expected,
            got=got,
            fix="Load it into a module of the same head_dim, heads and AdaptiveConfig.",
        )
    )
