"""A rank's part of a value, computed from parts of what the value is computed from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ...ir.groups import TENSOR_PARALLEL
from ...ir.infer import same_value
from ...ir.operators.traits import Trait, has, named
from ...ir.program import Program
from ...ir.ranks.dimensions import sources_of
from ...ir.ranks.placement import Shard, mark_cut
from ...ir.running.fold import depends_on_weights_alone
from ...ir.schema import arguments, is_operator, normal_call, operator_name

dialect = torch.ops.graphopt
# the argument that names the sizes of a result
_SIZES = {"aten.reshape": "shape", "aten.expand": "size", **dict.fromkeys(named(Trait.NEW), "size")}


def even(total: int, ranks: int, dim: int) -> Shard:
    """Return the cut of ``total`` entries into equal parts."""
    length = total // ranks
    return Shard(dim, tuple(range(0, length * ranks, length)), length, total)


def key_value_cut(cut: Shard, key_value_heads: int) -> Shard | str:
    """Return which key-value heads the queries of each rank need, or why they cannot have just those."""
    group = cut.total // key_value_heads
    if cut.length % group and group % cut.length:
        return f"{cut.length} of {cut.total} heads a rank share {key_value_heads} key-value heads unevenly"
    count = max(1, cut.length // group)
    return Shard(1, tuple(start // group for start in cut.starts), count, key_value_heads)


@dataclass
class Cutter:
    """Makes nodes for parts of values, each once; they go to the editor's insertion point.

    A part is anything that says how it moves to another dimension (``at``): a rank's share, an order of heads.
    ``whole`` lists values that every rank computes whole before it cuts them, and why.
    """

    program: Program
    constant: set[fx.Node] = field(default_factory=set)
    made: dict[tuple[fx.Node, Any], fx.Node] = field(default_factory=dict)
    whole: list[tuple[fx.Node, str]] = field(default_factory=list)
    cut_cores: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.constant = set(depends_on_weights_alone(self.program))

    def part(self, node: fx.Node, cut: Any) -> fx.Node:
        """Return a node with this rank's part of a value."""
        if self.is_all(cut):
            return node
        key = (node, cut)
        if key not in self.made:
            found = self._through(node, cut)
            if isinstance(found, str):
                if node not in self.constant:
                    self.whole.append((node, found))
                found = self.take(node, cut)
            if found is not node:
                self.mark(found, cut)
            self.made[key] = found
        return self.made[key]

    def is_all(self, cut: Any) -> bool:
        """Tell whether every rank has all of the value."""
        return bool(cut.length == cut.total and len(cut.starts) > 1)

    def take(self, node: fx.Node, cut: Any) -> fx.Node:
        """Take the part of a value that exists whole."""
        return self.program.edit.call(
            dialect.local_slice.default, node, cut.dim, list(cut.starts), cut.length, TENSOR_PARALLEL
        )

    def mark(self, node: fx.Node, cut: Any) -> None:
        """Write down what a node is."""
        mark_cut(node, cut.dim)

    def keys(self, cut: Any, key_value_heads: int) -> Any:
        """Return the part of keys and values that a part of the queries needs, or why there is none."""
        return key_value_cut(cut, key_value_heads)

    def _through(self, node: fx.Node, cut: Any) -> fx.Node | str:
        if node.op != "call_function":
            return "it is an input"
        if is_operator(node, "graphopt.attention"):
            return self._attention(node, cut)
        root = _root(node)
        if root is not None and same_value(root.meta["val"], node.meta["val"]):
            return self.part(root, cut)
        sources = sources_of(node, cut.dim)
        if sources is None:
            return f"{operator_name(node.target)} mixes what would be cut"
        parts: dict[fx.Node, fx.Node] = {}
        wanted: dict[fx.Node, Any] = {}
        for operand, along in sources.items():
            if along is not None:
                moved = cut.at(along.dim, along.factor, along.divisor)
                if moved is None:
                    return f"the cut falls inside an entry of {operator_name(node.target)}"
                wanted[operand] = moved
        if not wanted and not is_operator(node, *_SIZES):
            return "nothing that it reads can be cut"
        for operand, moved in wanted.items():
            parts[operand] = self.part(operand, moved)
        return self._again(node, parts, cut)

    def _again(self, node: fx.Node, parts: dict[fx.Node, fx.Node], cut: Any) -> fx.Node:
        """Call the operator on parts, with the sizes that it names made to fit."""
        found = dict(arguments(node))
        name = _SIZES.get(operator_name(node.target))
        if name is not None:
            key = name if name in found else next(k for k in ("shape", "size") if k in found)
            sizes = list(found[key])
            if isinstance(sizes[cut.dim], int) and sizes[cut.dim] != -1:
                sizes[cut.dim] = cut.length
            found[key] = sizes
        if has(node, Trait.NEW):
            # it only says which type; the value that it named need not be computed whole
            dtype = found["self"].meta["val"].dtype
            typed = (n for n in self.program.weight_nodes if n.meta["val"].dtype == dtype)
            found["self"] = next(typed, found["self"])
        args, kwargs = normal_call(node.target, found)
        args, kwargs = fx.map_arg((args, kwargs), lambda n: parts.get(n, n))
        made = self.program.edit.call(node.target, *args, **kwargs)
        for key in ("stack_trace", "nn_module_stack"):
            if key in node.meta:
                made.meta[key] = node.meta[key]
        return made

    def _attention(self, node: fx.Node, cut: Any) -> fx.Node | str:
        if cut.dim != 1:
            return "attention mixes what would be cut"
        found = dict(arguments(node))
        keys = self.keys(cut, int(found["k"].meta["val"].shape[1]))
        if isinstance(keys, str):
            return keys
        found["q"] = self.part(found["q"], cut)
        found["k"], found["v"] = self.part(found["k"], keys), self.part(found["v"], keys)
        if found["bias"] is not None and found["bias"].meta["val"].shape[1] != 1:
            found["bias"] = self.part(found["bias"], cut)
        if found["sinks"] is not None:
            found["sinks"] = self.part(found["sinks"], cut.at(0))
        args, kwargs = normal_call(node.target, found)
        self.cut_cores.add(node)
        return self.program.edit.call(node.target, *args, **kwargs)


def _root(node: fx.Node) -> fx.Node | None:
    """The value that a chain of reshapes began with."""
    start: Any = node
    while has(start, Trait.RESHAPE):
        start = start.args[0]
    return start if start is not node and isinstance(start, fx.Node) else None


def local_starts(program: Program, cut: Shard) -> fx.Node:
    """Return a node with the place where this rank's part begins, a tensor of one integer."""
    name = f"starts.{cut.total}.{len(cut.starts)}"
    existing = [n for n in program.weight_nodes if program.weights[n.name].name == name]
    table = existing[0] if existing else program.edit.add_weight(
        name, torch.tensor(cut.starts), kind="constant", persistent=False
    )  # fmt: skip
    ranks = len(cut.starts)
    return program.edit.call(dialect.local_slice.default, table, 0, list(range(ranks)), 1, TENSOR_PARALLEL)


def all_reduce(program: Program, node: fx.Node) -> fx.Node:
    """Return the sum over ranks of a partial value."""
    return program.edit.call(dialect.all_reduce.default, node, TENSOR_PARALLEL)


def row_parallel(program: Program, cutter: Cutter, linear: fx.Node, cut: Shard) -> fx.Node:
    """Replace a linear by its part on each rank, the sum of all, and its bias, added once."""
    found = arguments(linear)
    call = program.edit.call
    with program.edit.before(linear):
        last = found["input"].meta["val"].dim() - 1
        x = cutter.part(found["input"], Shard(last, cut.starts, cut.length, cut.total))
        weight = cutter.part(found["weight"], Shard(1, cut.starts, cut.length, cut.total))
        total = all_reduce(program, call(torch.ops.aten.linear.default, x, weight))
        if found["bias"] is not None:
            total = call(torch.ops.aten.add.Tensor, total, found["bias"])
    program.edit.replace(linear, total)
    return total
