"""Depthwise convolutions along a sequence that see a token and those just before it, and the inputs that they remember."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .library import composite_operator
from .spec import OperatorSpec, Trait, like_first
from .work import Call, Work, moved, product


def _state_shape(x: Tensor, state: Tensor, *others: object, **options: object) -> Tensor:
    return state.new_empty(state.shape)


def _work(call: Call) -> Work:
    """A multiplication and an addition for each tap of each result."""
    return moved(call, 2 * product(call.output.shape) * call.tensor("weight").shape[-1])


def _ancestors(step_mask: Tensor, taps: int) -> Tensor:
    """Return where the taps of each node lie among (state, tokens): (batch, tokens, taps), the node itself last."""
    tokens = step_mask.shape[1]
    seen = step_mask.to(torch.bool)
    depth = seen.sum(2)
    order = torch.arange(tokens, device=step_mask.device)
    steps = torch.arange(taps - 1, -1, -1, device=step_mask.device)
    wanted = depth[:, :, None] - steps
    # the depths of the nodes on the path of each node: its entry d - 1 is the node at depth d
    places = torch.where(seen, depth[:, None, :] - 1, tokens)
    path = torch.zeros_like(places).new_zeros(step_mask.shape[0], tokens, tokens + 1)
    path = path.scatter(2, places, order.expand(step_mask.shape[0], tokens, -1))
    among = path.gather(2, (wanted - 1).clamp(min=0))
    return torch.where(wanted > 0, among + taps - 1, wanted + taps - 2)


@composite_operator(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, Tensor? state=None, Tensor? step_mask=None) -> Tensor",
    spec=OperatorSpec(shape=like_first, work=_work, traits=Trait.MIXING),
)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    step_mask: Tensor | None = None,
) -> Tensor:
    """Return a convolution of every channel with its own taps, the last of which lies on the token itself.

    Args:
        x: (batch, channels, tokens).
        weight: (channels, 1, taps).
        bias: (channels,).
        state: (batch, channels, taps - 1), the inputs before the first token; zeros if left out.
        step_mask: (batch, tokens, tokens), true where a token is another one or comes after it, as in a tree; if left
            out, tokens follow one another.

    Returns:
        (batch, channels, tokens).
    """
    taps = weight.shape[2]
    before: Tensor = F.pad(x, (taps - 1, 0)) if state is None else torch.cat([state.to(x.dtype), x], 2)
    y: Tensor
    if step_mask is not None:
        index = _ancestors(step_mask, taps).flatten(1)
        rows = before.gather(2, index[:, None, :].expand(-1, before.shape[1], -1))
        y = (rows.reshape(*rows.shape[:2], x.shape[2], taps) * weight[:, 0, None, :]).sum(-1)
    else:
        # a few products of shifted inputs, as fast as torch's convolution in float32 and many times as fast in float64
        tokens = x.shape[2]
        y = before[:, :, :tokens] * weight[:, :, 0]
        for tap in range(1, taps):
            y = torch.addcmul(y, before[:, :, tap : tap + tokens], weight[:, :, tap])
    return y if bias is None else y + bias[:, None]


@composite_operator(
    "causal_conv1d_state(Tensor x, Tensor state, Tensor taken, Tensor? step_mask=None) -> Tensor",
    spec=OperatorSpec(shape=_state_shape),
)
def causal_conv1d_state(x: Tensor, state: Tensor, taken: Tensor, step_mask: Tensor | None = None) -> Tensor:
    """Return the inputs that a convolution remembers after those tokens of a piece that are taken.

    Args:
        x: (batch, channels, tokens).
        state: (batch, channels, taps - 1).
        taken: (batch, tokens), booleans: the first tokens of a row, or one path of its tree.
        step_mask: (batch, tokens, tokens); what is taken says enough, so that it is not read.

    Returns:
        (batch, channels, taps - 1), of the state's type.
    """
    kept = state.shape[2]
    flags = torch.cat([taken.new_ones(taken.shape[0], kept), taken], 1).to(torch.int64)
    count = flags.cumsum(1)
    # the place of each taken one among the last ones, everything else behind them
    place = count - count[:, -1:] + kept - 1
    place = torch.where((flags > 0) & (place >= 0), place, kept)
    order = torch.arange(flags.shape[1], device=x.device).expand(flags.shape)
    index = torch.zeros_like(place).new_zeros(flags.shape[0], kept + 1).scatter(1, place, order)[:, :kept]
    joined = torch.cat([state, x.to(state.dtype)], 2)
    return joined.gather(2, index[:, None, :].expand(-1, x.shape[1], -1))
