"""Generation over programs."""

from __future__ import annotations

from .plain import continuations, generate

__all__ = ["continuations", "generate"]
