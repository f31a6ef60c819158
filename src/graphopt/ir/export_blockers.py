"""Why a program cannot go back to the folder it came from: one entry for each pass that stands in the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .facts import ExportBlockers

if TYPE_CHECKING:
    from .program import Program


def block_export(program: Program, reason: str, *, by: str | None = None) -> None:
    """Say that no Hugging Face folder can hold what the program is from now on.

    Args:
        program: changed in place.
        reason: what a configuration or a checkpoint has no place for.
        by: the pass that is in the way; by default the one that is editing the program, or none: "an edit".
    """
    by = by or program.edit.author or "an edit"
    blockers = export_blockers(program)
    reasons = blockers.get(by, ())
    if reason not in reasons:
        program.facts.add(ExportBlockers({**blockers, by: (*reasons, reason)}))


def unblock_export(program: Program, by: str) -> None:
    """Take away what one pass had in the way, since what it made is gone; other passes' reasons stay."""
    blockers = export_blockers(program)
    blockers.pop(by, None)
    program.facts.discard(ExportBlockers)
    if blockers:
        program.facts.add(ExportBlockers(blockers))


def export_blockers(program: Program) -> dict[str, tuple[str, ...]]:
    """Return the reasons by the name of the pass that gave them."""
    blockers = program.facts.get(ExportBlockers)
    return dict(blockers.reasons) if blockers is not None else {}
