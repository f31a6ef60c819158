"""Generation over programs."""

from __future__ import annotations

from .drafters import DraftProgram, PromptLookup, TokenRecycling
from .drafts import Draft, Drafter
from .plain import continuations
from .sampling import Sampling
from .speculating import Statistics

__all__ = [
    "Draft",
    "DraftProgram",
    "Drafter",
    "PromptLookup",
    "Sampling",
    "Statistics",
    "TokenRecycling",
    "continuations",
]
