"""Linear attention with decay and, optionally, the delta rule: what state space layers and gated linear layers compute.

Of every head, with decays exp(g) and strengths beta:

    S_t = diag(exp g_t) S_{t-1} + k_t u_t^T        y_t = S_t^T q_t
    u_t = v_t                                                   without beta
    u_t = beta_t (v_t - (diag(exp g_t) S_{t-1})^T k_t)          with beta

Mamba 2 (arXiv 2405.21060), retention (2307.08621) and gated linear attention (2312.06635) have no beta, Mamba (2312.00752)
is the case of one head per channel with a decay for each entry of its state, gated DeltaNet (2412.06464) and Kimi's delta
attention have one. Pieces of a sequence are computed as the chunked algorithms of these papers compute a chunk.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .library import composite_operator
from .spec import OperatorSpec, Trait
from .work import Call, Size, Work, moved, product

CHUNK = 64
"""Tokens that are computed at once where a head has one decay."""
CHANNEL_CHUNK = 16
"""The same where every key channel has a decay, which takes that many times the memory."""


def _shape(q: Tensor, k: Tensor, v: Tensor, *others: object, **options: object) -> Tensor:
    return v.new_empty(v.shape)


def _state_shape(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor, *others: object, **options: object
) -> Tensor:
    return state.new_empty(state.shape)


def _work(call: Call) -> Work:
    """Operations token by token: decay, outer product and read-out, and a second read for the delta rule."""
    return moved(call, _per_token(call) * (7 if call.arguments.get("beta") is not None else 5))


def _state_work(call: Call) -> Work:
    """The same without the read-out."""
    return moved(call, _per_token(call) * (5 if call.arguments.get("beta") is not None else 3))


def _per_token(call: Call) -> Size:
    return product(call.tensor("v").shape) * call.tensor("k").shape[-1]


def recurrence(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    state: Tensor | None,
    taken: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Return the outputs of a piece of consecutive tokens and the state after it.

    Args:
        q: (batch, key heads, tokens, key size); None if only the state is asked for.
        k: (batch, key heads, tokens, key size); the number of key heads divides that of heads.
        v: (batch, heads, tokens, value size).
        g: (batch, heads, tokens), or (batch, heads, tokens, key size): logarithms of decays.
        beta: (batch, heads, tokens).
        state: (batch, heads, key size, value size); zeros if None.
        taken: (batch, tokens): tokens that count in the state, the first ones of each row; all if None.
    """
    heads, tokens = v.shape[1], v.shape[2]
    q, k, v, g, beta, state = _wide(q, k, v, g, beta, state)
    q, k = None if q is None else _for_heads(q, heads), _for_heads(k, heads)
    if state is None:
        state = v.new_zeros(v.shape[0], heads, k.shape[3], v.shape[3])
    if taken is not None:
        # a decay of one and a key of zero leave the state as it is
        mask = taken[:, None, :, None].to(k.dtype)
        k, g = k * mask, g * (mask if g.dim() == 4 else mask[..., 0])
    if not isinstance(tokens, int):
        return _chunk(q, k, v, g, beta, state, None)
    by_channel = g.dim() == 4
    if tokens == 1 or (by_channel and beta is None):
        return _by_token(q, k, v, g, beta, state)
    size = CHANNEL_CHUNK if by_channel else CHUNK
    results = []
    for first in range(0, tokens, size):
        part = slice(first, first + size)
        y, state = _chunk(
            None if q is None else q[:, :, part], k[:, :, part], v[:, :, part], g[:, :, part],
            None if beta is None else beta[:, :, part], state, None,
        )  # fmt: skip
        if y is not None:
            results.append(y)
    if q is None:
        return None, state
    return results[0] if len(results) == 1 else torch.cat(results, 2) if results else v, state


def _wide(q: Tensor | None, k: Tensor, v: Tensor, g: Tensor, *others: Tensor | None) -> Any:
    """Return operands in one type of at least 32 bits: sums over all tokens are no longer sums in sixteen."""
    given = [t for t in (q, k, v, g, *others) if t is not None]
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in given), torch.float32)
    return tuple(None if t is None else t.to(dtype) for t in (q, k, v, g, *others))


def _nothing(v: Tensor) -> bool:
    """Return whether there surely are no tokens, which have no last one either."""
    return isinstance(v.shape[2], int) and v.shape[2] == 0


def _for_heads(t: Tensor, heads: int) -> Tensor:
    if t.shape[1] == heads:
        return t
    if t.shape[1] == 1:
        return t.expand(-1, heads, -1, -1)
    return t.repeat_interleave(heads // int(t.shape[1]), 1)


def _by_token(
    q: Tensor | None, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor
) -> tuple[Tensor | None, Tensor]:
    decays = torch.exp(g if g.dim() == 4 else g.unsqueeze(-1))
    results = []
    for t in range(v.shape[2]):
        state = state * decays[:, :, t].unsqueeze(-1)
        key, value = k[:, :, t].unsqueeze(-1), v[:, :, t].unsqueeze(-2)
        if beta is not None:
            value = beta[:, :, t, None, None] * (value - key.transpose(-1, -2) @ state)
        state = torch.addcmul(state, key, value)
        if q is not None:
            query = q[:, :, t].unsqueeze(-2)
            # a product with few rows or columns is slower as a product of matrices
            results.append(
                (query.transpose(-1, -2) * state).sum(-2, keepdim=True) if v.shape[3] == 1 else query @ state
            )
    if q is None:
        return None, state
    return results[0] if len(results) == 1 else torch.cat(results, 2) if results else v, state


def _chunk(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    state: Tensor,
    step_mask: Tensor | None,
    taken: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Return outputs and state of tokens that are computed at once: a chunk, or the nodes of a tree with its mask."""
    tokens = v.shape[2]
    by_channel = g.dim() == 4
    if step_mask is None:
        order = torch.arange(tokens, device=v.device)
        above = (order[:, None] >= order)[None, None]
        total = g.cumsum(2)
    else:
        above = step_mask.to(torch.bool)[:, None]
        path = step_mask.to(g.dtype)[:, None]
        total = path @ g if by_channel else (path @ g.unsqueeze(-1)).squeeze(-1)
    if by_channel:
        apart = total.unsqueeze(3) - total.unsqueeze(2)
        decay = apart.masked_fill(~above.unsqueeze(-1), -torch.inf).exp()
    else:
        apart = total.unsqueeze(3) - total.unsqueeze(2)
        decay = apart.masked_fill(~above, -torch.inf).exp()
    through = total.exp() if by_channel else total.exp().unsqueeze(-1)

    def scores(rows: Tensor) -> Tensor:
        if by_channel:
            return (rows.unsqueeze(3) * k.unsqueeze(2) * decay).sum(-1)
        return (rows @ k.transpose(-1, -2)) * decay

    u = v
    if beta is not None:
        strength = beta.unsqueeze(-1)
        system = scores(k * strength)
        u = strength * (v - (k * through) @ state)
        u = torch.linalg.solve_triangular(system.tril(-1), u, upper=False, unitriangular=True)
    y = None
    if q is not None:
        y = (q * through) @ state + scores(q) @ u
    if taken is None:
        end = total[:, :, -1:]
        rest = (end - total).exp()
    else:
        left = ~(taken[:, None].unsqueeze(-1) if by_channel else taken[:, None])
        # sums fall along a path: the lowest one is that of the last token taken, to the last bit
        end = total.masked_fill(left, 0.0).amin(2, keepdim=True)
        # what is not taken may lie outside of the path, where the difference has no sign
        rest = (end - total).masked_fill(left, -torch.inf).exp()
    rest, kept = (rest, end.exp().squeeze(2).unsqueeze(-1)) if by_channel else (
        rest.unsqueeze(-1), end.exp().unsqueeze(-1),
    )  # fmt: skip
    return y, state * kept + (k * rest).transpose(-1, -2) @ u


@composite_operator(
    "linear_attention(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? beta=None, Tensor? state=None, "
    "Tensor? step_mask=None) -> Tensor",
    spec=OperatorSpec(shape=_shape, work=_work, traits=Trait.MIXING),
)
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    step_mask: Tensor | None = None,
) -> Tensor:
    """Return what every token reads from the state that the tokens up to it have written.

    Args:
        q: (batch, key heads, tokens, key size).
        k: (batch, key heads, tokens, key size); the number of key heads divides that of heads.
        v: (batch, heads, tokens, value size).
        g: (batch, heads, tokens), or (batch, heads, tokens, key size): logarithms of the decays, at most 0.
        beta: (batch, heads, tokens), the strength of the delta rule; without it, values are added as they are.
        state: (batch, heads, key size, value size), before the first token; zeros if left out.
        step_mask: (batch, tokens, tokens), true where a token is another one or comes after it, as in a tree whose nodes
            are in topological order; if left out, tokens follow one another.

    Returns:
        (batch, heads, tokens, value size).
    """
    if step_mask is None or _nothing(v):
        y, _ = recurrence(q, k, v, g, beta, state)
    else:
        q, k = (_for_heads(t, v.shape[1]) for t in (q, k))
        start = v.new_zeros(v.shape[0], v.shape[1], k.shape[3], v.shape[3]) if state is None else state
        wide_q, wide_k, wide_v, g, beta, start = _wide(q, k, v, g, beta, start)
        y, _ = _chunk(wide_q, wide_k, wide_v, g, beta, start, step_mask)
    assert y is not None
    return y.to(v.dtype)


@composite_operator(
    "linear_attention_state(Tensor k, Tensor v, Tensor g, Tensor? beta, Tensor state, Tensor taken, Tensor? step_mask=None)"
    " -> Tensor",
    spec=OperatorSpec(shape=_state_shape, work=_state_work, traits=Trait.MIXING),
)
def linear_attention_state(
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    state: Tensor,
    taken: Tensor,
    step_mask: Tensor | None = None,
) -> Tensor:
    """Return the state after those tokens of a piece that are taken; see :func:`linear_attention` for the operands.

    Args:
        k: (batch, key heads, tokens, key size).
        v: (batch, heads, tokens, value size).
        g: (batch, heads, tokens), or (batch, heads, tokens, key size).
        beta: (batch, heads, tokens).
        state: (batch, heads, key size, value size), before the first token.
        taken: (batch, tokens), booleans: the first tokens of a row, or with a mask one path of its tree.
        step_mask: (batch, tokens, tokens).

    Returns:
        (batch, heads, key size, value size), of the state's type.
    """
    if step_mask is None or _nothing(v):
        _, after = recurrence(None, k, v, g, beta, state, taken)
    else:
        _, k, v, g, beta, start = _wide(None, _for_heads(k, v.shape[1]), v, g, beta, state)
        _, after = _chunk(None, k, v, g, beta, start, step_mask, taken)
    return after.to(state.dtype)
