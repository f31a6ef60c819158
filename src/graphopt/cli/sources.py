"""Reading what commands are given: programs, data, passes."""

from __future__ import annotations

from typing import Any

from ..api import capture
from ..frontends.data import read_data
from ..ir.program import Program
from ..passes.context import Context
from .output import note
from .progress import ShownProgress, Working


def read_program(source: str, trust: bool = False) -> Program:
    """Return a checkpoint or saved program."""
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
