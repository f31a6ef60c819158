"""Time of an all-reduce of n bytes over p ranks: links and algorithms.

α is the latency of a hop in seconds, β the bandwidth in bytes per second and direction. Every function
returns seconds, and 0 for one rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UsageError
from .devices import Device
from .names import nearest


@dataclass(frozen=True)
class Link:
    """An interconnect between ranks.

    Attributes:
        name: as given by users.
        bandwidth: bytes per second, per direction and rank (β).
        latency: seconds per hop (α).
        in_switch: switches can reduce (NVLink SHARP).
        note: where the numbers come from.
    """

    name: str
    bandwidth: float
    latency: float
    in_switch: bool = False
    note: str = ""


_HOP = "latency of a bare hop, NCCL takes 5 to 10 µs end to end"
_NOMINAL = "nominal line rate; latency the middle of the usual range"

LINKS: dict[str, Link] = {
    link.name: link
    for link in (
        Link("nvlink", 450e9, 1e-6, True, f"NVLink 4 of H100 and H200, 900 GB/s both ways; {_HOP}"),
        Link("nvlink3", 300e9, 1e-6, False, f"NVLink 3 of A100, 600 GB/s both ways; {_HOP}"),
        Link("pcie", 64e9, 5e-6, False, f"PCIe 5.0 x16; {_NOMINAL}, a guess"),
        Link("infiniband", 50e9, 3.5e-6, False, f"400 Gbit/s InfiniBand; {_NOMINAL} of 2 to 5 µs"),
        Link("ethernet", 12.5e9, 30e-6, False, f"100 Gbit/s Ethernet; {_NOMINAL} of 10 to 50 µs"),
    )
}  # fmt: skip
"""Known links by name."""


def find_link(name: str, device: Device | None = None) -> Link:
    """Return a link by name, or from a JSON file that ``graphopt links --fit`` wrote.

    ``nvlink`` has the bandwidth of the device, where one is given.

    Raises:
        UsageError: there is no link of that name, the file does not hold one, or the device has no such link.
    """
    link = _read_link(name) if name.endswith(".json") else LINKS.get(name.lower())
    if link is None:
        raise UsageError(f"no link is called {name!r}", hint=nearest(name, LINKS))
    if device is None or link.name != "nvlink":
        return link
    if device.link is None:
        raise UsageError(
            f"{device.name} has no NVLink", hint=nearest("", (n for n in LINKS if n != "nvlink"))
        )
    return link if device.link >= link.bandwidth else replace(LINKS["nvlink3"], bandwidth=device.link)


def _read_link(path: str) -> Link:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        link = Link(
            str(data["name"]),
            float(data["bandwidth"]),
            float(data["latency"]),
            note=str(data.get("note", "")),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is no link: {error!r}", hint="graphopt links --fit -o FILE.json writes one"
        ) from None
    if not (link.bandwidth > 0 and link.latency >= 0):
        raise UsageError(f"{path}: bandwidth must be positive and latency not negative")
    return link


def _hops(ranks: int) -> int:
    """Return ⌈log2 p⌉."""
    if ranks < 1:
        raise UsageError(f"a collective needs at least one rank, not {ranks}")
    return (ranks - 1).bit_length()


def ring(size: float, ranks: int, link: Link) -> float:
    """Return the time of a ring all-reduce: 2(p−1)α + 2(p−1)/p · n/β."""
    _hops(ranks)
    return 2 * (ranks - 1) * link.latency + 2 * (ranks - 1) / ranks * size / link.bandwidth


def tree(size: float, ranks: int, link: Link) -> float:
    """Return the time of reduce and broadcast over a binomial tree: 2⌈log2 p⌉(α + n/β)."""
    return 2 * _hops(ranks) * (link.latency + size / link.bandwidth)


def double_tree(size: float, ranks: int, link: Link) -> float:
    """Return the time of a pipelined double binary tree: 2⌈log2 p⌉α + 2n/β."""
    hops = _hops(ranks)
    return 2 * hops * link.latency + 2 * size / link.bandwidth if hops else 0.0


def one_shot(size: float, ranks: int, link: Link) -> float:
    """Return the time if every rank sends all data to every other: α + (p−1)n/β."""
    return link.latency + (ranks - 1) * size / link.bandwidth if _hops(ranks) else 0.0


def two_shot(size: float, ranks: int, link: Link) -> float:
    """Return the time of a direct reduce-scatter and a direct all-gather: 2α + 2(p−1)/p · n/β."""
    return 2 * link.latency + 2 * (ranks - 1) / ranks * size / link.bandwidth if _hops(ranks) else 0.0


def star(size: float, ranks: int, link: Link) -> float:
    """Return the time if one rank adds all messages and sends the sum back: 2α + 2(p−1)n/β.

    TPI-LLM, arXiv 2410.00531.
    """
    return 2 * link.latency + 2 * (ranks - 1) * size / link.bandwidth if _hops(ranks) else 0.0


def in_switch(size: float, ranks: int, link: Link) -> float:
    """Return the time of a reduction in the switch (NVLS): 2α + n/β."""
    return 2 * link.latency + size / link.bandwidth if _hops(ranks) else 0.0


def all_gather(size: float, ranks: int, link: Link) -> float:
    """Return the time of a ring all-gather, or reduce-scatter, of n bytes in total: half of a ring all-reduce."""
    return ring(size, ranks, link) / 2


ALL_REDUCE: dict[str, Callable[[float, int, Link], float]] = {
    "ring": ring,
    "tree": tree,
    "double-tree": double_tree,
    "one-shot": one_shot,
    "two-shot": two_shot,
    "star": star,
}
"""All-reduce algorithms that every link can run."""


def all_reduce(size: float, ranks: int, link: Link) -> tuple[str, float]:
    """Return the fastest algorithm and its seconds, in-switch reduction included where the link has it."""
    times = {name: algorithm(size, ranks, link) for name, algorithm in ALL_REDUCE.items()}
    if link.in_switch:
        times["in-switch"] = in_switch(size, ranks, link)
    best = min(times, key=lambda name: times[name])
    return best, times[best]
