"""Contracts of passes: what may change in the outputs of a program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Contract:
    """Base of all contracts."""

    def __str__(self) -> str:
        return type(self).__name__


@dataclass(frozen=True)
class Exact(Contract):
    """Outputs are equal: in float64 to 1e-11 relative, site by site."""

    def __str__(self) -> str:
        return "exact"


@dataclass(frozen=True)
class ExactAt(Contract):
    """Exact at one value of an option or run-time setting, approximate elsewhere.

    ``judged_at`` is another value of the setting, at which a metric measures the loss and a budget is checked; None if
    quality there is left to training.
    """

    option: str
    value: float
    judged_at: float | None = None
    metric: str = "auto"

    def __str__(self) -> str:
        exact = f"exact at {self.option}" + (
            f"={self.value:g}" if self.value == self.value else " as trained"
        )
        return exact + (f", judged at {self.judged_at:g}" if self.judged_at is not None else "")


@dataclass(frozen=True)
class ExactInChunks(Contract):
    """Outputs of consecutive pieces equal those of the whole: in float64 to 1e-10, on random pieces.

    The pass compares them itself, in its method ``check(before, after, entry)``.
    """

    limit: ClassVar[float] = 1e-10

    def __str__(self) -> str:
        return "exact in chunks"


@dataclass(frozen=True)
class Approximate(Contract):
    """Outputs change; a metric says how much, on data the pass did not calibrate on."""

    metric: str = "auto"

    def __str__(self) -> str:
        return "approximate" + (f", judged by {self.metric}" if self.metric != "auto" else "")


@dataclass(frozen=True)
class AddsOutputs(Contract):
    """Existing outputs are bit-identical; new ones are added."""

    def __str__(self) -> str:
        return "adds outputs"


@dataclass(frozen=True)
class NewFunction(Contract):
    """The program is meant to compute something else."""

    def __str__(self) -> str:
        return "new function"
