"""States of mixers that sum up what came before: short convolutions and linear attention, fed piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.inputs import add_input
from ...ir.schema import argument, arguments, is_operator, normal_call
from .positions import Decoder, NotCausal

if TYPE_CHECKING:
    from ...ir.program import Program

composites = torch.ops.graphopt


@dataclass(frozen=True)
class State:
    """A mixer that needs a state.

    Attributes:
        node: whose value the mixer computes.
        operator: that computes it with a state.
        operands: of the operator, by name.
        kind: "conv" or "recurrent".
        shape: of a row of its state.
        dtype: of its state.
    """

    node: fx.Node
    operator: Any
    operands: dict[str, Any]
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def states_needed(decoder: Decoder) -> Iterator[State]:
    """Yield the mixers along the tokens that keep no state so far, in the order of the graph.

    Raises:
        NotCausal: a state has no fixed size, or tokens are not where they are expected.
    """
    for node in decoder.program.graph.nodes:
        found = _mixer(decoder, node)
        if found is None:
            continue
        operator, operands = found
        if operands["state"] is not None or node not in decoder.moving or not decoder.has_length(node):
            continue
        if decoder.has_length(node) != [2]:
            raise NotCausal(node, "it mixes something else than consecutive tokens")
        conv = operator is composites.causal_conv1d.default
        sizes: tuple[Any, ...]
        if conv:
            channels, _, taps = operands["weight"].meta["val"].shape
            sizes, dtype = (channels, taps - 1), operands["x"].meta["val"].dtype
        else:
            keys, values = operands["k"].meta["val"], operands["v"].meta["val"]
            sizes, dtype = (values.shape[1], keys.shape[3], values.shape[3]), values.dtype
        if not all(isinstance(size, int) for size in sizes):
            raise NotCausal(node, f"its state has sizes {sizes}, and states have one size")
        if all(sizes):
            kind = "conv" if conv else "recurrent"
            yield State(node, operator, operands, kind, tuple(int(s) for s in sizes), dtype)


def _mixer(decoder: Decoder, node: fx.Node) -> tuple[Any, dict[str, Any]] | None:
    """Return the operator with a state that computes a node, and its operands."""
    if is_operator(node, "graphopt.causal_conv1d", "graphopt.linear_attention"):
        return node.target, dict(arguments(node))
    operands = _convolution(node) or _first_results(decoder, node)
    return None if operands is None else (composites.causal_conv1d.default, operands)


def _first_results(decoder: Decoder, node: fx.Node) -> dict[str, Any] | None:
    """Return the operands of a depthwise convolution padded on both sides, of which as many results as inputs are taken."""
    if not is_operator(node, "aten.slice") or node not in decoder.moving:
        return None
    args = arguments(node)
    conv = args["self"]
    if (
        args["dim"] != 2
        or args["step"] != 1
        or args["start"] not in (None, 0)
        or not isinstance(conv, fx.Node)
    ):
        return None
    operands = _convolution(conv, padded=True)
    return operands if operands is not None and decoder.has_length(node) == [2] else None


def _convolution(node: fx.Node, *, padded: bool = False) -> dict[str, Any] | None:
    """Return the operands of a depthwise convolution of stride 1 that pads as many zeros before as it has further taps.

    Args:
        node: the convolution.
        padded: it pads as many zeros behind as well.
    """
    if not is_operator(node, "aten.conv1d"):
        return None
    args = arguments(node)
    x, weight = args["input"], args["weight"]
    shape = weight.meta["val"].shape
    one = all(list(args[name]) == [1] for name in ("stride", "dilation"))
    if not one or shape[1] != 1 or args["groups"] != shape[0]:
        return None
    padding = list(args["padding"]) if not isinstance(args["padding"], str) else None
    further = int(shape[2]) - 1
    if padded:
        if padding != [further]:
            return None
    else:
        zeros = is_operator(x, "aten.pad", "aten.constant_pad_nd") and list(x.args[1]) == [further, 0]
        if padding != [0] or not zeros or argument(x, "value") not in (None, 0, 0.0):
            return None
        x = x.args[0]
    return {"x": x, "weight": weight, "bias": args["bias"], "state": None, "step_mask": None}


def drop_padding(decoder: Decoder) -> None:
    """Remove factors that are one wherever no input is padding: rows with a state have no padding."""
    program = decoder.program
    for value, users in decoder.still().items():
        if not decoder.is_one(value):
            continue
        for user in users:
            others = [n for n in user.all_input_nodes if n is not value]
            if not is_operator(user, "aten.mul") or len(others) != 1:
                continue
            found, expected = others[0].meta["val"], user.meta["val"]
            if found.dtype == expected.dtype and len(found.shape) == len(expected.shape):
                program.edit.replace(user, others[0], record=False)


def insert_states(
    program: Program,
    decoder: Decoder,
    needed: list[State],
    batch: Any,
    taken: fx.Node,
    step_mask: fx.Node | None,
) -> list[str]:
    """Give every mixer a state that is an input, and an output after the tokens that are taken; return their names."""
    names, counts = [], {"conv": 0, "recurrent": 0}
    call = program.edit.call
    for state in needed:
        name = f"{state.kind}_state_{counts[state.kind]}"
        counts[state.kind] += 1
        before = add_input(program, name, [batch, *state.shape], state.dtype)
        operands = state.operands | {"state": before, "step_mask": step_mask}
        with program.edit.before(state.node):
            args, kwargs = normal_call(state.operator, operands)
            replacement = call(state.operator, *args, **kwargs)
            if state.kind == "conv":
                after = call(composites.causal_conv1d_state.default, operands["x"], before, taken, step_mask)
            else:
                kept = [operands[n] for n in ("k", "v", "g", "beta")]
                after = call(composites.linear_attention_state.default, *kept, before, taken, step_mask)
        program.edit.replace(state.node, replacement, record=False)
        decoder.moving.add(replacement)
        program.add_output(f"next_{name}", after)
        names.append(name)
    return names
