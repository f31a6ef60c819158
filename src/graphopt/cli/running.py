"""Runs the command line: exit status, errors as messages, output from only one rank under torchrun."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import typer

from .app import app
from .mentioned import at_the_shell
from .output import documents_shown, errors, show_json

# depending on its version, typer bundles click or imports it; this finds click's usage error either way
_WrongUsage: Any = typer.BadParameter.__mro__[2]

_OUT_OF_MEMORY = ("can't allocate memory", "out of memory")
"""Torch's messages on a CPU and on a GPU."""

INTERRUPTED = 130
"""The exit status after Ctrl-C, as of a process ended by signal 2."""


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


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
    """Print graphopt's own warnings in one line; those of libraries are hidden from users of the command line."""
    if "graphopt" in Path(filename).parts or os.environ.get("GRAPHOPT_TRACEBACK"):
        errors.print(f"warning: {message}", markup=False)


def _run(arguments: list[str], prefix: str) -> int:
    before = documents_shown()
    try:
        # not its main(), which turns Ctrl-C into a status and loses the notes of the exception
        command: Any = typer.main.get_command(app)
        with warnings.catch_warnings(), command.make_context("graphopt", list(arguments)) as context:
            warnings.showwarning = _show_warning
            command.invoke(context)
        return 0
    except typer.Exit as stop:
        return int(stop.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _WrongUsage as error:
        ending = _misused(error)
    except (KeyboardInterrupt, typer.Abort) as stop:
        ending = _interrupted(stop)
    except Exception as error:
        ending = _failed(error, prefix, _flags(arguments))
    # a command that has printed its result and then refuses needs no second document
    if "--json" in arguments and documents_shown() == before:
        show_json({"error": ending.name, "message": ending.message, "exit_status": ending.status})
    if ending.shown:
        errors.print(ending.shown, markup=False)
    return ending.status


class _Ending(NamedTuple):
    """How a command failed, as data and as text for people."""

    name: str
    message: str
    status: int
    shown: str


def _interrupted(stop: BaseException) -> _Ending:
    """Return the ending of an interrupted command, with the exception's notes on what has been kept."""
    cause = stop if isinstance(stop, KeyboardInterrupt) else stop.__cause__
    words = [str(cause)] if isinstance(cause, KeyboardInterrupt) and str(cause) else []
    words += getattr(cause, "__notes__", [])
    message = "\n  ".join(["interrupted" + (f": {words[0]}" if words else ""), *words[1:]])
    return _Ending("Interrupted", message, INTERRUPTED, message)


def _flags(arguments: list[str]) -> dict[str, str]:
    """Return the flags of the called command, by the names of its parameters."""
    command: Any = typer.main.get_command(app)
    called = command.commands.get(next((a for a in arguments if not a.startswith("-")), ""))
    return {
        str(p.name): max(p.opts, key=len)
        for p in getattr(called, "params", ())
        if p.name and p.opts and p.opts[0].startswith("-")
    }


def _misused(error: Any) -> _Ending:
    message = str(error.format_message())
    context = getattr(error, "ctx", None)
    hint = f"\n  what to do: see {context.command_path} --help" if context is not None else ""
    return _Ending("UsageError", message, 2, message and f"UsageError: {message}{hint}")


def _failed(error: Exception, prefix: str, flags: dict[str, str]) -> _Ending:
    name, text = type(error).__name__, str(error)
    status = getattr(error, "exit_code", None)
    if status is None and (isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY)):
        # a limit of the machine, not an error in graphopt
        message = f"out of memory: {text.splitlines()[0] if text else name}"
        message += "\n  what to do: use smaller sizes, fewer rows or a machine with more memory"
        return _Ending("MemoryError", message, 1, prefix + message)
    message = at_the_shell(text, flags)
    shown = f"{prefix}{name}: {message}"
    if status is None:
        if os.environ.get("GRAPHOPT_TRACEBACK"):
            traceback.print_exc()
        frame = traceback.extract_tb(error.__traceback__)[-1]
        shown = f"{prefix}internal error: {name}: {text}\n  at {Path(frame.filename).name}:{frame.lineno}"
        shown += "\n  what to do: report it; GRAPHOPT_TRACEBACK=1 prints the whole traceback"
    notes = "".join(f"\n  in {line}" for line in getattr(error, "__notes__", []))
    return _Ending(name, message, int(status or 1), shown + notes)
