"""Properties of an operator beside its reference: shapes, work, placement on ranks, dimensions and traits."""

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
    """Properties of an operator that do not depend on the call; see :mod:`graphopt.ir.operators.traits` for ATen's."""

    NONE = 0
    RESHAPE = auto()
    """Returns its operand's values in their order, under another shape."""
    REORDER = auto()
    """Returns its operand's values with dimensions in another order."""
    REPEAT = auto()
    """Returns its operand's values several times without copying them."""
    PART = auto()
    """Returns values of its operand that are selected by position."""
    VIEW = RESHAPE | REORDER | REPEAT | PART
    """Returns values of its operand, sharing its memory where possible."""
    IDENTITY = auto()
    """Returns its operand's values at the same positions."""
    COPY = auto()
    """Copies values of its operands to other positions."""
    MOVEMENT = VIEW | IDENTITY | COPY
    """Every value returned is one of the operands' values, or a constant used as padding."""
    BITS = auto()
    """Returns its operand's bits, reinterpreted as another type."""
    CAST = auto()
    """Returns its operand's values converted to another type."""
    PADDING = auto()
    """Pads its operand."""
    LOOKUP = auto()
    """Returns entries of its operand, or rows of a table, selected by integer indices."""
    POINTWISE = auto()
    """Operands broadcast, and an entry of the result depends on the entries at its position only."""
    ACTIVATION = auto()
    """A pointwise function of one value that involves an exponential."""
    HOMOGENEOUS = auto()
    """f(s x) = s f(x) for every positive s, and the channels of images and signals are not mixed."""
    LINEAR = auto()
    """Linear in its first operand, whatever the others are; movement is linear as well."""
    CONVOLUTION = auto()
    """A convolution of weight (outputs, inputs / groups, *kernel size)."""
    TRANSPOSED = auto()
    """A transposed convolution of weight (inputs, outputs / groups, *kernel size)."""
    PRODUCT = auto()
    """A product of matrices, either of which may depend on the input."""
    MEAN_POOLING = auto()
    """Means over windows."""
    MAX_POOLING = auto()
    """Maxima over windows."""
    NORM = auto()
    """Normalises values by statistics over other values; the result has the operand's shape."""
    SOFTMAX = auto()
    """A softmax along a dimension, or its logarithm."""
    REDUCTION = auto()
    """One value for all entries of the dimensions it names, or of all dimensions."""
    SCAN = auto()
    """Every entry along a dimension is computed from those up to it."""
    ALONG = auto()
    """Mixes or selects entries along the dimensions that ``dim`` or ``dims`` names, and keeps all other dimensions."""
    MIXING = auto()
    """Mixes channels or positions by weights or by scores, as blocks of a residual network do."""
    FACTORY = auto()
    """Creates a tensor from sizes and numbers."""
    FILL = auto()
    """A factory of equal values."""
    NEW = auto()
    """A factory whose operand determines type and device only."""
    EMPTY = auto()
    """Returns uninitialised memory."""
    RANDOM = auto()
    """Returns different values at every call, according to torch's tag."""
    ROUNDING = auto()
    """Simulates storing a value in fewer bits."""
    COLLECTIVE = auto()
    """A collective: all ranks send and receive."""
    PER_RANK = auto()
    """Returns a different value on every rank, without communication."""
    MARKED = auto()
    """Returns its first operand at positions without a mask token."""


@dataclass(frozen=True)
class OperatorSpec:
    """Properties of an operator beside its reference; None stands for the default behaviour.

    Attributes:
        shape: called like the operator on fake tensors, returns a fake result; without it, the reference is run on them.
        work: cost of a call; without it, operands and results are moved and nothing is computed.
        place: the placement of the result from those of the operands (see :mod:`graphopt.ir.ranks.placement`);
            without it, whatever the dimensions allow.
        dimensions: where a dimension of the result comes from (see :mod:`graphopt.ir.ranks.dimensions`); without it,
            every dimension is mixed.
        traits: other properties that passes ask for.
    """

    shape: ShapeRule | None = None
    work: WorkRule | None = None
    place: PlacementRule | None = None
    dimensions: DimensionRule | None = None
    traits: Trait = Trait.NONE


SPECS: dict[str, OperatorSpec] = {}
"""Specs by operator name, such as ``graphopt.attention``."""


def like_first(first: Any, *others: Any, **options: Any) -> Any:
    """Return an empty tensor of the first operand's shape and type: a shape rule."""
    return first.new_empty(first.shape)
