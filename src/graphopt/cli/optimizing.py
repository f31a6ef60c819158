"""``graphopt optimize``: run passes and save what they make."""

from __future__ import annotations

from typing import cast

from ..api import read_steps, run_passes
from ..ir.cost import cost
from ..ir.errors import UsageError
from ..ir.groups import barrier, rank
from ..ir.program import Program
from ..passes.holding import Verify
from ..passes.manager import check_order, dump_to
from .app import Optimize
from .interrupts import scores_in
from .output import note, show_json, text
from .places import place, require_empty
from .progress import Written
from .sources import read_context, read_program


def optimize_checkpoint(given: Optimize) -> None:
    """Optimise a checkpoint and write the program."""
    read = (given.checkpoint, given.data, given.plan_file)
    with place(given.output, given.force, read, folder=True), scores_in(given.work_dir):
        result = _optimized(given)
        if rank() == 0:
            with Written(f"writing {given.output}") as written:
                result.save(given.output, progress=written)
        barrier()
        assert result.report is not None
        if given.as_json:
            found = {
                "output": given.output,
                "report": result.report.as_dict(),
                "cost": cost(result).as_dict(),
            }
            show_json({**found, "operators": dict(result.operators)})
        else:
            text(str(result.report))
            note(f"written: {given.output}")


def _optimized(given: Optimize) -> Program:
    if (given.passes is None) == (given.plan_file is None):
        raise UsageError("give a pipeline with -p, or a plan with --plan")
    if given.verify_with not in ("sites", "full", "off"):
        raise UsageError(f"--verify is sites, full or off, not {given.verify_with!r}")
    steps, plans = read_steps(given.passes or (), given.plan_file)
    program = read_program(given.checkpoint, given.trust, to_save=True)
    check_order(program, steps)
    context = read_context(program, given, given.work_dir)
    if given.dump_dir is not None:
        require_empty(given.dump_dir, given.force)
    write = dump_to(given.dump_dir) if given.dump_dir and rank() == 0 else None

    def dump(index: int, name: str, current: Program) -> None:
        if write is not None:
            write(index, name, current)
        if given.print_after_all:
            show = note if given.as_json else text
            show(f"# after pass {index}, {name}\n{current.text(weights=False, blocks=True)}\n")

    return run_passes(program, steps, context, plans=plans, verify=cast(Verify, given.verify_with), dump=dump)
