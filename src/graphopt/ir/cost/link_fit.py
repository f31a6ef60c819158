"""Latency and bandwidth between the running processes, fitted to measured times of all-reduces."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .. import groups
from ..errors import UsageError
from ..storage.atomic import atomic_file
from .collectives import Link

SIZES = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
"""Message sizes measured, in bytes: from one token of a small model to a prompt of a large one."""


def fit(points: Sequence[tuple[int, float]], ranks: int, name: str = "fitted") -> Link:
    """Return the link whose ring all-reduce, 2(p-1)α + 2(p-1)/p · n/β, fits measured times best.

    Least squares of relative errors, with both parameters at least zero.

    Args:
        points: message sizes in bytes and seconds.
        ranks: p, at least 2.
        name: of the link.

    Raises:
        UsageError: fewer than two sizes, or one rank.
    """
    if ranks < 2 or len({size for size, _ in points}) < 2:
        raise UsageError(
            "a link is fitted to the times of at least two message sizes over at least two ranks"
        )
    from scipy.optimize import nnls

    rows = [[2 * (ranks - 1) / t, 2 * (ranks - 1) / ranks * n / t] for n, t in points]
    (latency, inverse), _ = nnls(
        torch.tensor(rows, dtype=torch.float64).numpy(), torch.ones(len(rows)).double().numpy()
    )
    bandwidth = 1 / inverse if inverse > 0 else float("inf")
    return Link(
        name, bandwidth, float(latency), note=f"fitted to {len(points)} all-reduces over {ranks} processes"
    )


def measure(
    sizes: Sequence[int] = SIZES,
    rounds: int = 20,
    progress: Callable[[int, float], None] | None = None,
) -> list[tuple[int, float]]:
    """Return the median seconds of an all-reduce for each size in bytes, over all processes of the group."""
    bound = groups.bind("links")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    points = []
    for size in sizes:
        value = torch.ones(max(1, size // 4), device=device)
        times = []
        for _ in range(rounds + 3):
            groups.barrier()
            began = time.perf_counter()
            groups.all_reduce(value, bound)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        # all ranks wait for the slowest
        middle = torch.tensor([statistics.median(times[3:])], device=device)
        slowest = float(groups.all_gather(middle, bound).max())
        points.append((size, slowest))
        if progress is not None:
            progress(size, slowest)
    groups.unbind("links")
    return points


def write_link(link: Link, path: str | Path) -> None:
    """Write a link to a JSON file that ``find_link`` reads."""
    data = {"name": link.name, "bandwidth": link.bandwidth, "latency": link.latency, "note": link.note}
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
