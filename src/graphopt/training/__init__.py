"""Training of any module: a thin loop with progress, whose runs resume after an interruption."""

from __future__ import annotations

from .loop import train
from .settings import Settings
from .shown import Shown
from .state import Record

__all__ = ["Record", "Settings", "Shown", "train"]
