"""Storage of programs as folders of plain JSON and safetensors, read strictly and without evaluating anything."""

from __future__ import annotations

from .read import load_program
from .write import require_savable, save_program

__all__ = ["load_program", "require_savable", "save_program"]
