"""Values that a decoder computes from positions and masks alone, extended to later tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from ...ir.compat import surely_equal
from ...ir.errors import VerificationError
from ...ir.running.evaluate import evaluate
from ...ir.running.fold import depends_on_weights_alone
from ...ir.running.region import cut, drawn_source, leaf_value
from ...ir.schema import arguments, is_operator
from ...ir.sizes import expression
from ...ir.weights import numel

if TYPE_CHECKING:
    from ...ir.program import Program

aten = torch.ops.aten
_SMALL = 1 << 24
_LONGEST, _WIDEST = 1 << 20, 1 << 11
_LOOKUPS = ("aten.embedding", "aten.index_select", "aten.index")


class NotCausal(ValueError):
    """Raised if a program cannot have a cache; names the node and the reason."""

    def __init__(self, node: fx.Node, reason: str):
        super().__init__(reason)
        self.node = node


@dataclass
class _DecoderInputs:
    """The inputs of a decoder and the values that depend on its tokens; valid for copies of the program too."""

    tokens: fx.Node
    positions: list[fx.Node]
    masks: list[fx.Node]
    zeros: list[fx.Node]
    sequence: sympy.Symbol
    batch: Any
    moving: set[fx.Node]


def tokens_of(program: Program) -> tuple[str, list[str]]:
    """Return the input of the tokens that a program continues, and the other required inputs: those of an encoder.

    Raises:
        NotCausal: no single input of text was found.
    """
    inputs = program.signature.inputs
    # optional inputs are positions and masks, a required one is text
    required = [n for n, spec in inputs.items() if spec.fill is None and n not in program.dials]
    texts = [n for n in required if len(inputs[n].shape) >= 2]
    if len(required) > 1:
        # an encoder reads a text of another length than the one that logits continue
        logits = program.outputs[logits_of(program)].meta["val"].shape
        lengths = {n: program.input_nodes[n].meta["val"].shape[1] for n in texts}
        texts = [n for n, size in lengths.items() if len(logits) == 3 and surely_equal(size, logits[1])]
        texts = [n for n in texts if isinstance(lengths[n], torch.SymInt)]
    if len(texts) != 1:
        first = program.input_nodes[required[0]] if required else next(iter(program.graph.nodes))
        raise NotCausal(
            first, f"it takes {', '.join(required) or 'nothing'}, where a decoder takes one row of tokens"
        )
    return texts[0], [n for n in required if n != texts[0]]


def logits_of(program: Program) -> str:
    """Return the output of logits: the one of that name, else the first."""
    return "logits" if "logits" in program.outputs else next(iter(program.outputs))


def _find_inputs(program: Program) -> _DecoderInputs:
    inputs = program.signature.inputs
    name, beside = tokens_of(program)
    tokens = program.input_nodes[name]
    fills = {n: spec.fill.rule for n, spec in inputs.items() if spec.fill is not None}
    nodes = program.input_nodes
    if beside:
        # masks of the encoder stay as they are
        fills = {n: rule for n, rule in fills.items() if inputs[n].shape[1:2] == inputs[name].shape[1:2]}
    positions = [nodes[n] for n, rule in fills.items() if rule.startswith("positions")]
    masks = [nodes[n] for n, rule in fills.items() if rule == "ones"]
    zeros = [nodes[n] for n, rule in fills.items() if rule == "zeros"]
    batch, sequence = tokens.meta["val"].shape[:2]
    if not isinstance(sequence, torch.SymInt) or not expression(sequence).is_Symbol:
        raise NotCausal(tokens, f"its rows have {sequence} tokens, no more and no less")
    moving: set[fx.Node] = {
        tokens,
        *(nodes[n] for n, rule in fills.items() if rule in ("following", "marks")),
    }
    for node in program.graph.nodes:
        holds = isinstance(node.meta.get("val"), (torch.Tensor, list, tuple))
        if node.op == "call_function" and holds and any(n in moving for n in node.all_input_nodes):
            moving.add(node)
    end = expression(batch) if isinstance(batch, torch.SymInt) else None
    return _DecoderInputs(tokens, positions, masks, zeros, expression(sequence), end, moving)


class Decoder:
    """Analysis of a decoder: its tokens, positions and masks, and the values that depend on tokens.

    Args:
        program: with one input of tokens (batch, sequence), and possibly positions and a mask of the same shape.

    Raises:
        NotCausal: it has no such inputs.
    """

    def __init__(self, program: Program):
        self.program = program
        inputs: _DecoderInputs = program.derived("decoder", lambda: _find_inputs(program), portable=True)
        self.tokens, self.positions, self.masks, self.zeros = (
            inputs.tokens, inputs.positions, inputs.masks, inputs.zeros,
        )  # fmt: skip
        self.sequence: sympy.Symbol = inputs.sequence
        self.batch: Any = inputs.batch
        self.moving: set[fx.Node] = inputs.moving
        self._of_one_token: set[fx.Node] | None = None

    def has_length(self, node: Any) -> list[int]:
        """Return the dimensions of a value whose size depends on the number of tokens."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return []
        return [
            d
            for d, size in enumerate(value.shape)
            if isinstance(size, torch.SymInt) and self.sequence in expression(size).free_symbols
        ]

    @property
    def of_one_token(self) -> set[fx.Node]:
        """Values that depend on tokens, one by one: on no value of pairs of tokens, unless through attention."""
        if self._of_one_token is None:
            found: set[fx.Node] = set()
            pairs: set[fx.Node] = set()
            for node in self.program.graph.nodes:
                if is_operator(node, "graphopt.attention"):
                    found.add(node)
                elif len(self.has_length(node)) > 1 or any(n in pairs for n in node.all_input_nodes):
                    pairs.add(node)
                elif node in self.moving:
                    found.add(node)
            self._of_one_token = found
        return self._of_one_token

    def still(self) -> dict[fx.Node, list[fx.Node]]:
        """Return values with a token dimension that tokens do not affect, and the nodes that combine them with tokens."""
        constant = depends_on_weights_alone(self.program)
        meetings: dict[fx.Node, list[fx.Node]] = {}
        for node in self.program.graph.nodes:
            if node in self.moving:
                for used in node.all_input_nodes:
                    if used not in self.moving and used not in constant and self.has_length(used):
                        meetings.setdefault(used, []).append(node)
        return meetings

    def follows_positions(self, node: fx.Node) -> bool:
        """Return whether a value at a token depends on that token's position alone, by shuffling positions."""
        if len(self.positions) != 1 or len(self.has_length(node)) != 1:
            return False
        (dim,) = self.has_length(node)
        region = cut(self.program, [node], lambda n: isinstance(n.meta.get("val"), torch.SymInt))
        tensors = [n for n in region.leaves if isinstance(n.meta.get("val"), torch.Tensor)]
        if tensors != self.positions:
            return False
        sizes = {
            n: 5 if self.program.symbols.get(self.sequence) == n else 1 for n in self.program.signature.sizes
        }
        values = {n.name: leaf_value(self.program, n, sizes, 0) for n in region.leaves}
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(5, generator=generator)
        positions = torch.tensor([[3, 4, 0, 9, 6]])
        results = []
        for order_of_positions in (positions, positions[:, order]):
            values[self.positions[0].name] = order_of_positions
            try:
                results.append(region.run(values, self._load)[0])
            except (RuntimeError, IndexError):
                return False
        return torch.equal(results[0].index_select(dim, order), results[1])

    def ignores_tokens(self, node: fx.Node) -> bool:
        """Return whether a value is the same for all tokens, wherever they stand: it follows from sizes and weights."""
        region = cut(self.program, [node], lambda n: isinstance(n.meta.get("val"), torch.SymInt))
        if any(isinstance(n.meta.get("val"), torch.Tensor) for n in region.leaves):
            return False
        sizes = {name: limits.hint for name, limits in self.program.signature.sizes.items()}
        value = region.run(
            {n.name: leaf_value(self.program, n, sizes, 0) for n in region.leaves}, self._load
        )[0]
        first = value
        for dim in self.has_length(node):
            first = first.narrow(dim, 0, 1)
        return value.numel() > 0 and bool((value == first).all())

    def limit(self) -> int | None:
        """Return the largest number of tokens that the program has positions for; None if there is no limit.

        The limit is a table with a row per position, a bias of fixed size, or the range of the size itself. Values
        that cannot be computed at the example's own size are ignored.
        """
        longest: int | None = self.program.derived("most tokens", self._limit, portable=True)
        return longest

    def _limit(self) -> int | None:
        most = self.program.signature.sizes[self.program.symbols[self.sequence]].high
        limits = [most] if most is not None else []
        lookups: dict[fx.Node, fx.Node] = {}
        for value in self.still():
            region = cut(self.program, [value], lambda n: isinstance(n.meta.get("val"), torch.SymInt))
            for node in region.nodes:
                if is_operator(node, *_LOOKUPS):
                    lookups.update(_tables_of(node))
            dims = self.has_length(value)
            plain = all(expression(value.meta["val"].shape[d]) == self.sequence for d in dims)
            if not plain and any(is_operator(u, "graphopt.attention") for u in value.users):
                limits.extend(self._longest([value], partial(_as_long, dims)))
        for indices, table in lookups.items():
            limits.extend(self._longest([indices], partial(_inside, table.meta["val"].shape[0])))
        return min(limits, default=None)

    def _longest(
        self, values: list[fx.Node], holds: Callable[[int, list[torch.Tensor]], bool]
    ) -> Iterator[int]:
        """Yield the largest number of tokens at which values can be computed and are valid, if there is one."""
        region = cut(self.program, values, lambda n: isinstance(n.meta.get("val"), torch.SymInt))
        name = self.program.symbols[self.sequence]
        # a table of pairs of tokens has quadratic size
        wide = any(len(self.has_length(n)) > 1 for n in region.nodes)
        most = _WIDEST if wide else _LONGEST

        def works(count: int) -> bool:
            sizes = {n: count if n == name else 1 for n in self.program.signature.sizes}
            leaves = {n.name: leaf_value(self.program, n, sizes, 0) for n in region.leaves}
            for node in (*self.positions, *self.masks, *self.zeros):
                if node in region.leaves:
                    shape = leaves[node.name].shape
                    numbers = torch.arange(count).expand(shape)
                    leaves[node.name] = (
                        numbers if node in self.positions else torch.full(shape, int(node in self.masks))
                    )
            try:
                return holds(count, region.run(leaves, self._load))
            except (RuntimeError, IndexError):
                return False

        low = min(self.program.signature.sizes[name].hint, most)
        if not works(low):
            return
        high = 2 * low
        while high <= most and works(high):
            low, high = high, 2 * high
        if high > most:
            return
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if works(middle) else (low, middle)
        yield low

    def _load(self, node: fx.Node) -> torch.Tensor:
        source = self.program.weights[node.name].source
        return source.load() if numel(source.shape) < _SMALL else drawn_source(node, 0).load()

    def sees_everything(self, mask: fx.Node) -> bool:
        """Return whether a mask hides nothing if no input hides anything."""
        visible = self._unpadded(mask)
        return visible is not None and bool(visible.bool().all())

    def is_one(self, value: fx.Node) -> bool:
        """Return whether a value is one everywhere if no input hides anything."""
        found = self._unpadded(value)
        return found is not None and found.numel() > 0 and bool((found == 1).all())

    def hides_later(self, bias: Any) -> bool:
        """Return whether a bias on scores hides all later tokens if no input hides anything."""
        if not isinstance(bias, fx.Node) or bias in self.moving:
            return False
        value = self._unpadded(bias)
        if value is None or value.dim() < 2 or value.shape[-1] != value.shape[-2]:
            return False
        later = torch.ones(value.shape[-2:], dtype=torch.bool).triu(1)
        return bool((value[..., later] < -1e4).all())

    def _unpadded(self, node: fx.Node) -> torch.Tensor | None:
        """Return a value for rows without padding; None if it depends on tokens."""
        region = cut(self.program, [node], lambda n: isinstance(n.meta.get("val"), torch.SymInt))
        tensors = [n for n in region.leaves if isinstance(n.meta.get("val"), torch.Tensor)]
        if not set(tensors) <= {*self.masks, *self.positions, *self.zeros}:
            return None
        sizes = {name: limits.hint for name, limits in self.program.signature.sizes.items()}
        values = {n.name: leaf_value(self.program, n, sizes, 0) for n in region.leaves}
        for leaf in tensors:
            shape = values[leaf.name].shape
            numbers = torch.arange(shape[-1]).expand(shape)
            values[leaf.name] = (
                numbers if leaf in self.positions else torch.full(shape, int(leaf in self.masks))
            )
        return region.run(values, self._load)[0]


class AtCapacity:
    """Copies values that depend on positions and masks, for all slots of a cache: rows without padding, batch 1.

    Args:
        decoder: to copy from.
        capacity: number of slots, or the node with that number.
    """

    def __init__(self, decoder: Decoder, capacity: int | fx.Node):
        self.decoder = decoder
        self.capacity = capacity
        self.copies: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """Return the copy of a node; new nodes are inserted at the insertion point.

        Raises:
            VerificationError: an operator does not accept these sizes.
        """
        if node not in self.copies:
            self.copies[node] = self._copy(node)
        return self.copies[node]

    def _copy(self, node: fx.Node) -> Any:
        decoder, program = self.decoder, self.decoder.program
        call = program.edit.call
        if node.op == "placeholder":
            if node in decoder.positions:
                numbers = call(aten.arange.default, self.capacity, dtype=node.meta["val"].dtype)
                return call(aten.unsqueeze.default, numbers, 0)
            if node in decoder.masks or node in decoder.zeros:
                fill = int(node in decoder.masks)
                return call(aten.full.default, [1, self.capacity], fill, dtype=node.meta["val"].dtype)
            return node
        if isinstance(node.meta.get("val"), torch.SymInt):
            return self._size(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
        return call(node.target, *args, **kwargs)

    def _size(self, node: fx.Node) -> Any:
        size = expression(node.meta["val"])
        if size == self.decoder.sequence:
            return self.capacity
        if size == self.decoder.batch:
            return 1
        if not size.free_symbols & {self.decoder.sequence, self.decoder.batch}:
            return node
        args = fx.map_arg(node.args, self.value)
        if any(isinstance(a, fx.Node) for a in args):
            return self.decoder.program.edit.call(node.target, *args)
        return evaluate(
            node, dict(zip(node.all_input_nodes, (self.value(n) for n in node.all_input_nodes), strict=True))
        )


def rows_of_positions(program: Program, table: fx.Node, dim: int, positions: fx.Node) -> fx.Node:
    """Take the entries of a table at each token's position: (1, ..., capacity, ...) or without the leading 1.

    Returns:
        A value (batch, ..., tokens, ...): the batch replaces a leading 1 or is added in front; the dimension of
        tokens stays in place.

    Raises:
        VerificationError: the table differs from row to row.
    """
    call = program.edit.call
    shape = list(table.meta["val"].shape)
    if dim > 0:
        if expression(shape[0]) != 1:
            raise VerificationError("it differs from row to row")
        table, dim, shape = call(aten.squeeze.dim, table, 0), dim - 1, shape[1:]
    # sizes that vary have to be read where the program runs
    shape = [
        call(aten.sym_size.int, table, d) if isinstance(size, torch.SymInt) else size
        for d, size in enumerate(shape)
    ]
    flat = call(aten.reshape.default, positions, [-1])
    rows = call(aten.index_select.default, table, dim, flat)
    batch, tokens = (call(aten.sym_size.int, positions, d) for d in (0, 1))
    split = call(aten.reshape.default, rows, [*shape[:dim], batch, tokens, *shape[dim + 1 :]])
    if dim == 0:
        return split
    order = [dim, *(d for d in range(len(shape) + 1) if d != dim)]
    return call(aten.permute.default, split, order)


def _tables_of(lookup: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield the indices into the first dimension of a table of fixed size, and the table."""
    args = arguments(lookup)
    if is_operator(lookup, "aten.embedding"):
        table, indices = args["weight"], args["indices"]
    elif is_operator(lookup, "aten.index_select"):
        table, indices = args["self"], args["index"] if args["dim"] == 0 else None
    else:
        table, indices = args["self"], next(iter(args["indices"]), None)
    rows = table.meta["val"].shape[0]
    if isinstance(indices, fx.Node) and isinstance(rows, int) and indices.meta["val"].dtype is not torch.bool:
        yield indices, table


def _inside(rows: int, count: int, values: list[torch.Tensor]) -> bool:
    return not values[0].numel() or -rows <= int(values[0].min()) <= int(values[0].max()) < rows


def _as_long(dims: list[int], count: int, values: list[torch.Tensor]) -> bool:
    return all(values[0].shape[dim] in (1, count) for dim in dims)


def size_of_input(node: Any) -> bool:
    """Return whether a node reads a size of an input."""
    return is_operator(node, "aten.sym_size") and node.args[0].op == "placeholder"
