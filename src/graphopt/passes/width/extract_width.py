"""One of several widths, as a plain dense program again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.anatomy import Block
from ...ir.errors import PassRefusedError, PipelineError
from ...ir.export_blockers import block_export, unblock_export
from ...ir.facts import note_checkpoint
from ...ir.inputs import remove_dial
from ...ir.option import option
from ...ir.program import Program
from ...ir.running.fold import drop_unread_weights
from ...ir.schema import arguments
from ..framework.base import Pass
from ..framework.contracts import Approximate
from ..framework.plan import Plan, Refused, Site
from .nesting import MATRICES, dense
from .split_ffn import DIAL
from .taking import take_channels

if TYPE_CHECKING:
    from ...measure.context import Context


@dataclass(frozen=True, kw_only=True)
class ExtractWidth(Pass):
    """Leave one width of feed-forwards that have several, without routers: a dense model, which any tool takes.

    The result computes what the program computes where every token takes that width. With one width in all layers it
    is written back to a plain Hugging Face folder.
    """

    name = "extract-width"
    contract = Approximate()
    paper = "arXiv 2502.12325"
    trial = {"width": 1.0}  # noqa: RUF012

    width: float = option(1.0, help="the width that is left, as a share of the whole", low=0, high=1)

    def validate(self) -> None:
        """A width of nothing is no feed-forward."""
        if self.width == 0:
            raise PipelineError(
                f"{self.name}: a width of 0 is no feed-forward", hint="skip-layers{unit=ffn} removes them"
            )

    def plan(self, program: Program, context: Context) -> Plan:
        """Find the feed-forwards of several widths."""
        plan = Plan()
        for block in program.anatomy.ffn:
            if "core" not in block.parts:
                plan.refused.append(Refused(block.name, "it has one width", program.source_line(block.term)))
                continue
            if len(_cores(block)) == 2 and _together(block) is None:
                plan.refused.append(
                    Refused(
                        block.name,
                        "what its experts give is not simply added",
                        program.source_line(block.term),
                    )
                )
                continue
            there = sorted({w for core in _cores(block) for w in arguments(core)["widths"]} - {0})
            wanted = min(there, key=lambda w: abs(w - self.width * there[-1]))
            # half a channel was rounded away when the widths were made
            if abs(wanted - self.width * there[-1]) > max(1.0, 0.01 * there[-1]):
                raise PassRefusedError(
                    f"{self.name}: {block.name} has the widths {', '.join(map(str, there))}, none is "
                    f"{self.width:g} of {there[-1]}",
                    hint="widths=" + " ".join(f"{w / there[-1]:g}" for w in there),
                )
            plan.sites.append(Site(block.name, width=there[-1], kept=wanted))
        return plan

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Write them as ordinary operators and take the channels that stay."""
        blocks = {b.name: b for b in program.anatomy.ffn}
        several = {name for name, b in blocks.items() if "core" in b.parts}
        writable = True
        for site in plan.sites:
            writable &= _leave(program, blocks[site.block], int(site["kept"]))
        ffns = {b.name: b for b in program.anatomy.ffn}
        kept = {site.block: int(site["kept"]) for site in plan.sites}
        narrow = {n: torch.arange(w) for n, w in kept.items() if int(ffns[n].sizes["width"]) > w}
        take_channels(program, [b for n, b in ffns.items() if n in narrow], narrow)
        if DIAL in program.dials and not program.input_nodes[DIAL].users:
            remove_dial(program, DIAL)
        drop_unread_weights(program)
        widths = {(int(s["width"]), int(s["kept"])) for s in plan.sites}
        if not kept or set(kept) != several:
            return
        # no feed-forward has several widths any more
        unblock_export(program, by="split-ffn")
        if not writable:
            block_export(program, "the weights of its small experts have no place in the checkpoint")
        elif len(widths) > 1 or set(kept) != set(ffns):
            block_export(
                program, "feed-forwards have different widths, for which the configuration has one entry"
            )
        elif (pair := widths.pop())[0] != pair[1]:
            note_checkpoint(program, ffn_widths=(pair,))


def _cores(block: Block) -> list[fx.Node]:
    return [block.parts[name] for name in ("core", "other_core") if name in block.parts]


def _together(block: Block) -> fx.Node | None:
    """The sum of two experts."""
    first, second = _cores(block)
    return next((u for u in first.users if second in u.all_input_nodes), None)


def _leave(program: Program, block: Block, width: int) -> bool:
    """Make the experts of one width dense and drop the others; tell whether the checkpoint has a place for it."""
    cores = _cores(block)
    if len(cores) == 1:
        program.edit.replace(cores[0], dense(program, cores[0]))
        return True
    kept, gone = sorted(cores, key=lambda core: width not in arguments(core)["widths"])
    both = _together(block)
    assert both is not None
    writable = True
    if kept is block.parts["other_core"]:
        writable = _take_place(program, arguments(kept), arguments(gone))
    made = dense(program, kept)
    program.edit.replace(both, made)
    return writable


def _take_place(program: Program, kept: dict[str, Any], gone: dict[str, Any]) -> bool:
    """Let the small expert's weights be what the checkpoint's tensors are now."""
    places: dict[fx.Node, list[str]] = {}
    for name, node in program.checkpoint.items():
        places.setdefault(node, []).append(name)
    found = True
    for role in MATRICES:
        if kept[role] is None:
            continue
        names = places.get(gone[role], [])
        found &= bool(names) or kept[role] in places
        for name in names:
            program.checkpoint[name] = kept[role]
    return found
