"""Partition of a program: the host computes what depends on integers alone (masks, position tables)."""

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
    """Two programs: outputs of ``host`` are inputs of ``device`` with the same names; ``host`` is None if not needed."""

    host: Program | None
    device: Program


def split(program: Program) -> Split:
    """Return the two partitions of a program, which together compute the same outputs.

    Args:
        program: with fixed sizes; not changed.

    Raises:
        LoweringError: an output depends on integers alone, so the device would not compute it.
    """
    values = border(program)
    output_names = {node: name for name, node in program.outputs.items()}
    if any(node in output_names for node in values):
        name = next(output_names[n] for n in values if n in output_names)
        raise LoweringError(
            f"output {name!r} does not depend on anything that the device computes", hint="remove the output"
        )
    if not values:
        return Split(None, program)
    crossing = {f"host_{node.name}": node for node in values}
    device = extract(program, crossing, program.outputs, all_given=True)
    return Split(extract(program, {}, crossing, all_given=True), device)


def prepared(case: Case, host: Program) -> Case:
    """Return the inputs together with the outputs of the host partition."""
    inputs = {name: value for name, value in case.inputs.items() if name in host.input_nodes}
    return replace(case, inputs=case.inputs | run(host, inputs))
