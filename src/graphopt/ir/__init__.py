"""The intermediate representation: programs, their anatomy, matching, rewriting, checking and cost."""

from __future__ import annotations

from . import operators as operators
