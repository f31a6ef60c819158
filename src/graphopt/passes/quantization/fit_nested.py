"""Legalising feed-forwards with several widths: all channels are computed, with a mask made by arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ...ir.operators.activations import gated_by
from ...ir.program import Program
from ...ir.schema import arguments, is_operator


def unfit(program: Program, node: fx.Node) -> str:
    """Return why a nested feed-forward cannot be written with a mask, or an empty string."""
    args = arguments(node)
    choice = args["choice"]
    if not is_operator(choice, "graphopt.choose_width"):
        return "its widths are chosen by something else than a router"
    if arguments(choice)["delta"].name not in program.weights:
        return "the run-time setting that chooses widths is an input; freeze-dial makes it a constant"
    if args["down_bias"] is not None and min(args["widths"]) == 0:
        return "a token may skip it, and its bias would still be added"
    return ""


def masked(program: Program, node: fx.Node) -> fx.Node:
    """Return a feed-forward that computes all channels and sets those beyond each token's width to zero.

    A width is used if the probabilities of the cheaper ones sum to less than delta: ``relu(sign(delta - sum))`` is
    then one, and zero otherwise, and a product with a matrix of zeros and ones turns it into a factor for each
    channel.
    """
    args = arguments(node)
    router = arguments(args["choice"])
    delta = float(program.weights[router["delta"].name].source.load())
    widths, inner = args["widths"], int(args["up"].meta["val"].shape[0])
    dtype = args["x"].meta["val"].dtype
    count = len(widths)
    sums = torch.ones(count, count).tril()[:-1]
    reached = (torch.arange(inner)[:, None] < torch.tensor(widths)).to(dtype)

    def table(name: str, value: Tensor) -> fx.Node:
        return program.edit.add_weight(
            f"{node.name}.{name}", value.to(dtype), kind="constant", persistent=False
        )

    names = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")
    operands: dict[str, Any] = {name: args[name] for name in names if args[name] is not None}
    operands["sums"] = table("sums", -sums)
    operands["steps"] = table("steps", reached[:, 1:] - reached[:, :-1])
    operands["least"] = table("least", reached[:, 0])
    order = list(operands)

    def compute(x: Tensor, logits: Tensor, *tensors: Tensor) -> Tensor:
        values = dict(zip(order, tensors, strict=True))

        def projected(name: str) -> Tensor:
            product = F.linear(x, values[name])
            return product + values[f"{name}_bias"] if f"{name}_bias" in values else product

        upper = projected("up")
        gate = projected("gate") if "gate" in values else upper
        if args["activation"] == "silu":
            hidden = gate * torch.sigmoid(gate)
            hidden = hidden * upper if "gate" in values else hidden
        else:
            hidden = gated_by(
                gate, upper if "gate" in values else None, args["activation"], args["limit"], args["alpha"]
            )
        if delta < 1:
            selected = torch.relu(torch.sign(F.linear(torch.softmax(logits, -1), values["sums"]) + delta))
            hidden = hidden * (F.linear(selected, values["steps"]) + values["least"])
        elif widths[-1] < inner:
            hidden = hidden[..., : widths[-1]]
        out = F.linear(hidden, values["down"][:, : hidden.shape[-1]])
        return out + values["down_bias"] if "down_bias" in values else out

    replacement = program.edit.emit(compute, args["x"], router["logits"], *operands.values())
    assert isinstance(replacement, fx.Node)
    return replacement
