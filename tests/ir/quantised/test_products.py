"""Products with matrices of few bits: those with the dequantised matrix, within what bfloat16 rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from amounts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ir.quantised.codes import RANGES, STORED
from graphopt.ir.quantised.products import FewBitProduct
from graphopt.ir.quantised.tensor import QuantisedTensor

HALF = 2.0**-8
"""Largest relative error of one rounding to bfloat16, with its one hidden bit and seven others."""


def form_of(
    code: str, shape: tuple[int, int], block: tuple[int, int], seed: int = 0, zero: str = "none", offset: bool = False,
    dtype: torch.dtype = torch.float32,
) -> QuantisedTensor:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-s // min(b, s)) for s, b in zip(shape, block, strict=True)]
    scale = (torch.rand(counts, generator=generator) + 0.1).to(dtype)
    if code in RANGES:
        low, high = RANGES[code]
        codes = torch.randint(low, high + 1, shape, generator=generator).to(STORED[code])
        numbers = torch.randint(low, high + 1, counts, generator=generator).float()
    else:
        codes = torch.randint(0, 16, shape, generator=generator).to(STORED[code])
        numbers = torch.zeros(counts)
    return QuantisedTensor(
        codes, scale, code, block, dtype,
        zero={"none": None, "whole": numbers, "real": numbers + 0.31}[zero],
        offset=torch.randn(counts, generator=generator) if offset else None,
    )  # fmt: skip


def bound(form: QuantisedTensor, x: torch.Tensor) -> torch.Tensor:
    """Return how far a product may be: roundings of each scale, shift, entry of a row and result, not more than a few."""
    weight = form.dequantise().double().abs()
    largest = max(abs(n) for n in RANGES.get(form.code, (0, 8))) + 8
    if form.zero is not None:
        largest += float(form.zero.abs().max())
    # scales and shifts are rounded by themselves, and may cancel
    spread = form.spread(form.scales()).expand(form.shape).double() * largest
    if form.offset is not None:
        spread = spread + form.spread(form.offset).expand(form.shape).double().abs()
    return x.double().abs() @ (weight + 2 * spread).t() * HALF * 1.5 + 1e-6


@settings(max_examples=examples(40), deadline=None)
@given(
    code=st.sampled_from(["int4", "uint4", "int8", "uint8", "int3", "uint2", "int6", "uint5"]),
    outputs=st.sampled_from([1, 5, 16, 40, 1040]),
    block=st.sampled_from([(1, 32), (1, 64), (1, 96), (1, 192), (1, 999), (3, 64), (999, 192)]),
    zero=st.sampled_from(["none", "whole", "real"]),
    offset=st.booleans(),
    rows=st.sampled_from([1, 2, 13, 100]),
    seed=st.integers(0, 99),
)
def test_products_are_those_of_the_values(
    code: str, outputs: int, block: tuple[int, int], zero: str, offset: bool, rows: int, seed: int
) -> None:
    form = form_of(code, (outputs, 192), block, seed, zero, offset)
    product = FewBitProduct.of(form)
    assert product is not None
    assert product.packed is not None
    assert product.bits == (8 if code[-1] in "568" else 4)
    x = torch.randn(rows, 192, generator=torch.Generator().manual_seed(seed + 1))
    found, expected = product(x), x.double() @ form.dequantise().double().t()
    assert found.dtype == torch.bfloat16
    assert ((found.double() - expected).abs() <= bound(form, x)).all()
    # tighter on the whole: rounding errors do not add up
    assert (found.double() - expected).norm() <= 0.02 * bound(form, x).norm() / HALF
    entries = torch.tensor([[outputs - 1, 0]])
    values = product.rows(entries)
    assert values.shape == (1, 2, 192)
    assert (
        (values[0].double() - form.dequantise()[entries[0]].double()).abs()
        <= bound(form, torch.eye(192))[:, entries[0]].t()
    ).all()


@pytest.mark.parametrize("code", ["int4", "int8"])
def test_scales_in_bfloat16_are_exact(code: str) -> None:
    """Rows that bfloat16 holds and sums of few terms: nothing is left to round but the result."""
    form = form_of(code, (32, 64), (1, 32), dtype=torch.bfloat16)
    x = torch.eye(64)
    product = FewBitProduct.of(form)
    assert product is not None
    expected = form.dequantise().float().t()
    assert torch.equal(product.few(x.to(torch.bfloat16)).float(), expected)
    assert torch.equal(product.rows(torch.arange(32)).float(), expected.t())


def test_few_rows_and_many_are_multiplied_by_the_same_matrix() -> None:
    for code in ("uint4", "int8"):
        product = FewBitProduct.of(form_of(code, (2100, 128), (1, 64), zero="whole"))
        assert product is not None
        x = torch.randn(200, 128)
        one_by_one = torch.cat([product(row[None]) for row in x])
        assert ((product(x) - one_by_one).abs() <= 0.01 * one_by_one.abs().max()).all()


@pytest.mark.parametrize(
    ("code", "shape", "block"),
    [
        ("nf4", (8, 64), (1, 64)),
        ("e2m1", (8, 64), (1, 16)),
        ("int4", (8, 48), (1, 48)),
        ("int4", (8, 40), (1, 16)),
    ],
)
def test_what_has_no_kernel_is_kept_in_bfloat16(
    code: str, shape: tuple[int, int], block: tuple[int, int]
) -> None:
    form = form_of(code, shape, block)
    product = FewBitProduct.of(form)
    assert product is not None
    assert product.packed is None
    x = torch.randn(3, shape[1])
    expected = x.to(torch.bfloat16) @ form.dequantise().to(torch.bfloat16).t()
    assert torch.equal(product(x), expected)
    assert torch.equal(product.rows(torch.tensor([2])), form.dequantise()[2:3].to(torch.bfloat16))


def test_columns_that_choose_their_scales() -> None:
    form = form_of("int4", (16, 64), (1, 32))
    chosen = QuantisedTensor(
        form.codes, form.scale, "int4", (1, 0), torch.float32, group=torch.arange(64) % 2, group_dim=1
    )
    product = FewBitProduct.of(chosen)
    assert product is not None
    assert product.packed is None
    assert (
        FewBitProduct.of(
            QuantisedTensor(form.codes[None], form.scale[None], "int4", (1, 1, 32), torch.float32)
        )
        is None
    )


def memory(product: Any) -> int:
    return sum(t.numel() * t.dtype.itemsize for t in (product.packed, product.scales, product.words))


def test_memory() -> None:
    """A matrix in four bits takes a byte a weight and its scales, not the four of float32."""
    form = form_of("int4", (512, 512), (1, 128))
    assert memory(FewBitProduct.of(form)) <= 512 * 512 * (1 + 4 / 128) + 100
