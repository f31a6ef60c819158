"""The best path of a token through feed-forwards of several widths, found by exhaustive search: a bound for routers.

Section 3 of Duo-LLM (arXiv 2410.10846): knowing the next token, which feed-forwards would have sufficed? The oracle sees
the answer and takes the minimum of many noisy numbers, so it is a bound and not a usable router.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..data.reading import read_data
from ..data.tokenizer import Tokenizer
from ..ir.errors import UsageError
from ..ir.program import Model, Program, as_program
from ..ir.ranks.rank_programs import ranks_of
from .choices import nested_blocks, widths_of_choices, with_choices_as_input
from .context import Context, Progress, Silent
from .paths import Paths


@dataclass(frozen=True)
class TokenReport:
    """Results of the oracle for one token.

    Args:
        row: index of the row in the data.
        position: position in the row of the token that is predicted.
        text: the token and the text before it; empty without a tokenizer.
        all_largest: loss, in nats, with every feed-forward at its largest width.
        best: loss of the best path.
        path: its choices, one per feed-forward, where 0 is the narrowest.
        exactly: lowest loss by the exact number of feed-forwards at their largest width.
    """

    row: int
    position: int
    text: str
    all_largest: float
    best: float
    path: list[int]
    exactly: dict[int, float] = field(repr=False)

    @property
    def difficulty(self) -> float:
        """How much the best path lowers the loss, not how high the loss is (section 4 of the paper)."""
        return self.all_largest - self.best


@dataclass(frozen=True)
class OracleReport:
    """Results of the oracle, token by token; means are over tokens.

    Args:
        tokens: one report per token.
        layers: number of feed-forwards with several widths.
        ways: number of choices of each.
    """

    tokens: list[TokenReport]
    layers: int
    ways: int

    @cached_property
    def exactly(self) -> dict[int, float]:
        """Mean of the lowest loss by the number of feed-forwards at their largest width."""
        counts = sorted(set.intersection(*(set(t.exactly) for t in self.tokens)))
        return {b: sum(t.exactly[b] for t in self.tokens) / len(self.tokens) for b in counts}

    @property
    def all_largest(self) -> float:
        """Mean loss with every feed-forward at its largest width."""
        return sum(t.all_largest for t in self.tokens) / len(self.tokens)

    @property
    def best(self) -> float:
        """Mean loss of the best paths."""
        return sum(t.best for t in self.tokens) / len(self.tokens)

    @property
    def mean_difficulty(self) -> float:
        """Mean amount by which the best paths lower the loss."""
        return self.all_largest - self.best


def routing_oracle(
    model: Model | Program,
    data: str | os.PathLike[str] | Iterable[Mapping[str, torch.Tensor]],
    *,
    budget: int | None = None,
    tokens: int = 64,
    length: int = 128,
    sequences: int = 64,
    seed: int = 0,
    at_once: int = 1024,
    progress: Progress | None = None,
) -> OracleReport:
    """Return the best paths of some tokens through the feed-forwards of a program, found by trying all of them.

    Earlier tokens use the largest width everywhere; only the path of the token that is predicted from varies. Paths
    share common prefixes: the work is that of ways^1 + ... + ways^layers layers of one token.

    Args:
        model: a model that predicts next tokens and was rewritten by split-ffn.
        data: text, or batches without padding.
        budget: if given, only paths with exactly this number of feed-forwards at their largest width are tried.
        tokens: number of tokens, at random positions in the data.
        length: maximum number of tokens per row.
        sequences: maximum number of rows.
        seed: seed of the random positions.
        at_once: number of paths computed together; more are split and searched depth first.
        progress: notified of every token.

    Raises:
        UsageError: the program has no widths to choose from or does not predict tokens, or the budget is out of range.
    """
    program = as_program(model)
    if ranks_of(program):
        raise UsageError("the oracle runs on programs that are not sharded")
    blocks = nested_blocks(program)
    widths = widths_of_choices(blocks[0])
    if program.origin.padding != "causal" or "logits" not in program.signature.output_names:
        raise UsageError("the oracle needs a program that predicts next tokens")
    if budget is not None and not 0 <= budget <= len(blocks):
        raise UsageError(f"a budget of {budget} is not from 0 to the {len(blocks)} feed-forwards there are")
    routed = with_choices_as_input(program)
    if not isinstance(data, (str, os.PathLike)):
        data = list(data)
    batches = read_data(program, data, sequences=sequences, length=length, batch=1, seed=seed)[0]
    rows = [
        {name: tensor[i : i + 1] for name, tensor in batch.items()}
        for batch in batches
        for i in range(len(batch["input_ids"]))
    ]
    positions = _positions(rows, tokens, seed)
    if not positions:
        raise UsageError("there is no row with a token to predict")
    paths = Paths(routed, len(blocks), len(widths), widths.index(max(widths)), at_once)
    names = _token_text(program)
    reporter: Progress = progress or Silent()
    reporter.start(f"paths of {len(positions)} tokens", len(positions))
    context = Context(rows)
    reports: list[TokenReport] = []
    current_row = -1
    try:
        for number, position in positions:
            row = rows[number]
            if number != current_row:
                routing = torch.full((len(blocks), *row["input_ids"].shape), paths.largest)
                paths.begin(context.bound(routed, {**row, "routing": routing}))
                current_row = number
            losses, choices = paths.losses(position - 1, int(row["input_ids"][0, position]), budget)
            text = names(row["input_ids"][0], position)
            reports.append(_report(number, position, losses, choices, paths, text))
            reporter.step(f"difficulty {reports[-1].difficulty:.3f}")
    finally:
        reporter.done()
    return OracleReport(reports, len(blocks), len(widths))


def _positions(rows: list[dict[str, torch.Tensor]], count: int, seed: int) -> list[tuple[int, int]]:
    """Return rows and positions of tokens to predict, by row; the first tokens of a row have too little context."""
    candidates = [
        (number, position) for number, row in enumerate(rows)
        if bool(row.get("attention_mask", torch.ones(1)).all())
        for position in range(min(8, row["input_ids"].shape[1] // 2) or 1, row["input_ids"].shape[1])
    ]  # fmt: skip
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(candidates[i] for i in order[:count])


def _token_text(program: Program) -> Any:
    try:
        tokenizer = Tokenizer(program)
    except UsageError:
        return lambda ids, position: ""
    return lambda ids, position: (
        tokenizer.decode(ids[max(0, position - 8) : position].tolist())
        + " ["
        + tokenizer.decode([int(ids[position])])
        + "]"
    )


def _report(
    row: int, position: int, losses: torch.Tensor, choices: torch.Tensor, paths: Paths, text: str
) -> TokenReport:
    counts = (choices == paths.largest).sum(1)
    exactly = {int(b): float(losses[counts == b].min()) for b in set(counts.tolist())}
    best = int(losses.argmin())
    return TokenReport(
        row, position, text, paths.all_largest, float(losses[best]), choices[best].tolist(), exactly
    )


__all__ = ["OracleReport", "TokenReport", "routing_oracle"]
