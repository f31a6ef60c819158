"""Shapes of torch's recurrent layers (LSTM, GRU, RNN), whose length may vary.

Torch computes them by unrolling the layer over the example's steps, which fixes the length, although the operator itself
takes any. These rules give the same shapes without running a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from .compat import composite_kernels


def _lstm(input: torch.Tensor, states: Any, *others: Any) -> tuple[torch.Tensor, ...]:
    """Return output, last hidden state and last cell state of ``aten.lstm.input``."""
    hidden, cell = states
    return _output(input, hidden, others), torch.empty_like(hidden), torch.empty_like(cell)


def _recurrent(input: torch.Tensor, hidden: torch.Tensor, *others: Any) -> tuple[torch.Tensor, ...]:
    """Return output and last hidden state of ``aten.gru.input`` and of plain recurrent layers."""
    return _output(input, hidden, others), torch.empty_like(hidden)


def _output(input: torch.Tensor, hidden: torch.Tensor, others: tuple[Any, ...]) -> torch.Tensor:
    # parameters, has_biases, num_layers, dropout, train, bidirectional, batch_first
    directions = 2 if others[5] else 1
    return input.new_empty((*input.shape[:2], hidden.shape[2] * directions))


_RULES = {
    torch.ops.aten.lstm.input: _lstm,
    torch.ops.aten.gru.input: _recurrent,
    torch.ops.aten.rnn_tanh.input: _recurrent,
    torch.ops.aten.rnn_relu.input: _recurrent,
}


def _named(operator: Any) -> Any:
    names = [argument.name for argument in operator._schema.arguments]

    def shape(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        return _RULES[operator](*(given[name] for name in names))

    return shape


def is_recurrent(operator: Any) -> bool:
    """Return whether an operator is a recurrent layer of torch's on sequences of one length."""
    return operator in _RULES


@contextlib.contextmanager
def free_lengths() -> Iterator[None]:
    """Infer shapes of recurrent layers inside the block without unrolling them."""
    with composite_kernels({operator: _named(operator) for operator in _RULES}):
        yield
