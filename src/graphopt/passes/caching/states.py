"""States of mixers that sum up what came before: short convolutions and linear attention, fed piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.inputs import add_input
from ...ir.schema import arguments, is_operator, normal_call
from .positions import Decoder, NotCausal

if TYPE_CHECKING:
    from ...ir.program import Program

composites = torch.ops.graphopt


@dataclass(frozen=True)
class State:
    """A mixer that needs a state.

    Attributes:
        node: the convolution or linear attention.
        kind: "conv" or "recurrent".
        shape: of a row of its state.
        dtype: of its state.
    """

    node: fx.Node
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def states_needed(decoder: Decoder) -> Iterator[State]:
    """Yield the mixers along the tokens that keep no state so far, in the order of the graph.

    Raises:
        NotCausal: a state has no fixed size, or tokens are not where they are expected.
    """
    for node in decoder.program.graph.nodes:
        conv = is_operator(node, "graphopt.causal_conv1d")
        if not conv and not is_operator(node, "graphopt.linear_attention"):
            continue
        args = arguments(node)
        if args["state"] is not None or node not in decoder.moving or not decoder.has_length(node):
            continue
        if decoder.has_length(node) != [2]:
            raise NotCausal(node, "it mixes something else than consecutive tokens")
        sizes: tuple[Any, ...]
        if conv:
            channels, _, taps = args["weight"].meta["val"].shape
            sizes, dtype = (channels, taps - 1), args["x"].meta["val"].dtype
        else:
            keys, values = args["k"].meta["val"], args["v"].meta["val"]
            sizes, dtype = (values.shape[1], keys.shape[3], values.shape[3]), values.dtype
        if not all(isinstance(size, int) for size in sizes):
            raise NotCausal(node, f"its state has sizes {sizes}, and states have one size")
        if all(sizes):
            yield State(node, "conv" if conv else "recurrent", tuple(int(s) for s in sizes), dtype)


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
        operands = dict(arguments(state.node)) | {"state": before, "step_mask": step_mask}
        with program.edit.before(state.node):
            args, kwargs = normal_call(state.node.target, operands)
            replacement = call(state.node.target, *args, **kwargs)
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
