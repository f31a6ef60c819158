"""Trimmed vocabularies: the remaining tokens of an output, and its logits over the full vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .facts import Vocabulary

if TYPE_CHECKING:
    from .program import Program


def kept_tokens(program: Program, output: str) -> torch.Tensor | None:
    """Return the token ids of an output's logits, ascending; None where its vocabulary is not trimmed."""
    trimmed = program.facts.get(Vocabulary)
    if trimmed is None or output not in trimmed.outputs:
        return None
    return torch.tensor(trimmed.ids, dtype=torch.int64)


def over_all_tokens(program: Program, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return outputs with logits over the full vocabulary: minus infinity, so probability 0, for removed tokens.

    The token ids that ``take-top-k`` returns for such an output become those of the tokenizer.

    Args:
        program: the program that computed them.
        outputs: by name; other outputs are returned as they are.
    """
    trimmed = program.facts.get(Vocabulary)
    if trimmed is None:
        return dict(outputs)
    results = dict(outputs)
    for name in trimmed.outputs:
        ids = kept_tokens(program, name)
        assert ids is not None
        if isinstance(results.get(name), torch.Tensor):
            trimmed_logits = results[name]
            all_logits = trimmed_logits.new_full((*trimmed_logits.shape[:-1], trimmed.size), float("-inf"))
            results[name] = all_logits.index_copy(-1, ids.to(trimmed_logits.device), trimmed_logits)
        tokens = f"{name}_tokens"
        if isinstance(results.get(tokens), torch.Tensor):
            results[tokens] = ids.to(results[tokens].device)[results[tokens]]
    return results


def kept_logits(program: Program, output: str, logits: torch.Tensor) -> torch.Tensor:
    """Return the logits of the tokens that an output has, selected from logits over all tokens, for comparison."""
    ids = kept_tokens(program, output)
    return logits if ids is None else logits.index_select(-1, ids.to(logits.device))
