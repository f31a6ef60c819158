"""Training-time branches: parallel chains of linear operators from one value to a sum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from ..operators.traits import Trait, has
from ..running.fold import depends_on_weights_alone
from ..schema import is_operator
from .blocks import Branches

if TYPE_CHECKING:
    from ..program import Program

_CONVOLUTION = Trait.CONVOLUTION | Trait.TRANSPOSED
_LINEAR = _CONVOLUTION | Trait.MEAN_POOLING | Trait.PADDING


def find_branches(program: Program, sums: set[fx.Node]) -> list[Branches]:
    """Return sums whose terms are chains of linear operators from one source, one of them a convolution.

    Args:
        program: a canonical graph.
        sums: additions on residual streams; those whose branches are all linear count as branches instead.
    """
    del sums
    constant = depends_on_weights_alone(program)
    inner_sums: set[fx.Node] = set()
    branches: list[Branches] = []
    for node in reversed(list(program.graph.nodes)):
        if node in inner_sums or not is_operator(node, "aten.add"):
            continue
        leaves = _leaves(node, inner_sums)
        if leaves is None:
            continue
        paths = [_chain(leaf, constant) for leaf in leaves]
        source = _common_source(paths, leaves)
        if source is None:
            continue
        trimmed = [_from(path, source) for path in paths]
        convolutions = sum(any(has(n, _CONVOLUTION) for n in path) for path in trimmed)
        if convolutions == 0:
            continue
        evidence = [f"{len(trimmed)} linear paths from {source.name}, {convolutions} with a convolution"]
        branches.append(Branches(source, node, trimmed, evidence))
    branches.reverse()
    return branches


def _leaves(node: fx.Node, inner_sums: set[fx.Node]) -> list[fx.Node] | None:
    leaves: list[fx.Node] = []
    if len(node.args) != 2 or node.kwargs:
        return None
    for operand in node.args:
        if not isinstance(operand, fx.Node):
            return None
        if is_operator(operand, "aten.add") and len(operand.users) == 1:
            inner = _leaves(operand, inner_sums)
            if inner is not None:
                inner_sums.add(operand)
                leaves.extend(inner)
                continue
        leaves.append(operand)
    return leaves


def _chain(leaf: fx.Node, constant: set[fx.Node]) -> list[fx.Node]:
    """Return the chain of linear operators that ends in ``leaf``, with its source first."""
    chain = [leaf]
    node: Any = leaf
    while _linear(node, constant):
        changing = [a for a in node.args if isinstance(a, fx.Node) and a not in constant]
        if len(changing) != 1:
            break
        node = changing[0]
        chain.append(node)
    chain.reverse()
    return chain


def _linear(node: Any, constant: set[fx.Node]) -> bool:
    if has(node, _LINEAR) or is_operator(node, "aten.batch_norm", "aten.slice"):
        return True
    return is_operator(node, "aten.mul", "aten.div") and _constant_factor(node, constant)


def _constant_factor(node: fx.Node, constant: set[fx.Node]) -> bool:
    return any(not isinstance(a, fx.Node) or a in constant for a in node.args[1:]) or node.args[0] in constant


def _common_source(paths: list[list[fx.Node]], leaves: list[fx.Node]) -> fx.Node | None:
    shared = [node for node in reversed(paths[0]) if all(node in path for path in paths[1:])]
    if not shared:
        return None
    # the latest value on all paths
    return shared[0]


def _from(path: list[fx.Node], source: fx.Node) -> list[fx.Node]:
    return path[path.index(source) + 1 :]
