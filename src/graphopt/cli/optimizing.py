"""``graphopt optimize``: run passes and save what they make."""

from __future__ import annotations

from typing import cast

from ..api import _steps
from ..ir.cost import cost
from ..ir.errors import UsageError
from ..ir.groups import barrier, rank
from ..ir.program import Program
from ..ir.running.examples import example_inputs
from ..ir.storage import require_savable
from ..passes.framework.holding import Verify
from ..passes.framework.manager import check_order, dump_to, run_pipeline
from .interrupts import on_interrupt, scores_in
from .output import note, show_json, text
from .places import place, require_empty
from .progress import Written
from .sources import read_context, read_program


def optimize_checkpoint(
    source: str,
    output: str,
    passes: str | None,
    plan_file: str | None,
    data: str | None,
    amount: tuple[int, int, int],
    work_dir: str | None,
    verify_with: str,
    print_after_all: bool,
    dump_dir: str | None,
    force: bool,
    as_json: bool,
    trust: bool,
) -> None:
    """Optimise a checkpoint and write the program."""
    with (
        place(output, force, (source, data, plan_file), folder=True),
        on_interrupt(lambda: scores_in(work_dir)),
    ):
        _optimize(
            source, output, passes, plan_file, data, amount, work_dir, verify_with, print_after_all, dump_dir,
            force, as_json, trust,
        )  # fmt: skip


def _optimize(
    source: str, output: str, passes: str | None, plan_file: str | None, data: str | None,
    amount: tuple[int, int, int], work_dir: str | None, verify_with: str, print_after_all: bool,
    dump_dir: str | None, force: bool, as_json: bool, trust: bool,
) -> None:  # fmt: skip
    if (passes is None) == (plan_file is None):
        raise UsageError("give a pipeline with -p, or a plan with --plan")
    if verify_with not in ("sites", "full", "off"):
        raise UsageError(f"--verify is sites, full or off, not {verify_with!r}")
    steps, plans = _steps(passes or (), plan_file)
    program = read_program(source, trust)
    require_savable(program)
    check_order(program, steps)
    context = read_context(program, data, amount, work_dir, as_json)
    if dump_dir is not None:
        require_empty(dump_dir, force)
    writer = dump_to(dump_dir) if dump_dir and rank() == 0 else None

    def dump(index: int, name: str, current: Program) -> None:
        if writer is not None:
            writer(index, name, current)
        if print_after_all:
            show = note if as_json else text
            show(f"# after pass {index}, {name}\n{current.text(weights=False, blocks=True)}\n")

    whole = None
    if verify_with == "full":
        whole = context.bound(program, context.data[0]) if context.data else example_inputs(program)
    checks = cast(Verify, verify_with)
    result = run_pipeline(program, steps, context, plans=plans, verify_with=checks, dump=dump, inputs=whole)
    if rank() == 0:
        with Written(f"writing {output}") as written:
            result.save(output, progress=written)
    barrier()
    if as_json:
        assert result.report is not None
        show_json(
            {
                "output": output,
                "report": result.report.as_dict(),
                "cost": cost(result).as_dict(),
                "operators": dict(result.operators),
            }
        )
    else:
        text(str(result.report))
        note(f"written: {output}")
