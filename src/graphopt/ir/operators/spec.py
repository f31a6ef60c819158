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
    """Returns its operand's values with dimensions in another order."""
    REPEAT = auto()
    """Returns its operand's values several times without copying them."""
    PART = auto()
    """Returns values of its operand that are chosen by place."""
    VIEW = RESHAPE | REORDER | REPEAT | PART
    """Returns values of its operand, in its memory wherever that is possible."""
    IDENTITY = auto()
    """Returns its operand's values at their places."""
    COPY = auto()
    """Writes values of its operands to other places."""
    MOVEMENT = VIEW | IDENTITY | COPY
    """Every number returned is one of the operands', or a constant filled in beside them."""
    BITS = auto()
    """Returns its operand's bits, read as numbers of another type."""
    CAST = auto()
    """Returns its operand's values at their places in another type."""
    PADDING = auto()
    """Puts values around its operand."""
    LOOKUP = auto()
    """Returns entries of its operand, or rows of a table, that integers name."""
    POINTWISE = auto()
    """Operands broadcast, and an entry of the result is made of the entries at its place."""
    ACTIVATION = auto()
    """Pointwise, of one value, by a function with an exponential in it."""
    HOMOGENEOUS = auto()
    """f(s x) = s f(x) for every positive s, and the channels of images and signals stay apart."""
    LINEAR = auto()
    """Linear in its first operand, whatever the others are; movement is linear as well."""
    CONVOLUTION = auto()
    """A convolution of weight (outputs, inputs / groups, *taps)."""
    TRANSPOSED = auto()
    """A transposed convolution of weight (inputs, outputs / groups, *taps)."""
    PRODUCT = auto()
    """A product of matrices, either of which may depend on the input."""
    MEAN_POOLING = auto()
    """Means over windows."""
    MAX_POOLING = auto()
    """Maxima over windows."""
    NORM = auto()
    """Shifts or scales values by what other values are on average; the result has the operand's shape."""
    SOFTMAX = auto()
    """A softmax along a dimension, or its logarithm."""
    REDUCTION = auto()
    """One value for all entries of the dimensions it names, or of all dimensions."""
    SCAN = auto()
    """Every entry along a dimension is made of those up to it."""
    ALONG = auto()
    """Mixes or chooses entries along the dimensions that ``dim`` or ``dims`` names, and keeps all others in place."""
    MIXING = auto()
    """Mixes channels or positions by weights or by scores, as blocks of a residual network do."""
    FACTORY = auto()
    """Makes a tensor out of sizes and numbers."""
    FILL = auto()
    """A factory of equal values."""
    NEW = auto()
    """A factory whose operand says type and device alone."""
    EMPTY = auto()
    """Returns memory that nobody wrote."""
    RANDOM = auto()
    """Returns other values each time, as torch tags it."""
    ROUNDING = auto()
    """Says in how many bits a value is stored."""
    COLLECTIVE = auto()
    """All ranks send and receive."""
    PER_RANK = auto()
    """Returns something else on every rank, without any message."""
    MARKED = auto()
    """Returns its first operand where no mask token stands."""


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
