"""Which tensors of a checkpoint make which weight of a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx


@dataclass(frozen=True)
class Recipe:
    """A conversion of weights: a graph over tensors of the checkpoint, with a result per weight."""

    graph: fx.Graph
    sources: tuple[str, ...]
    targets: tuple[str, ...]


@dataclass
class Mapped:
    """Weights that are tensors of the checkpoint as they are, weights that are computed, and unused tensors."""

    plain: dict[str, str] = field(default_factory=dict)
    recipes: list[Recipe] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
