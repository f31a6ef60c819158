"""What is known of an operator beside its reference: shapes, work, placement on ranks, dimensions and traits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Flag, auto
from typing import TYPE_CHECKING, Any

from torch import fx

if TYPE_CHECKING:
    from .along import Sources
    from .placement_types import Placement
    from .work import Call, Work

ShapeRule = Callable[..., Any]
WorkRule = Callable[["Call"], "Work"]
PlacementRule = Callable[[fx.Node, "dict[fx.Node, Placement]"], "Placement"]
DimensionRule = Callable[[fx.Node, int], "Sources | None"]


class Trait(Flag):
    """What can be said of an operator wherever it stands; see :mod:`graphopt.ir.operators.traits` for ATen's."""

    NONE = 0
    RESHAPE = auto()
    """Returns its operand's values in their order, under another shape."""
    REORDER = auto()
    """Returns its operand's values in another order, given by permuting dimensions."""
    REPEAT = auto()
    """Returns its operand's values several times without copying them."""
    PART = auto()
    """Returns some of its operand's values, chosen by place."""
    VIEW = RESHAPE | REORDER | REPEAT | PART
    """Values are its operand's, in its memory wherever that is possible."""


@dataclass(frozen=True)
class OperatorSpec:
    """What is known of an operator beside its reference; None where nothing special is to be said.

    Attributes:
        shape: called like the operator on fake tensors, returns the result's; without it the reference is run on them.
        work: cost of a call; without it operands and results are moved and nothing is computed.
        place: what ranks hold of the result, by what they hold of the operands (see
            :mod:`graphopt.ir.ranks.placement`); without it, whatever the dimensions allow.
        dimensions: where a dimension of the result comes from (see :mod:`graphopt.ir.ranks.dimensions`); without it
            every dimension is mixed.
        traits: what else passes ask.
    """

    shape: ShapeRule | None = None
    work: WorkRule | None = None
    place: PlacementRule | None = None
    dimensions: DimensionRule | None = None
    traits: Trait = Trait.NONE


SPECS: dict[str, OperatorSpec] = {}
"""Operator name, ``graphopt.attention``, to what is known of it."""


def like_first(first: Any, *others: Any, **options: Any) -> Any:
    """Return a value of the first operand's shape and type: a shape rule."""
    return first.new_empty(first.shape)
