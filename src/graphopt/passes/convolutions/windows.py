"""Attention with a window in pieces: keys and values of the last frames are states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx

from ...ir.inputs import add_input
from ...ir.schema import arguments, is_operator, normal_call
from ...ir.sizes import expression
from ..framework.plan import Refused

if TYPE_CHECKING:
    from ...ir.program import Program

aten = torch.ops.aten


def windowed(program: Program, time: str) -> Iterator[fx.Node | Refused]:
    """Yield each attention along time that reads earlier frames, or why it cannot stream."""
    symbol = next(s for s, name in program.symbols.items() if name == time)
    for node in program.graph.nodes:
        if not is_operator(node, "graphopt.attention"):
            continue
        args = arguments(node)
        length = args["k"].meta["val"].shape[2]
        if symbol not in expression(length).free_symbols:
            continue
        reason = _obstacle(args["causal"], args["window"], expression(length) == symbol)
        reason = reason or next(
            (
                f"its {name} says for pairs of frames what is seen, and pieces have other pairs"
                for name in ("bias", "segments", "visible")
                if args[name] is not None
            ),
            "",
        )
        if reason:
            yield Refused(node.name, reason, program.source_line(node))
        elif args["window"] > 1:
            yield node


def _obstacle(causal: bool, window: int | None, plain: bool) -> str:
    if not plain:
        return "its keys are another number of frames"
    if not causal:
        return "it reads later frames: window-attention{past=64 future=0} bounds what it sees"
    return "" if window is not None else "it reads all earlier frames: window-attention{past=64} bounds them"


def stream_windows(program: Program, nodes: Sequence[fx.Node]) -> None:
    """Let attentions read earlier keys and values from states; those with equal windows and masks share which were seen."""
    call = program.edit.call
    seen: dict[tuple[int, fx.Node | None], fx.Node] = {}
    for number, node in enumerate(nodes):
        operands = dict(arguments(node))
        frames = int(operands["window"]) - 1
        mask = operands["key_mask"]
        with program.edit.before(node):
            if (frames, mask) not in seen:
                seen[frames, mask] = _seen(program, len(seen), operands["k"], frames, mask)
            for name, short in (("k", "key"), ("v", "value")):
                value = operands[name]
                shape = list(value.meta["val"].shape)
                shape[2] = frames
                state = add_input(program, f"{short}_state_{number}", shape, value.meta["val"].dtype)
                operands[name] = call(aten.cat.default, [state, value], 2)
                following = call(aten.slice.Tensor, operands[name], 2, -frames)
                program.add_output(f"next_{short}_state_{number}", following)
            operands["key_mask"] = seen[frames, mask]
            args, kwargs = normal_call(node.target, operands)
            new = call(node.target, *args, **kwargs)
        program.edit.replace(node, new)


def _seen(program: Program, number: int, keys: fx.Node, frames: int, mask: fx.Node | None) -> fx.Node:
    """Return which of the earlier frames in the states and of the new ones there are: (batch, frames + new ones)."""
    call, value = program.edit.call, keys.meta["val"]
    state = add_input(program, f"seen_state_{number}", [value.shape[0], frames], value.dtype)
    if mask is None:
        shape = program.size_nodes([value.shape[0], value.shape[2]])
        new = call(aten.ones.default, shape, dtype=value.dtype, device=value.device)
    else:
        new = call(aten.to.dtype, mask, value.dtype)
    joined = call(aten.cat.default, [state, new], 1)
    program.add_output(f"next_seen_state_{number}", call(aten.slice.Tensor, joined, 1, -frames))
    return call(aten.gt.Scalar, joined, 0)
