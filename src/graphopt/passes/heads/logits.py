"""How a decoder computes its logits, for passes that add outputs beside them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from ...ir.running.evaluate import needed_for
from ...ir.schema import arguments, is_operator

if TYPE_CHECKING:
    from ...ir.anatomy import Layer
    from ...ir.program import Program


@dataclass(frozen=True)
class Head:
    """The operators from the residual stream to the logits.

    Attributes:
        logits: (batch, sequence, vocabulary).
        projection: the linear whose output width is the vocabulary.
        hidden: (batch, sequence, size), the input of ``projection``.
        stream: the last value of the stream.
        path: the operators between the stream and the logits, in order.
    """

    logits: fx.Node
    projection: fx.Node
    hidden: fx.Node
    stream: fx.Node
    path: tuple[fx.Node, ...]


def find_head(program: Program) -> Head | str:
    """Return a decoder's head, or why there is none."""
    head: Head | str = program.derived("head", lambda: _find_head(program), portable=True)
    return head


def _find_head(program: Program) -> Head | str:
    logits = program.outputs.get("logits")
    if logits is None:
        return "it returns no logits"
    vocabulary = logits.meta["val"].shape[-1]
    if not program.anatomy.streams:
        return "no residual stream was recognised"
    # attached heads look like blocks of the stream; only the last block that leads to the logits counts
    ends = {node for block in program.anatomy.blocks for node in (block.writes, block.add)}
    back = needed_for([logits], dict.fromkeys(ends))
    reached = [n for n in program.graph.nodes if n in ends and n in back]
    if not reached:
        return "its logits are not computed from the end of a residual stream"
    stream = reached[-1]
    descending = {stream}
    path = []
    for node in program.graph.nodes:
        if node in back and node is not stream and any(n in descending for n in node.all_input_nodes):
            descending.add(node)
            path.append(node)
    wide = [n for n in path if is_operator(n, "aten.linear") and n.meta["val"].shape[-1] == vocabulary]
    if not wide:
        return "no linear makes its logits"
    projection = wide[-1]
    hidden = arguments(projection)["input"]
    if not isinstance(hidden, fx.Node) or hidden.meta["val"].dim() != 3 or projection not in descending:
        return "its head does not read (batch, sequence, size)"
    return Head(logits, projection, hidden, stream, tuple(path))


def layers_to_logits(program: Program) -> list[Layer]:
    """Return the layers that lead to the logits, without attached ones."""

    def find() -> list[Layer]:
        logits = program.outputs.get("logits")
        back = needed_for([logits], {}) if logits is not None else set()
        return [layer for layer in program.anatomy.layers if all(block.add in back for block in layer.blocks)]

    layers: list[Layer] = program.derived("layers to logits", find, portable=True)
    return layers


def value_size(node: fx.Node) -> int:
    """Return the number of channels of a value."""
    size = node.meta["val"].shape[-1]
    assert isinstance(size, int)
    return size


def dtype_of(node: fx.Node) -> torch.dtype:
    """Return the type of a value."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def repeat_path(program: Program, path: Iterable[fx.Node], now: dict[fx.Node, fx.Node]) -> None:
    """Repeat operators on other values; new nodes are inserted at the insertion point.

    Args:
        program: whose graph it is.
        path: operators in order; those whose operands do not change are skipped.
        now: the replacement of each value; the results of the repeated operators are added.
    """
    for node in path:
        if node not in now and any(n in now for n in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: now.get(n, n))
            now[node] = program.edit.call(node.target, *args, **kwargs)


def token_embedding(program: Program) -> fx.Node | None:
    """Return the embedding look-up of the tokens."""
    inputs = {n for n, spec in program.signature.inputs.items() if spec.fill is None}
    for node in program.anatomy.embedding:
        if is_operator(node, "aten.embedding"):
            indices = arguments(node)["indices"]
            if (
                isinstance(indices, fx.Node)
                and indices.op == "placeholder"
                and str(indices.meta.get("input")) in inputs
            ):
                return node
    return None
