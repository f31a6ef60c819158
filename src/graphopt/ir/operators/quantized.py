"""All-reduce with quantised messages (arXiv 2411.07942).

A value of E features is ordered so that the ``kept`` outliers come first. Outliers are sent in bfloat16, the others as
integers of ``bits`` bits: either with static scales, one per rank and feature and known to all ranks, or with a
float16 scale per token and ``block`` of features, which is sent along.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import groups
from .collectives import place_sum
from .library import composite_operator, kernel_point
from .spec import OperatorSpec, Trait


def quantize(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return ``clip(round(x / scale), -2^(bits-1), 2^(bits-1) - 1)`` as int8; arithmetic in float32."""
    top = 1 << (bits - 1)
    return torch.round(x.float() / scale.float()).clamp(-top, top - 1).to(torch.int8)


def packed_bytes(features: int, bits: int) -> int:
    """Return how many bytes ``features`` integers of ``bits`` bits take."""
    return -(-features * bits // 8)


def pack(q: Tensor, bits: int) -> Tensor:
    """Pack (..., n) signed integers of ``bits`` bits into (..., ceil(n * bits / 8)) bytes."""
    offset = (q.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    if bits == 8:
        return offset
    count = packed_bytes(q.shape[-1], bits)
    if 8 % bits == 0:
        per_byte = 8 // bits
        parts = _rows(offset, count, per_byte)
        total: Tensor = parts[..., 0]
        for position in range(1, per_byte):
            total = total | (parts[..., position] << (bits * position))
        return total
    bit_positions = torch.arange(bits, device=q.device, dtype=torch.uint8)
    stream = ((offset.unsqueeze(-1) >> bit_positions) & 1).flatten(-2)
    stream = _rows(stream, count, 8)
    weights = 1 << torch.arange(8, device=q.device, dtype=torch.int32)
    return (stream.to(torch.int32) * weights).sum(-1).to(torch.uint8)


def _rows(x: Tensor, count: int, per_row: int) -> Tensor:
    """Return (..., n) as (..., count, per_row), padded with zeros."""
    filled = torch.nn.functional.pad(x, [0, count * per_row - x.shape[-1]])
    return filled.reshape(*x.shape[:-1], count, per_row)


def unpack(packed: Tensor, features: int, bits: int) -> Tensor:
    """Return the (..., ``features``) signed integers, as int8, that :func:`pack` packed."""
    if bits == 8:
        offset = packed[..., :features]
    elif 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
        parts = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
        offset = parts.flatten(-2)[..., :features]
    else:
        bit_positions = torch.arange(8, device=packed.device, dtype=torch.uint8)
        stream = ((packed.unsqueeze(-1) >> bit_positions) & 1).flatten(-2)[..., : features * bits]
        weights = 1 << torch.arange(bits, device=packed.device, dtype=torch.int32)
        offset = (_rows(stream, features, bits).to(torch.int32) * weights).sum(-1)
    return (offset.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _blocks(features: int, block: int) -> int:
    return -(-features // block) if block else 0


def _dynamic_scale(x: Tensor, bits: int, block: int) -> Tensor:
    """Return a float16 scale per token and block of features: the largest absolute value over 2^(bits-1) - 1."""
    count = _blocks(x.shape[-1], block)
    spread = _rows(x.float(), count, block)
    top = (1 << (bits - 1)) - 1
    # the largest float16 is 65,504, and a scale must not be zero
    return (spread.abs().amax(-1) / max(top, 1)).clamp(6e-8, 65504.0).to(torch.float16)


def encode(x: Tensor, scale: Tensor | None, kept: int, bits: int, block: int) -> Tensor:
    """Return the bytes of (..., features) ordered values: outliers, then dynamic scales, then integers."""
    outliers = x[..., :kept].to(torch.bfloat16).contiguous().view(torch.uint8)
    inliers = x[..., kept:]
    if scale is not None:
        return torch.cat([outliers, pack(quantize(inliers, scale, bits), bits)], -1)
    travelling = _dynamic_scale(inliers, bits, block)
    wide = travelling.repeat_interleave(block, -1)[..., : inliers.shape[-1]]
    packed = pack(quantize(inliers, wide, bits), bits)
    return torch.cat([outliers, travelling.contiguous().view(torch.uint8), packed], -1)


def _typed(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """Return bytes viewed as another type; empty tensors are made anew, since their strides do not allow a view."""
    if payload.shape[-1] == 0:
        return payload.new_empty(payload.shape, dtype=dtype)
    return payload.clone(memory_format=torch.contiguous_format).view(dtype)


def decode(payload: Tensor, scale: Tensor | None, features: int, kept: int, bits: int, block: int) -> Tensor:
    """Return the (..., ``features``) float32 values that :func:`encode` wrote."""
    outliers = _typed(payload[..., : 2 * kept], torch.bfloat16).float()
    inlier_count, offset = features - kept, 2 * kept
    if scale is None:
        count = _blocks(inlier_count, block)
        scale = (
            _typed(payload[..., offset : offset + 2 * count], torch.float16)
            .float()
            .repeat_interleave(block, -1)[..., :inlier_count]
        )
        offset += 2 * count
    whole = unpack(payload[..., offset : offset + packed_bytes(inlier_count, bits)], inlier_count, bits)
    return torch.cat([outliers, whole.float() * scale.float()], -1)


@kernel_point("quantize_pack")
def quantize_pack(
    x: Tensor, columns: Tensor | None, scale: Tensor | None, kept: int, bits: int, block: int, width: int
) -> Tensor:
    """Return the message for x: (..., ``width``) bytes, padded with zeros.

    Args:
        x: (..., features).
        columns: which features are sent, outliers first; all in their order if left out.
        scale: (columns - kept,) static scales; None where scales are dynamic.
        kept: how many outliers come first.
        bits: of an integer.
        block: features that share a dynamic scale.
        width: of the message.
    """
    message = encode(x if columns is None else x.index_select(-1, columns), scale, kept, bits, block)
    return torch.nn.functional.pad(message, [0, width - message.shape[-1]])


@kernel_point("unpack_sum")
def unpack_sum(
    payload: Tensor,
    columns: Tensor | None,
    scales: Tensor | None,
    count: int,
    kept: int,
    bits: int,
    block: int,
) -> Tensor:
    """Return the float32 sum of the messages of all ranks, added in the order of ranks.

    Args:
        payload: (ranks, ..., bytes).
        columns: (count,), the feature of each value; a permutation of all features.
        scales: (ranks, count - kept) static scales; None where scales are dynamic.
        count: number of values per token.
        kept, bits, block: as in :func:`quantize_pack`.

    Returns:
        (..., count).
    """
    total: Tensor | None = None
    for rank in range(payload.shape[0]):
        term = decode(payload[rank], None if scales is None else scales[rank], count, kept, bits, block)
        total = term if total is None else total + term
    assert total is not None
    if columns is None:
        return total
    return torch.empty_like(total).index_copy(-1, columns, total)


def payload_bytes(features: int, kept: int, bits: int, block: int) -> int:
    """Return the number of bytes of one token's values."""
    inlier_count = features - kept
    return 2 * kept + 2 * _blocks(inlier_count, block) + packed_bytes(inlier_count, bits)


def shares(count: int, ranks: int) -> list[tuple[int, int]]:
    """Return the range of each rank when ``count`` items are divided as evenly as possible."""
    size, more = divmod(count, ranks)
    ends = [0]
    for rank in range(ranks):
        ends.append(ends[-1] + size + (rank < more))
    return list(itertools.pairwise(ends))


def share_bytes(features: int, kept: int, bits: int, block: int, ranks: int) -> int:
    """Return the number of bytes of one token in the largest share that a rank has of it."""
    return max(
        payload_bytes((b - a) + (d - c), b - a, bits, block)
        for (a, b), (c, d) in zip(shares(kept, ranks), shares(features - kept, ranks), strict=True)
    )


def chosen_algorithm(
    algorithm: str, tokens: int, features: int, ranks: int, bits: int, crossover: int
) -> str:
    """Return the algorithm of a sum: ``algorithm`` itself, or for ``auto`` the one chosen by message size.

    Gathering takes one step and moves (N-1) n bytes a rank, two steps move 2 (N-1)/N n: gathering is
    faster while n (N-1)(1 - 2/N) < latency * bandwidth, which ``crossover`` is, in bytes.
    """
    if algorithm != "auto":
        return algorithm
    message = tokens * features * bits / 8
    return "gather" if message * (ranks - 1) * (1 - 2 / ranks) < crossover else "two-step"


def _rank_share(x: Tensor, kept: int, rank: int, ranks: int) -> tuple[Tensor, slice, int]:
    """Return a rank's share of ordered features, its range of static scales, and its number of outliers."""
    outliers, inliers = shares(kept, ranks)[rank], shares(x.shape[-1] - kept, ranks)[rank]
    share = torch.cat([x[..., outliers[0] : outliers[1]], x[..., kept + inliers[0] : kept + inliers[1]]], -1)
    return share, slice(*inliers), outliers[1] - outliers[0]


def _join_shares(parts: Sequence[Tensor], kept: int, ranks: int) -> Tensor:
    """Join the shares of all ranks into one ordered value."""
    counts = [end - start for start, end in shares(kept, ranks)]
    first = [part[..., :count] for part, count in zip(parts, counts, strict=True)]
    second = [part[..., count:] for part, count in zip(parts, counts, strict=True)]
    return torch.cat([*first, *second], -1)


def _static(scales: Tensor, row: int, columns: slice, block: int) -> Tensor | None:
    return None if block else scales[row, columns]


@composite_operator(
    "quantized_sum(Tensor[] parts, Tensor order, Tensor inverse, Tensor scales, Tensor reduced, int kept, "
    "int bits, int block, str algorithm, int crossover) -> Tensor"
)
def quantized_sum(
    parts: Sequence[Tensor],
    order: Tensor,
    inverse: Tensor,
    scales: Tensor,
    reduced: Tensor,
    kept: int,
    bits: int,
    block: int,
    algorithm: str,
    crossover: int,
) -> Tensor:
    """Return the result of :func:`quantized_all_reduce`, computed in one process from all terms."""
    ranks, features = len(parts), parts[0].shape[-1]
    form = chosen_algorithm(algorithm, parts[0][..., 0].numel(), features, ranks, bits, crossover)
    ordered = [p.index_select(-1, order) for p in parts]

    def added(owner: int | None) -> Tensor:
        total: Tensor | None = None
        for rank, value in enumerate(ordered):
            share, columns, outliers = (
                (value, slice(None), kept) if owner is None else _rank_share(value, kept, owner, ranks)
            )
            scale = _static(scales, rank, columns, block)
            sent = encode(share, scale, outliers, bits, block)
            term = decode(sent, scale, share.shape[-1], outliers, bits, block)
            total = term if total is None else total + term
        assert total is not None
        return total

    if form == "gather":
        return added(None).index_select(-1, inverse).to(parts[0].dtype)
    done = []
    for rank in range(ranks):
        _, columns, outliers = _rank_share(ordered[0], kept, rank, ranks)
        value = added(rank)
        scale = None if block else reduced[columns]
        sent = encode(value, scale, outliers, bits, block)
        done.append(decode(sent, scale, value.shape[-1], outliers, bits, block))
    return _join_shares(done, kept, ranks).index_select(-1, inverse).to(parts[0].dtype)


@composite_operator(
    "quantized_all_reduce(Tensor x, Tensor order, Tensor inverse, Tensor scales, Tensor reduced, int kept, "
    "int bits, int block, str algorithm, int crossover, str group) -> Tensor",
    spec=OperatorSpec(place=place_sum, traits=Trait.COLLECTIVE),
)
def quantized_all_reduce(
    x: Tensor,
    order: Tensor,
    inverse: Tensor,
    scales: Tensor,
    reduced: Tensor,
    kept: int,
    bits: int,
    block: int,
    algorithm: str,
    crossover: int,
    group: str,
) -> Tensor:
    """Return the sum of all ranks' values, sent in about ``bits`` bits a feature; bit-identical on every rank.

    Args:
        x: (..., features).
        order: (features,) features with the ``kept`` outliers first.
        inverse: (features,) the inverse of ``order``.
        scales: (ranks, features - kept) static scales in that order; (ranks, 0) where scales are dynamic.
        reduced: (features - kept,) static scales of the sum, for the second of two steps; (0,) likewise.
        kept: how many outliers are sent in bfloat16.
        bits: of the integers, 2 to 8.
        block: features that share a dynamic scale; 0 for static scales.
        algorithm: ``gather`` (every rank receives all messages and adds them), ``two-step`` (every rank adds its share
            of the features and sends the sums on, quantised again), ``auto`` by message size.
        crossover: for ``auto``, latency times bandwidth of the link in bytes.
        group: whose ranks.

    Sums are computed in float32, in the order of ranks.
    """
    bound = groups.bound_group(group, x)
    if bound is None:
        return torch.empty_like(x)
    ranks, features = bound.size, x.shape[-1]
    form = chosen_algorithm(algorithm, x[..., 0].numel(), features, ranks, bits, crossover)
    if form == "gather":
        width = payload_bytes(features, kept, bits, block)
        own_scales = _static(scales, bound.rank, slice(None), block)
        sent = quantize_pack(x, order, own_scales, kept, bits, block, width)
        received = groups.all_gather(sent.unsqueeze(0), bound)
        static = None if block else scales
        return unpack_sum(received, order, static, features, kept, bits, block).to(x.dtype)
    width = share_bytes(features, kept, bits, block, ranks)
    messages = []
    for rank in range(ranks):
        part, columns, outliers = _rank_share(order, kept, rank, ranks)
        scale = _static(scales, bound.rank, columns, block)
        messages.append(quantize_pack(x, part, scale, outliers, bits, block, width))
    received = groups.all_to_all(torch.stack(messages), bound)
    part, columns, outliers = _rank_share(order, kept, bound.rank, ranks)
    count = part.shape[0]
    total = unpack_sum(received, None, None if block else scales[:, columns], count, outliers, bits, block)
    sent = quantize_pack(total, None, None if block else reduced[columns], outliers, bits, block, width)
    gathered = groups.all_gather(sent.unsqueeze(0), bound)
    done = []
    for rank in range(ranks):
        part, columns, outliers = _rank_share(order, kept, rank, ranks)
        scale = None if block else reduced[columns][None]
        done.append(unpack_sum(gathered[rank : rank + 1], None, scale, part.shape[0], outliers, bits, block))
    return _join_shares(done, kept, ranks).index_select(-1, inverse).to(x.dtype)
