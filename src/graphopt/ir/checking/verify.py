"""The invariants of the graph, checked where it changed: order, values, weights, signature, shapes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..errors import VerificationError
from ..infer import describe_value, infer, same_value
from ..ranks.placement import placements
from ..ranks.rank_programs import ranks_of
from ..running.execute import interpret
from ..running.retype import retyped, widen
from ..schema import is_mutable, operator_name
from .comparison import relative_error

if TYPE_CHECKING:
    from ..program import Program


def verify(program: Program, nodes: Iterable[fx.Node] | None = None) -> None:
    """Check the structure of the whole graph, and the shapes of ``nodes`` (of all if None).

    Checking the structure costs about a microsecond a node; inferring shapes again costs milliseconds a node,
    so passes infer only what they touched.

    Raises:
        VerificationError: with the node, its source line and the graph around it.
    """
    _structure(program)
    if ranks_of(program):
        placements(program)
    for node in program.graph.nodes if nodes is None else nodes:
        if node._erased or node.op != "call_function":
            continue
        try:
            value = infer(program.mode, node.target, node.args, node.kwargs)
        except VerificationError as error:
            raise _at(program, node, str(error)) from error
        if not same_value(value, node.meta["val"]):
            raise _at(
                program,
                node,
                f"its recorded value is {describe_value(node.meta['val'])}, "
                f"but the operator returns {describe_value(value)}",
            )


def _structure(program: Program) -> None:
    seen: set[fx.Node] = set()
    names: set[str] = set()
    for node in program.graph.nodes:
        if node.name in names:
            raise _at(program, node, "its name is used twice")
        names.add(node.name)
        for used in node.all_input_nodes:
            if used not in seen:
                raise _at(program, node, f"it reads {used.name}, which is not defined before it")
        seen.add(node)
        if node.op == "call_function":
            if "val" not in node.meta:
                raise _at(program, node, "it has no recorded value; make nodes with program.edit")
            if is_mutable(node.target):
                raise _at(program, node, f"{operator_name(node.target)} writes in place")
        elif node.op == "placeholder":
            if node.name not in program.weights and "input" not in node.meta:
                raise _at(program, node, "it is neither a weight nor an input")
        elif node.op != "output":
            raise _at(program, node, f"a program cannot have operations of kind {node.op}")
    _tables(program, seen, names)


def _tables(program: Program, seen: set[fx.Node], names: set[str]) -> None:
    missing = [name for name in program.weights if name not in names]
    if missing:
        raise VerificationError(f"weights without a placeholder: {', '.join(missing[:5])}")
    for node in program.weight_nodes:
        weight = program.weights[node.name]
        value = node.meta["val"]
        if (
            tuple(int(s) for s in value.shape) != tuple(weight.source.shape)
            or value.dtype != weight.source.dtype
        ):
            raise _at(
                program,
                node,
                f"weight {weight.name} is {describe_value(value)}, but its values are {weight.source.dtype} "
                f"{list(weight.source.shape)}",
            )
    inputs = set(program.input_nodes)
    expected = set(program.signature.inputs) | set(program.dials)
    if inputs != expected:
        raise VerificationError(
            f"the graph takes {sorted(inputs)}, but the signature lists {sorted(expected)}"
        )
    results = program.output_node.args[0]
    if not isinstance(results, (list, tuple)) or len(results) != len(program.signature.output_names):
        raise VerificationError("the graph does not return the number of values that the signature lists")
    for name, node in program.checkpoint.items():
        if node not in seen:
            raise VerificationError(
                f"the node that computes the checkpoint's {name!r} was erased", node=node.name
            )


def _at(program: Program, node: fx.Node, reason: str) -> VerificationError:
    from ..text import around

    return VerificationError(
        f"{node.name}: {reason}\n{around(program, node)}", node=node.name, source=program.source_line(node)
    )


def compare_programs(before: Program, after: Program, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Run both programs, streamed, in float64, so that rounding hides no errors; return the relative error of each output
    they share.

    Args:
        before: the reference.
        after: what is checked.
        inputs: by input name, for both; run-time settings that are not among them have their defaults.
    """
    first, second = (_run(p, inputs) for p in (before, after))
    return {name: relative_error(second[name], first[name]) for name in first if name in second}


def _run(program: Program, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    dials = {name: torch.tensor(dial.default, dtype=torch.float64) for name, dial in program.dials.items()}
    inputs = dials | inputs
    wide = retyped(program, shapes=False)
    return interpret(wide, {name: widen(value) for name, value in inputs.items()})
