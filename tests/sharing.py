"""Programs that several tests read and that need to be captured only once."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graphopt import Program


def everyones(tmp_path_factory: pytest.TempPathFactory, kind: str, name: str) -> Path:
    """Return a path that all processes of one run of the tests know."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / kind
    folder.mkdir(exist_ok=True)
    return folder / name


def shared(program: Program, place: Path) -> None:
    """Save a program where all processes of one run look for it; the first that comes there stays."""
    with contextlib.suppress(OSError):
        program.save(place.with_name(f"{place.name}.{os.getpid()}")).rename(place)


class Once:
    """Captures checkpoints as the function that it stands for does, but each only once a process.

    What it remembers goes by the path and the bytes that lie there, so that a checkpoint that was changed is captured
    again; each caller gets a copy.
    """

    made: dict[tuple[str, ...], Program] = {}  # noqa: RUF012

    def __init__(self, capture: Callable[..., Program]):
        self.capture = capture

    def __call__(self, source: Any, inputs: Any = None, **options: Any) -> Program:
        """Return what the function does."""
        path = Path(source)
        if inputs is not None or not path.exists():
            return self.capture(source, inputs, **options)
        files = [p for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file()]
        said = sorted(f"{p} {hashlib.sha256(p.read_bytes()).hexdigest()}" for p in files)
        key = (str(path.resolve()), str(sorted(options.items())), *said)
        if key not in self.made:
            self.made[key] = self.capture(source, inputs, **options)
        return self.made[key].copy()
