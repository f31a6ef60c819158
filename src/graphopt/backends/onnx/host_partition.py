"""A program in two: what integers decide (masks, tables of positions) for the host, all else for the device."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...ir.errors import LoweringError
from ...ir.inputs import add_input, remove_input
from ...ir.program import Program
from ...ir.running.execute import run
from ...ir.running.fold import drop_unread_weights
from ...targets.partition import border
from ..checking.cases import Case


@dataclass(frozen=True)
class Split:
    """Two programs: ``host`` gives what ``device`` takes under the same names; None where there is nothing to prepare."""

    host: Program | None
    device: Program


def split(program: Program) -> Split:
    """Return a program's two parts; together they compute what it computes.

    Args:
        program: with fixed sizes; not changed.

    Raises:
        LoweringError: an output depends on integers alone, and a device would have nothing to do with it.
    """
    values = border(program)
    held = {node: name for name, node in program.outputs.items()}
    if any(node in held for node in values):
        name = next(held[n] for n in values if n in held)
        raise LoweringError(
            f"output {name!r} does not depend on what a device computes", hint="remove the output"
        )
    if not values:
        return Split(None, program)
    device = program.copy()
    places = {n.name: n for n in device.graph.nodes}
    for node in values:
        own = places[node.name]
        value = own.meta["val"]
        given = add_input(device, f"host_{node.name}", list(value.shape), value.dtype)
        device.edit.replace(own, given, record=False)
    _drop_unread_inputs(device)
    drop_unread_weights(device)
    host = program.copy()
    places = {n.name: n for n in host.graph.nodes}
    host.signature.outputs = {
        "dict": {f"host_{n.name}": {"leaf": f"host_{n.name}"} for n in values},
        "class": None,
    }
    before = list(host.output_node.all_input_nodes)
    host.edit.set_outputs([places[n.name] for n in values])
    host.edit.erase_dead(before)
    host.checkpoint.clear()
    host.edit.erase_dead([n for n in reversed(list(host.graph.nodes)) if n.op == "call_function"])
    _drop_unread_inputs(host)
    drop_unread_weights(host)
    return Split(host, device)


def _drop_unread_inputs(program: Program) -> None:
    for name, node in list(program.input_nodes.items()):
        if name in program.signature.inputs and not node.users:
            remove_input(program, name)


def prepared(case: Case, host: Program) -> Case:
    """Return inputs with what a host makes of them."""
    taken = {name: value for name, value in case.inputs.items() if name in host.input_nodes}
    return replace(case, inputs=case.inputs | run(host, taken))
