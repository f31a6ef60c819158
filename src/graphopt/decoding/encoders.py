"""Texts that follow an encoder: its inputs, and the tokens with which the decoder begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..ir.errors import UsageError
from ..ir.facts import CrossCache, KVCache
from ..ir.program import Program
from ..passes.caching.positions import NotCausal, tokens_of


def has_encoder(program: Program) -> bool:
    """Return whether a program continues a text that follows from other inputs."""
    if KVCache in program.facts:
        return CrossCache in program.facts
    try:
        return bool(tokens_of(program)[1])
    except NotCausal:
        return False


def inputs_of_encoder(
    program: Program,
    input_ids: Any,
    attention_mask: torch.Tensor | None,
    others: Mapping[str, torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    """Return the inputs of the encoder by name.

    Args:
        program: with an encoder.
        input_ids: the text that the encoder reads, a tensor or rows of different lengths; None if it reads others.
        attention_mask: 0 where ``input_ids`` is padding.
        others: further inputs, such as ``input_features``.

    Raises:
        UsageError: there is nothing to read, or something is given twice.
    """
    inputs = dict(others or {})
    names = program.signature.inputs
    if input_ids is not None:
        if "input_ids" in inputs:
            raise UsageError("input_ids is given twice", hint="leave it out of the other inputs")
        if "input_ids" not in names:
            raise UsageError(
                "this program's encoder does not read tokens", hint=f"its inputs are {', '.join(names)}"
            )
        if not isinstance(input_ids, torch.Tensor):
            rows = [list(row) for row in input_ids]
            if not rows or not all(rows):
                raise UsageError("every row needs at least one token")
            width = max(map(len, rows))
            input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            attention_mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        inputs["input_ids"] = input_ids
    if attention_mask is not None and "attention_mask" in names:
        inputs["attention_mask"] = attention_mask
    if not inputs:
        raise UsageError("the encoder has nothing to read", hint="give input_ids, or its inputs by name")
    return inputs


def beginnings(program: Program, given: Any, rows: int, setting: Any) -> list[list[int]]:
    """Return the tokens with which each row's text begins.

    Args:
        program: with an encoder.
        given: by the user: a tensor (batch, tokens) or rows; None for those of the checkpoint.
        rows: number of rows.
        setting: returns a setting of the checkpoint by name.

    Raises:
        UsageError: the checkpoint names no first token, or the number of rows differs.
    """
    if given is not None:
        found = given.tolist() if isinstance(given, torch.Tensor) else [list(row) for row in given]
        if len(found) != rows or not all(found):
            raise UsageError(f"decoder_input_ids has {len(found)} rows of tokens, the encoder reads {rows}")
        return [[int(token) for token in row] for row in found]
    first = setting("decoder_start_token_id")
    if not isinstance(first, int):
        first = setting("bos_token_id")
    if not isinstance(first, int):
        raise UsageError(
            "the checkpoint does not say with which token a text begins", hint="give decoder_input_ids"
        )
    forced = setting("forced_bos_token_id")
    return [[first, *([forced] if isinstance(forced, int) else [])] for _ in range(rows)]


def number_of_rows(inputs: Mapping[str, torch.Tensor]) -> int:
    """Return the number of rows of an encoder's inputs.

    Raises:
        UsageError: inputs have different numbers of rows.
    """
    counts: Sequence[int] = sorted({int(value.shape[0]) for value in inputs.values()})
    if len(counts) != 1:
        told = ", ".join(f"{name} {value.shape[0]}" for name, value in inputs.items())
        raise UsageError(f"the encoder's inputs have different numbers of rows: {told}")
    return counts[0]
