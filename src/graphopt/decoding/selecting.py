"""A decoder that keeps everything and reads little: each new token attends to the tokens that promise most.

Which these are is found from a few channels of all keys (Double Sparsity, arXiv 2408.07092), or in a few layers that read
everything, for the layers after them (TidalDecode, arXiv 2410.05076).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ir.errors import UsageError
from ..ir.facts import QuantizedCache
from ..ir.operators import attention
from ..ir.program import Program
from ..ir.schema import arguments, is_operator
from .cached import CachedDecoder
from .policies import Reading, Reuse, Select
from .step import Buffer, Step, number_of, of_groups


@dataclass
class Labels:
    """What is kept a second time of one layer's keys.

    Attributes:
        channels: (batch, heads, some), which channels.
        kept: (batch, heads, some, slots), these channels, slots side by side so that scores read them in order.
        known: number of slots for which they are up to date.
    """

    channels: torch.Tensor
    kept: torch.Tensor
    known: int = 0


@dataclass
class SelectingStep(Step):
    """A step in which tokens choose what they read.

    Attributes:
        policy: how many are read, and how they are found.
        labels: by the buffer of a layer's keys.
        found: (batch, heads, tokens, number) by range of heads: what the last selecting layer found.
        bounds: (batch, 1, tokens, slots) by window: minus infinity where nothing is seen, infinity for newest tokens.
    """

    policy: Reading | None = None
    labels: dict[Buffer, Labels] = field(default_factory=dict)
    found: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    bounds: dict[int | None, torch.Tensor] = field(default_factory=dict)

    @property
    def weighs(self) -> bool:
        """Whether attention is not simply over all slots."""
        return True

    def chosen(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, scale: float,
        softcap: float | None, window: int | None, layer: Buffer | None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Return attention to the tokens that are chosen; None where all are read."""
        policy = self.policy
        assert policy is not None
        if layer is None or self.limit <= policy.budget or number_of(layer) < policy.dense:
            return None
        if isinstance(policy, Reuse):
            if window is not None:
                # what a window shows is few already, and not what others see
                return None
            if number_of(layer) in policy.select:
                self.found[layer[1:]] = self._best(self._shared_queries(q, k), k.transpose(-1, -2), window, k)
                return None
            index = self.found.get(layer[1:])
        else:
            index = self._by_channels(q, k, window, layer)
        return None if index is None else self._attend(index, q, k, v, sinks, scale, softcap, window)

    def _shared_queries(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Return the mean query of the heads that share keys: (batch, key heads, tokens, size)."""
        batch, heads, tokens, size = q.shape
        return q.reshape(batch, k.shape[1], heads // k.shape[1], tokens, size).mean(2)

    def _by_channels(
        self, q: torch.Tensor, k: torch.Tensor, window: int | None, layer: Buffer
    ) -> torch.Tensor:
        labels = self.labels[layer]
        first, slots = labels.known, k.shape[2]
        channels = labels.channels.unsqueeze(2)
        if first < slots:
            new = k[:, :, first:].gather(3, channels.expand(-1, -1, slots - first, -1))
            labels.kept[..., first:slots] = new.transpose(-1, -2)
            labels.known = slots
        queries = self._shared_queries(q, k).gather(3, channels.expand(-1, -1, q.shape[2], -1))
        return self._best(queries, labels.kept[..., :slots], window, k)

    def _best(
        self, queries: torch.Tensor, keys: torch.Tensor, window: int | None, cache: torch.Tensor
    ) -> torch.Tensor:
        """Return the slots with the largest scores: (batch, key heads, tokens, number), in no order."""
        assert self.policy is not None
        scores = queries @ keys
        scores += self._bounds(window, cache)
        count = min(self.policy.budget, scores.shape[-1])
        best = scores.topk(count, -1, sorted=False)
        least = best.values.amin(-1, keepdim=True)
        # which of equal tokens are chosen must not follow from the width of a batch: the newer ones, as elsewhere
        if bool((((scores >= least).sum(-1, keepdim=True) > count) & (least > -torch.inf)).any()):
            order = torch.argsort(scores.flip(-1), dim=-1, descending=True, stable=True)
            return scores.shape[-1] - 1 - order[..., :count]
        return best.indices

    def _bounds(self, window: int | None, cache: torch.Tensor) -> torch.Tensor:
        """Return what is added to scores so that newest tokens are chosen, and what is not seen is not."""
        assert self.policy is not None
        if window not in self.bounds:
            visible = self.visible(window, cache)
            slots = torch.arange(cache.shape[2], device=cache.device)
            # the slot of an earlier token is its position; those of this step stand where the step says
            places = slots.expand(visible.shape[0], -1).scatter(1, self.slots, self.positions)
            newest = places[:, None, None] > self.positions[:, None, :, None] - self.policy.recent
            bounds = torch.zeros(newest.shape, device=cache.device).masked_fill_(newest, torch.inf)
            self.bounds[window] = bounds.masked_fill_(~visible, -torch.inf)
        return self.bounds[window]

    def _attend(
        self, index: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None,
        scale: float, softcap: float | None, window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        """Return attention of each token to its own slots."""
        batch, heads, tokens, size = q.shape
        # each token becomes a row of its own
        seen = None
        if tokens > 1 or self.start is None or window is not None:
            bounds = self._bounds(window, k).expand(batch, k.shape[1], tokens, -1)
            seen = bounds.gather(3, index).transpose(1, 2).flatten(0, 1).unsqueeze(2) > -torch.inf
        keys, values = (rows_of(cache, index).transpose(1, 2).flatten(0, 1) for cache in (k, v))
        q = q.transpose(1, 2).reshape(batch * tokens, heads, 1, size)
        if sinks is None:
            mixed = of_groups(self, q, keys, values, seen, None, scale, softcap, None)
        else:
            seen = None if seen is None else seen.repeat_interleave(heads // seen.shape[1], 1)
            mixed = attention(q, keys, values, None, None, sinks, None, seen, scale=scale, softcap=softcap)
        return mixed.reshape(batch, tokens, heads, -1).transpose(1, 2)


def windows_of(program: Program) -> dict[int, int | None]:
    """Return how many tokens each layer with caches sees, by its number; None if it sees all."""
    found: dict[int, int | None] = {}
    for node in program.nodes:
        if not is_operator(node, "graphopt.attention"):
            continue
        args = arguments(node)
        if args["visible"] is None or not is_operator(args["k"], "graphopt.cache_store"):
            continue
        cache = arguments(args["k"])["cache"]
        while is_operator(cache, "aten.slice"):
            cache = cache.args[0]
        name = str(cache.meta.get("input", ""))
        if name.startswith("key_cache_"):
            found[number_of((name, 0, 0))] = arguments(args["visible"])["window"]
    return found


def _with_layers(policy: Reuse, program: Program, layers: int) -> Reuse:
    """Return a policy whose layers can choose for others.

    Raises:
        UsageError: there are none, or those that it names cannot.
    """
    windows = windows_of(program)
    free = [number for number in range(layers) if windows.get(number) is None]
    policy = policy.among(free, layers)
    if policy.select and max(policy.select) >= layers:
        raise UsageError(
            f"{policy.name}: select names layer {max(policy.select)}, the program has caches in {layers} layers",
            hint="layers are counted from 0",
        )
    for number in policy.select:
        if number not in free:
            raise UsageError(
                f"{policy.name}: select names layer {number}, which sees {windows[number]} tokens alone and cannot choose "
                "for others",
                hint=f"layers that see everything: {', '.join(map(str, free)) or 'none'}",
            )
    if not policy.select or not any(n > min(policy.select) and n not in policy.select for n in free):
        named = f" what layers {', '.join(map(str, policy.select))} choose" if policy.select else ""
        raise UsageError(
            f"{policy.name}: no layer that sees everything is left to read{named}",
            hint="fewer layers in select, or the policy full" if named else "the policy full, or select",
        )
    return policy


def rows_of(cache: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return some slots of a cache, copied row by row: several times as fast as ``gather`` on CPUs.

    Args:
        cache: (batch, heads, slots, size).
        index: (batch, heads, tokens, number).

    Returns:
        (batch, heads, tokens, number, size).
    """
    batch, heads, _, size = cache.shape
    by_row, by_head, by_slot, by_number = cache.stride()
    if by_number != 1 or not by_slot or by_row % by_slot or by_head % by_slot:
        wide = cache.unsqueeze(2).expand(-1, -1, index.shape[2], -1, -1)
        return wide.gather(3, index.unsqueeze(-1).expand(*index.shape, size))
    starts = torch.arange(batch, device=cache.device)[:, None] * (by_row // by_slot)
    starts = starts + torch.arange(heads, device=cache.device) * (by_head // by_slot)
    count = (batch - 1) * (by_row // by_slot) + (heads - 1) * (by_head // by_slot) + cache.shape[2]
    rows = cache.as_strided((count, size), (by_slot, 1))
    return rows.index_select(0, (index + starts[:, :, None, None]).flatten()).view(*index.shape, size)


def largest(sizes: torch.Tensor, channels: int) -> torch.Tensor:
    """Return the channels of the largest pairs, (..., channels); rotation mixes channel i with channel i + half."""
    half = sizes.shape[-1] // 2
    pairs = sizes[..., :half] + sizes[..., half : 2 * half]
    best = pairs.topk(min(channels // 2, half), -1).indices
    return torch.cat([best, best + half], -1)


class SelectingDecoder(CachedDecoder):
    """Runs a program whose new tokens read few of the earlier ones; see :class:`CachedDecoder`.

    Prompts read everything, but for their last token, which is a new one whether candidates are computed with it or not.
    The channels of a row follow from its first ``budget`` keys, which are known before anything is chosen: so they depend
    on no other row, and not on how many tokens a step has.

    Args:
        program: after insert-cache, with attention that does not depend on where tokens stand in the cache.
        batch: number of rows.
        capacity: number of slots.
        policy: how many tokens are read.
        options: as for :class:`CachedDecoder`.

    Raises:
        UsageError: the program's attention adds a bias by position, its caches are in few bits, or the policy names layers
            that it has not.
    """

    def __init__(self, program: Program, batch: int, capacity: int, policy: Reading, **options: Any):
        if QuantizedCache in program.facts:
            raise UsageError(
                "caches in few bits are read whole", hint="leave quantize-cache out, or the policy"
            )
        super().__init__(program, batch, capacity, **options)
        # recorded steps read all of the caches
        self.recorder = None
        if self.biased:
            raise UsageError(
                "this program adds a bias that depends on where tokens stand, so no tokens can be chosen by their keys",
                hint="the policy full",
            )
        layers = self.cache.layers
        if not layers:
            raise UsageError("this program has no caches to choose from", hint="the policy full")
        if isinstance(policy, Reuse):
            policy = _with_layers(policy, program, layers)
        if isinstance(policy, Select) and policy.dense >= layers:
            raise UsageError(
                f"{policy.name}: {policy.dense} layers that read everything are all of the {layers} layers with caches",
                hint="a smaller dense, or the policy full",
            )
        self.policy = policy
        self.labels: dict[Buffer, Labels] = {}
        self._chosen = [False] * batch
        self._certain, self._prompt = 0, False

    @property
    def bytes(self) -> int:
        """Number of bytes that caches, states and the channels that are kept twice take."""
        return super().bytes + sum(one.kept.nbytes for one in self.labels.values())

    def free(self, row: int) -> int:
        """Return how many tokens a row may commit in a step: channels are chosen before any token needs them."""
        until = self.policy.budget - self.lengths[row]
        return min(super().free(row), until) if until > 0 else super().free(row)

    def _step(
        self, positions: torch.Tensor, slots: torch.Tensor | None, step_mask: torch.Tensor | None,
        counts: Sequence[int] | None, read: torch.Tensor | None,
    ) -> Step:  # fmt: skip
        step = super()._step(positions, slots, step_mask, counts, read)
        self._settle()
        if self._prompt:
            return step
        if isinstance(self.policy, Select):
            self._choose(self.policy)
        return SelectingStep(
            step.buffers, step.positions, step.slots, step.limit, step.start, step.step_mask, step.read,
            states=step.states, taken=step.taken, policy=self.policy, labels=self.labels,
        )  # fmt: skip

    def prefill(self, rows: Sequence[Sequence[int]], whole: bool = True) -> list[dict[str, torch.Tensor]]:
        """Read prompts; see :meth:`CachedDecoder.prefill`."""
        self._settle()
        before = [row[:-1] for row in rows] if whole else rows
        outputs: list[dict[str, torch.Tensor]] = [{} for _ in rows]
        self._prompt = True
        try:
            if any(before):
                outputs = super().prefill(before, whole=False)
        finally:
            self._prompt = False
        if whole and any(rows):
            counts = [min(len(row), 1) for row in rows]
            ids = torch.tensor([[row[-1] if row else 0] for row in rows], device=self.device)
            found = self.extend(ids, counts=counts)
            self.advance(counts)
            outputs = [
                {name: value[number, 0] for name, value in found.items()} if count else {}
                for number, count in enumerate(counts)
            ]
        return outputs

    def _settle(self) -> None:
        """Forget what is known of slots that are, or may have been, written anew: rows go on from where they stand."""
        # what the last step wrote behind these may have been rejected or moved since
        sure, self._certain = min(self._certain, *self.lengths), min(self.lengths)
        for one in self.labels.values():
            one.known = min(one.known, sure)
        chosen = zip(self._chosen, self.lengths, strict=True)
        self._chosen = [known and length >= self.policy.budget for known, length in chosen]

    def _choose(self, policy: Select) -> None:
        """Choose the channels of rows that are as long as the budget."""
        due = [n for n, length in enumerate(self.lengths) if length >= policy.budget and not self._chosen[n]]
        self._chosen = [length >= policy.budget for length in self.lengths]
        for layer, keys in self.buffers.items():
            if not layer[0].startswith("key_cache_") or number_of(layer) < policy.dense:
                continue
            if layer not in self.labels:
                batch, heads, slots, size = keys.shape
                some = 2 * min(policy.channels // 2, size // 2)
                channels = torch.arange(some, device=self.device).expand(batch, heads, some).clone()
                self.labels[layer] = Labels(channels, keys.new_zeros(batch, heads, some, slots))
            for row in due:
                sizes = keys[row, :, : policy.budget].abs().mean(1)
                self.labels[layer].channels[row] = largest(sizes, policy.channels)
                self.labels[layer].known = 0

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Continue with only some of the rows."""
        if list(rows) != list(range(self.batch)):
            index = torch.tensor(list(rows), dtype=torch.int64, device=self.device)
            for one in self.labels.values():
                one.channels, one.kept = one.channels.index_select(0, index), one.kept.index_select(0, index)
            self._chosen = [self._chosen[row] for row in rows]
        super().keep_rows(rows)


__all__ = ["Labels", "SelectingDecoder", "SelectingStep"]
