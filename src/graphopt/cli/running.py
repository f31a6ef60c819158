"""Running the command line: exit status, errors as messages, one voice under torchrun."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, TextIO

import typer

from .app import app
from .mentioned import at_the_shell
from .output import documents_shown, errors, show_json

# typer has a copy of click or uses the package, by its version; either way its errors are found here
_WrongUsage: Any = typer.BadParameter.__mro__[2]

_OUT_OF_MEMORY = ("can't allocate memory", "out of memory")
"""What torch says on a CPU and on a GPU."""

INTERRUPTED = 130
"""The exit status after Ctrl-C, as of a process that a signal 2 ended."""


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit status.

    Under torchrun every rank runs it; the first prints and writes, all print errors.
    """
    rank = int(os.environ.get("RANK", "0") or 0) if "WORLD_SIZE" in os.environ else 0
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    status = _run(arguments, f"rank {rank}: " if rank else "")
    if status and int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
        # the others may be waiting for this rank in a collective; ending at once tells them
        errors.file.flush()
        sys.stdout.flush()
        os._exit(status)
    return status


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Ours in one line; those of libraries are for who writes programs."""
    if "graphopt" in Path(filename).parts or os.environ.get("GRAPHOPT_TRACEBACK"):
        errors.print(f"warning: {message}", markup=False)


def _run(arguments: list[str], who: str) -> int:
    as_json = "--json" in arguments
    before = documents_shown()
    try:
        # not its main(), which turns Ctrl-C into a status and loses what was said on the way
        command: Any = typer.main.get_command(app)
        with warnings.catch_warnings(), command.make_context("graphopt", list(arguments)) as context:
            warnings.showwarning = _show_warning
            command.invoke(context)
        return 0
    except typer.Exit as stop:
        return int(stop.exit_code)
    except _WrongUsage as error:
        return _misused(error, as_json)
    except (KeyboardInterrupt, typer.Abort) as stop:
        return _interrupted(stop, as_json and documents_shown() == before)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # a command that shows what it found and then refuses has said it all
        return _failed(error, as_json and documents_shown() == before, who, _flags(arguments))


def _interrupted(stop: BaseException, as_json: bool) -> int:
    """Say so, and what is kept of the work: whoever keeps something has left a note."""
    cause = stop if isinstance(stop, KeyboardInterrupt) else stop.__cause__
    words = [str(cause)] if isinstance(cause, KeyboardInterrupt) and str(cause) else []
    words += getattr(cause, "__notes__", [])
    message = "\n  ".join(["interrupted" + (f": {words[0]}" if words else ""), *words[1:]])
    if as_json:
        _show_error("Interrupted", message, INTERRUPTED)
    errors.print(message, markup=False)
    return INTERRUPTED


def _flags(arguments: list[str]) -> dict[str, str]:
    """Return the flags of the command that was called, by the names of its parameters."""
    command: Any = typer.main.get_command(app)
    called = command.commands.get(next((a for a in arguments if not a.startswith("-")), ""))
    return {
        str(p.name): max(p.opts, key=len)
        for p in getattr(called, "params", ())
        if p.name and p.opts and p.opts[0].startswith("-")
    }


def _misused(error: Any, as_json: bool) -> int:
    message = str(error.format_message())
    if as_json:
        _show_error("UsageError", message, 2)
    if message:
        context = getattr(error, "ctx", None)
        where = f"\n  what to do: see {context.command_path} --help" if context is not None else ""
        errors.print(f"UsageError: {message}{where}", markup=False)
    return 2


def _show_error(name: str, message: str, code: int) -> None:
    show_json({"error": name, "message": message, "exit_status": code})


def _failed(error: Exception, as_json: bool, who: str, flags: dict[str, str]) -> int:
    code = getattr(error, "exit_code", None)
    notes = list(getattr(error, "__notes__", []))
    if code is None and (isinstance(error, MemoryError) or any(w in str(error) for w in _OUT_OF_MEMORY)):
        # the machine's limit and nobody's mistake
        message = f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        message += "\n  what to do: smaller sizes or fewer rows, or a machine with more memory"
        if as_json:
            _show_error("MemoryError", message, 1)
        errors.print(who + message, markup=False)
        return 1
    if code is None:
        if os.environ.get("GRAPHOPT_TRACEBACK"):
            traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        message = f"internal error: {type(error).__name__}: {error}\n  at {place}"
        message += "\n  what to do: report it; GRAPHOPT_TRACEBACK=1 prints the whole traceback"
        code = 1
    else:
        message = f"{type(error).__name__}: {at_the_shell(str(error), flags)}"
    for line in notes:
        message += f"\n  in {line}"
    if as_json:
        _show_error(type(error).__name__, at_the_shell(str(error), flags), int(code))
    errors.print(who + message, markup=False)
    return int(code)
