"""States of mixers while a decoder runs: they advance by the tokens that count, which may be known only after a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..ir.operators import causal_conv1d, causal_conv1d_state, linear_attention, linear_attention_state
from ..ir.operators.linear_attention import recurrence
from .step import Step


def convolve(
    step: Step, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Compute ``graphopt.causal_conv1d`` after the inputs that its state remembers."""
    state = step.states[name]
    if x.shape[2] == 1 and step.taken is None:
        step.after[name] = torch.cat([state[:, :, 1:], x.to(state.dtype)], 2)
    elif step.taken is not None:
        step.after[name] = causal_conv1d_state(x, state, step.taken)
    else:
        # memory of the step is written again before it is known which tokens count
        step.pending[name] = (x.clone(),)
    return causal_conv1d(x, weight, bias, state, step.step_mask)


def attend_linearly(
    step: Step, name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor,
    beta: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Compute ``graphopt.linear_attention`` after the tokens that its state sums up."""
    state = step.states[name]
    if step.taken is not None or v.shape[2] == 1:
        y, after = recurrence(q, k, v, g, beta, state, step.taken)
        step.after[name] = after.to(state.dtype)
        assert y is not None
        return y.to(v.dtype)
    step.pending[name] = tuple(None if t is None else t.clone() for t in (k, v, g, beta))
    return linear_attention(q, k, v, g, beta, state, step.step_mask)


def advanced(step: Step, taken: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the states after those tokens of a step that are taken.

    Args:
        step: that was run.
        taken: (batch, tokens), booleans: the first tokens of each row, or one path of its tree.
    """
    states = dict(step.states)
    everything = bool(taken.all())
    for name, after in step.after.items():
        keep = taken[:, 0].view(-1, *[1] * (after.dim() - 1))
        states[name] = (
            after if everything or step.taken is not None else torch.where(keep, after, states[name])
        )
    for name, operands in step.pending.items():
        state = step.states[name]
        if len(operands) == 1:
            (x,) = operands
            assert x is not None
            states[name] = causal_conv1d_state(x, state, taken)
        else:
            k, v, g, beta = operands
            assert k is not None
            assert v is not None
            assert g is not None
            states[name] = linear_attention_state(k, v, g, beta, state, taken, step.step_mask)
    return states


def of_rows(states: Mapping[str, torch.Tensor], index: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the states of some rows."""
    return {name: state.index_select(0, index) for name, state in states.items()}
