"""Training of any module: a thin loop with progress whose runs go on after an interruption."""

from __future__ import annotations

from .loop import train
from .settings import Settings
from .state import Record

__all__ = ["Record", "Settings", "train"]
