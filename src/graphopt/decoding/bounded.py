"""A decoder whose caches are bounded: slots are apart from positions, and a policy says which tokens stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ir.errors import UsageError
from ..ir.facts import QuantizedCache
from ..ir.program import Program
from .cached import CachedDecoder, Mark
from .policies import Episode, Held, Policy
from .step import Buffer, Step


@dataclass
class BoundedStep(Step):
    """A step over caches whose slots hold any positions, in ascending order.

    Attributes:
        held: (batch, heads, slots) by the buffer of keys: the positions of all tokens, new ones included; -1 if empty.
        filled: number of slots in use before the step, of each row.
        masks: those made so far.
    """

    held: dict[Buffer, torch.Tensor] = field(default_factory=dict)
    filled: Sequence[int] = ()
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    def mask_of(
        self, q: torch.Tensor, k: torch.Tensor, window: int | None, layer: Buffer | None
    ) -> torch.Tensor | None:
        """Return what new tokens see: (batch, 1 or heads, tokens, slots in use); None where order alone says it."""
        plain = self.start is not None and self.step_mask is None and self.watch is None and window is None
        if plain and (q.shape[2] == 1 or self.start == 0):
            return None
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
        self.slots = min(
            policy.budget + policy.block + room + 1, capacity + len(getattr(policy, "probe", ()))
        )
        if isinstance(policy, Episode):
            self.slots = max(self.slots, policy.budget + policy.block + len(policy.probe) + 1)
        super().__init__(program, batch, capacity, **options)
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
        self._held: dict[Buffer, torch.Tensor] = {}
        self._scores: dict[Buffer, torch.Tensor] = {}
        self._weights: dict[Buffer, torch.Tensor] = {}
        self._probing = False

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

    def _step(
        self, positions: torch.Tensor, slots: torch.Tensor | None, step_mask: torch.Tensor | None,
        counted: torch.Tensor | None, read: torch.Tensor | None,
    ) -> Step:  # fmt: skip
        tokens = positions.shape[1]
        start = torch.tensor(self.filled, device=self.device)[:, None]
        own = start + torch.arange(tokens, device=self.device)
        limit = max(self.filled) + tokens
        if limit > self.slots:
            raise UsageError(f"{limit} slots are needed, the bounded caches have {self.slots}")
        for layer in self.layers:
            heads = self.buffers[layer].shape[1]
            if layer not in self._held:
                shape = (self.batch, heads, self.slots)
                self._held[layer] = torch.full(shape, -1, dtype=torch.int64, device=self.device)
                planes = (self.batch, heads, self.policy.planes, self.slots)
                self._scores[layer] = torch.zeros(planes, device=self.device)
            index = own[:, None].expand(-1, heads, -1)
            self._held[layer] = self._held[layer].scatter(2, index, positions[:, None].expand(-1, heads, -1))
        watched = self.policy.counts and (not isinstance(self.policy, Episode) or self._probing)
        self._weights = {}
        self.peak = max(self.peak, limit)
        start_of_all = self.filled[0] if len(set(self.filled)) == 1 else None
        return BoundedStep(
            self.buffers, positions, own, limit, start_of_all, step_mask, read, states=self.states, taken=counted,
            held=self._held, filled=list(self.filled), watch=self._watch if watched else None,
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
        scores = self._scores[layer]
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
            outputs = self.extend(ids, counts=counts)
            self._commit([list(range(count)) for count in counts])
            for number, count in enumerate(counts):
                done[number] += count
                if count and done[number] == len(rows[number]):
                    last[number] = {name: value[number, count - 1] for name, value in outputs.items()}
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
                for tensor in (self._held[layer], self._scores[layer]):
                    tensor[row, ..., start : start + count] = tensor[row].index_select(-1, index)
            if moved:
                index = torch.tensor(path, device=self.device) + start
                for buffer in self.buffers.values():
                    buffer[row, :, start : start + count] = buffer[row].index_select(1, index)
            for layer in self.layers:
                self._held[layer][row, :, start + count :] = -1
                self._scores[layer][row, ..., start + count :] = 0
            self.filled[row] += count
            self.lengths[row] += count
            self.since[row] += count
        self._cut()

    def _count(self, paths: Sequence[Sequence[int]]) -> None:
        """Let the policy count what the tokens that are kept attended to."""
        for layer, weights in self._weights.items():
            queries = torch.zeros(weights.shape[0], weights.shape[2], dtype=torch.bool, device=self.device)
            for row, path in enumerate(paths):
                queries[row, list(path)] = True
            used = weights.shape[-1]
            scores = self._scores[layer]
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
            held = Held(
                self._held[layer][index, :, :used],
                self.buffers[layer][index, :, :used],
                self._scores[layer][index][..., :used],
            )
            kept = self.policy.kept(held)
            count = kept.shape[-1]
            self._held[layer][index, :, :count] = held.positions.gather(2, kept)
            self._held[layer][index, :, count:] = -1
            planes = kept[:, :, None].expand(-1, -1, held.scores.shape[2], -1)
            scores = torch.zeros_like(self._scores[layer][index])
            scores[..., :count] = held.scores.gather(3, planes)
            self._scores[layer][index] = scores
            for name in (layer, values):
                buffer = self.buffers[name]
                wide = kept[..., None].expand(-1, -1, -1, buffer.shape[-1])
                buffer[index, :, :count] = buffer[index, :, :used].gather(2, wide)
        for row in due:
            self.filled[row] = min(self.filled[row], self.policy.budget)

    def _probe(self, policy: Episode) -> None:
        """Compute the episode's words behind all rows, for what they attend to; nothing of them is kept."""
        self._probing = True
        before = self.mark()
        try:
            # no output is read: the caches alone are asked for
            self.extend(torch.tensor([policy.probe], device=self.device).expand(self.batch, -1))
        finally:
            self._probing = False
            self.rewind(before)
        for layer in self.layers:
            for row, filled in enumerate(self.filled):
                self._held[layer][row, :, filled:] = -1
                self._scores[layer][row, ..., filled:] = 0

    def snapshot(self) -> Snapshot:
        """Return copies of all that the rows hold, so that another text can be read in the meantime."""
        used = max(self.filled)
        return Snapshot(
            {name: buffer[:, :, :used].clone() for name, buffer in self.buffers.items()},
            {layer: held[..., :used].clone() for layer, held in self._held.items()},
            {layer: scores[..., :used].clone() for layer, scores in self._scores.items()},
            dict(self.states), list(self.lengths), list(self.filled), list(self.since),
        )  # fmt: skip

    def restore(self, snapshot: Snapshot | None) -> None:
        """Hold what a snapshot holds; nothing at all if it is None."""
        for tensors, fill in ((self._held, -1), (self._scores, 0)):
            for tensor in tensors.values():
                tensor.fill_(fill)
        self._last, self._weights = None, {}
        if snapshot is None:
            zeros = [0] * self.batch
            self.lengths, self.filled, self.since = list(zeros), list(zeros), list(zeros)
            self.states = {name: torch.zeros_like(state) for name, state in self.states.items()}
            return
        for name, copy in snapshot.buffers.items():
            self.buffers[name][:, :, : copy.shape[2]] = copy
        for tensors, copies in ((self._held, snapshot.held), (self._scores, snapshot.scores)):
            for layer, copy in copies.items():
                tensors[layer][..., : copy.shape[-1]] = copy
        self.states = dict(snapshot.states)
        self.lengths, self.filled, self.since = (
            list(snapshot.lengths), list(snapshot.filled), list(snapshot.since),
        )  # fmt: skip

    def mark(self) -> Mark:
        """Return where all rows stand; see :meth:`CachedDecoder.mark`."""
        mark = super().mark()
        mark.others["bounded"] = (list(self.filled), list(self.since))
        return mark

    def rewind(self, mark: Mark) -> None:
        """Forget what came after a mark, which must not have cut anything."""
        super().rewind(mark)
        filled, since = mark.others["bounded"]
        self.filled, self.since = list(filled), list(since)
        self._weights = {}

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Continue with only some of the rows."""
        if list(rows) == list(range(self.batch)):
            return
        super().keep_rows(rows)
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.device)
        for tensors in (self._held, self._scores):
            for layer, tensor in tensors.items():
                tensors[layer] = tensor.index_select(0, index)
        self.filled = [self.filled[row] for row in rows]
        self.since = [self.since[row] for row in rows]
