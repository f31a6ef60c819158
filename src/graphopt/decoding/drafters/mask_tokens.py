"""Candidates from mask tokens appended to the row (arXiv 2507.11851)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...ir.errors import UsageError
from ...ir.facts import MaskTokens as Masked
from ..cached import CachedDecoder
from ..drafts import Draft, Drafter, Seen
from ..sampling import Sampling

HIDDEN, LOGITS, BEFORE = "mask_hidden", "mask_logits", "sampler_ids"


class MaskTokens(Drafter):
    """Proposes a chain that the sampler predicts from the mask tokens after the last accepted token.

    Mask tokens are computed in the same step as the candidates. ``quadratic`` puts mask tokens after every candidate, so
    that there are new candidates however many are accepted; ``linear`` puts them after the last candidate only, so that
    there are new candidates only if all are accepted. With k mask tokens a step has (k + 1)^2 positions, or 2 k + 1.

    Args:
        tokens: number of tokens proposed; by default, the program's number of mask tokens.
        layout: "quadratic" or "linear".

    Raises:
        UsageError: fewer than one token, or another layout.
    """

    name = "mask-tokens"
    outputs = (HIDDEN,)

    def __init__(self, tokens: int | None = None, layout: str = "quadratic"):
        if (tokens is not None and tokens < 1) or layout not in ("quadratic", "linear"):
            raise UsageError("mask-tokens: tokens must be at least 1, layout is quadratic or linear")
        self.tokens, self.layout = tokens, layout
        self.room = 16 * 17 if tokens is None else tokens * (tokens + 2)

    def begin(self, decoder: CachedDecoder, rows: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Read how many mask tokens the program has.

        Raises:
            UsageError: the program has no mask tokens, or fewer than requested.
        """
        super().begin(decoder, rows, sampling)
        masked = decoder.program.facts.get(Masked)
        if masked is None or LOGITS not in decoder.program.outputs:
            raise UsageError("this program has no mask tokens", hint="attach-mask-tokens adds them")
        self.count = masked.masks if self.tokens is None else self.tokens
        if self.count > masked.masks:
            raise UsageError(f"the program has {masked.masks} mask tokens, {self.count} are asked for")
        self.hidden: list[torch.Tensor | None] = [None] * len(rows)

    def observe(self, number: int, row: Sequence[int], seen: Seen) -> None:
        """Keep the hidden states of the mask tokens after the last accepted token."""
        last, candidates = seen.path[-1], len(seen.draft.tokens)
        self.hidden[number] = None
        if not seen.draft.probes or (self.layout == "linear" and last < candidates):
            return  # they attended to tokens that were rejected
        first = 1 + candidates + (last * self.count if self.layout == "quadratic" else 0)
        self.hidden[number] = seen.outputs[HIDDEN][first : first + self.count]

    def propose(self, rows: Sequence[Sequence[int]], room: Sequence[int]) -> list[Draft]:
        """Sample candidates one after another, and put mask tokens after them."""
        chains = self._sample_chains(rows, room)
        drafts = []
        for chain in chains:
            anchors = range(-1, len(chain)) if self.layout == "quadratic" else (len(chain) - 1,)
            probes: list[tuple[int, int]] = []
            for anchor in anchors:
                for mark in range(1, self.count + 1):
                    probes.append((anchor if mark == 1 else len(chain) + len(probes) - 1, mark))
            line = Draft.line(chain)
            drafts.append(Draft(line.tokens, line.parents, [], probes))
        return drafts

    def _sample_chains(self, rows: Sequence[Sequence[int]], room: Sequence[int]) -> list[list[int]]:
        ready = [n for n, hidden in enumerate(self.hidden) if hidden is not None and room[n] > 0]
        chains: list[list[int]] = [[] for _ in rows]
        if not ready:
            return chains
        hidden = torch.stack([self.hidden[n] for n in ready])  # type: ignore[misc]
        device = self.decoder.device
        before = torch.tensor([[rows[n][-1]] for n in ready], device=device)
        zeros = torch.zeros_like(before)
        for index in range(min(self.count, max(room))):
            inputs = {HIDDEN: hidden[:, index : index + 1], BEFORE: before}
            logits = self.decoder.forward(zeros, zeros, outputs=(LOGITS,), given=inputs)[LOGITS]
            before = logits.argmax(-1)
            for n, token in zip(ready, before[:, 0].tolist(), strict=True):
                chains[n].append(token)
        return [chain[:depth] for chain, depth in zip(chains, room, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with only some of the rows."""
        self.hidden = [self.hidden[row] for row in rows]
