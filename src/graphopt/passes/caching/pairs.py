"""Scores and masks that tokens compute for pairs of tokens, such as top-k masks: of new tokens with all that came before.

What is added to the scores of attention may be computed from both tokens of a pair, by an indexer that picks the keys a
token attends to, or from one of them. Between it and the values of single tokens lies a region in which one dimension
stands for the queries and one for the keys. Values of keys are stored like keys; the region is computed for new queries
and all slots.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.compat import surely_equal
from ...ir.inputs import add_input
from ...ir.operators.traits import Trait, has
from ...ir.ranks.dimensions import sources_of
from ...ir.schema import arguments, is_operator, normal_call
from ...ir.sizes import expression
from .positions import AtCapacity, Decoder, NotCausal, rows_of_positions

if TYPE_CHECKING:
    from ...ir.program import Program

aten, composites = torch.ops.aten, torch.ops.graphopt
QUERY, KEY = "query", "key"
Labels = dict[int, str]
_SIZED = {
    "aten.expand": "size", "aten.reshape": "shape", "aten.new_ones": "size", "aten.new_zeros": "size",
    "aten.new_full": "size", "aten.full": "size", "aten.ones": "size", "aten.zeros": "size",
    "aten.broadcast_to": "size",
}  # fmt: skip


class Pairs:
    """The region before one bias: which of its dimensions are queries and which are keys.

    Args:
        decoder: of the program.
        bias: added to scores (batch, heads, queries, keys); depends on tokens.

    Attributes:
        nodes: of the region, in order.
        labels: of the dimensions of every value that the region computes or reads.
        keys: values of single tokens that are read as keys.

    Raises:
        NotCausal: an operator mixes the dimensions in a way that is not known.
    """

    def __init__(self, decoder: Decoder, bias: fx.Node):
        self.decoder, self.bias = decoder, bias
        self.labels: dict[fx.Node, Labels] = {}
        self.uses: dict[tuple[fx.Node, fx.Node], Labels] = {}
        self.keys: list[fx.Node] = []
        self.nodes = self._region(bias)
        self._members = set(self.nodes)
        self._label()

    def _region(self, bias: fx.Node) -> list[fx.Node]:
        found: set[fx.Node] = set()
        work = [bias]
        while work:
            node = work.pop()
            if node in found or not self._inside(node):
                continue
            found.add(node)
            work.extend(node.all_input_nodes)
        return [node for node in self.decoder.program.graph.nodes if node in found]

    def _inside(self, node: fx.Node) -> bool:
        """Tell whether a node computes something for pairs: it depends on tokens, and not on one token alone."""
        single = node in self.decoder.of_one_token and len(self.decoder.has_length(node)) == 1
        return node in self.decoder.moving and node.op == "call_function" and not single

    def _tokens(self, node: fx.Node) -> list[int]:
        """Return the dimensions of a value that are as long as the row of tokens."""
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)) and value:
            value = value[0]
        if not isinstance(value, torch.Tensor):
            return []
        return [d for d, size in enumerate(value.shape) if expression(size) == self.decoder.sequence]

    def _label(self) -> None:
        rank = self.bias.meta["val"].dim()
        self._add(self.bias, {rank - 2: QUERY, rank - 1: KEY})
        for node in reversed(self.nodes):
            labels = self.labels.get(node, {})
            for operand in node.all_input_nodes:
                self._add(operand, self._before(node, operand, labels), node)

    def _add(self, node: fx.Node, labels: Labels, user: fx.Node | None = None) -> None:
        wanted = self._tokens(node)
        labels = {dim: label for dim, label in labels.items() if dim in wanted}
        if user is not None:
            self.uses[user, node] = labels
        if node not in self._members:
            if node in self.decoder.moving and KEY in labels.values() and node not in self.keys:
                self.keys.append(node)
            return
        known = self.labels.setdefault(node, {})
        for dim, label in labels.items():
            if known.setdefault(dim, label) != label:
                raise NotCausal(node, "it pairs tokens in two ways at once")

    def _before(self, node: fx.Node, operand: fx.Node, labels: Labels) -> Labels:
        """Return which dimensions of an operand are queries and keys, given those of the result."""
        tokens = self._tokens(operand)
        if not tokens:
            return {}
        if node.target is operator.getitem:
            return {dim: label for dim, label in labels.items() if dim in tokens}
        rank = operand.meta["val"].dim()
        found: Labels = {}
        if is_operator(node, "aten.topk", "aten.sort"):
            found = dict(labels)
            last = int(arguments(node)["dim"]) % rank
            found[last] = KEY if QUERY in labels.values() or len(tokens) < 2 else QUERY
            return {dim: label for dim, label in found.items() if dim in tokens}
        args = arguments(node)
        if is_operator(node, "aten.scatter"):
            return {dim: label for dim, label in labels.items() if dim in tokens and dim < rank}
        if is_operator(node, "aten.gather"):
            along_dim = int(args["dim"]) % rank
            return {
                dim: label
                for dim, label in labels.items()
                if dim in tokens and (operand is args["index"] or dim != along_dim)
            }
        like = has(node, Trait.FACTORY) and node.meta["val"].dim() == rank
        if like:
            return {dim: label for dim, label in labels.items() if dim in tokens}
        if has(node, Trait.RESHAPE):
            before, after = operand.meta["val"].shape, node.meta["val"].shape
            for dim in tokens:
                same = [i for i in labels if expression(_numel(before[:dim]) - _numel(after[:i])) == 0]
                if not same:
                    raise NotCausal(node, "it mixes tokens with another dimension")
                found[dim] = labels[same[0]]
            return found
        if has(node, Trait.REDUCTION | Trait.SOFTMAX | Trait.SCAN) and node.meta["val"].dim() == rank:
            return {dim: label for dim, label in labels.items() if dim in tokens}
        for dim, label in labels.items():
            sources = sources_of(node, dim)
            if sources is None:
                if has(node, Trait.FACTORY):
                    continue
                raise NotCausal(node, "it mixes pairs of tokens in an unknown way")
            along = sources.get(operand)
            if along is not None and along.dim in tokens:
                if along.factor != along.divisor:
                    raise NotCausal(node, "it mixes tokens with another dimension")
                found[along.dim] = label
        unknown = [dim for dim in tokens if dim not in found]
        if unknown and not has(node, Trait.NEW):
            raise NotCausal(node, "it mixes pairs of tokens in an unknown way")
        return found


def _numel(sizes: Any) -> Any:
    product: Any = 1
    for size in sizes:
        product = product * size
    return product


class PairCaches:
    """Inserts what regions need: caches of the values of keys, and the regions for new queries and all slots.

    Args:
        program: that is being rewritten.
        decoder: of it.
        tables: values of positions for all slots.
        positions: the input of positions.
        slots: where new tokens are stored.
        batch: number of rows.
        capacity: number of slots as a size.
        first: the node before which values of positions are computed.
    """

    def __init__(
        self, program: Program, decoder: Decoder, tables: AtCapacity, positions: fx.Node, slots: fx.Node, batch: Any,
        capacity: Any, first: fx.Node,
    ):  # fmt: skip
        self.program, self.decoder, self.tables, self.first = program, decoder, tables, first
        self.positions, self.slots, self.batch, self.capacity = positions, slots, batch, capacity
        self._stored: dict[fx.Node, fx.Node] = {}
        self._tables: dict[tuple[fx.Node, tuple[tuple[int, str], ...]], Any] = {}
        self._sizes: dict[fx.Node, Any] = {}

    def bias(self, pairs: Pairs, user: fx.Node) -> fx.Node:
        """Return the bias on the scores of new queries for all slots, computed before its user."""
        copies: dict[fx.Node, Any] = {}
        for node in pairs.nodes:
            with self.program.edit.before(user):
                copies[node] = self._copy(pairs, node, copies)
        # a value of each key alone, of which nothing is computed for pairs
        found: fx.Node = copies[pairs.bias] if pairs.nodes else self._keys(pairs.bias)
        return found

    def _copy(self, pairs: Pairs, node: fx.Node, copies: dict[fx.Node, Any]) -> Any:
        labels = pairs.labels.get(node, {})

        def operand(value: fx.Node) -> Any:
            if value in copies:
                return copies[value]
            if isinstance(value.meta.get("val"), torch.SymInt):
                return self._size(value)
            return self._read(value, pairs.uses.get((node, value), {}))

        operands = dict(arguments(node)) if node.target is not operator.getitem else {}
        if not operands:
            return self.program.edit.call(node.target, *fx.map_arg(node.args, operand))
        sized = next((name for op, name in _SIZED.items() if is_operator(node, op)), None)
        mapped = {}
        for name, value in operands.items():
            if name == sized:
                mapped[name] = [self._length(i, s, labels, operand) for i, s in enumerate(value)]
            else:
                mapped[name] = fx.map_arg(value, operand)
        args, kwargs = normal_call(node.target, mapped)
        return self.program.edit.call(node.target, *args, **kwargs)

    def _length(self, dim: int, size: Any, labels: Labels, operand: Any) -> Any:
        if labels.get(dim) == KEY:
            return self.tables.capacity
        if labels.get(dim) == QUERY:
            return self.program.edit.call(aten.sym_size.int, self.positions, 1)
        return fx.map_arg(size, operand)

    def _size(self, node: fx.Node) -> Any:
        """Return a size: of the row of tokens, that of all slots; of rows, the number of rows."""
        if node not in self._sizes:
            size = expression(node.meta["val"])
            if size == self.decoder.sequence:
                self._sizes[node] = self.tables.capacity
            elif self.decoder.sequence not in size.free_symbols:
                self._sizes[node] = node
            else:
                args = fx.map_arg(node.args, self._size)
                if any(isinstance(a, fx.Node) for a in args):
                    with self.program.edit.before(self.first):
                        self._sizes[node] = self.program.edit.call(node.target, *args)
                else:
                    self._sizes[node] = node.target(*args)  # type: ignore[operator]
        return self._sizes[node]

    def _read(self, value: fx.Node, labels: Labels) -> Any:
        """Return a value from outside of a region: of new tokens, or of all slots where it is read as keys."""
        if value in self.decoder.moving:
            return self._keys(value) if KEY in labels.values() else value
        if not self.decoder.has_length(value):
            return value
        key = (value, tuple(sorted(labels.items())))
        if key not in self._tables:
            with self.program.edit.before(self.first):
                table = self.tables.value(value)
                queries = [dim for dim, label in labels.items() if label == QUERY]
                if queries:
                    table = rows_of_positions(self.program, table, queries[0], self.positions)
                self._tables[key] = table
        return self._tables[key]

    def _keys(self, value: fx.Node) -> fx.Node:
        """Return a value for all slots: of new tokens it is stored, of earlier ones it is read from a cache."""
        if value in self._stored:
            return self._stored[value]
        tensor = value.meta["val"]
        (dim,) = self.decoder.has_length(value)
        others = [d for d in range(1, tensor.dim()) if d != dim]
        sizes = [tensor.shape[d] for d in others]
        if dim == 0 or not all(isinstance(size, int) for size in sizes):
            raise NotCausal(value, f"it has sizes {tuple(tensor.shape)}, and caches have rows of one size")
        width = 1
        for size in sizes:
            width *= size
        call = self.program.edit.call
        name = f"index_cache_{len(self._stored)}"
        cache = add_input(self.program, name, [self.batch, 1, self.capacity, width], tensor.dtype)
        rows, new = (call(aten.sym_size.int, self.positions, d) for d in (0, 1))
        order = [0, dim, *others]
        flat = call(aten.reshape.default, call(aten.permute.default, value, order), [rows, 1, new, width])
        stored = call(composites.cache_store.default, cache, flat, self.slots)
        self.program.add_output(f"next_{name}", stored)
        wide = call(aten.reshape.default, stored, [rows, self.tables.capacity, *sizes])
        back = [order.index(d) for d in range(tensor.dim())]
        self._stored[value] = call(aten.permute.default, wide, back)
        return self._stored[value]


def pairs_of(decoder: Decoder, nodes: Iterable[fx.Node]) -> dict[fx.Node, Pairs]:
    """Return the region of every bias that depends on tokens, by bias.

    Raises:
        NotCausal: a region cannot be computed for new queries alone.
    """
    found: dict[fx.Node, Pairs] = {}
    for node in nodes:
        if is_operator(node, "graphopt.attention") and node in decoder.moving:
            bias = arguments(node)["bias"]
            if not isinstance(bias, fx.Node) or bias not in decoder.moving or bias in found:
                continue
            if not of_query(decoder, bias):
                found[bias] = Pairs(decoder, bias)
    return found


def of_query(decoder: Decoder, bias: fx.Node) -> bool:
    """Return whether a bias is one number for all keys of a token's query, (batch, heads, tokens, 1)."""
    return decoder.has_length(bias) == [2] and surely_equal(bias.meta["val"].shape[3], 1)
