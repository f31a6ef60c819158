"""The best path of a token through feed-forwards of several widths, found by trying all: a bound for routers.

Section 3 of Duo-LLM (arXiv 2410.10846): knowing the next token, which feed-forwards would have sufficed? The oracle sees
the answer and takes the least of many noisy numbers, so that it is a bound and nothing that can be run.
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
from .choices import given_choices, nested_blocks, way_widths
from .context import Context, Progress, Silent
from .paths import Paths


@dataclass(frozen=True)
class TokenReport:
    """What the oracle found for one token.

    Args:
        row: of the data.
        position: in the row, of the token that is predicted.
        text: the token, and what is before it; empty without a tokenizer.
        all_largest: loss, in nats, with every feed-forward at its largest.
        best: loss of the best path.
        path: its ways, one a feed-forward, 0 being the narrowest.
        exactly: least loss with so many feed-forwards at their largest.
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
        """How much a better path would have helped: not how high the loss is (section 4 of the paper)."""
        return self.all_largest - self.best


@dataclass(frozen=True)
class OracleReport:
    """What the oracle found, token by token; means are over tokens.

    Args:
        tokens: a report each.
        layers: how many feed-forwards have several ways.
        ways: how many each has.
    """

    tokens: list[TokenReport]
    layers: int
    ways: int

    @cached_property
    def exactly(self) -> dict[int, float]:
        """Mean least loss by how many feed-forwards are at their largest."""
        counts = sorted(set.intersection(*(set(t.exactly) for t in self.tokens)))
        return {b: sum(t.exactly[b] for t in self.tokens) / len(self.tokens) for b in counts}

    @property
    def all_largest(self) -> float:
        """Mean loss with everything at its largest."""
        return sum(t.all_largest for t in self.tokens) / len(self.tokens)

    @property
    def best(self) -> float:
        """Mean loss of the best paths."""
        return sum(t.best for t in self.tokens) / len(self.tokens)

    @property
    def mean_difficulty(self) -> float:
        """Mean of what the best paths would have helped."""
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
    """Try every path of some tokens through the feed-forwards of a program, and report the best.

    The tokens before the one that is predicted from took the largest way everywhere; only its own path varies. Paths
    share what they have in common: the work is that of ways^1 + ... + ways^layers layers of one token.

    Args:
        model: predicts next tokens, and went through split-ffn.
        data: text, or batches without padding.
        budget: only paths with exactly so many feed-forwards at their largest.
        tokens: how many are tried, at random places of the data.
        length: tokens a row at most.
        sequences: rows of data at most.
        seed: of the places.
        at_once: paths computed together; more are tried piece by piece, depth first.
        progress: hears of every token.

    Raises:
        UsageError: the program has no ways to choose from or does not predict tokens, or the budget cannot be.
    """
    program = as_program(model)
    if ranks_of(program):
        raise UsageError("the oracle runs on programs that are not sharded")
    blocks = nested_blocks(program)
    widths = way_widths(blocks[0])
    if program.origin.padding != "causal" or "logits" not in program.signature.output_names:
        raise UsageError("the oracle needs a program that predicts next tokens")
    if budget is not None and not 0 <= budget <= len(blocks):
        raise UsageError(f"a budget of {budget} is not from 0 to the {len(blocks)} feed-forwards there are")
    form = given_choices(program)
    if not isinstance(data, (str, os.PathLike)):
        data = list(data)
    batches = read_data(program, data, sequences=sequences, length=length, batch=1, seed=seed)[0]
    rows = [
        {name: tensor[i : i + 1] for name, tensor in batch.items()}
        for batch in batches
        for i in range(len(batch["input_ids"]))
    ]
    places = _places(rows, tokens, seed)
    if not places:
        raise UsageError("there is no row with a token to predict")
    paths = Paths(form, len(blocks), len(widths), widths.index(max(widths)), at_once)
    names = _names(program)
    shown: Progress = progress or Silent()
    shown.start(f"paths of {len(places)} tokens", len(places))
    context = Context(rows)
    found: list[TokenReport] = []
    begun = -1
    try:
        for number, position in places:
            row = rows[number]
            if number != begun:
                routing = torch.full((len(blocks), *row["input_ids"].shape), paths.largest)
                paths.begin(context.bound(form, {**row, "routing": routing}))
                begun = number
            losses, ways = paths.losses(position - 1, int(row["input_ids"][0, position]), budget)
            text = names(row["input_ids"][0], position)
            found.append(_report(number, position, losses, ways, paths, text))
            shown.step(f"difficulty {found[-1].difficulty:.3f}")
    finally:
        shown.done()
    return OracleReport(found, len(blocks), len(widths))


def _places(rows: list[dict[str, torch.Tensor]], count: int, seed: int) -> list[tuple[int, int]]:
    """Rows and positions of tokens to predict, row by row; the first tokens of a row have little to go by."""
    every = [
        (number, position) for number, row in enumerate(rows)
        if bool(row.get("attention_mask", torch.ones(1)).all())
        for position in range(min(8, row["input_ids"].shape[1] // 2) or 1, row["input_ids"].shape[1])
    ]  # fmt: skip
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(every[i] for i in order[:count])


def _names(program: Program) -> Any:
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
    row: int, position: int, losses: torch.Tensor, ways: torch.Tensor, paths: Paths, text: str
) -> TokenReport:
    counts = (ways == paths.largest).sum(1)
    exactly = {int(b): float(losses[counts == b].min()) for b in set(counts.tolist())}
    best = int(losses.argmin())
    return TokenReport(
        row, position, text, paths.all_largest, float(losses[best]), ways[best].tolist(), exactly
    )


__all__ = ["OracleReport", "TokenReport", "routing_oracle"]
