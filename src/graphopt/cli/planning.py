"""``graphopt plan``: every site of a pipeline, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..api import plan_passes
from ..ir.errors import PassRefusedError, UsageError
from ..ir.storage import require_savable
from ..ir.storage.atomic import atomic_file
from ..passes.framework.base import Pass
from ..passes.framework.plan import Plan, write_plans
from .interrupts import on_interrupt, scores_in
from .output import note, show_json, table, text
from .places import place
from .sources import read_context, read_program


def plan_checkpoint(
    source: str,
    passes: str,
    output: str | None,
    why: str | None,
    data: str | None,
    amount: tuple[int, int, int],
    work_dir: str | None,
    force: bool,
    as_json: bool,
    trust: bool,
) -> None:
    """Plan a pipeline and show or write the plan."""
    with place(output, force, (source, data)), on_interrupt(lambda: scores_in(work_dir)):
        _plan(source, passes, output, why, data, amount, work_dir, as_json, trust)


def _plan(
    source: str, passes: str, output: str | None, why: str | None, data: str | None, amount: tuple[int, int, int],
    work_dir: str | None, as_json: bool, trust: bool,
) -> None:  # fmt: skip
    from ..passes.framework.pipeline import parse_pipeline

    parse_pipeline(passes)
    program = read_program(source, trust)
    require_savable(program)
    context = read_context(program, data, amount, work_dir, as_json)
    planned = plan_passes(program, passes, context)
    steps = [(str(step), plan) for step, plan in planned]
    if why is not None:
        _why(planned, why, as_json)
    elif as_json:
        show_json(
            [
                {"pass": str(step), **plan.as_dict(), "notes": [*plan.told, *plan.notes]}
                for step, plan in planned
            ]
        )
    else:
        for step, plan in planned:
            rows = [
                (s.block, "taken", ", ".join(f"{k}={v}" for k, v in s.choices.items())) for s in plan.sites
            ]
            rows += [
                (r.block, "refused", r.reason + (f"  [{r.source}]" if r.source else "")) for r in plan.refused
            ]
            table(str(step), ("site", "", "why"), rows)
            for remark in [*plan.told, *plan.notes]:
                text(f"  {remark}")
    if any(not plan.sites and not step.allow_no_match for step, plan in planned):
        raise PassRefusedError(
            "; ".join(f"{step.name} matches nothing" for step, plan in planned if not plan.sites)
        )
    if output is not None:
        with atomic_file(Path(output)) as made:
            made.write_text(
                write_plans(steps, f"plan of {source}; edit sites, then graphopt optimize --plan"),
                encoding="utf-8",
            )
        note(f"written: {output}")


def _why(planned: list[tuple[Pass, Plan]], name: str, as_json: bool) -> None:
    """Say what each pass does to one block, and why."""
    found: list[dict[str, Any]] = []
    lines: list[str] = []
    for step, plan in planned:
        for site in plan.sites:
            if site.block == name or name in map(str, site.choices.get("parts", ())):
                found.append({"pass": str(step), "taken": True, "block": site.block, **site.choices})
                choices = ", ".join(f"{k}={v}" for k, v in site.choices.items())
                lines.append(f"{step.name} takes {site.block}: {choices}")
        for refused in plan.refused:
            if refused.block == name:
                found.append({"pass": str(step), "taken": False, **vars(refused)})
                place = f"  [{refused.source}]" if refused.source else ""
                lines.append(f"{step.name} leaves {name} alone: {refused.reason}{place}")
    if not found:
        import difflib

        taken = [site.block for _, plan in planned for site in plan.sites]
        known = taken + [refused.block for _, plan in planned for refused in plan.refused]
        near = difflib.get_close_matches(name, known, n=3)
        raise UsageError(
            f"no pass of this pipeline looks at {name!r}",
            hint=f"it looks at {', '.join(near or known[:6]) or 'nothing'}",
        )
    if as_json:
        show_json(found)
    else:
        text("\n".join(lines))
