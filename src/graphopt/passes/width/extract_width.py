"""Extracting one of several widths as a plain dense program."""

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
    """Keep one width of feed-forwards that have several, without routers: a dense model that any tool can read.

    The result computes what the program computes if every token takes that width. With one width in all layers it can
    be written back to a plain Hugging Face folder.
    """

    name = "extract-width"
    contract = Approximate()
    paper = "arXiv 2502.12325"
    trial = {"width": 1.0}  # noqa: RUF012

    width: float = option(1.0, help="the width to keep, as a share of the full width", low=0, high=1)

    def validate(self) -> None:
        """Refuse a width of 0."""
        if self.width == 0:
            raise PipelineError(
                f"{self.name}: a width of 0 is no feed-forward", hint="skip-layers{unit=ffn} removes them"
            )

    def plan(self, program: Program, context: Context) -> Plan:
        """Take the feed-forwards of several widths."""
        plan = Plan()
        for block in program.anatomy.ffn:
            if "core" not in block.parts:
                plan.refused.append(Refused(block.name, "it has one width", program.source_line(block.term)))
                continue
            if len(_cores(block)) == 2 and _expert_sum(block) is None:
                plan.refused.append(
                    Refused(
                        block.name,
                        "the outputs of its experts are not simply added",
                        program.source_line(block.term),
                    )
                )
                continue
            widths = sorted({w for core in _cores(block) for w in arguments(core)["widths"]} - {0})
            chosen_width = min(widths, key=lambda w: abs(w - self.width * widths[-1]))
            # the widths were rounded to whole channels
            if abs(chosen_width - self.width * widths[-1]) > max(1.0, 0.01 * widths[-1]):
                raise PassRefusedError(
                    f"{self.name}: {block.name} has the widths {', '.join(map(str, widths))}, none is "
                    f"{self.width:g} of {widths[-1]}",
                    hint="widths=" + " ".join(f"{w / widths[-1]:g}" for w in widths),
                )
            plan.sites.append(Site(block.name, width=widths[-1], kept=chosen_width))
        return plan

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Write the feed-forwards as ordinary operators and keep the planned channels."""
        blocks = {b.name: b for b in program.anatomy.ffn}
        nested_names = {name for name, b in blocks.items() if "core" in b.parts}
        writable = True
        for site in plan.sites:
            writable &= _make_dense(program, blocks[site.block], int(site["kept"]))
        ffns = {b.name: b for b in program.anatomy.ffn}
        kept_widths = {site.block: int(site["kept"]) for site in plan.sites}
        narrow = {n: torch.arange(w) for n, w in kept_widths.items() if int(ffns[n].sizes["width"]) > w}
        take_channels(program, [b for n, b in ffns.items() if n in narrow], narrow)
        if DIAL in program.dials and not program.input_nodes[DIAL].users:
            remove_dial(program, DIAL)
        drop_unread_weights(program)
        widths = {(int(s["width"]), int(s["kept"])) for s in plan.sites}
        if not kept_widths or set(kept_widths) != nested_names:
            return
        # no feed-forward has several widths any more
        unblock_export(program, by="split-ffn")
        if not writable:
            block_export(program, "the weights of its small experts have no tensors in the checkpoint")
        elif len(widths) > 1 or set(kept_widths) != set(ffns):
            block_export(
                program, "feed-forwards have different widths, for which the configuration has one entry"
            )
        elif (pair := widths.pop())[0] != pair[1]:
            note_checkpoint(program, ffn_widths=(pair,))


def _cores(block: Block) -> list[fx.Node]:
    return [block.parts[name] for name in ("core", "other_core") if name in block.parts]


def _expert_sum(block: Block) -> fx.Node | None:
    """Return the node that adds two experts; None if there is none."""
    first, second = _cores(block)
    return next((u for u in first.users if second in u.all_input_nodes), None)


def _make_dense(program: Program, block: Block, width: int) -> bool:
    """Make the expert of one width dense and drop the others; return whether the checkpoint can store it."""
    cores = _cores(block)
    if len(cores) == 1:
        program.edit.replace(cores[0], dense(program, cores[0]))
        return True
    kept_core, removed_core = sorted(cores, key=lambda core: width not in arguments(core)["widths"])
    expert_sum = _expert_sum(block)
    assert expert_sum is not None
    writable = True
    if kept_core is block.parts["other_core"]:
        writable = _replace_in_checkpoint(program, arguments(kept_core), arguments(removed_core))
    output = dense(program, kept_core)
    program.edit.replace(expert_sum, output)
    return writable


def _replace_in_checkpoint(program: Program, kept_args: dict[str, Any], removed_args: dict[str, Any]) -> bool:
    """Map the checkpoint's tensors to the small expert's weights; return whether each has a tensor."""
    names_by_node: dict[fx.Node, list[str]] = {}
    for name, node in program.checkpoint.items():
        names_by_node.setdefault(node, []).append(name)
    writable = True
    for role in MATRICES:
        if kept_args[role] is None:
            continue
        names = names_by_node.get(removed_args[role], [])
        writable &= bool(names) or kept_args[role] in names_by_node
        for name in names:
            program.checkpoint[name] = kept_args[role]
    return writable
