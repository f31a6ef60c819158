"""Who proposes candidates."""

from __future__ import annotations

from ..drafts import Drafter
from .draft_program import DraftProgram
from .prompt_lookup import PromptLookup
from .token_recycling import TokenRecycling

BY_NAME: dict[str, type[Drafter]] = {d.name: d for d in (PromptLookup, TokenRecycling)}
"""Strategies that need nothing but the program."""

__all__ = ["BY_NAME", "DraftProgram", "PromptLookup", "TokenRecycling"]
