"""Feed-forwards of several widths as a device takes them: all channels, and a mask made by arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ...ir.operators.activations import gated_by
from ...ir.program import Program
from ...ir.schema import arguments, is_operator


def unfit(program: Program, node: fx.Node) -> str:
    """Return why a nested feed-forward cannot be written with a mask, or nothing."""
    found = arguments(node)
    choice = found["choice"]
    if not is_operator(choice, "graphopt.choose_width"):
        return "its widths are chosen by something else than a router"
    if arguments(choice)["delta"].name not in program.weights:
        return "the dial that chooses widths is an input; freeze-dial makes it a number"
    if found["down_bias"] is not None and min(found["widths"]) == 0:
        return "a token may go around it, and its bias would not"
    return ""


def masked(program: Program, node: fx.Node) -> fx.Node:
    """Return what computes all channels and takes those beyond each token's width as zero.

    A way is chosen if the probabilities of the cheaper ones sum to less than delta: ``relu(sign(delta - sum))`` is one
    there and zero elsewhere, and a product with a matrix of zeros and ones makes it a factor for each channel.
    """
    found = arguments(node)
    router = arguments(found["choice"])
    delta = float(program.weights[router["delta"].name].source.load())
    widths, inner = found["widths"], int(found["up"].meta["val"].shape[0])
    dtype = found["x"].meta["val"].dtype
    ways = len(widths)
    sums = torch.ones(ways, ways).tril()[:-1]
    reached = (torch.arange(inner)[:, None] < torch.tensor(widths)).to(dtype)

    def table(part: str, value: Tensor) -> fx.Node:
        return program.edit.add_weight(
            f"{node.name}.{part}", value.to(dtype), kind="constant", persistent=False
        )

    names = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")
    given: dict[str, Any] = {name: found[name] for name in names if found[name] is not None}
    given["sums"] = table("sums", -sums)
    given["steps"] = table("steps", reached[:, 1:] - reached[:, :-1])
    given["least"] = table("least", reached[:, 0])
    order = list(given)

    def compute(x: Tensor, logits: Tensor, *tensors: Tensor) -> Tensor:
        held = dict(zip(order, tensors, strict=True))

        def projected(name: str) -> Tensor:
            made = F.linear(x, held[name])
            return made + held[f"{name}_bias"] if f"{name}_bias" in held else made

        upper = projected("up")
        gate = projected("gate") if "gate" in held else upper
        if found["activation"] == "silu":
            hidden = gate * torch.sigmoid(gate)
            hidden = hidden * upper if "gate" in held else hidden
        else:
            hidden = gated_by(
                gate, upper if "gate" in held else None, found["activation"], found["limit"], found["alpha"]
            )
        if delta < 1:
            chosen = torch.relu(torch.sign(F.linear(torch.softmax(logits, -1), held["sums"]) + delta))
            hidden = hidden * (F.linear(chosen, held["steps"]) + held["least"])
        elif widths[-1] < inner:
            hidden = hidden[..., : widths[-1]]
        out = F.linear(hidden, held["down"][:, : hidden.shape[-1]])
        return out + held["down_bias"] if "down_bias" in held else out

    made = program.edit.emit(compute, found["x"], router["logits"], *given.values())
    assert isinstance(made, fx.Node)
    return made
