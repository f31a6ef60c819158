"""Placements: whether each value of a sharded program is replicated, partial, or sharded along a dimension.

The types are DTensor's: ``Replicate``, ``Partial``, ``Shard(dim)``. A partial value may only be read by linear operators
and collectives; adding a replicated value to a partial one would count it once per rank, the usual error with
biases and residuals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..errors import VerificationError
from ..operators.placement_types import (
    PARTIAL,
    WHOLE,
    Joined,
    Misplaced,
    Partial,
    Placement,
    Replicate,
    Shard,
    cut_along,
    mark_cut,
    placement_of,
)
from ..operators.spec import SPECS
from ..operators.traits import Trait, has
from ..schema import arguments, is_operator, operator_name
from .dimensions import carried

if TYPE_CHECKING:
    from ..program import Program


# a cast to a narrower type rounds, but so does the sum itself
_LINEAR = Trait.MOVEMENT | Trait.LINEAR | Trait.CAST


def placements(program: Program) -> dict[fx.Node, Placement]:
    """Return the placement of every value of a sharded program.

    Raises:
        VerificationError: the placements of an operator's operands are incompatible.
    """
    result: dict[fx.Node, Placement] = program.derived("placements", lambda: _infer(program))
    return result


def _infer(program: Program) -> dict[fx.Node, Placement]:
    placed: dict[fx.Node, Placement] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            placed[node] = WHOLE
        elif node.op == "call_function":
            try:
                placed[node] = _place(node, placed)
            except Misplaced as problem:
                near = [node, *node.all_input_nodes]
                raise VerificationError(
                    f"{node.name} = {operator_name(node.target)}: {problem}",
                    node=node.name, source=next(filter(None, map(program.source_line, near)), ""),
                    hint="reduce or gather the value first, or add replicated values after the sum",
                ) from None  # fmt: skip
        elif node.op == "output":
            for name, value in zip(program.signature.output_names, node.args[0], strict=True):
                if placed[value] != WHOLE:
                    raise VerificationError(
                        f"output {name} is {placed[value]} on each rank",
                        node=value.name, source=program.source_line(value),
                        hint="a partial or sharded value must be reduced or gathered before it is returned",
                    )  # fmt: skip
    return placed


def _place(node: fx.Node, placed: dict[fx.Node, Placement]) -> Placement:
    name = operator_name(node.target)
    spec = SPECS.get(name)
    rule = _PLACEMENT_RULES.get(name) if spec is None else spec.place
    if rule is not None:
        return rule(node, placed)
    operands = {n: placed[n] for n in node.all_input_nodes}
    if all(p == WHOLE for p in operands.values()):
        return WHOLE
    if any(isinstance(p, Joined) for p in operands.values()):
        return _split_joined(node, name, operands)
    if any(p == PARTIAL for p in operands.values()):
        return _place_partial(node, name, operands)
    return _place_sharded(node, operands)


def _place_partial(node: fx.Node, name: str, operands: dict[fx.Node, Placement]) -> Placement:
    others = [n for n, p in operands.items() if p != PARTIAL]
    tensors = [n for n in others if isinstance(n.meta.get("val"), torch.Tensor)]
    if name in ("aten.add", "aten.sub"):
        if not others and not any(isinstance(a, (int, float)) for a in node.args):
            return PARTIAL
        what = f"{others[0].name}, which is {operands[others[0]]}" if others else "a number"
        raise Misplaced(f"it adds {what}, to a partial sum, where it would count once per rank")
    if name in ("aten.mul", "aten.div") and all(operands[n] == WHOLE for n in others):
        first: Any = node.args[0]
        if sum(isinstance(a, fx.Node) and operands[a] == PARTIAL for a in node.args) == 1 and (
            name == "aten.mul" or operands.get(first) == PARTIAL
        ):
            return PARTIAL
    if _adds_up(node) and not tensors:
        return PARTIAL
    partial = next(n for n, p in operands.items() if p == PARTIAL)
    raise Misplaced(f"{partial.name} is a partial sum, and this is not linear in it")


def _adds_up(node: fx.Node) -> bool:
    """Tell whether applying an operator to a sum gives the sum of applying it to the terms."""
    if has(node, Trait.PADDING) and arguments(node).get("value"):
        return False
    value = node.meta["val"]
    whole_numbers = isinstance(value, torch.Tensor) and not value.dtype.is_floating_point
    return has(node, _LINEAR) and not (has(node, Trait.CAST) and whole_numbers)


def _split_joined(node: fx.Node, name: str, operands: dict[fx.Node, Placement]) -> Placement:
    """Return the placement of a call on joined values: a piece of them, or the same joined values moved."""
    source = next(n for n, p in operands.items() if isinstance(p, Joined))
    joined = operands[source]
    assert isinstance(joined, Joined)
    args = arguments(node)
    if name == "aten.split_with_sizes" and args["dim"] % source.meta["val"].dim() == joined.dim:
        return joined
    piece: Shard | None = None
    if name == "aten.slice" and args["dim"] % source.meta["val"].dim() == joined.dim and args["step"] == 1:
        size = int(source.meta["val"].shape[joined.dim])
        piece = joined.part(args["start"] or 0, min(size, size if args["end"] is None else args["end"]))
    elif name == "getitem":
        sizes = [int(v.shape[joined.dim]) for v in source.meta["val"]]
        number = int(node.args[1])  # type: ignore[arg-type]
        piece = joined.part(sum(sizes[:number]), sum(sizes[: number + 1]))
    if piece is not None:
        return piece
    moved = carried(node, source, joined.dim)
    others = [n for n, p in operands.items() if n is not source]
    if moved is None or moved.factor != moved.divisor or any(operands[n] != WHOLE for n in others):
        raise Misplaced(f"{source.name} is {joined}, and this does not read a complete piece of it")
    for other in others:
        value = other.meta.get("val")
        if isinstance(value, torch.Tensor) and not _broadcasts_over(node, value, moved.dim):
            raise Misplaced(f"{other.name} is replicated where the other operand is {joined}")
    return joined.at(moved.dim)


def _place_sharded(node: fx.Node, operands: dict[fx.Node, Placement]) -> Placement:
    """Return the placement for an operator that keeps the entries of the sharded dimension apart, or moves them."""
    results: set[Placement] = set()
    for source, placement in operands.items():
        if not isinstance(placement, Shard):
            continue
        moved = carried(node, source, placement.dim, cut_along(node))
        if moved is None:
            raise Misplaced(
                f"{source.name} is {placement}, and this operator mixes that dimension or its position is lost"
            )
        moved_placement = placement.at(moved.dim, moved.factor, moved.divisor)
        if moved_placement is None:
            raise Misplaced(f"{source.name} is {placement}, and a shard would end inside an entry here")
        results.add(moved_placement)
    if len(results) > 1:
        raise Misplaced("its operands have different placements: " + "; ".join(sorted(map(str, results))))
    (result,) = results
    assert isinstance(result, Shard)
    for source, placement in operands.items():
        value = source.meta.get("val")
        if (
            placement == WHOLE
            and isinstance(value, torch.Tensor)
            and not _broadcasts_over(node, value, result.dim)
        ):
            raise Misplaced(f"{source.name} is replicated where the other operand is {result}")
    return result


def _broadcasts_over(node: fx.Node, value: torch.Tensor, dim: int) -> bool:
    """Tell whether a replicated operand broadcasts over the sharded dimension of the result."""
    result = node.meta["val"]
    if not isinstance(result, torch.Tensor):
        return True
    if has(node, Trait.POINTWISE | Trait.NORM) or is_operator(node, "graphopt.rotary"):
        operand_dim = value.dim() - (result.dim() - dim % result.dim())
        return operand_dim < 0 or bool(value.shape[operand_dim] == 1)
    return True


def _place_linear(node: fx.Node, placed: dict[fx.Node, Placement]) -> Placement:
    """Return the placement of a linear: a matrix sharded by columns gives a partial sum, by rows sharded channels."""
    args = arguments(node)
    x, weight, bias = (placement_of(args[n], placed) for n in ("input", "weight", "bias"))
    last = node.meta["val"].dim() - 1
    if PARTIAL in (weight, bias):
        raise Misplaced("its weights are partial sums")
    if x == PARTIAL:
        if weight != WHOLE or args["bias"] is not None:
            raise Misplaced("a bias added to a partial sum would count once per rank")
        return PARTIAL
    if isinstance(x, Shard) and x.dim == last:
        if (
            not isinstance(weight, Shard)
            or weight.dim != 1
            or (x.starts, x.length) != (weight.starts, weight.length)
        ):
            raise Misplaced(f"its input is {x}, and its matrix is not sharded by the same columns")
        if not x.even:
            raise Misplaced("two ranks have the same columns, which the sum would count twice")
        if args["bias"] is not None:
            raise Misplaced("its bias would be added once per rank; add it after the sum")
        return PARTIAL
    if isinstance(weight, Joined):
        if weight.dim != 0 or x != WHOLE or (args["bias"] is not None and bias != weight):
            raise Misplaced(f"its matrix is {weight}, its input is {x}, its bias is {bias}")
        return weight.at(last)
    if isinstance(weight, Shard):
        if weight.dim != 0 or x != WHOLE:
            raise Misplaced(f"its matrix is {weight}, and its input is {x}")
        same = isinstance(bias, Shard) and (bias.starts, bias.length) == (weight.starts, weight.length)
        if args["bias"] is not None and not same:
            raise Misplaced("its matrix is sharded by rows, and its bias is not sharded in the same way")
        return Shard(last, weight.starts, weight.length, weight.total)
    if bias != WHOLE:
        raise Misplaced("its bias is sharded, and its matrix is not")
    return x


def _place_cat(node: fx.Node, placed: dict[fx.Node, Placement]) -> Placement:
    """Return the placement of a concatenation; values sharded along its dimension become joined."""
    pieces = [placed[n] for n in node.args[0]]  # type: ignore[union-attr, index]
    dim = int(arguments(node)["dim"]) % node.meta["val"].dim()
    if all(p == WHOLE for p in pieces):
        return WHOLE
    if all(p == PARTIAL for p in pieces):
        return PARTIAL
    if all(isinstance(p, Shard) and p.dim == dim for p in pieces):
        return Joined(dim, tuple(p for p in pieces if isinstance(p, Shard)))
    return _place_sharded(node, {n: placed[n] for n in node.all_input_nodes})


_PLACEMENT_RULES: dict[str, Callable[[fx.Node, dict[fx.Node, Placement]], Placement]] = {
    "aten.linear": _place_linear,
    "aten.cat": _place_cat,
}

__all__ = [
    "PARTIAL", "WHOLE", "Joined", "Partial", "Placement", "Replicate", "Shard", "cut_along", "mark_cut", "placements",
]  # fmt: skip
