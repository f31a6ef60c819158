"""Outputs whose logits are of some of the tokens: which those are, and the same logits over all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .facts import Vocabulary

if TYPE_CHECKING:
    from .program import Program


def kept_tokens(program: Program, output: str) -> torch.Tensor | None:
    """Return the tokens that an output's logits are of, ascending; None where it has all."""
    trimmed = program.facts.get(Vocabulary)
    if trimmed is None or output not in trimmed.outputs:
        return None
    return torch.tensor(trimmed.ids, dtype=torch.int64)


def over_all_tokens(program: Program, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return outputs with logits over all tokens: minus infinity, and so probability 0, for those that are gone.

    The numbers of tokens that ``take-top-k`` leaves of such an output become those of the tokenizer.

    Args:
        program: that computed them.
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
    """Return those of the logits over all tokens that an output has too: what it can be compared with."""
    ids = kept_tokens(program, output)
    return logits if ids is None else logits.index_select(-1, ids.to(logits.device))
