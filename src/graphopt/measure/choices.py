"""Which way tokens take through feed-forwards of several widths, and a program that is told it."""

from __future__ import annotations

import torch
from torch import fx

from ..ir.anatomy import Block
from ..ir.errors import UsageError
from ..ir.inputs import add_input, remove_dial
from ..ir.program import Program
from ..ir.schema import arguments

aten, dialect = (torch.ops.aten, torch.ops.graphopt)


def nested_blocks(program: Program) -> list[Block]:
    """Return the feed-forwards among whose widths a router chooses.

    Raises:
        UsageError: there is none.
    """
    found = [b for b in program.anatomy.ffn if "core" in b.parts and "router" in b.parts]
    if not found:
        raise UsageError(
            "no feed-forward of this program has several widths", hint="run the pass split-ffn first"
        )
    ways = {int(b.parts["router"].meta["val"].shape[-1]) for b in found}
    if len(ways) > 1:
        raise UsageError(
            f"its feed-forwards have {' and '.join(map(str, sorted(ways)))} ways; recipes take one number"
        )
    return found


def way_widths(block: Block) -> list[int]:
    """Return how many channels each way computes, the ways in their order."""
    cores = [block.parts[n] for n in ("core", "other_core") if n in block.parts]
    return [max(each) for each in zip(*(arguments(core)["widths"] for core in cores), strict=True)]


def given_choices(program: Program) -> Program:
    """Return the program with an input ``routing`` (feed-forwards, batch, sequence) that says every token's way."""
    form = program.copy()
    blocks = nested_blocks(form)
    choices = [b.parts["choice"] for b in blocks]
    shape = _tokens(form, choices[0])
    routing = add_input(form, "routing", [len(blocks), *shape], torch.int64)
    for number, choice in enumerate(choices):
        with form.edit.before(choice):
            made = form.edit.call(aten.select.int, routing, 0, number)
            if choice.meta["val"].dim() == 1 and len(shape) == 2:
                made = form.edit.call(aten.reshape.default, made, [-1])
        form.edit.replace(choice, made)
    _without_dial(form)
    return form


def _tokens(form: Program, choice: fx.Node) -> list[int | torch.SymInt]:
    """(batch, sequence), also where a feed-forward sees tokens of all rows one after the other."""
    ids = form.input_nodes.get("input_ids")
    flat = choice.meta["val"].dim() == 1
    return list((ids if flat and ids is not None else choice).meta["val"].shape)


def _without_dial(form: Program) -> None:
    for name in list(form.dials):
        if not form.input_nodes[name].users:
            remove_dial(form, name)
