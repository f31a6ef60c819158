"""Recurrent state: caches and other values that a program passes from one step to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..facts import KVCache
from ..program import Program


def states_of(program: Program) -> list[str]:
    """Return the input names of a program's recurrent state; the outputs have the prefix ``next_``."""
    return [name for name in program.signature.inputs if f"next_{name}" in program.signature.output_names]


def _in_a_row(inputs: Mapping[str, torch.Tensor], cache: KVCache) -> dict[str, torch.Tensor]:
    """Return the inputs of a step of a program for trees whose tokens follow one another: stored at their positions."""
    positions = inputs[cache.positions]
    rows, tokens = positions.shape
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(rows, -1, -1)
    return {**inputs, "cache_slots": positions, "step_mask": mask}


STEPS = 4
"""How many single tokens follow a prompt when ranges are observed."""


def begun(program: Program, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch with the inputs of a first step: zeros as recurrent state, and positions for a cache.

    Rows are truncated to the cache's length.
    """
    inputs = dict(batch)
    names = [name for name in states_of(program) if name not in inputs]
    cache = program.facts.get(KVCache)
    if not names or not inputs:
        return inputs
    if cache is not None and cache.tokens in inputs:
        tokens = inputs[cache.tokens]
        longest = program.signature.inputs[names[0]].shape[2]
        if isinstance(longest, int):
            tokens = tokens[:, :longest]
        inputs[cache.tokens] = tokens
        if cache.positions not in inputs:
            inputs[cache.positions] = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1)
        if cache.tree:
            inputs = _in_a_row(inputs, cache)
    rows = next(iter(inputs.values())).shape[0]
    for name in names:
        spec = program.signature.inputs[name]
        sizes = [s if isinstance(s, int) else rows for s in spec.shape]
        if cache is not None and not isinstance(spec.shape[2], int):
            sizes[2] = inputs[cache.tokens].shape[1] + STEPS
        inputs[name] = torch.zeros(sizes, dtype=spec.dtype)
    return inputs


def in_steps(
    program: Program,
    batch: Mapping[str, torch.Tensor],
    run: Callable[[dict[str, torch.Tensor]], Mapping[str, Any]],
) -> None:
    """Run a batch in steps: a prompt and single tokens with a cache, else twice, the second time with the new state.

    Args:
        program: with caches or another recurrent state.
        batch: all of its inputs, as :func:`begun` gives them.
        run: called with the inputs of each step; returns the outputs by name.
    """
    names, cache = states_of(program), program.facts.get(KVCache)

    def following(inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {**inputs, **{name: outputs[f"next_{name}"] for name in names}}

    if cache is None:
        run(following(batch, run(dict(batch))))
        return
    ids, positions = batch[cache.tokens], batch[cache.positions]
    prompt = max(1, ids.shape[1] - STEPS)
    step_inputs = dict(batch)
    for first, end in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
        step_inputs |= {cache.tokens: ids[:, first:end], cache.positions: positions[:, first:end]}
        if cache.tree:
            step_inputs = _in_a_row(step_inputs, cache)
        step_inputs = following(step_inputs, run(step_inputs))
