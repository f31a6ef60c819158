"""Output paths of commands: existing files are kept unless ``--force`` is given, and the command's inputs always are.

After Ctrl-C, messages say what has been kept.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..ir.errors import UsageError
from ..ir.groups import rank
from ..ir.storage.atomic import keeping, set_aside
from ..ir.storage.safetensors_file import writer

_OTHER_OUTPUT_HINT = "choose another output; --force does not help here"


@contextlib.contextmanager
def place(
    output: str | None,
    force: bool,
    inputs: Iterable[str | None] = (),
    *,
    folder: bool = False,
    beside: Iterable[str] = (),
    moved: bool = False,
) -> Iterator[None]:
    """Check a command's output path before the work starts, and protect existing files during the work.

    Args:
        output: the path; None if nothing is written.
        force: an existing plain file may be replaced by a file, a folder that graphopt wrote by a folder.
        inputs: paths that the command reads.
        folder: whether a folder is written, not a file.
        beside: suffixes of further files that are written next to the output.
        moved: the code that writes refuses an existing path, so existing files are set aside first.

    Raises:
        UsageError: the path must not be replaced, or the command reads it.
    """
    if output is None or rank():
        yield  # only the first rank writes
        return
    if not output:
        raise UsageError("the name of the output is empty")
    target = Path(output)
    paths = [target, *(target.with_name(target.name + ending) for ending in beside)]
    for path in paths:
        _require_not_read(path, inputs)
        _require_free(path, force, folder)
    before = _stamp(target)

    def describe_outcome() -> str:
        after = _stamp(target)
        if after == before:
            return f"{output} was not written" if after is None else f"{output} is unchanged"
        return f"{output} is written" if after is not None else f"{output} is gone"

    with on_interrupt(describe_outcome), contextlib.ExitStack() as stack:
        for path in paths:
            if not force:
                stack.enter_context(keeping(path))
            elif moved and path.exists():
                stack.enter_context(set_aside(path))
        yield


def _stamp(target: Path) -> tuple[int, int] | None:
    """Return what identifies the file or folder at a path; None if there is none."""
    try:
        status = target.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _require_not_read(target: Path, inputs: Iterable[str | None]) -> None:
    resolved = target.resolve()
    for name in inputs:
        if name is None or not os.path.exists(name):
            continue
        source = Path(name).resolve()
        if source == resolved or (target.exists() and os.path.samefile(target, source)):
            raise UsageError(f"{target} is what the command reads", hint=_OTHER_OUTPUT_HINT)
        if resolved in source.parents:
            raise UsageError(f"{target} holds {name}, which the command reads", hint=_OTHER_OUTPUT_HINT)
        if source.is_dir() and source in resolved.parents and target.exists():
            raise UsageError(
                f"{target} is a part of {name}, which the command reads", hint=_OTHER_OUTPUT_HINT
            )


def _require_free(target: Path, force: bool, folder: bool) -> None:
    if not os.path.lexists(target) or (target.is_symlink() and not target.exists()):
        return
    if folder and target.is_dir() and not any(target.iterdir()):
        return
    if not force:
        raise UsageError(f"{target} exists already", hint="choose another output, or replace it with --force")
    if not folder and target.is_dir():
        raise UsageError(f"{target} is a folder", hint="give the name of a file")
    if not folder and not target.is_file():
        raise UsageError(f"{target} is a device or a pipe", hint="give the name of a file")
    if folder and not (target.is_dir() and written_here(target)):
        raise UsageError(
            f"{target} is not a folder that graphopt wrote, so --force does not replace it",
            hint="choose another output, or remove it",
        )


def require_empty(folder: str, force: bool) -> None:
    """Check that a folder to which a command adds files is new or empty, unless ``--force`` is given.

    Raises:
        UsageError: the folder is not empty, or is a file.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{folder} is a file", hint="give the name of a folder")
    if not force and path.is_dir() and any(path.iterdir()):
        raise UsageError(
            f"{folder} is not empty", hint="choose another folder, or replace files with --force"
        )


def written_here(folder: Path) -> bool:
    """Tell whether graphopt wrote a folder: a saved program, a Hugging Face folder or files for another runtime."""
    if (folder / "program.json").is_file() and (folder / "manifest.json").is_file():
        return True
    if (folder / "config.json").is_file():
        return any(writer(file) == "graphopt" for file in folder.glob("*.safetensors"))
    if any(b"graphopt" in _read_start(file, 64) for file in folder.glob("*.onnx")):
        return True
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and {"kernels", "without", "package"} <= set(report)


def _read_start(file: Path, size: int) -> bytes:
    with file.open("rb") as stream:
        return stream.read(size)


@contextlib.contextmanager
def on_interrupt(describe: Callable[[], str]) -> Iterator[None]:
    """Add a note to an interruption that says what has been kept, unless ``describe`` returns an empty text."""
    try:
        yield
    except KeyboardInterrupt as stop:
        message = describe()
        if message:
            stop.add_note(message)
        raise


def scores_in(work_dir: str | None) -> contextlib.AbstractContextManager[None]:
    """Say at an interruption where scores are kept, if they are."""
    message = f"measurements are kept in {work_dir}; the same command resumes from them"
    return on_interrupt(lambda: message if work_dir is not None and os.path.isdir(work_dir) else "")
