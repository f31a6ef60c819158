"""``graphopt links``: what joins ranks, known or measured."""

from __future__ import annotations

import dataclasses

from ..ir import groups
from ..ir.cost.collectives import LINKS, ring
from ..ir.cost.link_fit import fit, measure, write_link
from ..ir.errors import UsageError
from .output import note, show_json, table, text


def show_links(fitted: bool, output: str | None, as_json: bool) -> None:
    """List links, or fit one to the processes that run."""
    if not fitted:
        if output is not None:
            raise UsageError("-o writes a link that was fitted", hint="add --fit")
        if as_json:
            show_json({name: dataclasses.asdict(link) for name, link in LINKS.items()})
            return
        rows = [(n, f"{k.bandwidth / 1e9:g}", f"{k.latency * 1e6:g}", k.note) for n, k in LINKS.items()]
        table("Links", ("name", "GB/s", "µs", "note"), rows)
        return
    groups.join()
    ranks = groups.world_size()
    if ranks < 2:
        raise UsageError(
            "a link joins several processes, and this one is alone",
            hint="torchrun --nproc-per-node 2 -m graphopt links --fit",
        )
    points = measure(progress=lambda size, seconds: note(f"{size} bytes: {seconds * 1e6:.1f} µs"))
    link = fit(points, ranks)
    if output is not None and groups.rank() == 0:
        write_link(link, output)
    if as_json:
        show_json({**dataclasses.asdict(link), "ranks": ranks, "measured": points})
        return
    shown = [(str(n), f"{t * 1e6:.1f}", f"{ring(n, ranks, link) * 1e6:.1f}") for n, t in points]
    table(f"{ranks} processes", ("bytes", "measured µs", "fitted µs"), shown)
    text(f"latency {link.latency * 1e6:.3g} µs, bandwidth {link.bandwidth / 1e9:.3g} GB/s")
