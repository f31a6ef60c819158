"""Text generation with programs."""

from __future__ import annotations

from .drafters import (
    AttachedDraft,
    DraftProgram,
    EarlyExit,
    MaskTokens,
    MultiTokenHeads,
    PromptLookup,
    Retrieval,
    TokenRecycling,
)
from .drafts import Draft, Drafter
from .plain import continuations
from .sampling import Sampling
from .sensitivity import layer_budgets, layer_sensitivity
from .speculating import Statistics

__all__ = [
    "AttachedDraft",
    "Draft",
    "DraftProgram",
    "Drafter",
    "EarlyExit",
    "MaskTokens",
    "MultiTokenHeads",
    "PromptLookup",
    "Retrieval",
    "Sampling",
    "Statistics",
    "TokenRecycling",
    "continuations",
    "layer_budgets",
    "layer_sensitivity",
]
