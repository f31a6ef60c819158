"""Recognition of convolutions and BatchNorm in graphs that were already decomposed."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
from torch import fx

from ..infer import same_value
from ..operators.traits import Trait, has
from ..rewriting.cleanup import replace_or_erase
from ..schema import argument, arguments, is_operator

if TYPE_CHECKING:
    from ..program import Program

aten = torch.ops.aten
_BY_AXES = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_NORMS = (
    "aten._native_batch_norm_legit_no_training", "aten.native_batch_norm", "aten.cudnn_batch_norm",
    "aten.miopen_batch_norm",
)  # fmt: skip
_END = 2**63 - 1


def recognise_convolutions(program: Program) -> None:
    """Replace ``convolution`` and decomposed variants of BatchNorm by ``conv2d`` and ``batch_norm``."""
    for node in list(program.graph.nodes):
        if node._erased:
            continue
        if is_operator(node, "aten.convolution", "aten._convolution"):
            _convolution(program, node)
        elif is_operator(node, *_NORMS):
            _batch_norm(program, node)
        elif is_operator(node, "aten.unfold"):
            _last_tokens(program, node)
        elif is_operator(node, "aten.slice_scatter"):
            _drop_overwritten(program, node)
            if not node._erased:
                _join_written(program, node)
        elif is_operator(node, "aten.copy"):
            _drop_copy(program, node)


def _convolution(program: Program, node: fx.Node) -> None:
    args = arguments(node)
    target = _BY_AXES.get(node.meta["val"].dim() - 2)
    if args["transposed"] or any(args["output_padding"]) or target is None:
        return
    order = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    with program.edit.before(node):
        new = program.edit.call(target, *(args[name] for name in order))
    replace_or_erase(program, node, new)


def _last_tokens(program: Program, node: fx.Node) -> None:
    """Replace windows over the last tokens by a causal convolution with a channel for each of a window's places.

    Convolutions whose weights are computed from tokens read their windows like this; as a convolution, it has a state.
    """
    args = arguments(node)
    padded, taps = args["self"], args["size"]
    if (
        not isinstance(taps, int)
        or args["step"] != 1
        or node.meta["val"].dim() != 4
        or args["dimension"] not in (-1, 2)
    ):
        return
    if not is_operator(padded, "aten.pad", "aten.constant_pad_nd") or list(padded.args[1]) != [taps - 1, 0]:
        return
    x = padded.args[0]
    batch, channels, tokens = x.meta["val"].shape
    if (
        argument(padded, "value") not in (None, 0, 0.0)
        or not isinstance(channels, int)
        or isinstance(tokens, int)
    ):
        return
    places = torch.eye(taps, dtype=x.meta["val"].dtype).repeat(channels, 1).unsqueeze(1)
    weight = program.edit.add_weight(f"places_of_{node.name}", places, kind="constant", persistent=False)
    call = program.edit.call
    with program.edit.before(node):
        sizes = program.size_nodes([batch, channels, taps, tokens])
        wide = call(aten.expand.default, call(aten.unsqueeze.default, x, 2), sizes)
        wide = call(aten.reshape.default, wide, [sizes[0], channels * taps, sizes[3]])
        found = call(torch.ops.graphopt.causal_conv1d.default, wide, weight)
        new = call(aten.permute.default, call(aten.reshape.default, found, sizes), [0, 1, 3, 2])
    program.edit.replace(node, new, record=False)


def _batch_norm(program: Program, node: fx.Node) -> None:
    """Replace an operator of which only the first result, the normalised value, is read, as in evaluation."""
    args = arguments(node)
    if args.get("training"):
        return
    if any(u.target is not operator.getitem or u.args[1] != 0 for u in node.users):
        return
    x = args.get("input", args.get("self"))
    with program.edit.before(node):
        new = program.edit.call(
            aten.batch_norm.default, x, args["weight"], args["bias"], args["running_mean"],
            args["running_var"], False, args.get("momentum", args.get("exponential_average_factor", 0.1)),
            args.get("eps", args.get("epsilon")), False,
        )  # fmt: skip
    for user in list(node.users):
        program.edit.replace(user, new, record=False)


def _drop_overwritten(program: Program, node: fx.Node) -> None:
    """Replace a ``slice_scatter`` that overwrites all of a dimension by the value written."""
    args = arguments(node)
    end, written = args["end"], args["src"]
    is_whole = end is None or (isinstance(end, int) and end >= _END)
    is_whole = is_whole and args["start"] in (None, 0) and args["step"] == 1 and isinstance(written, fx.Node)
    if is_whole and same_value(written.meta["val"], node.meta["val"]):
        program.edit.replace(node, written, record=False)


def _join_written(program: Program, node: fx.Node) -> None:
    """Replace parts written one after another into an empty value, of which they fill all, by their concatenation."""
    dim, size = arguments(node)["dim"], node.meta["val"].shape[arguments(node)["dim"]]
    parts: dict[int, tuple[int, fx.Node]] = {}
    current = node
    while is_operator(current, "aten.slice_scatter"):
        args = arguments(current)
        start, end, written = args["start"] or 0, args["end"], args["src"]
        end = size if end is None or (isinstance(end, int) and end >= _END) else end
        plain = all(isinstance(n, int) and n >= 0 for n in (start, end, size))
        if args["dim"] != dim or args["step"] != 1 or not plain or not isinstance(written, fx.Node):
            return
        parts[start] = (min(end, size), written)
        if current is not node and len(current.users) != 1:
            return
        current = args["self"]
    if not has(current, Trait.EMPTY):
        return
    place, ordered = 0, []
    while place in parts:
        place, written = parts[place]
        ordered.append(written)
    if place != size or len(ordered) != len(parts):
        return
    with program.edit.before(node):
        new = program.edit.call(aten.cat.default, ordered, dim)
    replace_or_erase(program, node, new)


def _drop_copy(program: Program, node: fx.Node) -> None:
    """Replace a copy by its source."""
    source = arguments(node)["src"]
    if isinstance(source, fx.Node) and same_value(source.meta["val"], node.meta["val"]):
        program.edit.replace(node, source, record=False)
