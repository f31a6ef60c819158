"""Programs as folders: plain JSON and safetensors, read strictly, nothing evaluated."""

from __future__ import annotations

from .read import load_program
from .write import save_program

__all__ = ["load_program", "save_program"]
