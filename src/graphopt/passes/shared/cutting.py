"""A rank's shard of a value, computed from shards of its operands."""

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

composites = torch.ops.graphopt
# the argument that holds the sizes of a result
_SIZES = {"aten.reshape": "shape", "aten.expand": "size", **dict.fromkeys(named(Trait.NEW), "size")}


def even(total: int, ranks: int, dim: int) -> Shard:
    """Return the split of ``total`` entries into equal shards."""
    length = total // ranks
    return Shard(dim, tuple(range(0, length * ranks, length)), length, total)


def key_value_cut(cut: Shard, key_value_heads: int) -> Shard | str:
    """Return which key-value heads the queries of each rank need, or why those cannot be separated."""
    group = cut.total // key_value_heads
    if cut.length % group and group % cut.length:
        return f"{cut.length} of {cut.total} heads a rank share {key_value_heads} key-value heads unevenly"
    count = max(1, cut.length // group)
    return Shard(1, tuple(start // group for start in cut.starts), count, key_value_heads)


@dataclass
class Cutter:
    """Creates nodes for shards of values, each once, at the editor's insertion point.

    A cut is any object that can be carried over to another dimension (``at``): a rank's shard, an order of heads.
    ``in_full`` lists values that every rank computes in full before it slices them, and why.
    """

    program: Program
    constant: set[fx.Node] = field(default_factory=set)
    parts: dict[tuple[fx.Node, Any], fx.Node] = field(default_factory=dict)
    in_full: list[tuple[fx.Node, str]] = field(default_factory=list)
    cut_cores: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.constant = set(depends_on_weights_alone(self.program))

    def part(self, node: fx.Node, cut: Any) -> fx.Node:
        """Return a node with this rank's shard of a value."""
        if self.is_all(cut):
            return node
        key = (node, cut)
        if key not in self.parts:
            shard = self._through(node, cut)
            if isinstance(shard, str):
                if node not in self.constant:
                    self.in_full.append((node, shard))
                shard = self.take(node, cut)
            if shard is not node:
                self.mark(shard, cut)
            self.parts[key] = shard
        return self.parts[key]

    def is_all(self, cut: Any) -> bool:
        """Tell whether every rank has all of the value."""
        return bool(cut.length == cut.total and len(cut.starts) > 1)

    def take(self, node: fx.Node, cut: Any) -> fx.Node:
        """Return a slice of a value that exists in full."""
        return self.program.edit.call(
            composites.local_slice.default, node, cut.dim, list(cut.starts), cut.length, TENSOR_PARALLEL
        )

    def mark(self, node: fx.Node, cut: Any) -> None:
        """Record a node's placement in its metadata."""
        mark_cut(node, cut.dim)

    def keys(self, cut: Any, key_value_heads: int) -> Any:
        """Return the shard of keys and values that a shard of the queries needs, or why there is none."""
        return key_value_cut(cut, key_value_heads)

    def _through(self, node: fx.Node, cut: Any) -> fx.Node | str:
        if node.op != "call_function":
            return "it is an input"
        if is_operator(node, "graphopt.attention"):
            return self._attention(node, cut)
        root = _before_reshapes(node)
        if root is not None and same_value(root.meta["val"], node.meta["val"]):
            return self.part(root, cut)
        sources = sources_of(node, cut.dim)
        if sources is None:
            return f"{operator_name(node.target)} mixes entries of the dimension to split"
        shards: dict[fx.Node, fx.Node] = {}
        operand_cuts: dict[fx.Node, Any] = {}
        for operand, placement in sources.items():
            if placement is not None:
                operand_cut = cut.at(placement.dim, placement.factor, placement.divisor)
                if operand_cut is None:
                    return f"the split falls inside an entry of {operator_name(node.target)}"
                operand_cuts[operand] = operand_cut
        if not operand_cuts and not is_operator(node, *_SIZES):
            return "none of its operands can be split"
        for operand, operand_cut in operand_cuts.items():
            shards[operand] = self.part(operand, operand_cut)
        return self._repeat(node, shards, cut)

    def _repeat(self, node: fx.Node, shards: dict[fx.Node, fx.Node], cut: Any) -> fx.Node:
        """Call the operator on shards, with size arguments adjusted."""
        call_args = dict(arguments(node))
        name = _SIZES.get(operator_name(node.target))
        if name is not None:
            key = name if name in call_args else next(k for k in ("shape", "size") if k in call_args)
            sizes = list(call_args[key])
            if isinstance(sizes[cut.dim], int) and sizes[cut.dim] != -1:
                sizes[cut.dim] = cut.length
            call_args[key] = sizes
        if has(node, Trait.NEW):
            # the operand only gives the dtype, so it need not be computed in full
            dtype = call_args["self"].meta["val"].dtype
            typed = (n for n in self.program.weight_nodes if n.meta["val"].dtype == dtype)
            call_args["self"] = next(typed, call_args["self"])
        args, kwargs = normal_call(node.target, call_args)
        args, kwargs = fx.map_arg((args, kwargs), lambda n: shards.get(n, n))
        result = self.program.edit.call(node.target, *args, **kwargs)
        for key in ("stack_trace", "nn_module_stack"):
            if key in node.meta:
                result.meta[key] = node.meta[key]
        return result

    def _attention(self, node: fx.Node, cut: Any) -> fx.Node | str:
        if cut.dim != 1:
            return "attention mixes entries of the dimension to split"
        call_args = dict(arguments(node))
        keys = self.keys(cut, int(call_args["k"].meta["val"].shape[1]))
        if isinstance(keys, str):
            return keys
        call_args["q"] = self.part(call_args["q"], cut)
        call_args["k"], call_args["v"] = self.part(call_args["k"], keys), self.part(call_args["v"], keys)
        if call_args["bias"] is not None and call_args["bias"].meta["val"].shape[1] != 1:
            call_args["bias"] = self.part(call_args["bias"], cut)
        if call_args["sinks"] is not None:
            call_args["sinks"] = self.part(call_args["sinks"], cut.at(0))
        args, kwargs = normal_call(node.target, call_args)
        self.cut_cores.add(node)
        return self.program.edit.call(node.target, *args, **kwargs)


def _before_reshapes(node: fx.Node) -> fx.Node | None:
    """Return the value before a chain of reshapes; None if there is no reshape."""
    root: Any = node
    while has(root, Trait.RESHAPE):
        root = root.args[0]
    return root if root is not node and isinstance(root, fx.Node) else None


def local_starts(program: Program, cut: Shard) -> fx.Node:
    """Return a node with the position where this rank's shard begins, a tensor of one integer."""
    name = f"starts.{cut.total}.{len(cut.starts)}"
    existing = [n for n in program.weight_nodes if program.weights[n.name].name == name]
    table = existing[0] if existing else program.edit.add_weight(
        name, torch.tensor(cut.starts), kind="constant", persistent=False
    )  # fmt: skip
    ranks = len(cut.starts)
    return program.edit.call(composites.local_slice.default, table, 0, list(range(ranks)), 1, TENSOR_PARALLEL)


def all_reduce(program: Program, node: fx.Node) -> fx.Node:
    """Return the sum over ranks of a partial value."""
    return program.edit.call(composites.all_reduce.default, node, TENSOR_PARALLEL)


def row_parallel(program: Program, cutter: Cutter, linear: fx.Node, cut: Shard) -> fx.Node:
    """Replace a linear by its shard on each rank, their sum, and its bias, added once; return the result."""
    args = arguments(linear)
    call = program.edit.call
    with program.edit.before(linear):
        last = args["input"].meta["val"].dim() - 1
        x = cutter.part(args["input"], Shard(last, cut.starts, cut.length, cut.total))
        weight = cutter.part(args["weight"], Shard(1, cut.starts, cut.length, cut.total))
        total = all_reduce(program, call(torch.ops.aten.linear.default, x, weight))
        if args["bias"] is not None:
            total = call(torch.ops.aten.add.Tensor, total, args["bias"])
    program.edit.replace(linear, total)
    return total
