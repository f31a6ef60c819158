"""The widths that tokens use in feed-forwards of several widths, and a program that takes them as an input."""

from __future__ import annotations

import torch
from torch import fx

from ..ir.anatomy import Block
from ..ir.errors import UsageError
from ..ir.inputs import add_input, remove_dial
from ..ir.program import Program
from ..ir.schema import arguments

aten, composites = (torch.ops.aten, torch.ops.graphopt)


def nested_blocks(program: Program) -> list[Block]:
    """Return the feed-forwards whose width a router chooses.

    Raises:
        UsageError: there is none.
    """
    blocks = [b for b in program.anatomy.ffn if "core" in b.parts and "router" in b.parts]
    if not blocks:
        raise UsageError(
            "no feed-forward of this program has several widths", hint="run the pass split-ffn first"
        )
    choice_counts = {int(b.parts["router"].meta["val"].shape[-1]) for b in blocks}
    if len(choice_counts) > 1:
        raise UsageError(
            f"its feed-forwards have {' and '.join(map(str, sorted(choice_counts)))} choices; recipes take one number"
        )
    return blocks


def widths_of_choices(block: Block) -> list[int]:
    """Return the number of channels of each choice, in the order of the choices."""
    cores = [block.parts[n] for n in ("core", "other_core") if n in block.parts]
    return [max(widths) for widths in zip(*(arguments(core)["widths"] for core in cores), strict=True)]


def with_choices_as_input(program: Program) -> Program:
    """Return the program with an input ``routing`` (feed-forwards, batch, sequence): the choice of every token."""
    copy = program.copy()
    blocks = nested_blocks(copy)
    choices = [b.parts["choice"] for b in blocks]
    shape = _token_shape(copy, choices[0])
    routing = add_input(copy, "routing", [len(blocks), *shape], torch.int64)
    for number, choice in enumerate(choices):
        with copy.edit.before(choice):
            selected = copy.edit.call(aten.select.int, routing, 0, number)
            if choice.meta["val"].dim() == 1 and len(shape) == 2:
                selected = copy.edit.call(aten.reshape.default, selected, [-1])
        copy.edit.replace(choice, selected)
    _without_dial(copy)
    return copy


def _token_shape(program: Program, choice: fx.Node) -> list[int | torch.SymInt]:
    """Return (batch, sequence), also if a feed-forward reads the tokens of all rows flattened."""
    ids = program.input_nodes.get("input_ids")
    flat = choice.meta["val"].dim() == 1
    return list((ids if flat and ids is not None else choice).meta["val"].shape)


def _without_dial(program: Program) -> None:
    for name in list(program.dials):
        if not program.input_nodes[name].users:
            remove_dial(program, name)
