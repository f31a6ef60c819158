"""Compiled decoding: everything between two attentions is compiled as one piece, instead of one call per operator."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

_COMPILED: dict[str, Callable[..., Any]] = {}
"""Compiled pieces by their text: identical layers share one."""


def in_pieces(graph: fx.Graph, step: fx.Node) -> fx.GraphModule:
    """Return a module that runs a graph piece by piece, each compiled by torch.compile when it is first called.

    Nodes that read ``step`` (caches and attentions, whose lengths change with every token) are not compiled. Pieces
    alternate with such nodes; a piece contains all nodes with the same number of alternations before them. Pieces with
    the same text are compiled once and called with different weights, so that a model of many layers compiles three.

    Args:
        graph: of tensors, and of functions of ``step``.
        step: a placeholder.
    """
    depth: dict[fx.Node, int] = {}
    step_readers = {n for n in graph.nodes if n.op == "call_function" and step in n.all_input_nodes}
    for node in graph.nodes:
        depths = [depth[n] + (n in step_readers and node not in step_readers) for n in node.all_input_nodes]
        depth[node] = max(depths, default=0)
    root, outer = nn.Module(), fx.Graph()
    copies = {n: outer.placeholder(n.name) for n in graph.nodes if n.op == "placeholder"}
    calls = [n for n in graph.nodes if n.op == "call_function"]
    for number in range(1 + max((depth[n] for n in calls), default=0)):
        nodes = [n for n in calls if depth[n] == number and n not in step_readers]
        if nodes:
            members = set(nodes)
            reads = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in members))
            writes = [n for n in nodes if any(user not in members for user in n.users)]
            name = f"piece_{number}"
            root.add_module(name, Piece(_piece_graph(nodes, reads, writes)))
            results = outer.call_module(name, tuple(copies[n] for n in reads))
            for index, node in enumerate(writes):
                copies[node] = outer.call_function(_item, (results, index))
        for node in calls:
            if node in step_readers and depth[node] == number:
                copies[node] = outer.node_copy(node, lambda n: copies[n])
    outer.output(fx.map_arg(graph.output_node().args[0], lambda n: copies[n]))
    return fx.GraphModule(root, outer)


def _item(values: tuple[torch.Tensor, ...], index: int) -> torch.Tensor:
    return values[index]


def _piece_graph(nodes: list[fx.Node], reads: list[fx.Node], writes: list[fx.Node]) -> fx.Graph:
    """Return a separate graph of these nodes, whose names depend on their order alone."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(f"read_{index}") for index, node in enumerate(reads)}
    for node in nodes:
        args, kwargs = (fx.map_arg(a, lambda n: copies[n]) for a in (node.args, node.kwargs))
        copies[node] = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
    graph.output(tuple(copies[n] for n in writes))
    return graph


class Piece(nn.Module):
    """A compiled part of a step; runs uncompiled once any compilation has failed."""

    failed = False

    def __init__(self, graph: fx.Graph):
        super().__init__()
        self.text = str(graph)
        self.plain = fx.GraphModule(nn.Module(), graph)
        if self.text not in _COMPILED:
            _COMPILED[self.text] = torch.compile(self.plain)

    def forward(self, *values: Any) -> Any:
        """Run the piece."""
        if Piece.failed:
            return self.plain(*values)
        try:
            return _COMPILED[self.text](*values)
        except Exception as error:
            results = self.plain(*values)  # raises if the values themselves are at fault
            Piece.failed = True
            reason = str(error).strip().splitlines() or [type(error).__name__]
            warnings.warn(
                f"compilation failed, decoding continues without it: {reason[0]}",
                RuntimeWarning,
                stacklevel=2,
            )
            return results
