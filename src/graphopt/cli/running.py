"""Running the command line: exit status, errors as messages, one voice under torchrun."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import typer

from .app import app
from .output import documents_shown, errors, show_json

# typer has a copy of click or uses the package, by its version; either way its errors are found here
_WrongUsage: Any = typer.BadParameter.__mro__[2]


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


def _run(arguments: list[str], who: str) -> int:
    as_json = "--json" in arguments
    before = documents_shown()
    try:
        command = typer.main.get_command(app)
        result = command.main(arguments, prog_name="graphopt", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return int(stop.exit_code)
    except _WrongUsage as error:
        return _misused(error, as_json)
    except (KeyboardInterrupt, typer.Abort):
        errors.print("interrupted; nothing was written", markup=False)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # a command that shows what it found and then refuses has said it all
        return _failed(error, as_json and documents_shown() == before, who)


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


def _failed(error: Exception, as_json: bool, who: str = "") -> int:
    code = getattr(error, "exit_code", None)
    notes = list(getattr(error, "__notes__", []))
    if code is None:
        if os.environ.get("GRAPHOPT_TRACEBACK"):
            traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        message = f"internal error: {type(error).__name__}: {error}\n  at {place}"
        message += "\n  what to do: report it; GRAPHOPT_TRACEBACK=1 prints the whole traceback"
        code = 1
    else:
        message = f"{type(error).__name__}: {error}"
    for line in notes:
        message += f"\n  in {line}"
    if as_json:
        _show_error(type(error).__name__, str(error), int(code))
    errors.print(who + message, markup=False)
    return int(code)
