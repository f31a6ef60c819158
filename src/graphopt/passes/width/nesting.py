"""Feed-forwards read as ``activation(gate) * up`` between projections, written with nested widths, and made dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.anatomy import Block
from ...ir.operators.activations import gated_by
from ...ir.program import Program
from ...ir.running.activation import activation_between
from ...ir.running.fold import computed
from ...ir.schema import arguments, is_operator

aten, composites = torch.ops.aten, torch.ops.graphopt
NESTED = "feed-forwards have several widths, which a configuration has not; extract-width leaves one"
MATRICES = ("up", "down", "gate", "up_bias", "gate_bias", "down_bias")


@dataclass(frozen=True)
class FeedForward:
    """The parts of a dense feed-forward: its input, its last linear, its weights by role, its activation."""

    x: fx.Node
    down: fx.Node
    weights: dict[str, fx.Node | None]
    activation: dict[str, Any]


def read_feed_forward(block: Block) -> FeedForward | str:
    """Return the parts of a dense feed-forward, or why it cannot be written as one operator."""
    down, up, gate = (block.parts.get(name) for name in ("down", "up", "gate"))
    if down is None or up is None or not is_operator(up, "aten.linear"):
        return "its projections were not recognised"
    if gate is up:
        return "its gate and the value it multiplies come from one projection that cannot be split"
    up_args, down_args = arguments(up), arguments(down)
    gate_args = arguments(gate) if gate is not None else None
    if gate_args is not None and gate_args["input"] is not up_args["input"]:
        return "its gate and the projection it multiplies read different values"
    width = int(down_args["weight"].meta["val"].shape[1])
    if any(int(f["weight"].meta["val"].shape[0]) != width for f in (up_args, gate_args) if f is not None):
        return f"its projections have another width than the {width} channels that its last one reads"
    hidden = down_args["input"]
    assert isinstance(hidden, fx.Node)
    activation = activation_between(up, gate, hidden)
    if activation is None:
        return "the function between its projections is no activation that graphopt.nested_ffn supports"
    weights = {
        "up": up_args["weight"], "down": down_args["weight"], "gate": None if gate_args is None else gate_args["weight"],
        "up_bias": up_args["bias"], "gate_bias": None if gate_args is None else gate_args["bias"],
        "down_bias": down_args["bias"],
    }  # fmt: skip
    return FeedForward(up_args["input"], down, weights, activation)


def nested(program: Program, ffn: FeedForward, choice: fx.Node, widths: list[int]) -> fx.Node:
    """Insert and return the operator for a feed-forward with a chosen number of channels for each token."""
    w = ffn.weights
    return program.edit.call(
        composites.nested_ffn.default, ffn.x, choice, widths, w["up"], w["down"], w["gate"], w["up_bias"],
        w["gate_bias"], w["down_bias"], **ffn.activation,
    )  # fmt: skip


def own_small(program: Program, ffn: FeedForward, width: int, place: str) -> FeedForward:
    """Return a feed-forward with weights of its own, initialised with the first channels of another."""
    new_weights: dict[str, fx.Node | None] = {}
    for role, node in ffn.weights.items():
        if node is None:
            new_weights[role] = None
            continue
        tensor = node
        if role != "down_bias":
            tensor = program.edit.call(aten.slice.Tensor, node, 1 if role == "down" else 0, 0, width)
        stored = program.weights.get(tensor.name) if tensor.op == "placeholder" else None
        source = stored.source if stored is not None else computed(program, tensor)[0]
        new_weights[role] = program.edit.add_weight(free_name(program, f"{place}.small_{role}"), source)
        if tensor is not node:
            program.edit.erase_dead([tensor])
    return FeedForward(ffn.x, ffn.down, new_weights, ffn.activation)


def place_of(program: Program, node: fx.Node) -> str:
    """Return the path of the module that a projection's weight belongs to, without the projection: ``layers.0.mlp``."""
    work = [arguments(node)["weight"]]
    while work:
        current = work.pop()
        if current.op == "placeholder":
            if current.name in program.weights and program.weights[current.name].kind == "parameter":
                path = program.weights[current.name].name.split(".")
                return ".".join(path[:-2]) or path[0]
        else:
            work.extend(reversed(current.all_input_nodes))
    return node.name


def free_name(program: Program, wanted: str) -> str:
    """Return a name that no weight has: ``wanted``, with a number appended if layers share weights."""
    names = {name for w in program.weights.values() for name in w.all_names}
    if wanted not in names:
        return wanted
    stem, _, suffix = wanted.rpartition(".")
    return next(n for i in range(1, 10**6) if (n := f"{stem}_{i}.{suffix}") not in names)


def dense(program: Program, core: fx.Node) -> fx.Node:
    """Insert the full width of a nested feed-forward as ordinary operators, and return the result."""
    args = arguments(core)
    call = program.edit.call
    with program.edit.before(core):
        upper = call(aten.linear.default, args["x"], args["up"], args["up_bias"])
        if args["gate"] is None:
            hidden = program.edit.emit(
                lambda u: gated_by(u, None, args["activation"], args["limit"], args["alpha"]), upper
            )
        else:
            gate = call(aten.linear.default, args["x"], args["gate"], args["gate_bias"])
            hidden = program.edit.emit(
                lambda g, u: gated_by(g, u, args["activation"], args["limit"], args["alpha"]), gate, upper
            )
        return call(aten.linear.default, hidden, args["down"], args["down_bias"])
