"""One call of a decoder's graph: caches are written in place and read up to their end."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..ir.operators import attention, cache_positions, cache_visible

Buffer = tuple[str, int, int]
"""A cache input, and the first and last of its heads that this buffer holds."""


@dataclass
class Step:
    """The inputs of one call of a running graph, and the caches it writes into.

    Attributes:
        buffers: (batch, heads, capacity, size) by cache input and the range of its heads.
        positions: (batch, tokens), of the new tokens.
        slots: (batch, tokens), where the new tokens are stored.
        limit: one more than the last slot in use.
        start: the slot of the first token if all rows are equally long and tokens are consecutive; else None.
        step_mask: (batch, tokens, tokens), which new token attends to which; None if positions determine it.
        read: (batch, some), the tokens whose outputs are read, by number; None if all are.
    """

    buffers: dict[Buffer, torch.Tensor]
    positions: torch.Tensor
    slots: torch.Tensor
    limit: int
    start: int | None
    step_mask: torch.Tensor | None = None
    read: torch.Tensor | None = None
    seen: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def store(self, buffer: Buffer, values: torch.Tensor) -> torch.Tensor:
        """Write new tokens into a cache and return the part of the cache in use."""
        cache = self.buffers[buffer]
        if values.dtype != cache.dtype:
            values = values.to(cache.dtype)
        if self.start is None:
            cache.scatter_(2, self.slots[:, None, :, None].expand(values.shape), values)
        elif values.shape[2] == 1:
            cache.index_copy_(2, self.slots[0], values)
        else:
            cache[:, :, self.start : self.limit] = values
        return cache.narrow(2, 0, self.limit)

    def visible(self, window: int | None, cache: torch.Tensor) -> torch.Tensor:
        """Return which slots new tokens attend to; computed once per step."""
        if window not in self.seen:
            self.seen[window] = cache_visible(
                self.positions, self.slots, cache, self.step_mask, window=window
            )
        return self.seen[window]


def store(step: Step, buffer: Buffer, values: torch.Tensor) -> torch.Tensor:
    """Compute ``graphopt.cache_store`` in place."""
    return step.store(buffer, values)


def attend(
    step: Step, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None,
    sinks: torch.Tensor | None, scale: float, softcap: float | None, window: int | None,
) -> torch.Tensor:  # fmt: skip
    """Compute ``graphopt.attention`` over caches, without a mask if a single token attends to everything."""
    if bias is not None:
        bias = bias[..., : step.limit]
    visible = None
    if step.start is None or step.step_mask is not None:
        visible = step.visible(window, k)
    elif q.shape[2] == 1:
        if window is not None and window < step.limit:
            k, v = k[:, :, -window:], v[:, :, -window:]
            bias = bias if bias is None else bias[..., -window:]
    elif step.start == 0 and (window is None or window >= step.limit):
        return attention(q, k, v, None, bias, sinks, scale=scale, causal=True, softcap=softcap)
    else:
        visible = step.visible(window, k)
    return attention(q, k, v, None, bias, sinks, None, visible, scale=scale, softcap=softcap)


def positions_of_slots(step: Step) -> torch.Tensor:
    """Compute ``graphopt.cache_positions`` of the slots in use."""
    return cache_positions(step.positions, step.slots, step.limit)
