"""``graphopt plan``: every site of a pipeline, and why."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from ..api import plan_passes
from ..ir.atomic import atomic_file
from ..ir.errors import PassRefusedError, UsageError
from ..passes.base import Pass
from ..passes.pipeline import as_passes
from ..passes.plan import Plan, write_plans
from .app import Plan as Given
from .interrupts import scores_in
from .output import note, show_json, table, text
from .places import place
from .sources import read_context, read_program


def plan_checkpoint(given: Given) -> None:
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
