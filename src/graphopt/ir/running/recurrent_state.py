"""Recurrent state: caches and other values that a program passes from one step to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..facts import KVCache, StateCache
from ..program import Program


def states_of(program: Program) -> list[str]:
    """Return the input names of a program's recurrent state; the outputs have the prefix ``next_``."""
    return [name for name in program.signature.inputs if f"next_{name}" in program.signature.output_names]


def caches_of(program: Program) -> list[str]:
    """Return the input names of the caches with a slot for each token: (batch, heads, capacity, size)."""
    states = program.facts.get(StateCache)
    fixed = () if states is None else states.states
    return [name for name in states_of(program) if name not in fixed]


def in_a_row(program: Program, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the inputs of a step of a program for trees whose tokens follow one another: stored at their positions."""
    cache = program.facts[KVCache]
    rows, tokens = inputs[cache.tokens].shape[:2]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(rows, -1, -1)
    given = {**inputs, "step_mask": mask}
    if "cache_slots" in program.signature.inputs:
        given["cache_slots"] = inputs[cache.positions]
    return given


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
        if isinstance(cache.capacity, int):
            tokens = tokens[:, : cache.capacity]
        inputs[cache.tokens] = tokens
        if cache.positions and cache.positions not in inputs:
            inputs[cache.positions] = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1)
        if cache.tree:
            inputs = in_a_row(program, inputs)
    rows = next(iter(inputs.values())).shape[0]
    caches = caches_of(program)
    for name in names:
        spec = program.signature.inputs[name]
        sizes = [s if isinstance(s, int) else rows for s in spec.shape]
        if cache is not None and name in caches and not isinstance(spec.shape[2], int):
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
    names, cache, states = states_of(program), program.facts.get(KVCache), program.facts.get(StateCache)

    def following(inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {**inputs, **{name: outputs[f"next_{name}"] for name in names}}

    if cache is None:
        run(following(batch, run(dict(batch))))
        return
    ids = batch[cache.tokens]
    prompt = max(1, ids.shape[1] - STEPS)
    step_inputs = dict(batch)
    for first, end in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
        step_inputs |= {name: batch[name][:, first:end] for name in (cache.tokens, cache.positions) if name}
        if states is not None:
            step_inputs[states.taken] = torch.ones(ids.shape[0], end - first, dtype=torch.bool)
        if cache.tree:
            step_inputs = in_a_row(program, step_inputs)
        step_inputs = following(step_inputs, run(step_inputs))
