"""Output of commands: tables for people, JSON for programs, errors on standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

screen = Console(stderr=False, highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


class _Documents:
    """Number of JSON documents printed: a command prints exactly one, whether it fails or not."""

    count = 0


def show_json(data: Any) -> None:
    """Print plain data as JSON."""
    _Documents.count += 1
    sys.stdout.write(json.dumps(data, indent=2, default=str) + "\n")


def documents_shown() -> int:
    """Return how many JSON documents this process has printed."""
    return _Documents.count


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table."""
    rendered = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        rendered.add_column(column, overflow="fold")
    for row in rows:
        rendered.add_row(*(str(cell) for cell in row))
    screen.print(rendered)


def listing(
    as_json: bool, document: Any, columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = ""
) -> None:
    """Print plain data as JSON if requested, else as a table."""
    if as_json:
        show_json(document)
    else:
        table(title, columns, rows)


def text(message: str) -> None:
    """Print text without interpreting markup."""
    screen.print(message, markup=False)


def note(message: str) -> None:
    """Print a remark on standard error, apart from results; under torchrun only the first rank does."""
    if "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0":
        errors.print(message, markup=False)
