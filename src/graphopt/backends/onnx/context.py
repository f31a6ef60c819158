"""What the checkpoint of a program says of its texts: special tokens, and how long they may be."""

from __future__ import annotations

import json
from typing import Any

from ...ir.facts import KVCache
from ...ir.program import Program

LONGEST = 2048
"""Number of positions if neither the program nor its checkpoint has a limit."""


def configuration(program: Program) -> dict[str, Any]:
    """Return the checkpoint's configuration, with the special tokens of its generation settings."""
    config = dict(program.origin.config)
    config = {**config, **(config.get("text_config") or {})}
    raw = program.origin.assets.get("generation_config.json")
    if raw:
        settings = json.loads(raw)
        config |= {
            k: settings[k]
            for k in ("bos_token_id", "eos_token_id", "pad_token_id")
            if settings.get(k) is not None
        }
    return config


def context_length(program: Program) -> int:
    """Return how many positions a program with caches is used at.

    Args:
        program: after insert-cache.
    """
    cache = program.facts[KVCache]
    if isinstance(cache.capacity, int):
        return cache.capacity
    return int(cache.limit or configuration(program).get("max_position_embeddings") or LONGEST)
