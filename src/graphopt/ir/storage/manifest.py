"""The manifest of a saved program: format, version and files."""

from __future__ import annotations

import hashlib
from pathlib import Path

FORMAT = "graphopt-program"
VERSION = 1
INFERRED = {"inferred": True}
"""Stands for a value that no text describes, such as the root of a size: it is inferred when the program is read."""


def is_saved_program(path: Path) -> bool:
    """Tell whether a folder is a saved program."""
    return (path / "program.json").is_file() and (path / "manifest.json").is_file()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, read piece by piece."""
    seen = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            seen.update(block)
    return seen.hexdigest()
