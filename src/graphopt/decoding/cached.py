"""A decoder that runs with KV caches: rows at different positions, trees of candidates, accepted paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..ir.errors import UsageError
from ..ir.facts import CrossCache, KVCache, SkippedWhileDecoding, Vocabulary
from ..ir.inputs import settings_of
from ..ir.program import Program
from ..ir.schema import arguments, is_operator
from ..ir.vocabulary import over_all_tokens
from .kept import Shared
from .packing import WORTH, Line, Pack, packed
from .prepared import TOKENS
from .recorded import RECORDED, CudaRecorder, Recorder
from .running import Running
from .states import advanced, of_rows
from .step import Buffer, Step

MARKS = "mask_index"
"""The input that marks the positions of mask tokens."""

PIECE = 2048
"""Number of prompt tokens that are computed at once."""


PHASE = "decoding"
"""The run-time setting of ``skip-layers{phase=decode}``."""


@dataclass(frozen=True)
class Mark:
    """Where the rows of a decoder stood: their lengths and states, which are never changed in place."""

    lengths: list[int]
    states: dict[str, torch.Tensor]
    others: dict[str, Any] = field(default_factory=dict)

    def of_rows(self, rows: Sequence[int]) -> Mark:
        """Return the mark of some of the rows."""
        index = torch.tensor(list(rows), dtype=torch.int64)
        states = {n: s.index_select(0, index.to(s.device)) for n, s in self.states.items()}
        return Mark([self.lengths[row] for row in rows], states)


class CachedDecoder:
    """Runs a program made by insert-cache.

    Invariant: row ``b`` has ``lengths[b]`` tokens whose keys and values are stored in the slots of their positions;
    later slots are never attended to. Its states, if the program has any, follow from these tokens.

    Attributes:
        phased: the program skips layers while it decodes, that is, after the prompt.
        decoding: layers are skipped from now on.
        slots: number of slots of each cache.
        read: what the encoder has read, if there is one.
        packs: prompts of different lengths are packed into lines.
        through: attention of a prompt to what an earlier layer stored leaves out tokens that are not read.

    Args:
        program: with a cache.
        batch: number of rows.
        capacity: number of slots, enough for the longest row plus the candidates of a step.
        outputs: names of the outputs computed at each step; the logits by default.
        device: where it runs; the CPU by default.
        dials: values of run-time settings that differ from their defaults.
        compiled: compile everything between attentions, and on a GPU record steps as CUDA graphs.
        prepared: on a CPU, write steps whose shapes come again as straight-line code.
        kernels: how matrices that are stored in few bits are multiplied on a CPU: "auto" by kernels that compute in
            bfloat16, "exact" by their values in the program's own type.
        shared: weights and graphs of other decoders of this program, which run it in the same way; None for its own.
        slots: of each cache, where that is another number than the capacity.

    Raises:
        UsageError: the program has no cache, or too few slots.
    """

    through = True

    def __init__(
        self, program: Program, batch: int, capacity: int, outputs: Sequence[str] | None = None,
        device: torch.device | str = "cpu", dials: Mapping[str, float] | None = None, compiled: bool = False,
        prepared: bool = True, kernels: str = "auto", shared: Shared | None = None, slots: int | None = None,
    ):  # fmt: skip
        cache = program.facts.get(KVCache)
        if cache is None:
            raise UsageError(
                "this program has no cache", hint="graphopt.optimize(program, 'insert-cache') gives it one"
            )
        self.cache = cache
        limit = longest(program)
        if isinstance(cache.capacity, int):
            if capacity > cache.capacity:
                raise UsageError(
                    f"the text may have {capacity} tokens, the program's caches have {cache.capacity} slots",
                    hint="fewer new tokens, or insert-cache with a larger max_length",
                )
            capacity = cache.capacity
        elif limit is not None and capacity > limit:
            raise UsageError(
                f"the text may have {capacity} tokens, the model has positions for {limit}",
                hint="fewer new tokens",
            )
        self.program = program
        self.slots = capacity if slots is None else slots
        self.batch, self.capacity, self.compiled, self.prepared = batch, capacity, compiled, prepared
        self.device = torch.device(device)
        self.recorder: Recorder | None = None
        if compiled and self.device.type == "cuda":
            self.recorder = CudaRecorder()
        self.dials = {n: t.to(self.device) for n, t in settings_of(program, dials or {}).items()}
        if kernels not in ("auto", "exact"):
            raise UsageError(f"kernels is {kernels!r}; it is auto or exact")
        self.kernels = kernels
        self._shared = shared or Shared(self.device, compiled, kernels)
        self.weights = self._shared.weights
        self._graphs: dict[tuple[str | bool, ...], Running] = {}
        self.buffers: dict[Buffer, torch.Tensor] = {}
        self.states: dict[str, torch.Tensor] = {}
        self.encoded: dict[str, torch.Tensor] = {}
        self.read: dict[str, torch.Tensor] = {}
        self._last: Step | None = None
        self.lengths = [0] * batch
        self.outputs = tuple(outputs or (cache.logits,))
        self.packs = True
        self.phased = SkippedWhileDecoding in program.facts
        if self.phased and PHASE in (dials or {}):
            raise UsageError(
                f"the decoder itself sets {PHASE} to 0 or 1",
                hint=f"freeze-dial{{dial={PHASE} value=0}} makes a program that takes all layers always",
            )
        self.decoding = not self.phased
        self.graph(self.outputs)

    @property
    def bytes(self) -> int:
        """Number of bytes that caches and states take."""
        return sum(tensor.nbytes for tensor in (*self.buffers.values(), *self.states.values()))

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary."""
        trimmed = self.program.facts.get(Vocabulary)
        if trimmed is not None:
            return trimmed.size
        return int(self.program.outputs[self.cache.logits].meta["val"].shape[-1])

    @property
    def embedded(self) -> int | None:
        """Number of tokens the program can read; None if it takes no token ids."""
        rows = [
            int(user.args[0].meta["val"].shape[0])  # type: ignore[union-attr]
            for user in self.program.input_nodes[self.cache.tokens].users
            if is_operator(user, "aten.embedding")
        ]
        return min(rows, default=None)

    @property
    def biased(self) -> bool:
        """Tell whether any attention adds a bias that depends on position."""
        cores = (n for n in self.program.nodes if is_operator(n, "graphopt.attention"))
        return any(arguments(core)["bias"] is not None for core in cores)

    def graph(self, outputs: Sequence[str], taken: Sequence[str] = (), marked: bool = False) -> Running:
        """Return the graph that computes these outputs, taking others as given; all graphs share weights and caches."""
        key: tuple[str | bool, ...] = (*outputs, self.decoding, marked, self.through, *taken)
        if key not in self._graphs:
            with self._shared.lock:
                running = self._shared.graphs.get((*key, self.prepared, type(self)))
                if running is None or not running.fits(self.capacity):
                    running = self._shared.graphs[*key, self.prepared, type(self)] = Running(
                        self.program, self.capacity, self.weights, outputs, self.device,
                        decoding=self.decoding, taken=taken, compiled=self.compiled, marked=marked,
                        prepared=self.prepared, through=self.through,
                    )  # fmt: skip
            for buffer, (heads, size, dtype) in running.buffers.items():
                if buffer not in self.buffers:
                    shape = (self.batch, heads, self.slots_of(buffer), size)
                    self.buffers[buffer] = torch.zeros(shape, dtype=dtype, device=self.device)
            for name, (row, dtype) in running.states.items():
                if name not in self.states:
                    self.states[name] = torch.zeros((self.batch, *row), dtype=dtype, device=self.device)
            self._graphs[key] = running
        return self._graphs[key]

    def slots_of(self, buffer: Buffer) -> int:
        """Return the number of slots of a cache."""
        return self.slots

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor | None = None,
        step_mask: torch.Tensor | None = None, outputs: Sequence[str] | None = None,
        given: Mapping[str, torch.Tensor] | None = None, counts: Sequence[int] | None = None,
        read: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """Compute new tokens and store their keys and values; only :meth:`advance` and :meth:`accept` lengthen rows.

        Args:
            ids: (batch, tokens).
            positions: (batch, tokens).
            slots: (batch, tokens), where keys and values are stored; the positions by default.
            step_mask: (batch, tokens, tokens), which new token attends to which, where positions do not determine it.
            outputs: names of the outputs to compute; the decoder's own by default.
            given: values of other inputs, and of outputs to use instead of computing them.
            counts: how many of its tokens each row is going to keep, the first ones, if that is known already.
            read: (batch, some), the tokens at which outputs are computed, by number; all by default.

        Returns:
            The outputs by name. Logits over a trimmed vocabulary are expanded to the full one, with minus infinity for
            missing tokens.
        """
        given = {**self.encoded, **(given or {})} if self.encoded or given is not None else None
        taken = [name for name in given or {} if name in self.program.outputs]
        running = self.graph(outputs or self.outputs, taken, given is not None and MARKS in given)
        tokens = ids.shape[1]
        step = self._step(positions, slots, step_mask, counts, read)
        values = {self.cache.tokens: ids, self.cache.positions: positions, **self.dials, **(given or {})}
        if self.cache.tree:
            values["cache_slots"] = step.slots
        inputs = {n: values[n] for n in running.inputs}
        if self.recorder is not None and tokens <= RECORDED and read is None and not self.states:
            step = Step(self.buffers, positions, step.slots, self.capacity, None, step_mask)
            return over_all_tokens(self.program, self.recorder.run(running, step, inputs))
        computed = running(step, inputs)
        self._last = step if running.states else None
        return over_all_tokens(self.program, computed)

    def _step(
        self, positions: torch.Tensor, slots: torch.Tensor | None, step_mask: torch.Tensor | None,
        counts: Sequence[int] | None, read: torch.Tensor | None,
    ) -> Step:  # fmt: skip
        """Return a step of new tokens, where they are stored and how much of the caches they read."""
        store_slots = positions if slots is None else slots
        limit, tokens = int(store_slots.max()) + 1, positions.shape[1]
        if limit > self.capacity and self.cache.layers:
            raise UsageError(f"slot {limit - 1} lies beyond the {self.capacity} slots of the caches")
        start = None
        if slots is None and step_mask is None and limit - int(positions.min()) == tokens:
            start = limit - tokens
        return Step(
            self.buffers, positions, store_slots, limit, start, step_mask, read, states=self.states,
            taken=self._taken(counts, tokens),
        )  # fmt: skip

    def _taken(self, counts: Sequence[int] | None, tokens: int) -> torch.Tensor | None:
        """Return which tokens of a step count, (batch, tokens), if states have to know and it is known already."""
        if counts is None or not self.states:
            return None
        return torch.arange(tokens, device=self.device) < torch.tensor(counts, device=self.device)[:, None]

    def encode(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Compute what the rows read from an encoder, once for all steps.

        Args:
            inputs: of the encoder by name, a row for each row of the decoder; masks may be left out.

        Raises:
            UsageError: the program has no encoder, or inputs are missing, unknown or of a wrong size or type.
        """
        cross = self.program.facts.get(CrossCache)
        if cross is None:
            raise UsageError("this program has no encoder", hint="leave out its inputs")
        signature = self.program.signature
        names = cross.inputs
        of_encoder = replace(
            signature,
            inputs={n: signature.inputs[n] for n in names},
            parameters={n: {"leaf": n} for n in names},
        )
        for name, value in inputs.items():
            if value.shape[0] != self.batch:
                raise UsageError(f"{name} has {value.shape[0]} rows, the text has {self.batch}")
        bound = {name: value.to(self.device) for name, value in of_encoder.bind((), inputs).items()}
        running = self.graph(cross.outputs)
        none = torch.zeros(self.batch, 0, dtype=torch.int64, device=self.device)
        step = Step(self.buffers, none, none, 0, None)
        # the number of rows may be read from any input
        one = torch.zeros(self.batch, 1, dtype=torch.int64, device=self.device)
        values = {self.cache.tokens: one, self.cache.positions: one, **bound, **self.dials}
        outputs = running(step, {name: values[name] for name in running.inputs})
        self.encoded, self.read = {**outputs, **bound}, bound

    def extend(
        self,
        ids: torch.Tensor,
        outputs: Sequence[str] | None = None,
        counts: Sequence[int] | None = None,
        read: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the tokens that follow each row, without lengthening the rows.

        Args:
            ids: (batch, tokens).
            outputs: names of the outputs to compute; the decoder's own by default.
            counts: how many of its tokens each row is going to keep, if that is known already.
            read: (batch, some), the tokens at which outputs are computed, by number; all by default.
        """
        start = torch.tensor(self.lengths, device=self.device)[:, None]
        positions = start + torch.arange(ids.shape[1], device=self.device)[None]
        return self.forward(ids, positions, outputs=outputs, counts=counts, read=read)

    def prefill(self, rows: Sequence[Sequence[int]], whole: bool = True) -> list[dict[str, torch.Tensor]]:
        """Compute the prompts of all rows, which may differ in length, and lengthen the rows by them.

        Args:
            rows: the tokens of each.
            whole: whether prompts end here; False if their last token comes with the next step.

        Returns:
            For each row, its outputs at its last token.
        """
        longest_row = max(len(row) for row in rows)
        lines = self._lines([len(row) for row in rows])
        if lines is not None:
            return self._prefill_packed(rows, lines)
        # what follows a text by few tokens comes in shapes that are prepared, with all outputs
        late = longest_row > TOKENS or not any(self.lengths)
        ids = torch.zeros(len(rows), longest_row, dtype=torch.int64, device=self.device)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(list(row))
        before = list(self.lengths)
        last: list[dict[str, torch.Tensor]] = [{} for _ in rows]
        for first in range(0, longest_row, PIECE):
            piece = ids[:, first : first + PIECE]
            ends = [len(row) - 1 - first for row in rows]
            width = piece.shape[1]
            counts = [min(max(end + 1, 0), width) for end in ends]
            # a row that ends elsewhere reads any token
            read = torch.tensor([[end if 0 <= end < width else width - 1] for end in ends])
            outputs = self.extend(piece, counts=counts, read=read.to(self.device) if late else None)
            self._keep_states(counts)
            self.lengths = [n + width for n in self.lengths]
            for number, end in enumerate(ends):
                if 0 <= end < width:
                    place = 0 if late else end
                    last[number] = {name: value[number, place] for name, value in outputs.items()}
        # slots after a shorter row are stale and will be overwritten
        self.lengths = [n + len(row) for n, row in zip(before, rows, strict=True)]
        return last

    def _lines(self, lengths: Sequence[int]) -> list[Line] | None:
        """Return the lines into which prompts are packed; None if padding costs little, or rows must stand alone."""
        longest_row = max(lengths)
        alone = self.states or self.encoded or any(self.lengths) or not self.cache.tree or self.biased
        if alone or not self.packs or longest_row > PIECE or self.recorder is not None:
            return None
        lines = packed(lengths, longest_row)
        return lines if len(lines) <= WORTH * len(lengths) else None

    def _prefill_packed(
        self, rows: Sequence[Sequence[int]], lines: list[Line]
    ) -> list[dict[str, torch.Tensor]]:
        """Compute prompts that stand side by side in lines, and copy their keys and values to their rows."""
        pack = Pack.of(rows, lines, self.device)
        running = self.graph(self.outputs)
        count, width = pack.ids.shape
        buffers = {
            buffer: torch.zeros(count, shape[0], width, shape[1], dtype=shape[2], device=self.device)
            for buffer, shape in running.buffers.items()
        }
        slots = torch.arange(width, device=self.device).expand(count, -1)
        step = Step(buffers, pack.positions, slots, width, None, pack.mask, pack.read)
        values = {self.cache.tokens: pack.ids, self.cache.positions: pack.positions, **self.dials}
        values["cache_slots"] = slots
        outputs = over_all_tokens(self.program, running(step, {n: values[n] for n in running.inputs}))
        last: list[dict[str, torch.Tensor]] = [{} for _ in rows]
        for number, line in enumerate(pack.lines):
            start = 0
            for place, row in enumerate(line.rows):
                end = start + len(rows[row])
                for buffer, held in buffers.items():
                    self.buffers[buffer][row, :, : end - start] = held[number, :, start:end]
                last[row] = {name: value[number, place] for name, value in outputs.items()}
                start = end
        self.lengths = [len(row) for row in rows]
        return last

    def advance(self, counts: Sequence[int]) -> None:
        """Lengthen rows by the first tokens of the last step, which are stored in the slots after them."""
        self._keep_states(counts)
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the tokens on one path of each row's last step, in order, and lengthen the row by them.

        Args:
            paths: for each row, indices of tokens of the step, which are stored in the slots after the row.
        """
        moved = [any(p != i for i, p in enumerate(path)) for path in paths]
        for row, path in enumerate(paths):
            if moved[row]:
                start = self.lengths[row]
                slots = torch.tensor(path, device=self.device) + start
                for buffer in self.buffers.values():
                    buffer[row, :, start : start + len(path)] = buffer[row].index_select(1, slots)
        counts = [len(path) for path in paths]
        if any(moved) and self._last is not None:
            taken = torch.zeros(self._last.positions.shape, dtype=torch.bool, device=self.device)
            for row, path in enumerate(paths):
                taken[row, list(path)] = True
            self._advance_states(taken)
        self.advance(counts)

    def _keep_states(self, counts: Sequence[int]) -> None:
        """Let states follow from the first tokens of each row in the last step too, if they do not yet."""
        if self._last is not None:
            order = torch.arange(self._last.positions.shape[1], device=self.device)
            self._advance_states(order < torch.tensor(counts, device=self.device)[:, None])

    def _advance_states(self, taken: torch.Tensor) -> None:
        assert self._last is not None
        with torch.inference_mode():
            self.states = {**self.states, **advanced(self._last, taken)}
        self._last = None

    def free(self, row: int) -> int:
        """Return how many tokens a row may commit in a step."""
        return self.capacity - self.lengths[row]

    def unused(self) -> int:
        """Return the number of slots that no row uses."""
        return self.capacity - max(self.lengths)

    def mark(self) -> Mark:
        """Return where all rows stand, for :meth:`rewind`."""
        return Mark(list(self.lengths), dict(self.states))

    def rewind(self, mark: Mark) -> None:
        """Forget what came after a mark. Slots after a row are stale then, and states are those of before."""
        self.lengths, self.states, self._last = list(mark.lengths), dict(mark.states), None

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Continue with only some of the rows."""
        if list(rows) == list(range(self.batch)):
            return
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.device)
        self.buffers = {name: buffer.index_select(0, index) for name, buffer in self.buffers.items()}
        self.states, self._last = of_rows(self.states, index), None
        self.encoded, self.read = of_rows(self.encoded, index), of_rows(self.read, index)
        self.lengths = [self.lengths[row] for row in rows]
        self.batch = len(rows)


def longest(program: Program) -> int | None:
    """Return the number of positions of a program; None if it is unlimited."""
    limit = program.facts[KVCache].limit
    return limit
