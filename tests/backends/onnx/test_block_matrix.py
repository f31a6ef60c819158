"""Few-bit weights in the layout of ONNX Runtime's kernels, compared with what the codes stand for."""

from __future__ import annotations

from typing import Any

import numpy
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from graphopt.backends.onnx.block_matrix import BlockMatrix, NoKernel, block_matrix, layout
from graphopt.backends.onnx.runtime_operators import DOMAIN

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def runtime(
    operator: str, feed: dict[str, numpy.ndarray], held: dict[str, Any], **attributes: int
) -> torch.Tensor:
    """Return the output of one operator of ONNX Runtime, given inputs in the order of its schema."""
    held = {n: t.numpy() for n, t in held.items() if t is not None}
    kinds = {n: helper.np_dtype_to_tensor_dtype(a.dtype) for n, a in feed.items()}
    order = ["x", "words", "scales", "zeros"] if "x" in feed else ["words", "indices", "scales", "zeros"]
    names = [n for n in order if n in feed or n in held]
    node = helper.make_node(operator, names, ["y"], domain=DOMAIN, **attributes)
    kind = helper.np_dtype_to_tensor_dtype(held["scales"].dtype)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(n, kinds[n], a.shape) for n, a in feed.items()],
        [helper.make_tensor_value_info("y", kind, None)],
        [onnx.numpy_helper.from_array(a, n) for n, a in held.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, feed)[0])


def parts(matrix: BlockMatrix) -> dict[str, Any]:
    return {"words": matrix.words, "scales": matrix.scales, "zeros": matrix.zeros}


def multiplied(x: torch.Tensor, matrix: BlockMatrix, level: int = 1) -> torch.Tensor:
    return runtime(
        "MatMulNBits", {"x": x.numpy()}, parts(matrix), K=matrix.columns, N=len(matrix.words), bits=matrix.bits,
        block_size=matrix.block, accuracy_level=level,
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(
        ["int2", "uint2", "int3", "uint3", "int4", "uint4", "uint5", "int6", "int8", "uint8", "e2m1"]
    ),
    st.sampled_from([16, 32, 48, 64, 128, 192, 256, 512, 0]),
    st.sampled_from(["none", "whole", "real", "offset"]),
    st.integers(0, 40),
    st.integers(0, 1 << 30),
)
def test_products_with_codes_are_those_with_their_values(
    code: str, shared: int, kind: str, missing: int, seed: int
) -> None:
    """Whatever the code, the block and the zeros: what the kernel multiplies with is what the codes stand for."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = 7, 2 * shared + 16 if shared else 96
    columns -= missing % 16
    block = (1, shared or columns)
    count = -(-columns // block[1])
    if code == "e2m1":
        codes = torch.randint(0, 16, (rows, columns), generator=generator).to(torch.uint8)
        numbers = E2M1[codes.long()]
    else:
        bits = int(code.lstrip("uint"))
        low = 0 if code[0] == "u" else -(1 << (bits - 1))
        codes = torch.randint(low, low + (1 << bits), (rows, columns), generator=generator)
        codes = codes.to(torch.int8 if low else torch.uint8)
        numbers = codes.float()
    scale = torch.rand(rows, count, generator=generator) + 0.1
    zero = offset = None
    if kind == "whole":
        zero = numbers[:, :count].clone().round()
    elif kind == "real":
        zero = torch.rand(rows, count, generator=generator) * 3
    elif kind == "offset":
        offset = torch.randn(rows, count, generator=generator)
        scale[0, 0] = 0.0

    def spread(t: torch.Tensor) -> torch.Tensor:
        return t.double().repeat_interleave(block[1], 1)[:, :columns]

    values = numbers.double()
    if zero is not None:
        values = values - spread(zero)
    values = values * spread(scale)
    if offset is not None:
        values = values + spread(offset)
    try:
        matrix = block_matrix(codes, scale, zero, offset, code=code, block=block)
    except NoKernel as reason:
        assert "zeros are not codes of eight bits" in str(reason)
        assert kind in ("real", "offset") or (kind == "whole" and code == "e2m1")
        return
    assert matrix.words.numel() <= rows * (columns + 256) * matrix.bits // 8
    x = torch.randn(3, columns, generator=generator)
    expected = x.double() @ values.T
    found = multiplied(x, matrix)
    assert float((found - expected).norm() / expected.norm().clamp(min=1e-30)) < 3e-6
    # each entry by itself, too: a wrong column of a wide matrix is little beside the others
    unit = torch.eye(columns)[[0, columns // 2, columns - 1]]
    assert torch.allclose(
        multiplied(unit, matrix).double(), values.T[[0, columns // 2, columns - 1]], atol=1e-5
    )


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_an_embedding_are_those_of_the_matrix(bits: int, zeros: bool, dtype: torch.dtype) -> None:
    """One table of words serves both kernels."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (11, 64), generator=generator).to(torch.uint8)
    scale = torch.rand(11, 2, generator=generator).to(dtype)
    zero = (
        torch.randint(0, 1 << bits, (11, 2), generator=generator)
        if zeros
        else torch.full((11, 2), 1 << (bits - 1))
    )
    values = (codes.float() - zero.repeat_interleave(32, 1)) * scale.float().repeat_interleave(32, 1)
    matrix = block_matrix(codes, scale, zero, code=f"uint{bits}", block=(1, 32), dtype=dtype)
    assert (matrix.zeros is None) == (not zeros)
    indices = numpy.array([[3, 0, 10], [7, 7, 2]])
    rows = runtime(
        "GatherBlockQuantized", {"indices": indices}, parts(matrix.flat()), bits=bits, block_size=32, gather_axis=0,
        quantize_axis=1,
    )  # fmt: skip
    assert torch.allclose(rows.float(), values[indices], rtol=2e-3 if dtype is torch.float16 else 1e-6)


def test_what_no_kernel_multiplies_with_is_named() -> None:
    for code, block, reason in (
        ("e4m3", (1, 32), "its codes are e4m3"), ("nf4", (1, 64), "its codes are nf4"),
        ("int4", (128, 128), "128 rows share a scale"), ("int4", (1, 24), "24 columns share a scale"),
        ("int4", (1, 0), "columns choose their scales"),
    ):  # fmt: skip
        with pytest.raises(NoKernel, match=reason):
            layout(code, block, (256, 256))
    with pytest.raises(NoKernel, match="no matrix"):
        layout("int4", (1, 1, 32), (2, 4, 64))
