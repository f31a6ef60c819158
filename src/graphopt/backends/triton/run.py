"""Running and compiling kernels without a GPU, in a child process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ...ir.errors import LoweringError, UsageError

INSTALL = "pip install 'graphopt[triton]'"


def available() -> bool:
    """Return whether Triton is installed."""
    return find_spec("triton") is not None


def require() -> None:
    """Raise UsageError if Triton is not installed."""
    if not available():
        raise UsageError("Triton is not installed", hint=INSTALL)


def call_of(operator: str, what: str, args: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call as plain data; tensors are described by shape, strides and type."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {
                "shape": [int(s) for s in value.shape],
                "stride": [int(s) for s in value.stride()],
                "dtype": str(value.dtype).removeprefix("torch."),
            }
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return int(value) if isinstance(value, torch.SymInt) else value

    return {
        "operator": operator,
        "what": what,
        "args": [plain(a) for a in args],
        "options": {k: plain(v) for k, v in options.items()},
    }


def in_child(request: Mapping[str, Any], limit: float = 600.0) -> list[dict[str, Any]]:
    """Send a request to a child process and return its rows.

    Raises:
        UsageError: Triton is not installed.
        LoweringError: the child failed, or took longer than ``limit`` seconds.
    """
    require()
    environment = dict(os.environ)
    # if it interprets, the child sets this before it imports Triton
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "graphopt.backends.triton.child"]
    try:
        process = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=limit, env=environment
        )
    except subprocess.TimeoutExpired:
        raise LoweringError(f"compiling kernels took longer than {limit:.0f} s and was stopped") from None
    if process.returncode:
        last = "\n".join(process.stderr.strip().splitlines()[-6:])
        raise LoweringError(
            f"the process that compiles kernels ended with status {process.returncode}:\n{last}"
        )
    rows: list[dict[str, Any]] = json.loads(process.stdout.strip().splitlines()[-1])
    return rows


def interpret(operators: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Compare kernels with their references in Triton's interpreter; return a row per call and type."""
    return in_child({"mode": "interpret", "operators": list(operators)})


def trace() -> list[dict[str, Any]]:
    """Trace functions that launch kernels with dynamic sizes; return a row per call, with the number of kernels."""
    return in_child({"mode": "trace"})


def compile_ahead(
    calls: Sequence[Mapping[str, Any]],
    architectures: Sequence[str],
    folder: str | None = None,
    doubles: bool = False,
) -> list[dict[str, Any]]:
    """Compile the kernels that calls launch; return a row per call, kernel and architecture, with its resources.

    Args:
        calls: as :func:`call_of` returns them.
        architectures: see ``ARCHITECTURES``.
        folder: where binaries are written; None to write none.
        doubles: compile each kernel again with double-precision scalars, as torch.compile passes them.
    """
    request = {
        "mode": "compile",
        "calls": list(calls),
        "architectures": list(architectures),
        "folder": folder,
        "doubles": doubles,
    }
    return in_child(request)
