"""``graphopt links --fit``: the link between the running ranks."""

from __future__ import annotations

import dataclasses

from ..ir import groups
from ..ir.cost.collectives import ring
from ..ir.cost.link_fit import fit, measure, write_link
from ..ir.errors import UsageError
from .app import Links
from .output import note, show_json, table, text
from .places import place


def fit_link(args: Links) -> None:
    """Fit a link to the running processes."""
    if not args.fit:
        raise UsageError("-o writes a fitted link", hint="add --fit")
    with place(args.output, args.force):
        groups.join()
        ranks = groups.world_size()
        if ranks < 2:
            raise UsageError(
                "a link connects several processes, but only one is running",
                hint="torchrun --nproc-per-node 2 -m graphopt links --fit",
            )
        points = measure(progress=lambda size, seconds: note(f"{size} bytes: {seconds * 1e6:.1f} µs"))
        link = fit(points, ranks)
        if args.output is not None and groups.rank() == 0:
            write_link(link, args.output)
        if args.as_json:
            show_json({**dataclasses.asdict(link), "ranks": ranks, "measured": points})
            return
        rows = [(n, f"{t * 1e6:.1f}", f"{ring(n, ranks, link) * 1e6:.1f}") for n, t in points]
        table(f"{ranks} processes", ("bytes", "measured µs", "fitted µs"), rows)
        text(f"latency {link.latency * 1e6:.3g} µs, bandwidth {link.bandwidth / 1e9:.3g} GB/s")
