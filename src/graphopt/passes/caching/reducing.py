"""Reduction of a large decoder to a small one with the same kinds of layers, for comparisons that run whole programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.compat import surely_equal
from ...ir.errors import VerificationError
from ...ir.infer import infer
from ...ir.operators.traits import Trait, has
from ...ir.running.fold import drop_unread_weights
from ...ir.running.region import drawn_source
from ...ir.schema import is_operator
from ...ir.weights import Absent, InMemory, TensorSource, load_part, numel

if TYPE_CHECKING:
    from ...ir.anatomy import Layer
    from ...ir.program import Program

LARGE, MOST = 1 << 23, 1 << 28
"""Numbers of weights above which a program is reduced, and above which it is not run at all."""
ROWS = 512
"""Tokens that remain in a reduced vocabulary."""


@dataclass(frozen=True)
class FirstRows:
    """The first rows of a tensor."""

    source: TensorSource
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return (self.rows, *self.source.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""
        return self.source.dtype

    def load(self) -> torch.Tensor:
        """Read them, and no others if the source allows that."""
        return load_part(self.source, 0, 0, self.rows)


def reduced(program: Program) -> Program | None:
    """Return a program reduced to one layer of each kind and few tokens if it is large; None if that is too large as well.

    Weights without values are random. A program that is small enough is returned unchanged.
    """
    small = program
    if elements(program) >= LARGE:
        small = program.copy()
        first: dict[object, Layer] = {}
        cones: dict[fx.Node, int] = {}
        repeated = [
            layer
            for layer in small.anatomy.layers
            if first.setdefault(_kind(small, layer, cones), layer) is not layer
        ]
        for layer in reversed(repeated):
            small.remove(layer)
        drop_unread_weights(small)
        small = _with_few_tokens(small)
    if elements(small) >= MOST:
        return None
    absent = [n for n, w in small.weights.items() if isinstance(w.source, Absent)]
    if absent:
        small = small.copy() if small is program else small
        nodes = {n.name: n for n in small.weight_nodes}
        for seed, name in enumerate(absent):
            small.weights[name] = small.weights[name].with_source(drawn_source(nodes[name], seed))
    return small


def elements(program: Program) -> int:
    """Return the total number of values in a program's weights."""
    return sum(numel(w.source.shape) for w in program.weights.values())


def _kind(program: Program, layer: Layer, cones: dict[fx.Node, int]) -> object:
    """Return a key that layers share if they are the same computation on other weights and at another point of the stream.

    Values that a layer reads beside the stream (masks, rotary tables) are compared by their computation, including
    the values of small weights: layers with other frequencies are of another kind.
    """
    inside = {node: i for i, node in enumerate(n for block in layer.blocks for n in block.nodes)}
    stream: dict[fx.Node, int] = {}
    for block in layer.blocks:
        for node in (block.reads, block.add, block.writes):
            stream.setdefault(node, len(stream))

    def operand(node: fx.Node) -> object:
        if node in stream:
            return "stream", stream[node]
        if node in inside:
            return "inside", inside[node]
        if node.name in program.weights:
            return "weight", tuple(node.meta["val"].shape)
        return _cone(program, node, cones)

    def as_plain(node: fx.Node) -> object:
        plain = [a for a in (*node.args, *node.kwargs.items()) if not isinstance(a, fx.Node)]
        settings = [str(a) for a in plain if "%" not in str(a)]
        return str(node.target), tuple(settings), tuple(operand(n) for n in node.all_input_nodes)

    return tuple(tuple(as_plain(node) for node in block.nodes) for block in layer.blocks)


def _cone(program: Program, node: fx.Node, cones: dict[fx.Node, int]) -> int:
    """Return a number that equally computed values share; all values that depend on the stream have the same one."""
    work = [node]
    while work:
        current = work[-1]
        if current in cones:
            work.pop()
            continue
        missing = [n for n in current.all_input_nodes if n not in cones]
        if missing:
            work.extend(missing)
            continue
        work.pop()
        key: tuple[Any, ...]
        if current.name in program.weights:
            key = ("weight", tuple(current.meta["val"].shape), _values(program, current))
        elif current.op == "placeholder":
            key = ("input", current.name)
        else:
            plain = [a for a in (*current.args, *current.kwargs.items()) if not isinstance(a, fx.Node)]
            settings = tuple(str(a) for a in plain if "%" not in str(a))
            key = (str(current.target), settings, tuple(cones[n] for n in current.all_input_nodes))
        cones[current] = hash(key)
    return cones[node]


def _values(program: Program, node: fx.Node) -> object:
    source = program.weights[node.name].source
    if numel(source.shape) > 4096 or isinstance(source, Absent):
        return None
    return tuple(source.load().double().flatten().tolist())


def _with_few_tokens(program: Program) -> Program:
    """Return a program whose vocabulary has the first tokens only, or the same one if its vocabulary is unknown.

    Args:
        program: may be modified.
    """
    names = {n for n, w in program.weights.items() if n in _tables(program)}
    if not names:
        return program
    short = program.copy()
    nodes = {n.name: n for n in short.weight_nodes}
    for name in names:
        source: TensorSource = FirstRows(short.weights[name].source, ROWS)
        if isinstance(short.weights[name].source, InMemory):
            source = InMemory(source.load())
        short.weights[name] = short.weights[name].with_source(source)
        nodes[name].meta["val"] = short.fake(source.shape, source.dtype)
    try:
        for node in short.graph.nodes:
            if node.op == "call_function":
                node.meta["val"] = infer(short.mode, node.target, node.args, node.kwargs)
    except VerificationError:
        return program
    short.changed()
    return short


def _tables(program: Program) -> set[str]:
    """Return the weights with a row per token that are only used to embed inputs or compute outputs."""
    outputs = set(program.outputs.values())
    tables = set()
    for node in program.weight_nodes:
        rows = node.meta["val"].shape[0] if node.meta["val"].dim() else 0
        if (
            rows > ROWS
            and node.users
            and all(_of_tokens(program, node, u, outputs, rows) for u in node.users)
        ):
            tables.add(node.name)
    return tables


def _of_tokens(program: Program, weight: fx.Node, user: fx.Node, outputs: set[fx.Node], rows: int) -> bool:
    if is_operator(user, "aten.embedding"):
        index: Any = user.args[1]
        while has(index, Trait.RESHAPE | Trait.CAST):
            index = index.args[0]
        return user.args[0] is weight and isinstance(index, fx.Node) and index.op == "placeholder"
    if not is_operator(user, "aten.linear"):
        return False
    work = [user]
    while work:
        value = work.pop()
        result = value.meta["val"]
        # several values come of a split, as of queries, keys and values that one matrix makes
        if not isinstance(result, torch.Tensor) or not surely_equal(result.shape[-1], rows):
            return False
        if value in outputs:
            continue
        users = [u for u in value.users if u.op == "call_function"]
        if not users or any(len(_changing(program, u)) != 1 for u in users):
            return False
        work.extend(users)
    return True


def _changing(program: Program, node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if n.name not in program.weights]


__all__ = ["LARGE", "MOST", "ROWS", "FirstRows", "elements", "reduced"]
