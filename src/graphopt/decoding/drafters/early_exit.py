"""Candidates from the program's own first layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...ir.errors import UsageError
from ...ir.facts import EarlyExits
from ..cached import CachedDecoder
from ..drafts import Draft, Drafter
from ..sampling import Sampling


class EarlyExit(Drafter):
    """Proposes the predictions of an exit after some layers (arXiv 2404.16710), using the program's own caches.

    Args:
        tokens: number of tokens proposed.
        output: the name of the exit; may be left out if there is only one.
        threshold: stop when the exit's most likely token has less than this probability.

    Raises:
        UsageError: fewer than one token.
    """

    name = "early-exit"

    def __init__(self, tokens: int = 3, output: str | None = None, threshold: float = 0.0):
        if tokens < 1 or not 0 <= threshold <= 1:
            raise UsageError("early-exit: tokens must be at least 1, threshold from 0 to 1")
        self.room, self.output, self.threshold = tokens, output, threshold

    def begin(self, decoder: CachedDecoder, rows: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Choose the exit.

        Raises:
            UsageError: the program has no exit, or has several and none is named.
        """
        super().begin(decoder, rows, sampling)
        attached = decoder.program.facts.get(EarlyExits)
        exits = list(attached.layers) if attached is not None else []
        if not exits:
            raise UsageError("this program has no exits", hint="attach-early-exit adds them")
        if self.output is None and len(exits) > 1:
            raise UsageError(f"this program has the exits {', '.join(exits)}", hint="say which: output=...")
        if self.output is not None and self.output not in exits:
            raise UsageError(f"this program has no exit {self.output!r}, but {', '.join(exits)}")
        self.exit = self.output or exits[0]

    def propose(self, rows: Sequence[Sequence[int]], room: Sequence[int]) -> list[Draft]:
        """Continue all rows with the first layers; their cache entries are overwritten when all layers run."""
        tokens: list[list[int]] = [[] for _ in rows]
        odds: list[list[torch.Tensor]] = [[] for _ in rows]
        going = [deep > 0 for deep in room]
        last = [row[-1] for row in rows]
        for step in range(min(self.room, max(room))):
            ids = torch.tensor([[token] for token in last], device=self.decoder.device)
            logits = self.decoder.extend(ids, outputs=(self.exit,))[self.exit][:, -1].cpu()
            self.decoder.advance([1] * len(rows))
            for number in range(len(rows)):
                if not going[number] or step >= room[number]:
                    continue
                token, drawn_from = self.take(logits[number])
                if token is None:
                    going[number] = False
                    continue
                odds[number].extend([] if drawn_from is None else [drawn_from])
                tokens[number].append(token)
                last[number] = token
            if not any(going):
                break
        return [Draft.line(t, o) for t, o in zip(tokens, odds, strict=True)]
