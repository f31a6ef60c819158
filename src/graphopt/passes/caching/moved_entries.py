"""Where the entries of a value come from, found by moving numbers through the reshapes and permutations that lead to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.operators.traits import Trait, has
from ...ir.running.evaluate import evaluate
from ...ir.schema import arguments, is_operator, operator_name
from ...ir.sizes import expression

if TYPE_CHECKING:
    from ...ir.program import Program

ELSEWHERE = -1
"""Stands for entries that come from none of the sources."""


class Untraceable(ValueError):
    """Raised if entries do not only move on the way to a value; says what else happens to them."""


def moved(program: Program, target: fx.Node, sources: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor:
    """Return the numbers of the sources' entries at the places to which they are moved in ``target``.

    Casts and factors that are numbers are passed over. A rotation is passed over as well, as if its angle were 0.

    Args:
        program: with both.
        target: where the way ends.
        sources: numbers for each source's entries, of the shape that :func:`sizes_of` gives; other projections that
            the way comes from give ``ELSEWHERE``.

    Raises:
        Untraceable: something else is computed on the way.
    """
    values: dict[fx.Node, Any] = dict(sources)
    work = [target]
    while work:
        node = work[-1]
        if node in values:
            work.pop()
            continue
        held = node.meta.get("val")
        if isinstance(held, torch.SymInt):
            values[node] = _number(program, held)
            continue
        if has(node, Trait.MIXING):
            values[node] = torch.full(sizes_of(program, node), ELSEWHERE)
            continue
        kept = _kept(node)
        if kept is None and not (has(node, Trait.MOVEMENT) and not has(node, Trait.PADDING | Trait.LOOKUP)):
            what = operator_name(node.target) if node.op == "call_function" else f"the input {node.name}"
            raise Untraceable(f"{what} lies between its projection and its attention")
        needed = [kept] if kept is not None else node.all_input_nodes
        waiting = [n for n in needed if n not in values]
        if waiting:
            work.extend(waiting)
            continue
        work.pop()
        values[node] = values[kept] if kept is not None else evaluate(node, values)
    result = values[target]
    assert isinstance(result, torch.Tensor)
    return result


def _kept(node: fx.Node) -> fx.Node | None:
    """Return the operand whose entries an operator leaves where they are, though it may turn or scale them."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return None
    scaled = is_operator(node, "aten.mul", "aten.div") and not isinstance(node.args[1], fx.Node)
    if scaled or has(node, Trait.CAST) or is_operator(node, "graphopt.rotary"):
        return first
    return None


def sizes_of(program: Program, node: fx.Node) -> list[int]:
    """Return the shape of a value at the sizes of capture."""
    return [_number(program, size) for size in node.meta["val"].shape]


def _number(program: Program, size: Any) -> int:
    hints = {s: program.signature.sizes[n].hint for s, n in program.symbols.items()}
    return int(expression(size).subs(hints))


def by_head(placed: torch.Tensor) -> torch.Tensor:
    """Return (heads, size) of numbers (batch, heads, tokens, size) that are the same for every token.

    Raises:
        Untraceable: they differ.
    """
    one = placed[:1, :, :1]
    if placed.dim() != 4 or not torch.equal(placed, one.expand_as(placed)):
        raise Untraceable("heads are not laid out alike for every token")
    return one[0, :, 0]


def rotations(target: fx.Node) -> list[fx.Node]:
    """Return the rotations between a value and its projections."""
    found: list[fx.Node] = []
    work, seen = [target], {target}
    while work:
        node = work.pop()
        if is_operator(node, "graphopt.rotary"):
            found.append(node)
            following = [arguments(node)["x"]]
        elif node.op != "call_function" or has(node, Trait.MIXING):
            continue
        else:
            following = node.all_input_nodes
        work.extend(n for n in following if n not in seen)
        seen.update(following)
    return found


__all__ = ["ELSEWHERE", "Untraceable", "by_head", "moved", "rotations", "sizes_of"]
