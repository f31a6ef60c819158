"""Nested feed-forward networks: each width uses the first channels of the widest."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..compat import is_plain_tensor
from ..schema import arguments
from .activations import gated_by
from .library import composite_operator
from .placement_types import PARTIAL, WHOLE, Joined, Misplaced, Placement, Shard, check_whole, placement_of
from .spec import OperatorSpec, Trait, like_first
from .work import ACTIVATION_FLOPS, Call, Work, moved, product

_OPTIONS = '*, str activation="silu", float limit=0.0, float alpha=1.0'
_MATRICES = (
    "Tensor up, Tensor down, Tensor? gate=None, Tensor? up_bias=None, Tensor? gate_bias=None, "
    "Tensor? down_bias=None"
)


def _work(call: Call) -> Work:
    """FLOPs of the largest width, which any token may need: tokens · (2 · elements of the matrices + activation).

    The widths that tokens actually use are measured by :func:`graphopt.sweep`. Bytes are counted as for an MoE layer:
    hidden values are written and read once between the two products. Factors per channel, and products of outputs, are
    not counted.
    """
    width = max(call.arguments["widths"])
    x, up = call.tensor("x"), call.tensor("up")
    tokens = product(x.shape[:-1])
    matrices = [name for name in ("up", "gate", "down") if call.arguments.get(name) is not None]
    flops_per_channel = ACTIVATION_FLOPS + len(matrices) - 2
    flops = tokens * width * (2 * len(matrices) * x.shape[-1] + flops_per_channel)
    work = moved(call, flops, dict.fromkeys(matrices, width * x.shape[-1]) if width < up.shape[0] else {})
    return Work(work.flops, work.weight_bytes, work.activation_bytes + 2 * tokens * width * x.dtype.itemsize)


def _place(node: fx.Node, placed: dict[fx.Node, Placement]) -> Placement:
    """Return the placement: each rank has a share of every range of channels between two widths."""
    args = arguments(node)
    check_whole(placed, args["x"], args["choice"])
    names = [n for n in ("up", "gate", "up_bias", "gate_bias") if args[n] is not None]
    placements = [placement_of(args[n], placed) for n in names]
    down = placement_of(args["down"], placed)
    if down == WHOLE and all(p == WHOLE for p in placements):
        return WHOLE
    for name, placement in zip(names, placements, strict=True):
        if not _sharded_alike(placement, down):
            raise Misplaced(f"its {name} is {placement}, its last matrix {down}")
    if args["down_bias"] is not None:
        raise Misplaced("its bias would be added once per rank; add it after the sum")
    return PARTIAL


def _sharded_alike(first: Placement, second: Placement) -> bool:
    """Tell whether the rows of one matrix are sharded like the columns of another."""
    pieces = [p.pieces if isinstance(p, Joined) else (p,) for p in (first, second)]
    if len(pieces[0]) != len(pieces[1]):
        return False
    return all(
        isinstance(a, Shard) and isinstance(b, Shard) and a.dim == 0 and b.dim == 1 and a.even
        and (a.starts, a.length) == (b.starts, b.length)
        for a, b in zip(*pieces, strict=True)
    )  # fmt: skip


@composite_operator(
    f"nested_ffn(Tensor x, Tensor choice, int[] widths, {_MATRICES}, {_OPTIONS}) -> Tensor",
    spec=OperatorSpec(shape=like_first, work=_work, place=_place, traits=Trait.MIXING),
)
def nested_ffn(
    x: Tensor,
    choice: Tensor,
    widths: list[int],
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str = "silu",
    limit: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """Apply a feed-forward network of which each token uses the first ``widths[choice]`` channels (arXiv 2502.12325).

    Args:
        x: (..., size).
        choice: (...), integers: which of the widths each token gets.
        widths: in any order; a token of width 0 gets zero, without the bias.
        up: (width, size).
        down: (size, width).
        gate: (width, size); ``activation(gate) * up``; without it ``activation(up)``.
        up_bias: (width,).
        gate_bias: (width,).
        down_bias: (size,).
        activation: one of ``ACTIVATIONS``.
        limit: clamp of swiglu_clamped and silu_clamped; cap on the gate of silu_softcapped.
        alpha: slope of swiglu_clamped; cap on the other half of silu_softcapped.

    Returns:
        (..., size). Where values are known, tokens are sorted by width, and each range of channels between two widths
        is computed for the tokens that use it: every weight is read once, and arithmetic is proportional to the mean
        width. A traced graph computes all channels and zeroes those beyond each token's width.
    """

    def part(rows: Tensor, first: int, end: int) -> Tensor:
        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[first:end]

        return _hidden(rows, up[first:end], cut(gate), cut(up_bias), cut(gate_bias), activation, limit, alpha)

    if not (is_plain_tensor(x) and is_plain_tensor(choice)):
        token_widths = torch.zeros_like(choice)
        for number, width in enumerate(widths):
            token_widths = torch.where(choice == number, width, token_widths)
        token_widths = token_widths.unsqueeze(-1)
        reached = torch.arange(up.shape[0], device=x.device) < token_widths
        hidden = part(x, 0, up.shape[0])
        out = F.linear(torch.where(reached, hidden, torch.zeros_like(hidden)), down)
        if down_bias is None:
            return out
        return out + (down_bias if min(widths) > 0 else torch.where(token_widths > 0, down_bias, 0.0))

    rows, chosen = x.reshape(-1, x.shape[-1]), choice.reshape(-1)
    ranks, ranges = _ranges(chosen, widths)
    if not ranges:
        return x.new_zeros(*x.shape[:-1], down.shape[0])
    used = ranges[0][2]
    order = (
        torch.argsort(ranks, descending=True, stable=True)[:used]
        if len(ranges) > 1 or used < len(rows)
        else None
    )
    sorted_rows = rows if order is None else rows.index_select(0, order)
    total: Tensor | None = None
    for first, end, count in ranges:
        # slices of columns are strided views, which matrix products accept
        contribution = F.linear(part(sorted_rows[:count], first, end), down[:, first:end])
        if total is None:
            total = contribution if down_bias is None else contribution + down_bias
        elif total.requires_grad or contribution.requires_grad:
            total = torch.cat([total[:count] + contribution, total[count:]])
        else:
            total[:count] += contribution
    assert total is not None
    if order is not None:
        total = total.new_zeros(len(rows), total.shape[1]).index_copy(0, order, total)
    return total.reshape(*x.shape[:-1], down.shape[0])


def _hidden(
    x: Tensor, up: Tensor, gate: Tensor | None, up_bias: Tensor | None, gate_bias: Tensor | None,
    activation: str, limit: float, alpha: float,
) -> Tensor:  # fmt: skip
    upper = F.linear(x, up, up_bias)
    lower = upper if gate is None else F.linear(x, gate, gate_bias)
    return gated_by(lower, None if gate is None else upper, activation, limit, alpha)


def _ranges(chosen: Tensor, widths: list[int]) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Return a rank per token, higher for wider ones, and ranges of channels with the number of tokens using them."""
    if chosen.numel() == 1:
        width = widths[int(chosen)]
        return chosen, [(0, width, 1)] if width else []
    levels = sorted(set(widths))
    ranks = torch.tensor([levels.index(w) for w in widths], device=chosen.device)[chosen]
    counts = torch.bincount(ranks, minlength=len(levels)).tolist()
    ranges: list[tuple[int, int, int]] = []
    for index, end in enumerate(levels):
        first = levels[index - 1] if index else 0
        # when sorted by width, the widest first, these are the first tokens
        reaching = sum(counts[index:])
        if end == first or not reaching:
            continue
        if ranges and ranges[-1][2] == reaching:
            ranges[-1] = (ranges[-1][0], end, reaching)
        else:
            ranges.append((first, end, reaching))
    return ranks, ranges


@composite_operator(
    f"soft_nested_ffn(Tensor x, Tensor shares, int[] widths, {_MATRICES}, {_OPTIONS}) -> Tensor",
    spec=OperatorSpec(shape=like_first, work=_work, traits=Trait.MIXING),
)
def soft_nested_ffn(
    x: Tensor,
    shares: Tensor,
    widths: list[int],
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str = "silu",
    limit: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """Return the mean of :func:`nested_ffn` over the widths, weighted by ``shares``; routers are trained through it.

    A channel is weighted by the sum of the shares of all widths that include it, so that this costs one feed-forward.

    Args:
        x: (..., size).
        shares: (..., len(widths)).
        widths: as in :func:`nested_ffn`, like the other arguments.

    Returns:
        (..., size).
    """
    hidden = _hidden(x, up, gate, up_bias, gate_bias, activation, limit, alpha)

    def reaching(end: int) -> Tensor:
        those = [shares[..., i : i + 1] for i, w in enumerate(widths) if w >= end]
        return torch.cat(those, -1).sum(-1, keepdim=True).to(hidden.dtype)

    ends = sorted({*widths, up.shape[0]} - {0})
    if max(widths) < up.shape[0]:
        hidden, ends = hidden[..., : max(widths)], ends[:-1]
    pieces = [
        reaching(end).expand(*hidden.shape[:-1], end - first)
        for first, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
    out = F.linear(hidden * torch.cat(pieces, -1), down[:, : max(widths)])
    if down_bias is not None:
        out = out + reaching(min(w for w in widths if w)) * down_bias
    return out


@composite_operator(
    f"nested_similarity(Tensor x, int[] widths, {_MATRICES}, {_OPTIONS}) -> Tensor",
    spec=OperatorSpec(work=_work),
)
def nested_similarity(
    x: Tensor,
    widths: list[int],
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str = "silu",
    limit: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """Return the similarity of each width's output O_e to the widest's: ``<O_e, O_last> / <O_last, O_last>``.

    The formula is from arXiv 2502.12325, from memory.

    Args:
        x: (..., size).
        widths: ascending; the last is the full width. The others as in :func:`nested_ffn`.

    Returns:
        (..., len(widths)); the last is 1. Where the output of the widest is zero, all are 1.
    """
    hidden = _hidden(x, up, gate, up_bias, gate_bias, activation, limit, alpha)
    outputs: list[Tensor] = []
    for first, end in zip([0, *widths[:-1]], widths, strict=True):
        contribution = F.linear(hidden[..., first:end], down[:, first:end])
        base = outputs[-1] if outputs else down_bias
        outputs.append(contribution if base is None else contribution + base)
    products = torch.stack([(out * outputs[-1]).sum(-1) for out in outputs], -1)
    whole = products[..., -1:]
    return torch.where(whole == 0, torch.ones_like(products), products / whole)
