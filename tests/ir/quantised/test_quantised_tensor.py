"""Codes with scales stay what they say when entries are selected, moved and joined."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from amounts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ir.quantised.codes import RANGES, STORED, CannotExpress, bits_of, numbers, pack, unpack
from graphopt.ir.quantised.stored import packed
from graphopt.ir.quantised.tensor import QuantisedTensor, concatenate


def drawn(
    shape: tuple[int, ...], block: tuple[int, ...], code: str, seed: int, zero: bool, group: bool
) -> QuantisedTensor:
    """Return a tensor of random codes and scales."""
    generator = torch.Generator().manual_seed(seed)
    if code in RANGES:
        low, high = RANGES[code]
        codes = torch.randint(low, high + 1, shape, generator=generator).to(STORED[code])
    elif code == "e4m3":
        codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    else:
        codes = torch.randint(0, 16, shape, generator=generator).to(torch.uint8)
    chosen = None
    if group:
        chosen = torch.randint(0, 3, shape[-1:], generator=generator)
        block = (*block[:-1], 0)
    sizes = [
        3 if group and d == len(shape) - 1 else math.ceil(s / b)
        for d, (s, b) in enumerate(zip(shape, block, strict=True))
    ]
    scale = torch.rand(sizes, generator=generator).to(torch.bfloat16) + 0.01
    zeros = torch.randint(-3, 4, sizes, generator=generator).to(torch.float32) + 0.25 if zero else None
    return QuantisedTensor(
        codes,
        scale,
        code,
        block,
        torch.bfloat16,
        zeros,
        group=chosen,
        group_dim=len(shape) - 1 if group else -1,
    )


@st.composite
def tensors(draw: Any) -> QuantisedTensor:
    rank = draw(st.integers(1, 3))
    shape = tuple(draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12])) for _ in range(rank))
    block = tuple(draw(st.sampled_from([1, 2, 3, 4, s])) for s in shape)
    code = draw(st.sampled_from(["int4", "uint4", "int8", "uint2", "e4m3", "e2m1", "nf4"]))
    return drawn(shape, block, code, draw(st.integers(0, 99)), draw(st.booleans()), draw(st.booleans()))


def moved(draw: Any, form: QuantisedTensor, value: torch.Tensor) -> tuple[QuantisedTensor, torch.Tensor]:
    """Return both after one movement that hypothesis chooses."""
    what = draw(st.sampled_from(["take", "slice", "permute", "reshape", "join"]))
    rank = len(form.shape)
    dim = draw(st.integers(0, rank - 1))
    size = form.shape[dim]
    if what == "take":
        entries = torch.tensor(draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8)))
        return form.take(dim, entries), value.index_select(dim, entries)
    if what == "slice":
        start = draw(st.integers(0, size - 1))
        entries = torch.arange(start, draw(st.integers(start + 1, size)))
        return form.take(dim, entries), value.index_select(dim, entries)
    if what == "permute":
        order = draw(st.permutations(range(rank)))
        return form.permute(order), value.permute(*order)
    if what == "join":
        return concatenate([form, form], dim), torch.cat([value, value], dim)
    total = value.numel()
    first = draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
    second = draw(st.sampled_from([n for n in range(1, total // first + 1) if (total // first) % n == 0]))
    shape = draw(
        st.sampled_from([(total,), (first, total // first), (first, second, total // first // second)])
    )
    return form.reshape(shape), value.reshape(shape)


@settings(max_examples=examples(100))
@given(st.data(), tensors())
def test_movements_give_what_they_give_on_values(data: st.DataObject, form: QuantisedTensor) -> None:
    value = form.dequantise()
    for _ in range(4):
        try:
            form, value = moved(data.draw, form, value)
        except CannotExpress:
            return
        assert form.shape == tuple(value.shape)
        assert torch.equal(form.dequantise(), value)
    kept = packed(form)
    assert torch.equal(kept.load(), value) and kept.shape == tuple(value.shape)


def test_whole_blocks_move_and_parts_of_blocks_are_refused() -> None:
    form = drawn((8, 64), (1, 16), "int4", 0, True, False)
    value = form.dequantise()
    entries = torch.cat([torch.arange(32, 48), torch.arange(0, 16)])
    assert torch.equal(form.take(1, entries).dequantise(), value[:, entries])
    rows = torch.tensor([7, 0, 3])
    assert torch.equal(form.take(0, rows).dequantise(), value[rows])
    heads = form.reshape((8, 4, 16)).permute((1, 0, 2))
    assert torch.equal(heads.dequantise(), value.reshape(8, 4, 16).permute(1, 0, 2))
    for entries in (torch.arange(8, 24), torch.arange(0, 64, 2), torch.arange(63, -1, -1)):
        with pytest.raises(CannotExpress, match="blocks of 16"):
            form.take(1, entries)
    with pytest.raises(CannotExpress, match="middle of a block"):
        drawn((8, 48), (1, 16), "int4", 0, True, False).reshape((16, 24))
    with pytest.raises(CannotExpress, match="different codes"):
        concatenate([form, drawn((8, 64), (1, 16), "uint4", 0, True, False)], 0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int16, torch.int64])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("order", [None, "awq"])
def test_packed_words_give_back_what_was_packed(dtype: torch.dtype, bits: int, order: str | None) -> None:
    width = dtype.itemsize * 8 // bits
    places = None if order is None else [*range(0, width, 2), *range(1, width, 2)]
    for dim, count in ((0, 5), (1, 17), (-1, width * 2)):
        shape = [6, 6]
        shape[dim] = count
        values = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(count)).to(
            torch.uint8
        )
        words = pack(values, bits, dim, dtype, places)
        assert words.dtype == dtype and words.shape[dim] == math.ceil(count / width)
        assert torch.equal(unpack(words, bits, dim, count, places), values)


def test_numbers_of_four_bit_floats() -> None:
    assert numbers(torch.arange(16), "e2m1").tolist() == [
        0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6,
    ]  # fmt: skip
    assert bits_of("e2m1") == 4 and math.copysign(1, numbers(torch.tensor(8), "e2m1").item()) == -1
    assert numbers(torch.tensor([0, 7, 15]), "nf4").tolist() == [-1, 0, 1]
