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
from .policies import ByLayer, Episode, Held, Merge, Policy
from .prepared import TOKENS
from .step import Buffer, Step, number_of, rows_of_tokens


@dataclass(eq=False)
class Layers:
    """Layers of the same policy, whose tokens stand in the same slots.

    Attributes:
        policy: what they keep.
        slots: how many there are of each row.
        filled: how many of these are in use, of each row.
        written: one more than the last slot that the last step wrote into.
    """

    policy: Policy
    slots: int
    filled: list[int]
    written: int = 0


@dataclass
class Places:
    """Where a step's tokens are stored in some layers.

    Attributes:
        filled: number of slots in use before the step, of each row.
        slots: (batch, tokens), of the new tokens.
        limit: one more than the last slot in use.
        start: the slot of the first token if all rows are equally long and tokens are consecutive; else None.
    """

    filled: Sequence[int]
    slots: torch.Tensor
    limit: int
    start: int | None


@dataclass
class BoundedStep(Step):
    """A step over caches whose slots hold any positions, in ascending order.

    Attributes:
        places: where tokens are stored, by the number of the layer.
        held: (batch, heads, slots) by the buffer of keys: the positions of all tokens, new ones included; -1 if empty.
        masks: those made so far.
        windows: how far each layer sees, of those that do not see everything; filled in as layers are computed.
        counts: (batch, heads, slots) by the buffer of keys: how many tokens an entry stands for, where some are merged.
    """

    places: Sequence[Places] = ()
    held: dict[Buffer, torch.Tensor] = field(default_factory=dict)
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)
    windows: dict[Buffer, int] = field(default_factory=dict)
    counts: dict[Buffer, torch.Tensor] = field(default_factory=dict)

    @property
    def weighs(self) -> bool:
        """Whether entries have counts."""
        return bool(self.counts)

    def store(self, buffer: Buffer, values: torch.Tensor) -> torch.Tensor:
        """Write new tokens into a cache and return the part of the cache in use."""
        at, cache = self.places[number_of(buffer)], self.buffers[buffer]
        values = values.to(cache.dtype)
        if at.start is None:
            cache.scatter_(2, at.slots[:, None, :, None].expand(values.shape), values)
        else:
            cache[:, :, at.start : at.limit] = values
        return cache.narrow(2, 0, at.limit)

    def bias_of(self, q: torch.Tensor, layer: Buffer | None) -> torch.Tensor | None:
        """Return the logarithms of counts, by which an entry weighs as much as the tokens it stands for."""
        counts = self.counts.get(layer) if layer is not None else None
        if layer is None or counts is None:
            return None
        logs = counts[..., : self.places[number_of(layer)].limit].log().to(q.dtype)
        return logs.repeat_interleave(q.shape[1] // logs.shape[1], 1).unsqueeze(2)

    def mask_of(
        self, q: torch.Tensor, k: torch.Tensor, window: int | None, layer: Buffer | None
    ) -> torch.Tensor | None:
        """Return what new tokens see: (batch, 1 or heads, tokens, slots in use); None where order alone says it."""
        at = self.places[0 if layer is None else number_of(layer)]
        plain = at.start is not None and self.step_mask is None and self.watch is None and window is None
        if plain and (q.shape[2] == 1 or at.start == 0):
            return None
        if window is not None and layer is not None:
            self.windows[layer] = window
        key = id(at) if window is None else (layer, window)
        if key not in self.masks:
            self.masks[key] = self._mask(at, window, layer)
        return self.masks[key]

    def visible_where_read(
        self, window: int | None, cache: torch.Tensor, layer: Buffer | None
    ) -> torch.Tensor:
        """Return what the tokens that are read see: (batch, 1 or heads, tokens read, slots in use)."""
        assert self.read is not None
        if window is not None and layer is not None:
            self.windows[layer] = window
        return rows_of_tokens(
            self._mask(self.places[0 if layer is None else number_of(layer)], window, layer), self.read
        )

    def _mask(self, at: Places, window: int | None, layer: Buffer | None) -> torch.Tensor:
        tokens, device = self.positions.shape[1], self.positions.device
        new = torch.arange(at.limit, device=device) - torch.tensor(at.filled, device=device)[:, None]
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
        distance = self.positions[:, None, :, None] - self.held[layer][:, :, None, : at.limit]
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
    filled: list[list[int]]
    since: list[int]


class BoundedDecoder(CachedDecoder):
    """Runs a program with caches under a policy; see :class:`CachedDecoder`.

    Attributes:
        policy: what is kept.
        kinds: layers by their policies.
        peak: the largest number of slots that a row has used in a layer.

    Args:
        program: after insert-cache, with attention that does not depend on where tokens stand in the cache.
        batch: number of rows.
        capacity: number of positions of the longest text.
        policy: what is kept.
        room: slots for candidates after a row.
        options: as for :class:`CachedDecoder`.

    Raises:
        UsageError: the program's attention adds a bias by position, its caches are in few bits, or there are budgets for
            other layers or words of another vocabulary.
    """

    def __init__(
        self,
        program: Program,
        batch: int,
        capacity: int,
        policy: Policy | ByLayer,
        room: int = 0,
        **options: Any,
    ):
        if QuantizedCache in program.facts:
            raise UsageError(
                "caches in few bits are not bounded", hint="leave quantize-cache out, or the policy"
            )
        cache = program.facts.get(KVCache)
        layers = cache.layers if cache is not None else 0
        if isinstance(policy, ByLayer) and len(policy.policies) != layers:
            raise UsageError(
                f"there are budgets for {len(policy.policies)} layers, the program has caches in {layers}",
                hint="as many budgets as layers with caches",
            )
        self.policy = policy
        single = policy.policies if isinstance(policy, ByLayer) else (policy,) * layers
        # what is the same for all layers
        self._common = policy.policies[0] if isinstance(policy, ByLayer) else policy
        fixed = cache.capacity if cache is not None else None
        positions, words = capacity, 0
        if isinstance(self._common, Episode):
            words = len(self._common.probe)
            limit = fixed if isinstance(fixed, int) else cache.limit if cache is not None else None
            positions = max(capacity, min(capacity + words, limit or capacity + words))
        self.kinds: list[Layers] = []
        self._kind_of: list[Layers] = []
        for one in single:
            kind = next((k for k in self.kinds if vars(k.policy) == vars(one)), None)
            if kind is None:
                # one more slot than tokens: shorter rows of a step are padded into it
                slots = min(one.budget + one.block + room, capacity) + 1
                if words:
                    slots = max(slots, min(one.budget + one.block, capacity) + words + 1)
                kind = Layers(one, slots, [0] * batch)
                self.kinds.append(kind)
            self._kind_of.append(kind)
        self._words = words
        # what a policy counts is what all tokens attend to
        self.through = not self._common.counts
        most = max((kind.slots for kind in self.kinds), default=1)
        super().__init__(program, batch, positions, slots=most, **options)
        # recorded steps read caches of whole texts
        self.recorder = None
        if self.biased:
            raise UsageError(
                "this program adds a bias that depends on where tokens stand, so a cache cannot leave any out",
                hint="the policy full",
            )
        probe = self._common.probe if isinstance(self._common, Episode) else ()
        if self.embedded is not None and max(probe, default=0) >= self.embedded:
            raise UsageError(
                f"{self._common.name}: probe has token {max(probe)}, the program knows {self.embedded} tokens"
            )
        if not self.cache.layers:
            raise UsageError("this program has no caches that grow", hint="the policy full")
        if self.phased:
            raise UsageError(
                "layers that are skipped while decoding hold fewer tokens", hint="the policy full"
            )
        self.since = [0] * batch
        self.peak = 0
        self.held: dict[Buffer, torch.Tensor] = {}
        self.scores: dict[Buffer, torch.Tensor] = {}
        self.counts: dict[Buffer, torch.Tensor] = {}
        self._weights: dict[Buffer, torch.Tensor] = {}
        self._windows: dict[Buffer, int] = {}
        self._probing = self._trying = self._merged = False

    @property
    def layers(self) -> list[Buffer]:
        """The buffers of keys, one for each layer."""
        return [buffer for buffer in self.buffers if buffer[0].startswith("key_cache_")]

    @property
    def filled(self) -> list[int]:
        """The number of slots that each row uses, in layers where it uses most."""
        return [max(counts) for counts in zip(*(kind.filled for kind in self.kinds), strict=True)]

    def look_for(self, words: Sequence[int]) -> None:
        """Let an episode be about these words from now on, at most as many as before.

        Args:
            words: as tokens.

        Raises:
            UsageError: the policy is another one, or there are none or too many words.
        """
        before = self._common
        if not isinstance(before, Episode):
            raise UsageError(f"{before.name} looks for no words")
        if len(words) > self._words:
            raise UsageError(f"{len(words)} words are more than the {self._words} that there is room for")
        for kind in self.kinds:
            kind.policy = Episode(kind.policy.budget, before.block, before.sinks, tuple(words), before.recent)
        self._common = self.kinds[0].policy

    def filled_of(self, buffer: Buffer) -> list[int]:
        """Return the number of slots of a cache that each row uses."""
        return self._kind_of[number_of(buffer)].filled

    def slots_of(self, buffer: Buffer) -> int:
        """Return the number of slots of a cache."""
        return self._kind_of[number_of(buffer)].slots

    def free(self, row: int) -> int:
        """Return how many tokens a row may commit before it is cut, which a step does not go beyond."""
        return self._common.block - self.since[row]

    def unused(self) -> int:
        """Return the number of slots that no row uses in any layer."""
        return min(kind.slots - max(kind.filled) for kind in self.kinds)

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
        new = [tokens] * self.batch if counts is None else counts
        self.peak = max(self.peak, *(n + count for n, count in zip(self.filled, new, strict=True)))
        placed = {kind: self._places(kind, tokens, new) for kind in self.kinds}
        for layer in self.layers:
            heads, size = self.buffers[layer].shape[1:3]
            if layer not in self.held:
                shape = (self.batch, heads, size)
                self.held[layer] = torch.full(shape, -1, dtype=torch.int64, device=self.device)
                planes = (self.batch, heads, self._common.planes, size)
                self.scores[layer] = torch.zeros(planes, device=self.device)
                if isinstance(self._common, Merge):
                    self.counts[layer] = torch.ones(shape, device=self.device)
            at = placed[self._kind_of[number_of(layer)]]
            index = at.slots[:, None].expand(-1, heads, -1)
            self.held[layer].scatter_(2, index, positions[:, None].expand(-1, heads, -1))
        watched = self._common.counts and not self._trying and (
            not isinstance(self._common, Episode) or self._probing
        )  # fmt: skip
        self._weights = {}
        most = max(placed.values(), key=lambda at: at.limit)
        places = [placed[kind] for kind in self._kind_of]
        return BoundedStep(
            # where layers differ, each is asked for by itself
            self.buffers, positions, most.slots, most.limit, most.start if len(placed) == 1 else None, step_mask, read,
            states=self.states, taken=self._taken(counts, tokens), places=places, held=self.held,
            watch=self._watch if watched else None, windows=self._windows,
            counts=self.counts if self._merged else {},
        )  # fmt: skip

    def _places(self, kind: Layers, tokens: int, counts: Sequence[int]) -> Places:
        """Return where new tokens are stored in some layers."""
        filled = list(kind.filled)
        ends = [n + count for n, count in zip(filled, counts, strict=True)]
        limit = min(max(filled) + tokens, max(ends) + 1)
        if limit > kind.slots:
            raise UsageError(f"{limit} slots are needed, the bounded caches have {kind.slots}")
        start = torch.tensor(filled, device=self.device)[:, None]
        kind.written = limit
        own = (start + torch.arange(tokens, device=self.device)).clamp(max=limit - 1)
        together = len(set(filled)) == 1 and limit - filled[0] == tokens
        return Places(filled, own, limit, filled[0] if together else None)

    def _watch(self, layer: Buffer, weights: torch.Tensor) -> None:
        """Take what a layer's new tokens attended to: (batch, heads, heads of a group, tokens, slots in use)."""
        if not self._probing:
            self._weights[layer] = weights.sum(2)
            return
        # shares among the tokens held: what the probe's words pay to one another is left out
        filled = self.filled_of(layer)
        before = (
            torch.arange(weights.shape[-1], device=self.device)
            < torch.tensor(filled, device=self.device)[:, None]
        )
        weights = weights * before[:, None, None, None]
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
        scores = self.scores[layer]
        scores.zero_()
        scores[:, :, 0, : weights.shape[-1]] = weights.amax((2, 3))

    def prefill(self, rows: Sequence[Sequence[int]], whole: bool = True) -> list[dict[str, torch.Tensor]]:
        """Read prompts in pieces after each of which layers are cut; see :meth:`CachedDecoder.prefill`."""
        last: list[dict[str, torch.Tensor]] = [{} for _ in rows]
        done = [0] * len(rows)
        while any(n < len(row) for n, row in zip(done, rows, strict=True)):
            counts = [
                min(self._common.block - since, len(row) - n)
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
            count = len(path)
            if any(p != i for i, p in enumerate(path)):
                index = torch.tensor(path, device=self.device)
                for buffer, cache in self.buffers.items():
                    start = self.filled_of(buffer)[row]
                    beside = [self.held[buffer], self.scores[buffer]] if buffer in self.held else []
                    cache[row, :, start : start + count] = cache[row].index_select(1, index + start)
                    for tensor in beside:
                        tensor[row, ..., start : start + count] = tensor[row].index_select(-1, index + start)
            for kind in self.kinds:
                kind.filled[row] += count
            self._clear(row)
            self.lengths[row] += count
            self.since[row] += count
        if not self._trying:
            self._cut()

    def _clear(self, row: int) -> None:
        """Forget what a step has written into the slots that are not in use."""
        if all(kind.filled[row] >= kind.written for kind in self.kinds):
            return
        for layer in self.layers:
            kind = self._kind_of[number_of(layer)]
            first, last = kind.filled[row], kind.written
            if first < last:
                self.held[layer][row, :, first:last] = -1
                self.scores[layer][row, ..., first:last] = 0

    def _count(self, paths: Sequence[Sequence[int]]) -> None:
        """Let the policy count what the tokens that are kept attended to."""
        for layer, weights in self._weights.items():
            queries = torch.zeros(weights.shape[0], weights.shape[2], dtype=torch.bool, device=self.device)
            for row, path in enumerate(paths):
                queries[row, list(path)] = True
            used = weights.shape[-1]
            scores = self.scores[layer]
            scores[..., :used] = self._common.observe(scores[..., :used], weights, queries)
        self._weights = {}

    def _cut(self) -> None:
        """Cut the rows that have as many new tokens as a block."""
        due = [row for row, since in enumerate(self.since) if since >= self._common.block]
        for row in due:
            self.since[row] = 0
        full = {kind: [row for row in due if kind.filled[row] > kind.policy.budget] for kind in self.kinds}
        if not any(full.values()):
            return
        if isinstance(self._common, Episode):
            self._probe(self._common)
        for layer in self.layers:
            kind = self._kind_of[number_of(layer)]
            rows = full[kind]
            if not rows:
                continue
            index = torch.tensor(rows, device=self.device)
            used = max(kind.filled[row] for row in rows)
            values = (f"value{layer[0].removeprefix('key')}", *layer[1:])
            if values not in self.buffers:
                values = layer  # latents are keys and values at once
            if isinstance(kind.policy, Merge):
                self._merge(kind.policy, kind.filled, rows, layer, values)
                continue
            held = Held(
                self.held[layer][index, :, :used],
                self.buffers[layer][index, :, :used],
                self.scores[layer][index][..., :used],
                self._windows.get(layer),
            )
            kept = kind.policy.kept(held)
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
        for kind in self.kinds:
            for row in full[kind]:
                kind.filled[row] = kind.policy.budget

    def _merge(
        self, policy: Merge, filled: Sequence[int], rows: Sequence[int], layer: Buffer, values: Buffer
    ) -> None:
        """Merge the entries of a layer, row by row."""
        self._merged = True
        tensors = (self.held[layer], self.buffers[layer], self.buffers[values], self.counts[layer])
        for row in rows:
            merged = policy.merged(*(tensor[row, :, : filled[row]] for tensor in tensors))
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
        for row in range(self.batch):
            self._clear(row)

    def snapshot(self) -> Snapshot:
        """Return copies of all that the rows hold, so that another text can be read in the meantime."""

        def used(buffer: Buffer) -> int:
            return max(self.filled_of(buffer))

        return Snapshot(
            {buffer: cache[:, :, : used(buffer)].clone() for buffer, cache in self.buffers.items()},
            {layer: held[..., : used(layer)].clone() for layer, held in self.held.items()},
            {layer: scores[..., : used(layer)].clone() for layer, scores in self.scores.items()},
            {layer: counts[..., : used(layer)].clone() for layer, counts in self.counts.items()},
            dict(self.states), list(self.lengths), [list(kind.filled) for kind in self.kinds], list(self.since),
        )  # fmt: skip

    def restore(self, snapshot: Snapshot | None) -> None:
        """Hold what a snapshot holds; nothing at all if it is None."""
        for tensors, fill in ((self.held, -1), (self.scores, 0), (self.counts, 1)):
            for tensor in tensors.values():
                tensor.fill_(fill)
        self._last, self._weights, self._trying = None, {}, False
        if snapshot is None:
            self.lengths, self.since = [0] * self.batch, [0] * self.batch
            for kind in self.kinds:
                kind.filled = [0] * self.batch
            self.states = {name: torch.zeros_like(state) for name, state in self.states.items()}
            return
        for name, copy in snapshot.buffers.items():
            self.buffers[name][:, :, : copy.shape[2]] = copy
        kinds = ((self.held, snapshot.held), (self.scores, snapshot.scores), (self.counts, snapshot.counts))
        for tensors, copies in kinds:
            for layer, copy in copies.items():
                tensors[layer][..., : copy.shape[-1]] = copy
        self.states = dict(snapshot.states)
        self.lengths, self.since = list(snapshot.lengths), list(snapshot.since)
        for kind, filled in zip(self.kinds, snapshot.filled, strict=True):
            kind.filled = list(filled)

    def mark(self) -> Mark:
        """Return where all rows stand, for :meth:`rewind`; until then nothing is cut, and no attention counts."""
        self._trying = True
        mark = super().mark()
        mark.others["bounded"] = ([list(kind.filled) for kind in self.kinds], list(self.since))
        return mark

    def rewind(self, mark: Mark) -> None:
        """Forget what came after a mark."""
        super().rewind(mark)
        counts, since = mark.others["bounded"]
        self.since = list(since)
        for kind, filled in zip(self.kinds, counts, strict=True):
            kind.written = max(kind.written, *kind.filled)
            kind.filled = list(filled)
        for row in range(self.batch):
            self._clear(row)
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
        for kind in self.kinds:
            kind.filled = [kind.filled[row] for row in rows]
        self.since = [self.since[row] for row in rows]
