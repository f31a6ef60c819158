"""One call of a decoder's graph: caches are written in place and read up to their end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..ir.operators import attention, cache_positions, cache_visible

FOLDED = 16
"""Number of tokens up to which heads that share their keys are computed as one, so that keys are read once."""

WIDEST = 256
"""Size of heads up to which GPUs have kernels for grouped heads."""

Buffer = tuple[str, int, int]
"""A cache input, and the first and last of its heads that this buffer holds."""


def number_of(buffer: Buffer) -> int:
    """Return the number of a buffer's layer among those with caches."""
    return int(buffer[0].rsplit("_", 1)[1])


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
        states: of mixers without keys, by input.
        taken: (batch, tokens), the first tokens of each row, which count; None if that is known only after the step.
        after: the states after the tokens that count, as far as they are known.
        pending: of the other states, what they follow from once it is known which tokens count.
        watch: called with the buffer of a layer's keys and the weights of its attention, if they are needed.
    """

    buffers: dict[Buffer, torch.Tensor]
    positions: torch.Tensor
    slots: torch.Tensor
    limit: int
    start: int | None
    step_mask: torch.Tensor | None = None
    read: torch.Tensor | None = None
    seen: dict[int | None, torch.Tensor] = field(default_factory=dict)
    states: dict[str, torch.Tensor] = field(default_factory=dict)
    taken: torch.Tensor | None = None
    after: dict[str, torch.Tensor] = field(default_factory=dict)
    pending: dict[str, tuple[torch.Tensor | None, ...]] = field(default_factory=dict)
    watch: Callable[[Buffer, torch.Tensor], None] | None = None

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

    def mask_of(
        self, q: torch.Tensor, k: torch.Tensor, window: int | None, layer: Buffer | None
    ) -> torch.Tensor | None:
        """Return what new tokens see, or None where all of it follows from the order of the slots."""
        if self.start is None or self.step_mask is not None:
            return self.visible(window, k)
        if q.shape[2] == 1 or (self.start == 0 and (window is None or window >= self.limit)):
            return None
        return self.visible(window, k)

    @property
    def weighs(self) -> bool:
        """Whether the step itself adds something to scores; see :meth:`bias_of`."""
        return False

    def bias_of(self, q: torch.Tensor, layer: Buffer | None) -> torch.Tensor | None:
        """Return what is added to the scores of a layer's slots, (batch, heads, 1, slots); None if nothing is."""
        return None

    def chosen(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, scale: float,
        softcap: float | None, window: int | None, layer: Buffer | None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Return attention to some of the slots, if tokens choose them; None if they read all that is visible."""
        return None

    def visible_where_read(
        self, window: int | None, cache: torch.Tensor, layer: Buffer | None
    ) -> torch.Tensor:
        """Return what the tokens that are read see: (batch, 1 or heads, tokens read, slots in use)."""
        assert self.read is not None
        if self.step_mask is not None:
            return rows_of_tokens(self.visible(window, cache), self.read)
        slots = cache_positions(self.positions, self.slots, cache.shape[2])
        distance = self.positions.gather(1, self.read)[:, :, None] - slots[:, None]
        seen = distance >= 0
        return (seen if window is None else seen & (distance < window))[:, None]

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


def store_whole(step: Step, buffer: Buffer, values: torch.Tensor) -> torch.Tensor:
    """Compute ``graphopt.cache_store`` in place; slots that are not in use are returned too."""
    step.store(buffer, values)
    return step.buffers[buffer]


def attend(
    step: Step, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None,
    sinks: torch.Tensor | None, scale: float, softcap: float | None, window: int | None, layer: Buffer | None = None,
) -> torch.Tensor:  # fmt: skip
    """Compute ``graphopt.attention`` over caches, without a mask if a single token attends to everything."""
    chosen = step.chosen(q, k, v, sinks, scale, softcap, window, layer)
    if chosen is not None:
        return chosen
    bias = step.bias_of(q, layer) if bias is None else bias[..., : step.limit]
    visible = step.mask_of(q, k, window, layer)
    return _attended(step, q, k, v, visible, bias, sinks, scale, softcap, window, layer)


def attend_where_read(
    step: Step, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: None, sinks: torch.Tensor | None,
    scale: float, softcap: float | None, window: int | None, layer: Buffer | None = None,
) -> torch.Tensor:  # fmt: skip
    """Compute :func:`attend` for the tokens that a step reads, whose queries alone are given; for all if it names none."""
    if step.read is None:
        return attend(step, q, k, v, None, sinks, scale, softcap, window, layer)
    visible = step.visible_where_read(window, k, layer)
    return _attended(step, q, k, v, visible, step.bias_of(q, layer), sinks, scale, softcap, window, layer)


def rows_of_tokens(visible: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """Return the rows of some tokens in what all tokens of a step see."""
    index = read[:, None, :, None].expand(-1, visible.shape[1], -1, visible.shape[3])
    return visible.expand(read.shape[0], -1, -1, -1).gather(2, index)


def _attended(
    step: Step, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None,
    bias: torch.Tensor | None, sinks: torch.Tensor | None, scale: float, softcap: float | None, window: int | None,
    layer: Buffer | None,
) -> torch.Tensor:  # fmt: skip
    """Compute attention to what is visible, or to what the order of tokens says."""
    grouped = k.shape[1] < q.shape[1] and sinks is None and step.watch is None
    if grouped and (q.device.type == "cpu" or q.shape[3] > WIDEST):
        if q.shape[2] <= FOLDED:
            return of_groups(step, q, k, v, visible, bias, scale, softcap, window)
        if k.shape[1] == 1:
            # kernels for grouped heads would read or copy keys and values for each of them
            k, v = (t.expand(-1, q.shape[1], -1, -1) for t in (k, v))
    if visible is not None:
        if step.watch is not None and layer is not None:
            step.watch(layer, weights_of_groups(q, k, visible, scale, softcap, sinks))
        if visible.shape[1] not in (1, q.shape[1]):
            visible = visible.repeat_interleave(q.shape[1] // visible.shape[1], 1)
        return attention(q, k, v, None, bias, sinks, None, visible, scale=scale, softcap=softcap)
    if q.shape[2] == 1:
        if window is not None and window < step.limit:
            k, v = k[:, :, -window:], v[:, :, -window:]
            bias = bias if bias is None else bias[..., -window:]
        return attention(q, k, v, None, bias, sinks, None, None, scale=scale, softcap=softcap)
    return attention(q, k, v, None, bias, sinks, scale=scale, causal=True, softcap=softcap)


def of_groups(
    step: Step, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None,
    bias: torch.Tensor | None, scale: float, softcap: float | None, window: int | None,
) -> torch.Tensor:  # fmt: skip
    """Compute attention of heads that share keys as that of one head with as many more queries."""
    batch, heads, tokens, size = q.shape
    groups = k.shape[1]
    if visible is None and tokens == 1 and window is not None and window < k.shape[2]:
        k, v = k[:, :, -window:], v[:, :, -window:]
        bias = bias if bias is None else bias[..., -window:]
    elif visible is None and tokens > 1:
        visible = step.visible(window, k)
    slots, rows = k.shape[2], heads // groups * tokens
    if visible is not None:
        wide = visible.unsqueeze(2).expand(batch, groups, heads // groups, tokens, slots)
        visible = wide.reshape(batch, groups, rows, slots)
    if bias is not None:
        bias = bias.expand(batch, heads, tokens, slots).reshape(batch, groups, rows, slots)
    q = q.reshape(batch, groups, rows, size)
    mixed = attention(q, k, v, None, bias, None, None, visible, scale=scale, softcap=softcap)
    return mixed.reshape(batch, heads, tokens, v.shape[3])


def weights_of_groups(
    q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor, scale: float, softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Return the shares of attention.

    Args:
        q: (batch, query heads, tokens, size).
        k: (batch, key heads, slots, size).
        visible: (batch, 1 or key heads, tokens, slots).
        scale: of scores.
        softcap: bound of scores.
        sinks: (query heads,), scores that take part in the softmax.

    Returns:
        (batch, key heads, query heads of each, tokens, slots), float32.
    """
    batch, heads, slots, size = k.shape
    scores = q.reshape(batch, heads, -1, size) @ k.transpose(-1, -2)
    scores = scores.view(batch, heads, -1, q.shape[2], slots).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, :, None], -torch.inf)
    if sinks is None:
        return torch.softmax(scores, -1).nan_to_num(0.0)
    apart = sinks.float().view(1, heads, -1, 1, 1).expand(*scores.shape[:4], 1)
    return torch.softmax(torch.cat([scores, apart], -1), -1)[..., :-1].nan_to_num(0.0)


def positions_of_slots(step: Step) -> torch.Tensor:
    """Compute ``graphopt.cache_positions`` of the slots in use."""
    return cache_positions(step.positions, step.slots, step.limit)
