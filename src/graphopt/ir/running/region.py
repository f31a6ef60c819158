"""Regions: parts of a graph between leaves and targets, evaluated on their own in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..ranks.rank_programs import ranks_of, unroll
from ..schema import argument, is_operator
from ..sizes import expression
from ..weights import Drawn, TensorSource, numel
from .evaluate import evaluate, last_uses
from .examples import rows_of
from .retype import in_type, widen

if TYPE_CHECKING:
    from ..program import Program


@dataclass
class Region:
    """Nodes that compute ``targets`` from ``leaves`` (values at which the region ends) and weights.

    Attributes:
        nodes: leaves, weights and operators in topological order.
        leaves: values that are inputs of the region.
        weights: weights that it reads.
        targets: values that it computes.
        ranks: how many ranks compute it together; 0 if it is not sharded.
    """

    nodes: list[fx.Node]
    leaves: list[fx.Node]
    weights: list[fx.Node]
    targets: list[fx.Node]
    ranks: int = 0

    @cached_property
    def operators(self) -> list[fx.Node]:
        """Nodes of the region that are neither leaves nor weights."""
        read = {*self.leaves, *self.weights}
        return [node for node in self.nodes if node not in read]

    @cached_property
    def graph(self) -> fx.Graph:
        """The region as a separate graph, made on demand, since most regions are never run."""
        graph = fx.Graph()
        read = {*self.leaves, *self.weights}
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            if node in read:
                copies[node] = graph.placeholder(node.name)
                copies[node].meta["val"] = node.meta["val"]
            else:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
        graph.output([copies[n] for n in self.targets])
        return graph if not self.ranks else unroll(graph, self.ranks)[0]

    def run(self, values: dict[str, Any], load: Callable[[fx.Node], torch.Tensor]) -> list[torch.Tensor]:
        """Return the targets, evaluated in float64; a weight is loaded at its first use and freed after its last.

        Args:
            values: the value of each leaf by node name.
            load: returns a weight by its placeholder.
        """
        graph = in_type(self.graph)
        freed = last_uses(graph.nodes)
        originals = {n.name: n for n in self.weights}
        computed: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for node in graph.nodes:
                if node.op == "placeholder":
                    if node.name in values:
                        value = values[node.name]
                        computed[node] = widen(value) if isinstance(value, torch.Tensor) else value
                    continue
                for used in node.all_input_nodes:
                    if used not in computed:
                        computed[used] = widen(load(originals[used.name]))
                if node.op == "output":
                    return [computed[n] for n in node.args[0]]
                computed[node] = evaluate(node, computed)
                for dead in freed.get(node, ()):
                    computed.pop(dead, None)
        raise AssertionError("a region without an output")

    def key(self, program: Program) -> tuple[Any, ...]:
        """Return a key that is equal for regions with the same operators, wiring and shapes."""
        position: dict[fx.Node, int] = {}
        read = {*self.leaves, *self.weights}
        key: list[Any] = []
        for index, node in enumerate(self.nodes):
            position[node] = index
            if node in read:
                value = node.meta.get("val")
                shape = (
                    tuple(str(program.size_text(s)) for s in value.shape)
                    if isinstance(value, torch.Tensor)
                    else str(value)
                )
                key.append(("leaf", shape, str(getattr(value, "dtype", ""))))
            else:
                key.append(
                    (node.op, node.target, _frozen(node.args, position), _frozen(node.kwargs, position))
                )
        return (*key, *(position[target] for target in self.targets))


_PLAIN = (int, float, str, type(None))


def _frozen(value: Any, position: dict[fx.Node, int]) -> Any:
    """Return a hashable form of an argument: nodes by position, numbers with their type, since 1 == 1.0 == True."""
    if isinstance(value, fx.Node):
        return (fx.Node, position[value])
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v, position) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, _frozen(v, position)) for k, v in value.items()))
    return (type(value), value) if type(value) in _PLAIN or isinstance(value, bool) else repr(value)


def cut(program: Program, targets: list[fx.Node], stop: Callable[[fx.Node], bool]) -> Region:
    """Return the region that computes ``targets``, ending at nodes for which ``stop`` holds, inputs and weights."""
    order: list[fx.Node] = []
    seen: set[fx.Node] = set()
    leaves: dict[fx.Node, None] = {}
    weights: dict[fx.Node, None] = {}
    work = [(node, False) for node in reversed(targets)]
    while work:
        node, ready = work.pop()
        if ready:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            if node.op == "placeholder" and node.name in program.weights:
                weights[node] = None
                order.append(node)
            elif node.op == "placeholder" or (stop(node) and node not in targets):
                leaves[node] = None
                order.append(node)
            else:
                work.append((node, True))
                work.extend((n, False) for n in reversed(node.all_input_nodes))
    return Region(order, list(leaves), list(weights), targets, ranks_of(program))


def evaluated(
    program: Program, targets: list[fx.Node], sources: list[fx.Node]
) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
    """Compute targets from random values of sources, in float64 at the sizes of capture.

    Returns:
        The values of the targets and of the sources; None if the targets also depend on another input or a weight.
    """
    region = cut(
        program, targets, lambda node: node in sources or isinstance(node.meta.get("val"), torch.SymInt)
    )
    tensors = {leaf for leaf in region.leaves if isinstance(leaf.meta.get("val"), torch.Tensor)}
    if region.weights or tensors != set(sources):
        return None
    sizes = {name: limits.hint for name, limits in program.signature.sizes.items()}
    values = {node.name: leaf_value(program, node, sizes, seed) for seed, node in enumerate(region.leaves)}

    def load(node: fx.Node) -> torch.Tensor:
        raise AssertionError(node)

    return region.run(values, load), [values[source.name] for source in sources]


def leaf_value(program: Program, node: fx.Node, sizes: dict[str, int], seed: int) -> Any:
    """Return a random value for a leaf of a region, at given sizes."""
    value = node.meta["val"]
    if isinstance(value, (int, float, bool)):
        return value
    if isinstance(value, torch.SymInt):
        return int(_substituted(program, value, sizes))
    if isinstance(value, (list, tuple)):
        return [leaf_tensor(program, v, sizes, seed + i) for i, v in enumerate(value)]
    if _are_slots(program, node):
        # tokens of a row are stored in different slots
        shape = [int(_substituted(program, s, sizes)) for s in value.shape]
        order = torch.randperm(shape[-1], generator=torch.Generator().manual_seed(seed))
        return order.to(value.dtype).expand(shape).contiguous()
    return leaf_tensor(program, value, sizes, seed, _rows(program, node))


def _are_slots(program: Program, node: fx.Node) -> bool:
    if node.meta["val"].dtype not in (torch.int64, torch.int32):
        return False
    # the node may belong to a rewritten copy, in which caches are stored differently
    same_node = next((n for n in program.graph.nodes if n.name == node.name), node)
    return any(
        is_operator(u, "graphopt.cache_store") and argument(u, "slots") is same_node for u in same_node.users
    )


def _rows(program: Program, node: fx.Node) -> int:
    """Return the number of values an integer tensor may have: rows of a table, or experts of an MoE layer."""
    moe_layers = [u for u in node.users if is_operator(u, "graphopt.routed_ffn") and u.args[1] is node]
    nested = [u for u in node.users if is_operator(u, "graphopt.nested_ffn") and u.args[1] is node]
    experts = [int(argument(u, "up").meta["val"].shape[0]) for u in moe_layers]
    return max([rows_of(node), *experts, *(len(argument(u, "widths")) for u in nested)])


def leaf_tensor(
    program: Program, value: torch.Tensor, sizes: dict[str, int], seed: int, rows: int = 2
) -> torch.Tensor:
    """Return a random tensor with the type and shape of a fake one at given sizes; integers are below ``rows``."""
    shape = [int(_substituted(program, s, sizes)) for s in value.shape]
    generator = torch.Generator().manual_seed(seed)
    if value.dtype is torch.bool:
        drawn = torch.rand(shape, generator=generator) < 0.75
        if drawn.dim() and drawn.shape[-1]:
            drawn[..., 0] = True
        return drawn
    if value.dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    if value.dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.complex128)
    return torch.randint(0, rows, shape, generator=generator).to(value.dtype)


def _substituted(program: Program, size: int | torch.SymInt, sizes: dict[str, int]) -> Any:
    if isinstance(size, int):
        return size
    value = expression(size)
    return value.subs({s: sizes[n] for s, n in program.symbols.items() if n in sizes})


def drawn_source(node: fx.Node, seed: int) -> TensorSource:
    """Return random values for a weight, scaled so that products keep their magnitude."""
    value = node.meta["val"]
    shape = tuple(int(s) for s in value.shape)
    fan_in = numel(shape[1:]) if len(shape) > 1 else 1
    return Drawn(
        shape, torch.float64 if value.dtype.is_floating_point else value.dtype, seed, max(fan_in, 1) ** -0.5
    )
