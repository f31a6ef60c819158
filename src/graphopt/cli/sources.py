"""Reads the inputs of commands: programs and data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Size, Tensor

from ..api import capture
from ..data.reading import arrays_of, read_data
from ..ir.compat import import_tracer
from ..ir.errors import UsageError
from ..ir.program import Program
from ..ir.storage import require_savable
from ..ir.storage.manifest import is_saved_program
from ..measure.context import Context
from .app import Calibrating, Lower, Opening
from .output import note
from .progress import DELAY, ShownProgress, working

# every program needs it, and imports are quickest while commands are imported (cli.options)
import_tracer()


def read_program(source: str, args: Opening, *, to_save: bool = False, at_once: bool = False) -> Program:
    """Return a checkpoint or saved program.

    Args:
        source: path or name of the checkpoint or program.
        args: of the command: whether to trust a ``.pt2`` file, and on which inputs a checkpoint is captured.
        to_save: the result will be saved, so refuse a program that cannot be saved before doing any work.
        at_once: print what is being done even if it takes no time.
    """
    if not source:
        raise UsageError("the name of a checkpoint is empty")
    inputs = read_example(args)
    if inputs and (is_saved_program(Path(source)) or source.endswith(".pt2")):
        note(f"{source} was captured before, and not on the inputs that are given here")
        inputs = {}
    with working(f"reading and capturing {source}", 0.0 if at_once else DELAY):
        program = capture(source, inputs or None, trust=args.trust)
    for remark in filter(None, (*program.origin.notes, program.origin.recalled)):
        note(remark)
    for name in program.origin.unused[:5]:
        note(f"the checkpoint's tensor {name} is not used")
    if to_save:
        require_savable(program)
    return program


def read_example(args: Opening) -> dict[str, Any]:
    """Return the inputs on which checkpoints are captured: arrays of a file, and shapes to be made.

    Raises:
        UsageError: the file cannot be read, or a shape is none.
    """
    inputs: dict[str, Any] = {}
    if args.example is not None:
        require_files(args.example)
        if not args.example.endswith(".npz"):
            raise UsageError(
                f"--inputs {args.example} is not a .npz file",
                hint="save an array for each input with numpy.savez",
            )
        inputs.update(arrays_of(Path(args.example)))
    for spec in shapes_of(args):
        name, _, numbers = spec.partition("=")
        sizes = re.fullmatch(r"\s*[0-9]+(x[0-9]+)*\s*", numbers)
        if sizes is None or not name.strip() or "0" in numbers.strip().split("x"):
            raise UsageError(
                f"--shape takes the name and the sizes of an input, as in NAME=1x3x384x384, not {spec!r}"
            )
        if name.strip() in inputs:
            raise UsageError(f"{name.strip()} is given twice", hint="give its values or its shape, once")
        inputs[name.strip()] = Size(int(n) for n in numbers.split("x"))
    return inputs


def shapes_of(args: Opening) -> list[str]:
    """Return the shapes of inputs that a command was given, apart from sizes that it fixes."""
    if isinstance(args, Lower):
        return [spec for spec in args.sizes or () if is_shape(spec)]
    return list(getattr(args, "shape", None) or ())


def is_shape(spec: str) -> bool:
    """Return whether a text is the shape of an input, not sizes by name."""
    return re.fullmatch(r"[^=,]+=[^=,]*[0-9]x[0-9][^=,]*", spec) is not None


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
