"""JSON documents whose structure is checked as they are read."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


class Entry:
    """An object of a JSON document; entries that are read must exist and have the right type."""

    def __init__(self, data: dict[str, Any], where: str):
        self.data = data
        self.where = where

    def get(self, name: str) -> Any:
        """Return an entry or None."""
        return self.data.get(name)

    def table(self, name: str, kind: type | None = None) -> dict[str, Any]:
        """Return an object whose values are all of one type."""
        content = self.data.get(name)
        if not isinstance(content, dict) or (
            kind is not None and not all(isinstance(v, kind) for v in content.values())
        ):
            raise CheckpointError(f"{self.where}: {name!r} is missing or damaged")
        return content

    def list(self, name: str) -> builtins.list[Any]:
        """Return an array."""
        array = self.data.get(name)
        if not isinstance(array, builtins.list):
            raise CheckpointError(f"{self.where}: {name!r} is missing or damaged")
        return array


def read_document(path: Path, data: bytes | None = None) -> Entry:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        raw = path.read_bytes() if data is None else data
        document = json.loads(raw)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist", hint="give a folder written by Program.save"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} must hold an object")
    return Entry(document, str(path))
