"""Drafters: strategies that propose candidates."""

from __future__ import annotations

from ..drafts import Drafter
from .attached_draft import AttachedDraft
from .draft_program import DraftProgram
from .early_exit import EarlyExit
from .mask_tokens import MaskTokens
from .multi_token_heads import MultiTokenHeads, best_paths, expected_tokens
from .prompt_lookup import PromptLookup
from .retrieval import Retrieval
from .token_recycling import TokenRecycling

BY_NAME: dict[str, type[Drafter]] = {
    d.name: d
    for d in (PromptLookup, Retrieval, TokenRecycling, EarlyExit, MultiTokenHeads, AttachedDraft, MaskTokens)
}
"""Strategies that need nothing but the program and optional texts."""

__all__ = [
    "BY_NAME",
    "AttachedDraft", "DraftProgram", "EarlyExit", "MaskTokens", "MultiTokenHeads", "PromptLookup", "Retrieval",
    "TokenRecycling", "best_paths", "expected_tokens",
]  # fmt: skip
