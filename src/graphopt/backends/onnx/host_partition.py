"""A program in two: what integers decide (masks, tables of positions) for the host, all else for the device."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...ir.errors import LoweringError
from ...ir.program import Program
from ...ir.running.execute import run
from ...ir.running.extract import extract
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
    output_names = {node: name for name, node in program.outputs.items()}
    if any(node in output_names for node in values):
        name = next(output_names[n] for n in values if n in output_names)
        raise LoweringError(
            f"output {name!r} does not depend on what a device computes", hint="remove the output"
        )
    if not values:
        return Split(None, program)
    crossing = {f"host_{node.name}": node for node in values}
    device = extract(program, crossing, program.outputs, all_given=True)
    return Split(extract(program, {}, crossing, all_given=True), device)


def prepared(case: Case, host: Program) -> Case:
    """Return inputs with what a host makes of them."""
    inputs = {name: value for name, value in case.inputs.items() if name in host.input_nodes}
    return replace(case, inputs=case.inputs | run(host, inputs))
