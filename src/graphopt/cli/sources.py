"""Reads the inputs of commands: programs and data."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..api import capture
from ..data.reading import read_data
from ..ir.compat import import_tracer
from ..ir.errors import UsageError
from ..ir.program import Program
from ..ir.storage import require_savable
from ..measure.context import Context
from .app import Calibrating
from .output import note
from .progress import DELAY, ShownProgress, working

# every program needs it, and imports are quickest while commands are imported (cli.options)
import_tracer()


def read_program(source: str, trust: bool, *, to_save: bool = False, at_once: bool = False) -> Program:
    """Return a checkpoint or saved program.

    Args:
        source: path or name of the checkpoint or program.
        trust: read a ``.pt2`` file although reading can run code from it.
        to_save: the result will be saved, so refuse a program that cannot be saved before doing any work.
        at_once: print what is being done even if it takes no time.
    """
    if not source:
        raise UsageError("the name of a checkpoint is empty")
    with working(f"reading and capturing {source}", 0.0 if at_once else DELAY):
        program = capture(source, trust=trust)
    for remark in filter(None, (*program.origin.notes, program.origin.recalled)):
        note(remark)
    for name in program.origin.unused[:5]:
        note(f"the checkpoint's tensor {name} is not used")
    if to_save:
        require_savable(program)
    return program


def read_context(program: Program, args: Calibrating, work_dir: str | None = None) -> Context:
    """Return the context of a run, after reading its data and printing one sample."""
    require_work_dir(work_dir)
    batches: list[dict[str, Tensor]] = []
    if args.data is not None:
        batches, sample = read_data(
            program, args.data, sequences=args.sequences, length=args.length, seed=args.seed
        )
        rows = sum(next(iter(b.values())).shape[0] for b in batches)
        if not args.as_json:
            sample_text = f"; one of them: {sample!r}" if sample else ""
            note(f"data: {rows} rows in {len(batches)} batches{sample_text}")
    return Context(batches, work_dir=work_dir, seed=args.seed, progress=ShownProgress())


def require_files(*files: str | None) -> None:
    """Check that data files exist before anything slow begins.

    Raises:
        UsageError: a file does not exist.
    """
    for file in files:
        if file is not None and not Path(file).is_file():
            raise UsageError(f"the data file {file} does not exist")


def require_work_dir(work_dir: str | None) -> None:
    """Check that the path for scores or a run is a folder, or can become one.

    Raises:
        UsageError: the path, or a parent of it, is a file.
    """
    if work_dir is None:
        return
    existing = next(p for p in (Path(work_dir), *Path(work_dir).absolute().parents) if p.exists())
    if not existing.is_dir():
        raise UsageError(f"--work-dir {work_dir}: {existing} is a file", hint="give the name of a folder")
