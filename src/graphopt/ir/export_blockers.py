"""Reasons why a program cannot be exported to a Hugging Face folder, one entry per pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .facts import ExportBlockers

if TYPE_CHECKING:
    from .program import Program


def block_export(program: Program, reason: str, *, by: str | None = None) -> None:
    """Record that the program can no longer be exported to a Hugging Face folder.

    Args:
        program: changed in place.
        reason: what a configuration or a checkpoint cannot represent.
        by: the pass responsible; by default the one that is editing the program, or "an edit" if there is none.
    """
    by = by or program.edit.author or "an edit"
    blockers = export_blockers(program)
    reasons = blockers.get(by, ())
    if reason not in reasons:
        program.facts.add(ExportBlockers({**blockers, by: (*reasons, reason)}))


def unblock_export(program: Program, by: str) -> None:
    """Remove the reasons of one pass, whose changes are gone; the reasons of other passes stay."""
    blockers = export_blockers(program)
    blockers.pop(by, None)
    program.facts.discard(ExportBlockers)
    if blockers:
        program.facts.add(ExportBlockers(blockers))


def export_blockers(program: Program) -> dict[str, tuple[str, ...]]:
    """Return the reasons by name of the pass."""
    blockers = program.facts.get(ExportBlockers)
    return dict(blockers.reasons) if blockers is not None else {}
