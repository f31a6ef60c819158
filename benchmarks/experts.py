"""Time of a feed-forward with several widths against the dense one, by how wide tokens are in the mean.

    python benchmarks/experts.py [--size 1024] [--width 2816] [--threads 1]

Both run in turns, and medians are compared. Choices are given, so that routers (under one percent) are not in it; sorting
tokens by width and putting them back is.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

import graphopt.ir.operators  # noqa: F401

BATCHES = (1, 32, 1024)
# title: (widths as shares, how many of the tokens take each)
CASES = {
    "all at 1/4": ((0.25, 0.5, 0.75, 1.0), (1, 0, 0, 0)),
    "four fifths at 1/16, one at 1": ((0.0625, 1.0), (0.8, 0.2)),
    "halves at 1/4 and 3/4": ((0.25, 0.5, 0.75, 1.0), (0.5, 0, 0.5, 0)),
    "quarters at each": ((0.25, 0.5, 0.75, 1.0), (0.25, 0.25, 0.25, 0.25)),
    "all at 1": ((0.25, 0.5, 0.75, 1.0), (0, 0, 0, 1)),
}


def chosen(shares: tuple[float, ...], tokens: int) -> torch.Tensor:
    """Return a way for each token, so many of each, in random order; one token takes turns."""
    edges = torch.tensor(shares).cumsum(0)
    places = (torch.arange(tokens) + 0.5) / tokens
    return torch.searchsorted(edges, places).clamp(max=len(shares) - 1)[
        torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    ]


def medians(runs: list[Callable[[], object]], rounds: int) -> list[float]:
    """Return the median time of each, taken in turns."""
    times: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + 3):
        for run, found in zip(runs, times, strict=True):
            began = time.perf_counter()
            run()
            if number >= 3:
                found.append(time.perf_counter() - began)
    return [statistics.median(found) for found in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2816)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    size, width = arguments.size, arguments.width
    gate, up, down = torch.randn(width, size), torch.randn(width, size), torch.randn(size, width)
    table = Table("tokens", "widths", "mean width", "dense, ms", "routed, ms", "ratio", box=None)
    for tokens in BATCHES:
        x = torch.randn(1, tokens, size)

        def dense(x: torch.Tensor = x) -> torch.Tensor:
            return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

        for title, (shares, amounts) in CASES.items():
            widths = [round(share * width) for share in shares]
            if tokens == 1 and max(amounts) < 1:
                continue  # one token has one width
            choice = chosen(amounts, tokens)[None]

            def routed(
                x: torch.Tensor = x, choice: torch.Tensor = choice, widths: list[int] = widths
            ) -> torch.Tensor:
                return torch.ops.graphopt.nested_ffn(x, choice, widths, up, down, gate)

            with torch.no_grad():
                first, second = medians([dense, routed], 15 if tokens > 32 else 60)
            mean = float(torch.tensor(widths, dtype=torch.float64)[choice].mean()) / width
            table.add_row(
                str(tokens),
                title,
                f"{mean:.3f}",
                f"{first * 1e3:.2f}",
                f"{second * 1e3:.2f}",
                f"{second / first:.2f}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
