"""A feed-forward read as ``activation(gate) * up`` between projections, written as nested widths, and read back."""

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

aten, dialect = torch.ops.aten, torch.ops.graphopt
NESTED = "feed-forwards have several widths, which a configuration has not; extract-width leaves one"
MATRICES = ("up", "down", "gate", "up_bias", "gate_bias", "down_bias")


@dataclass(frozen=True)
class FeedForward:
    """What a dense feed-forward is made of: its input, its last linear, its weights by role, its activation."""

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
        return "its gate and what it multiplies come from one projection that cannot be taken apart"
    first, last = arguments(up), arguments(down)
    second = arguments(gate) if gate is not None else None
    if second is not None and second["input"] is not first["input"]:
        return "its gate reads another value than what it multiplies"
    width = int(last["weight"].meta["val"].shape[1])
    if any(int(f["weight"].meta["val"].shape[0]) != width for f in (first, second) if f is not None):
        return f"its projections have another width than the {width} channels that its last one reads"
    hidden = last["input"]
    assert isinstance(hidden, fx.Node)
    activation = activation_between(up, gate, hidden)
    if activation is None:
        return "what lies between its projections is no activation that graphopt.nested_ffn knows"
    weights = {
        "up": first["weight"], "down": last["weight"], "gate": None if second is None else second["weight"],
        "up_bias": first["bias"], "gate_bias": None if second is None else second["bias"],
        "down_bias": last["bias"],
    }  # fmt: skip
    return FeedForward(first["input"], down, weights, activation)


def nested(program: Program, ffn: FeedForward, choice: fx.Node, widths: list[int]) -> fx.Node:
    """Insert the operator for a feed-forward of which each token uses as many channels as its choice says."""
    w = ffn.weights
    return program.edit.call(
        dialect.nested_ffn.default, ffn.x, choice, widths, w["up"], w["down"], w["gate"], w["up_bias"],
        w["gate_bias"], w["down_bias"], **ffn.activation,
    )  # fmt: skip


def own_small(program: Program, ffn: FeedForward, width: int, place: str) -> FeedForward:
    """Return a feed-forward with weights of its own that begin as the first channels of another."""
    own: dict[str, fx.Node | None] = {}
    for role, node in ffn.weights.items():
        if node is None:
            own[role] = None
            continue
        taken = node
        if role != "down_bias":
            taken = program.edit.call(aten.slice.Tensor, node, 1 if role == "down" else 0, 0, width)
        plain = program.weights.get(taken.name) if taken.op == "placeholder" else None
        source = plain.source if plain is not None else computed(program, taken)[0]
        own[role] = program.edit.add_weight(free_name(program, f"{place}.small_{role}"), source)
        if taken is not node:
            program.edit.erase_dead([taken])
    return FeedForward(ffn.x, ffn.down, own, ffn.activation)


def place_of(program: Program, node: fx.Node) -> str:
    """Return the path of the module that a projection's weight belongs to, without the projection: ``layers.0.mlp``."""
    work = [arguments(node)["weight"]]
    while work:
        found = work.pop()
        if found.op == "placeholder":
            if found.name in program.weights and program.weights[found.name].kind == "parameter":
                path = program.weights[found.name].name.split(".")
                return ".".join(path[:-2]) or path[0]
        else:
            work.extend(reversed(found.all_input_nodes))
    return node.name


def free_name(program: Program, wanted: str) -> str:
    """Return a name that no weight has: the one wanted, or with a number where layers share weights."""
    taken = {name for w in program.weights.values() for name in w.all_names}
    if wanted not in taken:
        return wanted
    stem, _, leaf = wanted.rpartition(".")
    return next(n for i in range(1, 10**6) if (n := f"{stem}_{i}.{leaf}") not in taken)


def dense(program: Program, core: fx.Node) -> fx.Node:
    """Insert the widest feed-forward of a nested one as ordinary operators, and return its result."""
    found = arguments(core)
    call = program.edit.call
    with program.edit.before(core):
        upper = call(aten.linear.default, found["x"], found["up"], found["up_bias"])
        if found["gate"] is None:
            hidden = program.edit.emit(
                lambda u: gated_by(u, None, found["activation"], found["limit"], found["alpha"]), upper
            )
        else:
            gate = call(aten.linear.default, found["x"], found["gate"], found["gate_bias"])
            hidden = program.edit.emit(
                lambda g, u: gated_by(g, u, found["activation"], found["limit"], found["alpha"]), gate, upper
            )
        return call(aten.linear.default, hidden, found["down"], found["down_bias"])
