"""Settings of a training run: number of steps, learning rate and so on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW, Optimizer

from ..ir.errors import UsageError

Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class Settings:
    """Settings of a training run; a run can be resumed only with the same settings.

    Args:
        steps: number of updates of the weights.
        learning_rate: its highest value.
        warmup: number of steps over which the learning rate rises from zero.
        schedule: how the learning rate falls afterwards: cosine, linear, or constant.
        final: final learning rate, as a fraction of ``learning_rate``.
        weight_decay: decoupled (Loshchilov and Hutter, 2019), on tensors of two or more dimensions.
        betas: of AdamW.
        clip: largest norm of the gradient; 0 disables clipping.
        accumulate: number of batches whose gradients are averaged for one update.
        seed: for everything random.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 0
    schedule: Schedule = "cosine"
    final: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    accumulate: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        minimums = {"steps": 1, "warmup": 0, "accumulate": 1}
        for name, lowest in minimums.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise UsageError(f"{name} must be a whole number from {lowest}, not {value!r}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise UsageError(f"learning_rate must be positive, not {self.learning_rate!r}")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise UsageError(f"schedule must be cosine, linear or constant, not {self.schedule!r}")
        if not 0 <= self.final <= 1:
            raise UsageError(
                f"final must be a fraction of the learning rate, from 0 to 1, not {self.final!r}"
            )
        if not (self.clip >= 0 and self.weight_decay >= 0):
            raise UsageError(
                f"clip and weight_decay must be at least 0, not {self.clip} and {self.weight_decay}"
            )

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        factor = 0.5 * (1 + math.cos(math.pi * progress)) if self.schedule == "cosine" else 1 - progress
        return self.learning_rate * (self.final + (1 - self.final) * factor)

    def plain(self) -> dict[str, Any]:
        """Return the settings as JSON-compatible values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Return how other settings, read from a run, differ from these."""
        plain = self.plain()
        names = [f.name for f in fields(self)] + sorted(set(other) - set(plain))
        return [
            f"{n} was {other.get(n)!r}, is {plain.get(n)!r}" for n in names if plain.get(n) != other.get(n)
        ]


def adamw(settings: Settings) -> Callable[[nn.Module], Optimizer]:
    """Return a function that creates AdamW for a module, with weight decay on matrices only."""

    def make(module: nn.Module) -> Optimizer:
        trained = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        return AdamW(
            [g for g in groups if g["params"]], lr=settings.learning_rate, betas=settings.betas, fused=True
        )

    return make
