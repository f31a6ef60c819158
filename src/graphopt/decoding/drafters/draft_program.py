"""Candidates from a smaller program."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...ir.errors import UsageError
from ...ir.facts import CrossCache
from ...ir.program import Program
from ..cached import CachedDecoder
from ..drafts import Draft, Drafter
from ..kept import shared
from ..sampling import Sampling


class DraftProgram(Drafter):
    """Proposes a chain of tokens with which a smaller program of the same vocabulary continues the row.

    If tokens are sampled, candidates are sampled in the same way and accepted by speculative sampling.

    Args:
        program: with a cache.
        tokens: number of tokens proposed.
        threshold: stop when the draft's most likely token has less than this probability.

    Raises:
        UsageError: fewer than one token.
    """

    name = "draft-program"

    def __init__(self, program: Program, tokens: int = 4, threshold: float = 0.0):
        if tokens < 1 or not 0 <= threshold <= 1:
            raise UsageError("draft-program: tokens must be at least 1, threshold from 0 to 1")
        self.program, self.room, self.threshold = program, tokens, threshold

    def begin(self, decoder: CachedDecoder, rows: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Create the draft's decoder.

        Raises:
            UsageError: the draft's vocabulary differs from the program's.
        """
        super().begin(decoder, rows, sampling)
        self.draft = CachedDecoder(
            self.program, len(rows), decoder.capacity, device=decoder.device, compiled=decoder.compiled,
            kernels=decoder.kernels,
            shared=shared(self.program, decoder.device, decoder.compiled, decoder.kernels),
        )  # fmt: skip
        size = decoder.vocabulary
        if self.draft.vocabulary != size:
            raise UsageError(
                f"the draft has {self.draft.vocabulary} tokens, the program {size}",
                hint="a draft needs the program's tokenizer",
            )
        if CrossCache in self.draft.program.facts:
            # a draft that follows an encoder reads what the program has read
            self.draft.encode(decoder.read)
        self.cached: list[list[int]] = [[] for _ in rows]
        self.mark = self.draft.mark()
        self.logits = self.draft.cache.logits

    def propose(self, rows: Sequence[Sequence[int]], room: Sequence[int]) -> list[Draft]:
        """Feed the draft the tokens committed since the last call, then continue from them."""
        if self.draft.states:
            # states do not go back by a few tokens: those of the last call's rows are taken up again
            self.draft.rewind(self.mark)
            self.cached = [list(row[:n]) for row, n in zip(rows, self.mark.lengths, strict=True)]
        else:
            for number, row in enumerate(rows):
                # the row's last token is recomputed even if it is cached, to get the logits after it
                same = _shared(self.cached[number], row[:-1])
                self.cached[number] = list(row[:same])
            self.draft.lengths = [len(cached) for cached in self.cached]
        last = self.draft.prefill([row[len(cached) :] for row, cached in zip(rows, self.cached, strict=True)])
        logits = torch.stack([outputs[self.logits] for outputs in last])
        self.cached, self.mark = [list(row) for row in rows], self.draft.mark()
        tokens: list[list[int]] = [[] for _ in rows]
        odds: list[list[torch.Tensor]] = [[] for _ in rows]
        going = [depth > 0 for depth in room]
        for step in range(min(self.room, max(room))):
            for number in range(len(rows)):
                if going[number] and step < room[number]:
                    token, drawn_from = self.take(logits[number])
                    if token is None:
                        going[number] = False
                        continue
                    tokens[number].append(token)
                    if drawn_from is not None:
                        odds[number].append(drawn_from)
            if step + 1 == min(self.room, max(room)) or not any(going):
                break
            ids = torch.tensor([[t[-1] if t else 0] for t in tokens], device=self.draft.device)
            logits = self.draft.extend(ids)[self.logits][:, -1]
            self.draft.advance([1] * len(rows))
            for number, row in enumerate(tokens):
                self.cached[number].append(row[-1] if row else 0)
        return [Draft.line(t, o) for t, o in zip(tokens, odds, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with only some of the rows."""
        self.draft.keep_rows(rows)
        self.mark = self.mark.of_rows(rows)
        self.cached = [self.cached[row] for row in rows]


def _shared(cached: Sequence[int], row: Sequence[int]) -> int:
    """Return the length of the common prefix of two rows."""
    count = 0
    for first, second in zip(cached, row, strict=False):
        if first != second:
            break
        count += 1
    return count
