"""``graphopt optimize``: run passes and save what they make; ``graphopt plan``: every site of a pipeline, and why."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, cast

from ..api import plan_passes, read_steps, run_passes
from ..ir.cost import cost
from ..ir.errors import PassRefusedError, UsageError
from ..ir.groups import barrier, rank
from ..ir.program import Program
from ..ir.storage.atomic import atomic_file
from ..passes.framework.base import Pass
from ..passes.framework.holding import Verify
from ..passes.framework.manager import check_order, dump_to
from ..passes.framework.pipeline import as_passes
from ..passes.framework.plan import Plan, write_plans
from . import app
from .output import note, show_json, table, text
from .places import place, require_empty, scores_in
from .progress import writing
from .sources import read_context, read_program


def optimize_checkpoint(given: app.Optimize) -> None:
    """Optimise a checkpoint and write the program."""
    read = (given.checkpoint, given.data, given.plan_file)
    with place(given.output, given.force, read, folder=True), scores_in(given.work_dir):
        result = _optimized(given)
        if rank() == 0:
            with writing(given.output) as written:
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


def _optimized(given: app.Optimize) -> Program:
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


def plan_checkpoint(given: app.Plan) -> None:
    """Plan a pipeline and show or write the plan."""
    with place(given.output, given.force, (given.checkpoint, given.data)), scores_in(given.work_dir):
        steps = as_passes(given.passes)
        program = read_program(given.checkpoint, given.trust, to_save=True)
        planned = plan_passes(program, steps, read_context(program, given, given.work_dir))
        if given.why is not None:
            _why(planned, given.why, given.as_json)
        elif given.as_json:
            show_json([{"pass": str(s), **p.as_dict(), "notes": [*p.told, *p.notes]} for s, p in planned])
        else:
            for step, plan in planned:
                _show(step, plan)
        nothing = [step for step, plan in planned if not plan.sites]
        if any(not step.allow_no_match for step in nothing):
            raise PassRefusedError("; ".join(f"{step.name} matches nothing" for step in nothing))
        if given.output is not None:
            about = f"plan of {given.checkpoint}; edit sites, then graphopt optimize --plan"
            with atomic_file(Path(given.output)) as made:
                made.write_text(write_plans([(str(s), p) for s, p in planned], about), encoding="utf-8")
            note(f"written: {given.output}")


def _show(step: Pass, plan: Plan) -> None:
    rows = [(s.block, "taken", _listed(s.choices)) for s in plan.sites]
    rows += [(r.block, "refused", r.reason + _from(r.source)) for r in plan.refused]
    table(str(step), ("site", "", "why"), rows)
    for remark in [*plan.told, *plan.notes]:
        text(f"  {remark}")


def _listed(choices: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in choices.items())


def _from(source: str | None) -> str:
    return f"  [{source}]" if source else ""


def _why(planned: list[tuple[Pass, Plan]], name: str, as_json: bool) -> None:
    """Say what each pass does to one block, and why."""
    found: list[dict[str, Any]] = []
    lines: list[str] = []
    for step, plan in planned:
        for site in plan.sites:
            if site.block == name or name in map(str, site.choices.get("parts", ())):
                found.append({"pass": str(step), "taken": True, "block": site.block, **site.choices})
                lines.append(f"{step.name} takes {site.block}: {_listed(site.choices)}")
        for refused in plan.refused:
            if refused.block == name:
                found.append({"pass": str(step), "taken": False, **vars(refused)})
                lines.append(f"{step.name} leaves {name} alone: {refused.reason}{_from(refused.source)}")
    if not found:
        known = [s.block for _, p in planned for s in p.sites]
        known += [r.block for _, p in planned for r in p.refused]
        near = difflib.get_close_matches(name, known, n=3)
        raise UsageError(
            f"no pass of this pipeline looks at {name!r}",
            hint=f"it looks at {', '.join(near or known[:6]) or 'nothing'}",
        )
    if as_json:
        show_json(found)
    else:
        text("\n".join(lines))
