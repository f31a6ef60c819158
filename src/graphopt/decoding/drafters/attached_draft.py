"""Candidates from a draft that reads the program's own features (after EAGLE-3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...ir.errors import UsageError
from ..cached import CachedDecoder
from ..drafts import Draft, Drafter, Seen
from ..sampling import Sampling

FEATURES, HIDDEN, LOGITS = "draft_features", "draft_hidden", "draft_logits"


class AttachedDraft(Drafter):
    """Proposes a chain: the first token from the program's own features, each later one from the draft's hidden state.

    The draft's keys and values are stored in caches of the same program. Position t holds the features at t and the
    token after it, so that the draft of a row of n tokens has n - 1 positions.

    Args:
        tokens: number of tokens proposed.
        threshold: stop when the draft's most likely token has less than this probability.

    Raises:
        UsageError: fewer than one token.
    """

    name = "attached-draft"
    outputs = (FEATURES,)

    def __init__(self, tokens: int = 4, threshold: float = 0.0):
        if tokens < 1 or not 0 <= threshold <= 1:
            raise UsageError("attached-draft: tokens must be at least 1, threshold from 0 to 1")
        self.room, self.threshold = tokens, threshold

    def begin(self, decoder: CachedDecoder, rows: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Run the program over the prompts again to collect their features.

        Raises:
            UsageError: the program has no draft.
        """
        super().begin(decoder, rows, sampling)
        if LOGITS not in decoder.program.outputs:
            raise UsageError("this program has no draft", hint="attach-draft adds one")
        self.waiting: list[list[torch.Tensor]] = [[] for _ in rows]
        self.places = [0] * len(rows)
        width = max(len(row) for row in rows) - 1
        if width:
            ids = torch.zeros(len(rows), width, dtype=torch.int64)
            for number, row in enumerate(rows):
                ids[number, : len(row) - 1] = torch.tensor(list(row[:-1]))
            positions = torch.arange(width).expand(len(rows), -1)
            outputs = decoder.forward(
                ids.to(decoder.device), positions.to(decoder.device), outputs=(FEATURES,)
            )
            for number, row in enumerate(rows):
                self.waiting[number] = list(outputs[FEATURES][number, : len(row) - 1])

    def observe(self, number: int, row: Sequence[int], seen: Seen) -> None:
        """Keep the features of the accepted tokens."""
        self.waiting[number].extend(seen.outputs[FEATURES][node] for node in seen.path)

    def propose(self, rows: Sequence[Sequence[int]], room: Sequence[int]) -> list[Draft]:
        """Feed the draft the tokens committed since the last call, then continue from them."""
        features, following, positions, last = self._waiting(rows)
        outputs = self._run(features, following, positions)
        tokens: list[list[int]] = [[] for _ in rows]
        odds: list[list[torch.Tensor]] = [[] for _ in rows]
        going = [depth > 0 and index >= 0 for depth, index in zip(room, last, strict=True)]
        logits = torch.stack([outputs[LOGITS][n, max(index, 0)] for n, index in enumerate(last)])
        hidden = torch.stack([outputs[HIDDEN][n, max(index, 0)] for n, index in enumerate(last)])
        for step in range(min(self.room, max(room))):
            for number in range(len(rows)):
                if going[number] and step < room[number]:
                    token, drawn_from = self.take(logits[number])
                    going[number] = token is not None
                    tokens[number].extend([] if token is None else [token])
                    odds[number].extend([] if drawn_from is None else [drawn_from])
            if step + 1 == min(self.room, max(room)) or not any(going):
                break
            ids = torch.tensor([[t[-1] if t else 0] for t in tokens], device=self.decoder.device)
            next_positions = torch.tensor(
                [[index + step] for index in self.places], device=self.decoder.device
            )
            outputs = self._run(hidden[:, None], ids, next_positions)
            logits, hidden = outputs[LOGITS][:, 0], outputs[HIDDEN][:, 0]
        return [Draft.line(t, o) for t, o in zip(tokens, odds, strict=True)]

    def _waiting(
        self, rows: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
        """Return the pending features of all rows as one batch, and mark them as read."""
        width = max(1, *(len(waiting) for waiting in self.waiting))
        feature_value = self.decoder.program.outputs[FEATURES].meta["val"]
        features = torch.zeros(
            len(rows), width, int(feature_value.shape[-1]), dtype=feature_value.dtype, device=self.decoder.device
        )  # fmt: skip
        following = torch.zeros(len(rows), width, dtype=torch.int64, device=self.decoder.device)
        start = torch.tensor(self.places, device=self.decoder.device)[:, None]
        last = []
        for number, (row, waiting) in enumerate(zip(rows, self.waiting, strict=True)):
            if waiting:
                features[number, : len(waiting)] = torch.stack(waiting)
                first = self.places[number] + 1
                following[number, : len(waiting)] = torch.tensor(list(row[first : first + len(waiting)]))
            last.append(len(waiting) - 1)
            self.places[number] += len(waiting)
        self.waiting = [[] for _ in rows]
        return features, following, start + torch.arange(width, device=self.decoder.device)[None], last

    def _run(
        self, features: torch.Tensor, following: torch.Tensor, positions: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        return self.decoder.forward(
            following, positions, outputs=(HIDDEN, LOGITS), given={FEATURES: features, "draft_ids": following}
        )

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with only some of the rows."""
        self.waiting = [self.waiting[row] for row in rows]
        self.places = [self.places[row] for row in rows]
