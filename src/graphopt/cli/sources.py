"""Reading what commands are given: programs, data, passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..api import capture
from ..data.reading import read_data
from ..ir.errors import UsageError
from ..ir.program import Program
from ..measure.context import Context
from .output import note
from .progress import ShownProgress, Working


def read_program(source: str, trust: bool = False) -> Program:
    """Return a checkpoint or saved program."""
    if not source:
        raise UsageError("the name of a checkpoint is empty")
    with Working(f"reading and capturing {source}"):
        program = capture(source, trust=trust)
    for said in program.origin.notes:
        note(said)
    for name in program.origin.unused[:5]:
        note(f"the checkpoint's tensor {name} is read by nothing")
    return program


def read_context(
    program: Program,
    data: str | None,
    amount: tuple[int, int, int],
    work_dir: str | None,
    quiet: bool = False,
) -> Context:
    """Return the context of a run, with its data read and one sample shown."""
    require_work_dir(work_dir)
    sequences, length, seed = amount
    batches: list[Any] = []
    if data is not None:
        batches, sample = read_data(program, data, sequences=sequences, length=length, seed=seed)
        rows = sum(next(iter(b.values())).shape[0] for b in batches)
        if not quiet:
            note(
                f"data: {rows} rows in {len(batches)} batches"
                + (f"; one of them: {sample!r}" if sample else "")
            )
    return Context(batches, work_dir=work_dir, seed=seed, progress=ShownProgress())


def require_work_dir(work_dir: str | None) -> None:
    """Check that a place for scores or a run is a folder, or can become one.

    Raises:
        UsageError: a file is there, or above it.
    """
    if work_dir is None:
        return
    there = next(p for p in (Path(work_dir), *Path(work_dir).absolute().parents) if p.exists())
    if not there.is_dir():
        raise UsageError(f"--work-dir {work_dir}: {there} is a file", hint="give the name of a folder")
