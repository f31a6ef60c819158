"""Extraction of a part of a program, between some of its values, as a separate program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import fx

from ..constraints import constraints_among
from ..errors import UsageError
from ..inputs import add_input
from .evaluate import needed_for
from .fold import drop_unread_weights

if TYPE_CHECKING:
    from ..program import Program


def extract(
    program: Program, reads: Mapping[str, fx.Node], writes: Mapping[str, fx.Node], *, all_given: bool = False
) -> Program:
    """Return the program that computes ``writes`` from ``reads``, other inputs where needed, and weights.

    Args:
        program: not changed; weights are shared.
        reads: values of the program by the names of the inputs that replace them.
        writes: values of the program by the names of the outputs they become.
        all_given: all inputs are always given, so none is kept only because another is filled from it.

    Raises:
        UsageError: the values written do not depend on a value read, or a name is in use.
    """
    part = program.copy()
    nodes = {node.name: node for node in part.graph.nodes}
    for name, node in reads.items():
        copied = nodes[node.name]
        value = copied.meta["val"]
        input_node = add_input(part, name, list(value.shape), value.dtype)
        copied.replace_all_uses_with(input_node)
    part.checkpoint.clear()
    named_outputs = dict(writes)
    outputs = {name: nodes[node.name] for name, node in named_outputs.items()}
    structure = {"dict": {name: {"leaf": name} for name in outputs}, "class": None}
    part.signature = replace(part.signature, outputs=structure)
    part.edit.set_outputs(list(outputs.values()))
    needed = needed_for([part.output_node], {})
    for node in reversed(list(part.graph.nodes)):
        if node not in needed and node.op == "call_function":
            part.graph.erase_node(node)
    part.changed()
    _drop_inputs(part, all_given)
    drop_unread_weights(part)
    missing = [name for name in reads if name not in part.input_nodes]
    if missing:
        raise UsageError(f"the outputs do not depend on {', '.join(missing)}")
    part.history, part.report = [], None
    part.changed()
    return part


def _drop_inputs(program: Program, all_given: bool) -> None:
    """Remove unused inputs; sizes are read from the remaining ones."""
    signature = program.signature
    unread = {
        name for name, node in program.input_nodes.items() if not node.users and name not in program.dials
    }
    likes = {
        spec.fill.like
        for name, spec in signature.inputs.items()
        if spec.fill is not None and name not in unread and not all_given
    }
    gone = unread - likes
    for name in gone:
        program.graph.erase_node(program.input_nodes[name])
    inputs = {
        n: replace(spec, fill=None) if spec.fill is not None and spec.fill.like in gone else spec
        for n, spec in signature.inputs.items()
        if n not in gone
    }
    used = {str(size) for spec in inputs.values() for size in spec.shape}
    sizes = {n: s for n, s in signature.sizes.items() if any(n in text for text in used)}
    program.signature = replace(
        signature,
        inputs=inputs,
        parameters={n: s for n, s in signature.parameters.items() if s.get("leaf") not in gone},
        sizes=sizes,
        constraints=constraints_among(signature.constraints, frozenset(signature.sizes), sizes),
    )
