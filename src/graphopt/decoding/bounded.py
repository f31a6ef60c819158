"""A decoder whose caches are bounded: slots are apart from positions, and a policy says which tokens stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ir.errors import UsageError
from ..ir.facts import KVCache, QuantizedCache
from ..ir.program import Program
from .cached import CachedDecoder, Mark
from .policies import Episode, Held, Merge, Policy
from .prepared import TOKENS
from .step import Buffer, Step


@dataclass
class BoundedStep(Step):
    """A step over caches whose slots hold any positions, in ascending order.

    Attributes:
        held: (batch, heads, slots) by the buffer of keys: the positions of all tokens, new ones included; -1 if empty.
        filled: number of slots in use before the step, of each row.
        masks: those made so far.
        windows: how far each layer sees, of those that do not see everything; filled in as layers are computed.
        counts: (batch, heads, slots) by the buffer of keys: how many tokens an entry stands for, where some are merged.
    """

    held: dict[Buffer, torch.Tensor] = field(default_factory=dict)
    filled: Sequence[int] = ()
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)
    windows: dict[Buffer, int] = field(default_factory=dict)
    counts: dict[Buffer, torch.Tensor] = field(default_factory=dict)

    @property
    def weighs(self) -> bool:
        """Whether entries have counts."""
        return bool(self.counts)

    def bias_of(self, q: torch.Tensor, layer: Buffer | None) -> torch.Tensor | None:
        """Return the logarithms of counts, by which an entry weighs as much as the tokens it stands for."""
        counts = self.counts.get(layer) if layer is not None else None
        if counts is None:
            return None
        logs = counts[..., : self.limit].log().to(q.dtype)
        return logs.repeat_interleave(q.shape[1] // logs.shape[1], 1).unsqueeze(2)

    def mask_of(
        self, q: torch.Tensor, k: torch.Tensor, window: int | None, layer: Buffer | None
    ) -> torch.Tensor | None:
        """Return what new tokens see: (batch, 1 or heads, tokens, slots in use); None where order alone says it."""
        plain = self.start is not None and self.step_mask is None and self.watch is None and window is None
        if plain and (q.shape[2] == 1 or self.start == 0):
            return None
        if window is not None and layer is not None:
            self.windows[layer] = window
        key = None if window is None else (layer, window)
        if key not in self.masks:
            self.masks[key] = self._mask(window, layer)
        return self.masks[key]

    def _mask(self, window: int | None, layer: Buffer | None) -> torch.Tensor:
        tokens, device = self.positions.shape[1], self.positions.device
        new = torch.arange(self.limit, device=device) - torch.tensor(self.filled, device=device)[:, None]
        among = self.step_mask
        if among is None:
            among = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()[None]
        among = among.to(torch.bool).expand(new.shape[0], -1, -1)
        index = new.clamp(0, tokens - 1)[:, None].expand(-1, tokens, -1)
        inside = (new >= 0) & (new < tokens)
        visible = ((among.gather(2, index) & inside[:, None]) | (new < 0)[:, None])[:, None]
        if window is None:
            return visible
        assert layer is not None
        distance = self.positions[:, None, :, None] - self.held[layer][:, :, None, : self.limit]
        return visible & (distance < window)


@dataclass(frozen=True)
class Snapshot:
    """Copies of what a bounded decoder holds of its rows."""

    buffers: dict[Buffer, torch.Tensor]
    held: dict[Buffer, torch.Tensor]
    scores: dict[Buffer, torch.Tensor]
    counts: dict[Buffer, torch.Tensor]
    states: dict[str, torch.Tensor]
    lengths: list[int]
    filled: list[int]
    since: list[int]


class BoundedDecoder(CachedDecoder):
    """Runs a program with caches under a policy; see :class:`CachedDecoder`.

    Attributes:
        policy: what is kept.
        filled: number of slots in use, of each row.
        peak: the largest number of slots that a row has used.

    Args:
        program: after insert-cache, with attention that does not depend on where tokens stand in the cache.
        batch: number of rows.
        capacity: number of positions of the longest text.
        policy: what is kept.
        room: slots for candidates after a row.
        options: as for :class:`CachedDecoder`.

    Raises:
        UsageError: the program's attention adds a bias by position, or its caches are in few bits.
    """

    def __init__(
        self, program: Program, batch: int, capacity: int, policy: Policy, room: int = 0, **options: Any
    ):
        if QuantizedCache in program.facts:
            raise UsageError(
                "caches in few bits are not bounded", hint="leave quantize-cache out, or the policy"
            )
        self.policy = policy
        # one more slot than tokens: shorter rows of a step are padded into it
        slots = min(policy.budget + policy.block + room, capacity) + 1
        positions = capacity
        if isinstance(policy, Episode):
            words = len(policy.probe)
            slots = max(slots, min(policy.budget + policy.block, capacity) + words + 1)
            cache = program.facts.get(KVCache)
            fixed = cache.capacity if cache is not None else None
            limit = fixed if isinstance(fixed, int) else cache.limit if cache is not None else None
            positions = max(capacity, min(capacity + words, limit or capacity + words))
        super().__init__(program, batch, positions, slots=slots, **options)
        # recorded steps read caches of whole texts
        self.recorder = None
        if self.biased:
            raise UsageError(
                "this program adds a bias that depends on where tokens stand, so a cache cannot leave any out",
                hint="the policy full",
            )
        if not self.cache.layers:
            raise UsageError("this program has no caches that grow", hint="the policy full")
        if self.phased:
            raise UsageError(
                "layers that are skipped while decoding hold fewer tokens", hint="the policy full"
            )
        self.filled = [0] * batch
        self.since = [0] * batch
        self.peak = 0
        self.held: dict[Buffer, torch.Tensor] = {}
        self.scores: dict[Buffer, torch.Tensor] = {}
        self.counts: dict[Buffer, torch.Tensor] = {}
        self._weights: dict[Buffer, torch.Tensor] = {}
        self._windows: dict[Buffer, int] = {}
        self._written = 0
        self._probing = self._trying = self._merged = False

    @property
    def layers(self) -> list[Buffer]:
        """The buffers of keys, one for each layer."""
        return [buffer for buffer in self.buffers if buffer[0].startswith("key_cache_")]

    def free(self, row: int) -> int:
        """Return how many tokens a row may commit before it is cut, which a step does not go beyond."""
        return self.policy.block - self.since[row]

    def unused(self) -> int:
        """Return the number of slots that no row uses."""
        return self.slots - max(self.filled)

    @property
    def bytes(self) -> int:
        """Number of bytes that caches, states, positions and scores take."""
        beside = (*self.held.values(), *self.scores.values(), *self.counts.values())
        return super().bytes + sum(t.nbytes for t in beside)

    def _step(
        self, positions: torch.Tensor, slots: torch.Tensor | None, step_mask: torch.Tensor | None,
        counts: Sequence[int] | None, read: torch.Tensor | None,
    ) -> Step:  # fmt: skip
        tokens = positions.shape[1]
        ends = [
            filled + (tokens if counts is None else counts[row]) for row, filled in enumerate(self.filled)
        ]
        limit = min(max(self.filled) + tokens, max(ends) + 1)
        if limit > self.slots:
            raise UsageError(f"{limit} slots are needed, the bounded caches have {self.slots}")
        start = torch.tensor(self.filled, device=self.device)[:, None]
        own = (start + torch.arange(tokens, device=self.device)).clamp(max=limit - 1)
        for layer in self.layers:
            heads = self.buffers[layer].shape[1]
            if layer not in self.held:
                shape = (self.batch, heads, self.slots)
                self.held[layer] = torch.full(shape, -1, dtype=torch.int64, device=self.device)
                planes = (self.batch, heads, self.policy.planes, self.slots)
                self.scores[layer] = torch.zeros(planes, device=self.device)
                if isinstance(self.policy, Merge):
                    self.counts[layer] = torch.ones(shape, device=self.device)
            index = own[:, None].expand(-1, heads, -1)
            self.held[layer].scatter_(2, index, positions[:, None].expand(-1, heads, -1))
        watched = self.policy.counts and not self._trying and (
            not isinstance(self.policy, Episode) or self._probing
        )  # fmt: skip
        self._weights, self._written = {}, limit
        self.peak = max(self.peak, *ends)
        together = len(set(self.filled)) == 1 and limit - self.filled[0] == tokens
        return BoundedStep(
            self.buffers, positions, own, limit, self.filled[0] if together else None, step_mask, read,
            states=self.states, taken=self._taken(counts, tokens), held=self.held, filled=list(self.filled),
            watch=self._watch if watched else None, windows=self._windows,
            counts=self.counts if self._merged else {},
        )  # fmt: skip

    def _watch(self, layer: Buffer, weights: torch.Tensor) -> None:
        """Take what a layer's new tokens attended to: (batch, heads, heads of a group, tokens, slots in use)."""
        if not self._probing:
            self._weights[layer] = weights.sum(2)
            return
        # shares among the tokens held: what the probe's words pay to one another is left out
        before = (
            torch.arange(weights.shape[-1], device=self.device)
            < torch.tensor(self.filled, device=self.device)[:, None]
        )
        weights = weights * before[:, None, None, None]
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
        scores = self.scores[layer]
        scores.zero_()
        scores[:, :, 0, : weights.shape[-1]] = weights.amax((2, 3))

    def prefill(self, rows: Sequence[Sequence[int]]) -> list[dict[str, torch.Tensor]]:
        """Read prompts in pieces after each of which layers are cut; see :meth:`CachedDecoder.prefill`."""
        last: list[dict[str, torch.Tensor]] = [{} for _ in rows]
        done = [0] * len(rows)
        while any(n < len(row) for n, row in zip(done, rows, strict=True)):
            counts = [
                min(self.policy.block - since, len(row) - n)
                for since, row, n in zip(self.since, rows, done, strict=True)
            ]
            width = max(counts)
            ids = torch.zeros(len(rows), width, dtype=torch.int64, device=self.device)
            for number, (row, n) in enumerate(zip(rows, done, strict=True)):
                ids[number, : counts[number]] = torch.tensor(list(row[n : n + counts[number]]))
            # as for whole caches: steps of few tokens are prepared, with all outputs
            late = width > TOKENS
            ends = torch.tensor([[max(count - 1, 0)] for count in counts], device=self.device)
            outputs = self.extend(ids, counts=counts, read=ends if late else None)
            self._commit([list(range(count)) for count in counts])
            for number, count in enumerate(counts):
                done[number] += count
                if count and done[number] == len(rows[number]):
                    place = 0 if late else count - 1
                    last[number] = {name: value[number, place] for name, value in outputs.items()}
        return last

    def advance(self, counts: Sequence[int]) -> None:
        """Keep the first tokens of the last step."""
        self._commit([list(range(count)) for count in counts])

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the tokens on one path of each row's last step; see :meth:`CachedDecoder.accept`."""
        self._commit(paths)

    def _commit(self, paths: Sequence[Sequence[int]]) -> None:
        if self._last is not None:
            taken = torch.zeros(self._last.positions.shape, dtype=torch.bool, device=self.device)
            for row, path in enumerate(paths):
                taken[row, list(path)] = True
            self._advance_states(taken)
        self._count(paths)
        for row, path in enumerate(paths):
            start, count = self.filled[row], len(path)
            moved = [p for i, p in enumerate(path) if p != i]
            for layer in self.layers if moved else ():
                index = torch.tensor(path, device=self.device) + start
                for tensor in (self.held[layer], self.scores[layer]):
                    tensor[row, ..., start : start + count] = tensor[row].index_select(-1, index)
            if moved:
                index = torch.tensor(path, device=self.device) + start
                for buffer in self.buffers.values():
                    buffer[row, :, start : start + count] = buffer[row].index_select(1, index)
            self._clear(row, start + count)
            self.filled[row] += count
            self.lengths[row] += count
            self.since[row] += count
        if not self._trying:
            self._cut()

    def _clear(self, row: int, first: int) -> None:
        """Forget what a step has written into the slots from a first one on."""
        for layer in self.layers if first < self._written else ():
            self.held[layer][row, :, first : self._written] = -1
            self.scores[layer][row, ..., first : self._written] = 0

    def _count(self, paths: Sequence[Sequence[int]]) -> None:
        """Let the policy count what the tokens that are kept attended to."""
        for layer, weights in self._weights.items():
            queries = torch.zeros(weights.shape[0], weights.shape[2], dtype=torch.bool, device=self.device)
            for row, path in enumerate(paths):
                queries[row, list(path)] = True
            used = weights.shape[-1]
            scores = self.scores[layer]
            scores[..., :used] = self.policy.observe(scores[..., :used], weights, queries)
        self._weights = {}

    def _cut(self) -> None:
        """Cut the rows that have as many new tokens as a block."""
        due = [row for row, since in enumerate(self.since) if since >= self.policy.block]
        if not due:
            return
        for row in due:
            self.since[row] = 0
        due = [row for row in due if self.filled[row] > self.policy.budget]
        if not due:
            return
        if isinstance(self.policy, Episode):
            self._probe(self.policy)
        index = torch.tensor(due, device=self.device)
        used = max(self.filled[row] for row in due)
        for layer in self.layers:
            values = (f"value{layer[0].removeprefix('key')}", *layer[1:])
            if values not in self.buffers:
                values = layer  # latents are keys and values at once
            if isinstance(self.policy, Merge):
                self._merge(self.policy, due, layer, values)
                continue
            held = Held(
                self.held[layer][index, :, :used],
                self.buffers[layer][index, :, :used],
                self.scores[layer][index][..., :used],
                self._windows.get(layer),
            )
            kept = self.policy.kept(held)
            count = kept.shape[-1]
            self.held[layer][index, :, :count] = held.positions.gather(2, kept)
            self.held[layer][index, :, count:] = -1
            planes = kept[:, :, None].expand(-1, -1, held.scores.shape[2], -1)
            scores = torch.zeros_like(self.scores[layer][index])
            scores[..., :count] = held.scores.gather(3, planes)
            self.scores[layer][index] = scores
            for name in dict.fromkeys((layer, values)):
                buffer = self.buffers[name]
                wide = kept[..., None].expand(-1, -1, -1, buffer.shape[-1])
                buffer[index, :, :count] = buffer[index, :, :used].gather(2, wide)
        for row in due:
            self.filled[row] = min(self.filled[row], self.policy.budget)

    def _merge(self, policy: Merge, rows: Sequence[int], layer: Buffer, values: Buffer) -> None:
        """Merge the entries of a layer, row by row."""
        self._merged = True
        tensors = (self.held[layer], self.buffers[layer], self.buffers[values], self.counts[layer])
        for row in rows:
            merged = policy.merged(*(tensor[row, :, : self.filled[row]] for tensor in tensors))
            for tensor, entries, empty in zip(tensors, merged, (-1, None, None, 1), strict=True):
                tensor[row, :, : policy.budget] = entries
                if empty is not None:
                    tensor[row, :, policy.budget :] = empty

    def _probe(self, policy: Episode) -> None:
        """Compute the episode's words behind all rows, for what they attend to; nothing of them is kept."""
        words = torch.tensor([policy.probe], device=self.device).expand(self.batch, -1)
        start = torch.tensor(self.lengths, device=self.device)[:, None]
        # at the end of what the model has positions for, words stand among the last tokens
        start = start.clamp(max=max(self.capacity - len(policy.probe), 0))
        positions = start + torch.arange(len(policy.probe), device=self.device)
        states = self.states
        self._probing = True
        try:
            # of the outputs nothing is read, so that one token's are enough
            self.forward(words, positions, read=torch.zeros_like(start))
        finally:
            self._probing = False
            self.states, self._last = states, None
        for row, filled in enumerate(self.filled):
            self._clear(row, filled)

    def snapshot(self) -> Snapshot:
        """Return copies of all that the rows hold, so that another text can be read in the meantime."""
        used = max(self.filled)
        return Snapshot(
            {name: buffer[:, :, :used].clone() for name, buffer in self.buffers.items()},
            {layer: held[..., :used].clone() for layer, held in self.held.items()},
            {layer: scores[..., :used].clone() for layer, scores in self.scores.items()},
            {layer: counts[..., :used].clone() for layer, counts in self.counts.items()},
            dict(self.states), list(self.lengths), list(self.filled), list(self.since),
        )  # fmt: skip

    def restore(self, snapshot: Snapshot | None) -> None:
        """Hold what a snapshot holds; nothing at all if it is None."""
        for tensors, fill in ((self.held, -1), (self.scores, 0), (self.counts, 1)):
            for tensor in tensors.values():
                tensor.fill_(fill)
        self._last, self._weights, self._trying = None, {}, False
        if snapshot is None:
            zeros = [0] * self.batch
            self.lengths, self.filled, self.since = list(zeros), list(zeros), list(zeros)
            self.states = {name: torch.zeros_like(state) for name, state in self.states.items()}
            return
        for name, copy in snapshot.buffers.items():
            self.buffers[name][:, :, : copy.shape[2]] = copy
        kinds = ((self.held, snapshot.held), (self.scores, snapshot.scores), (self.counts, snapshot.counts))
        for tensors, copies in kinds:
            for layer, copy in copies.items():
                tensors[layer][..., : copy.shape[-1]] = copy
        self.states = dict(snapshot.states)
        self.lengths, self.filled, self.since = (
            list(snapshot.lengths), list(snapshot.filled), list(snapshot.since),
        )  # fmt: skip

    def mark(self) -> Mark:
        """Return where all rows stand, for :meth:`rewind`; until then nothing is cut, and no attention counts."""
        self._trying = True
        mark = super().mark()
        mark.others["bounded"] = (list(self.filled), list(self.since))
        return mark

    def rewind(self, mark: Mark) -> None:
        """Forget what came after a mark."""
        super().rewind(mark)
        filled, since = mark.others["bounded"]
        self._written = max(self._written, *self.filled)
        self.filled, self.since = list(filled), list(since)
        for row, start in enumerate(self.filled):
            self._clear(row, start)
        self._weights, self._trying = {}, False

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Continue with only some of the rows."""
        if list(rows) == list(range(self.batch)):
            return
        super().keep_rows(rows)
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.device)
        for tensors in (self.held, self.scores, self.counts):
            for layer, tensor in tensors.items():
                tensors[layer] = tensor.index_select(0, index)
        self.filled = [self.filled[row] for row in rows]
        self.since = [self.since[row] for row in rows]
