"""The speculative decoding loop: candidates are verified in one step, and those the program would choose are committed."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ir.errors import GraphoptError
from .cached import MARKS, CachedDecoder
from .drafts import Draft, Drafter, Seen
from .sampling import Sampling, draw
from .stopping import Stop


@dataclass
class Statistics:
    """Statistics of a decoding run.

    Attributes:
        steps: how often the program ran after the prompts.
        row_steps: the same, counted once per row.
        tokens: number of committed tokens, over all rows.
        proposed: for each depth, how often a row had a candidate there.
        accepted: for each depth, how often one was accepted.
        seconds: time spent on prompts, candidates, the program, and everything else.
        notes: problems that occurred.
    """

    steps: int = 0
    row_steps: int = 0
    tokens: int = 0
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("prompt", "candidates", "program", "rest"), 0.0)
    )
    notes: list[str] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        """Average number of tokens that a row commits in a step."""
        return self.tokens / max(self.row_steps, 1)

    @property
    def acceptance(self) -> list[float]:
        """Share of the rows with a candidate at a depth that accepted one, from depth 1 on."""
        return [a / p if p else 0.0 for a, p in zip(self.accepted, self.proposed, strict=True)]

    def count(self, draft: Draft, accepted: int) -> None:
        """Add one row's candidates."""
        deepest = max(draft.depths, default=0)
        while len(self.proposed) < deepest:
            self.proposed.append(0)
            self.accepted.append(0)
        for depth in range(deepest):
            self.proposed[depth] += 1
            self.accepted[depth] += depth < accepted


@dataclass
class Commit:
    """What one step adds to one row: its index in the original batch, the tokens, and whether the row has ended."""

    row: int
    tokens: list[int]
    ended: bool


class Loop:
    """Generates with caches, and with candidates if there is a drafter.

    Greedy output equals that of decoding one token at a time: a candidate is accepted only if it is the token that the
    program would choose. Sampled output has the program's distribution: a token is sampled at each position, and
    candidates that were chosen deterministically are accepted if they equal it; candidates that were sampled are
    accepted by the rule of speculative sampling (arXiv 2211.17192).

    Args:
        decoder: without tokens yet.
        drafter: proposes candidates; None for none.
        sampling: how tokens are chosen.
        stop: when rows end.
        seed: for sampling.
    """

    def __init__(
        self, decoder: CachedDecoder, drafter: Drafter | None, sampling: Sampling, stop: Stop, seed: int = 0
    ):  # fmt: skip
        self.decoder, self.drafter, self.sampling, self.stop = decoder, drafter, sampling, stop
        self.generator = torch.Generator().manual_seed(seed)
        if drafter is not None:
            # candidates must be sampled independently of the draws that accept them, and differently for every seed
            drafter_seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed)))
            drafter.generator = torch.Generator().manual_seed(drafter_seed)
        self.statistics = Statistics()
        self.logits = decoder.cache.logits

    def run(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[Commit]]:
        """Yield the commits of each step, in the order of rows; rows that have ended are dropped.

        Args:
            prompts: at least one token each; a decoder that was fed already has the first ones, and not the last.

        Raises:
            UsageError: the drafter cannot work with this program.
        """
        began = time.perf_counter()
        rows = [list(prompt) for prompt in prompts]
        start = [len(row) for row in rows]
        alive = list(range(len(rows)))
        unread = [row[n:] for row, n in zip(rows, self.decoder.lengths, strict=True)]
        read: list[dict[str, torch.Tensor]] | None = None
        if self.drafter is None:
            read = self.decoder.prefill(unread)
        elif any(len(row) > 1 for row in unread):
            # the last tokens are computed together with candidates
            self.decoder.prefill([row[:-1] for row in unread], whole=False)
        self._guarded("begin", self.decoder, rows, self.sampling)
        self.statistics.seconds["prompt"] += time.perf_counter() - began
        while alive:
            step_began = time.perf_counter()
            spent = dict(self.statistics.seconds)
            if read is not None:
                commits, seen = self._first(rows, read)
                read = None
            else:
                commits, seen = self._step([rows[r] for r in alive], [len(rows[r]) - start[r] for r in alive])
            continuing: list[int] = []
            for index, (row, tokens) in enumerate(zip(alive, commits, strict=True)):
                new, ended = self.stop.cut(rows[row][start[row] :], tokens)
                rows[row].extend(new)
                self.statistics.tokens += len(new)
                commits[index] = new
                if not ended:
                    continuing.append(index)
            result = [
                Commit(row, tokens, p not in continuing)
                for p, (row, tokens) in enumerate(zip(alive, commits, strict=True))
            ]
            for index in continuing:
                self._guarded("observe", index, rows[alive[index]], seen[index])
            if 0 < len(continuing) < len(alive):
                self.decoder.keep_rows(continuing)
                self._guarded("keep", continuing)
            alive = [alive[index] for index in continuing]
            accounted = sum(self.statistics.seconds[n] - spent[n] for n in ("candidates", "program"))
            self.statistics.seconds["rest"] += time.perf_counter() - step_began - accounted
            yield result

    def _guarded(self, method: str, *arguments: Any) -> Any:
        """Call a method of the drafter; if it fails once decoding has begun, continue without a drafter."""
        if self.drafter is None:
            return None
        try:
            result = getattr(self.drafter, method)(*arguments)
            return _checked(result, arguments[0], self.decoder) if method == "propose" else result
        except Exception as error:
            if isinstance(error, GraphoptError) and not self.statistics.steps:
                raise  # the drafter does not work with this program at all
            note = (
                f"{self.drafter.name or type(self.drafter).__name__} failed ({type(error).__name__}: {error}); "
                "decoding continues without candidates"
            )
            warnings.warn(note, RuntimeWarning, stacklevel=2)
            self.statistics.notes.append(note)
            self.drafter = None
            return None

    def _drafts(self, rows: list[list[int]], new: list[int]) -> list[Draft]:
        # the last token of a step is the program's own
        room = [
            max(0, min(self.stop.max_new_tokens - n - 1, self.decoder.free(index) - 1))
            for index, n in enumerate(new)
        ]
        if self.drafter is None or not any(room):
            return [Draft() for _ in rows]
        began = time.perf_counter()
        before = self.decoder.mark()
        proposals = self._guarded("propose", rows, room)
        self.decoder.rewind(before)
        self.statistics.seconds["candidates"] += time.perf_counter() - began
        if proposals is None:
            return [Draft() for _ in rows]
        drafts = [draft.cut(depth) for draft, depth in zip(proposals, room, strict=True)]
        free_slots = self.decoder.unused() - 1
        return [draft if draft.width <= free_slots else Draft() for draft in drafts]

    def _first(
        self, rows: list[list[int]], read: list[dict[str, torch.Tensor]]
    ) -> tuple[list[list[int]], list[Seen]]:
        """Return what the outputs at the last tokens of the prompts commit."""
        self.statistics.steps += 1
        self.statistics.row_steps += len(rows)
        commits, seen = [], []
        for row, outputs in zip(rows, read, strict=True):
            path, tokens = self._walk(Draft(), outputs[self.logits][None])
            commits.append(tokens)
            seen.append(Seen([row[-1]], Draft(), path, {n: v[None] for n, v in outputs.items()}))
        self.decoder.decoding = True
        return commits, seen

    def _step(self, rows: list[list[int]], new: list[int]) -> tuple[list[list[int]], list[Seen]]:
        # the last token of a prompt is computed like the rest of the prompt, with all layers
        reading = self.decoder.phased and not self.decoder.decoding
        drafts = [Draft() for _ in rows] if reading else self._drafts(rows, new)
        width = 1 + max(draft.width for draft in drafts)
        began = time.perf_counter()
        names = [self.logits, *(self.drafter.outputs if self.drafter else ())]
        outputs = self._forward(rows, drafts, width, names)
        self.statistics.seconds["program"] += time.perf_counter() - began
        self.statistics.steps += 1
        self.statistics.row_steps += len(rows)
        commits, paths, seen = [], [], []
        for index, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
            path, tokens = self._walk(draft, outputs[self.logits][index])
            self.statistics.count(draft, len(tokens) - 1)
            commits.append(tokens)
            paths.append(path)
            node_count = 1 + draft.width
            row_outputs = {n: v[index, :node_count] for n, v in outputs.items()}
            seen.append(Seen([row[-1], *draft.tokens], draft, path, row_outputs))
        self.decoder.accept(paths)
        self.decoder.decoding = True
        return commits, seen

    def _forward(
        self, rows: list[list[int]], drafts: list[Draft], width: int, names: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        decoder, device = self.decoder, self.decoder.device
        ids = torch.tensor(
            [
                [row[-1], *d.tokens, *[0] * (width - 1 - len(d.tokens))]
                for row, d in zip(rows, drafts, strict=True)
            ],
            device=device,
        )
        probing = any(draft.probes for draft in drafts)
        if not probing and all(draft.chain for draft in drafts):
            return decoder.extend(ids, outputs=names)
        start = torch.tensor(decoder.lengths, device=device)[:, None]
        slots = start + torch.arange(width, device=device)[None]
        # padding up to the width attends only to itself, and nothing attends to it
        depths, seen = [], []
        for draft in drafts:
            depths.append([0, *draft.all_depths, *[0] * (width - 1 - draft.width)])
            visible = [{node} for node in range(width)]
            for node, parent in enumerate(draft.all_parents):
                visible[node + 1] |= visible[parent + 1]
            seen.append([[other in visible[node] for other in range(width)] for node in range(width)])
        mask = torch.tensor(seen, device=device)
        mark_inputs = None
        if probing:
            marks = [
                [0] * (1 + len(d.tokens)) + [mark for _, mark in d.probes] + [0] * (width - 1 - d.width)
                for d in drafts
            ]
            mark_inputs = {MARKS: torch.tensor(marks, device=device)}
        positions = start + torch.tensor(depths, device=device)
        return decoder.forward(ids, positions, slots, mask, outputs=names, given=mark_inputs)

    def _walk(self, draft: Draft, logits: torch.Tensor) -> tuple[list[int], list[int]]:
        """Return the accepted nodes, starting with 0 for the row's last token, and the tokens to commit."""
        if self.sampling.typical is not None:
            return self._accept_typical(draft, logits)
        if draft.odds and not self.sampling.greedy:
            return self._accept_drawn(draft, logits)
        path, tokens, node = [0], [], -1
        best = logits.argmax(-1).tolist() if self.sampling.greedy else None
        while True:
            index = node + 1
            token = best[index] if best is not None else self._draw(logits[index])
            tokens.append(token)
            following = next((c for c in draft.children(node) if draft.tokens[c] == token), None)
            if following is None:
                return path, tokens
            path.append(following + 1)
            node = following

    def _accept_typical(self, draft: Draft, logits: torch.Tensor) -> tuple[list[int], list[int]]:
        """Accept the likeliest acceptable candidate as long as there is one, then sample. Not lossless."""
        path, node = [0], -1
        tokens: list[int] = []
        while True:
            odds = self.sampling.distribution(logits[node + 1].cpu())
            acceptable = self.sampling.acceptable(odds)
            candidates = [c for c in draft.children(node) if acceptable[draft.tokens[c]]]
            if not candidates:
                return path, [*tokens, draw(odds, self.generator)]
            node = max(candidates, key=lambda c: float(odds[draft.tokens[c]]))
            path.append(node + 1)
            tokens.append(draft.tokens[node])

    def _draw(self, logits: torch.Tensor) -> int:
        return draw(self.sampling.distribution(logits.cpu()), self.generator)

    def _accept_drawn(self, draft: Draft, logits: torch.Tensor) -> tuple[list[int], list[int]]:
        path, tokens = [0], []
        for node, (token, drawn_from) in enumerate(zip(draft.tokens, draft.odds, strict=True)):
            odds = self.sampling.distribution(logits[node].cpu())
            draft_odds = drawn_from.double().cpu()
            coin = torch.rand((), generator=self.generator, dtype=torch.float64)
            if coin * draft_odds[token] < odds[token]:
                path.append(node + 1)
                tokens.append(token)
                continue
            residual = (odds - draft_odds).clamp(min=0)
            tokens.append(draw(residual if residual.sum() > 0 else odds, self.generator))
            return path, tokens
        tokens.append(self._draw(logits[len(draft.tokens)]))
        return path, tokens


def _checked(drafts: list[Draft], rows: list[list[int]], decoder: CachedDecoder) -> list[Draft]:
    if len(drafts) != len(rows):
        raise ValueError(f"{len(drafts)} proposals for {len(rows)} rows")
    for draft in drafts:
        wrong = [t for t in draft.tokens if not 0 <= t < decoder.vocabulary]
        if wrong:
            raise ValueError(f"token {wrong[0]} lies outside the vocabulary of {decoder.vocabulary}")
    return drafts
