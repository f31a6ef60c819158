"""``graphopt optimize``: run passes and save the result; ``graphopt plan``: list every site of a pipeline, and why."""

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


def optimize_checkpoint(args: app.Optimize) -> None:
    """Optimise a checkpoint and save the program."""
    inputs = (args.checkpoint, args.data, args.plan_file)
    with place(args.output, args.force, inputs, folder=True), scores_in(args.work_dir):
        result = _run_passes(args)
        if rank() == 0:
            with writing(args.output) as progress:
                result.save(args.output, progress=progress)
        barrier()
        assert result.report is not None
        if args.as_json:
            document = {
                "output": args.output,
                "report": result.report.as_dict(),
                "cost": cost(result).as_dict(),
            }
            show_json({**document, "operators": dict(result.operators)})
        else:
            text(str(result.report))
            note(f"written: {args.output}")


def _run_passes(args: app.Optimize) -> Program:
    if (args.passes is None) == (args.plan_file is None):
        raise UsageError("give a pipeline with -p, or a plan with --plan")
    if args.verify_with not in ("sites", "full", "off"):
        raise UsageError(f"--verify is sites, full or off, not {args.verify_with!r}")
    steps, plans = read_steps(args.passes or (), args.plan_file)
    program = read_program(args.checkpoint, args, to_save=True)
    check_order(program, steps)
    context = read_context(program, args, args.work_dir)
    if args.dump_dir is not None:
        require_empty(args.dump_dir, args.force)
    write = dump_to(args.dump_dir) if args.dump_dir and rank() == 0 else None

    def dump(index: int, name: str, current: Program) -> None:
        if write is not None:
            write(index, name, current)
        if args.print_after_all:
            show = note if args.as_json else text
            show(f"# after pass {index}, {name}\n{current.text(weights=False, blocks=True)}\n")

    return run_passes(program, steps, context, plans=plans, verify=cast(Verify, args.verify_with), dump=dump)


def plan_checkpoint(args: app.Plan) -> None:
    """Plan a pipeline, and print or write the plan."""
    with place(args.output, args.force, (args.checkpoint, args.data)), scores_in(args.work_dir):
        steps = as_passes(args.passes)
        program = read_program(args.checkpoint, args, to_save=True)
        planned = plan_passes(program, steps, read_context(program, args, args.work_dir))
        if args.why is not None:
            _why(planned, args.why, args.as_json)
        elif args.as_json:
            show_json([{"pass": str(s), **p.as_dict(), "notes": [*p.told, *p.notes]} for s, p in planned])
        else:
            for step, plan in planned:
                _show(step, plan)
        unmatched = [step for step, plan in planned if not plan.sites]
        if any(not step.allow_no_match for step in unmatched):
            raise PassRefusedError("; ".join(f"{step.name} matches nothing" for step in unmatched))
        if args.output is not None:
            about = f"plan of {args.checkpoint}; edit sites, then graphopt optimize --plan"
            with atomic_file(Path(args.output)) as temporary:
                temporary.write_text(write_plans([(str(s), p) for s, p in planned], about), encoding="utf-8")
            note(f"written: {args.output}")


def _show(step: Pass, plan: Plan) -> None:
    rows = [(s.block, "taken", _format_choices(s.choices)) for s in plan.sites]
    rows += [(r.block, "refused", r.reason + _format_source(r.source)) for r in plan.refused]
    table(str(step), ("site", "", "why"), rows)
    for remark in [*plan.told, *plan.notes]:
        text(f"  {remark}")


def _format_choices(choices: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in choices.items())


def _format_source(source: str | None) -> str:
    return f"  [{source}]" if source else ""


def _why(planned: list[tuple[Pass, Plan]], name: str, as_json: bool) -> None:
    """Print what each pass does to one block, and why."""
    decisions: list[dict[str, Any]] = []
    lines: list[str] = []
    for step, plan in planned:
        for site in plan.sites:
            if site.block == name or name in map(str, site.choices.get("parts", ())):
                decisions.append({"pass": str(step), "taken": True, "block": site.block, **site.choices})
                lines.append(f"{step.name} takes {site.block}: {_format_choices(site.choices)}")
        for refused in plan.refused:
            if refused.block == name:
                decisions.append({"pass": str(step), "taken": False, **vars(refused)})
                lines.append(
                    f"{step.name} leaves {name} alone: {refused.reason}{_format_source(refused.source)}"
                )
    if not decisions:
        blocks = [s.block for _, p in planned for s in p.sites]
        blocks += [r.block for _, p in planned for r in p.refused]
        near = difflib.get_close_matches(name, blocks, n=3)
        raise UsageError(
            f"no pass of this pipeline looks at {name!r}",
            hint=f"it looks at {', '.join(near or blocks[:6]) or 'nothing'}",
        )
    if as_json:
        show_json(decisions)
    else:
        text("\n".join(lines))
