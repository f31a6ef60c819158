"""The library ``gguf``: the names of types, how many bytes their blocks take, and what blocks mean."""

from __future__ import annotations

import functools
from typing import Any

from ...ir.errors import CheckpointError


def require_gguf() -> Any:
    """Return the library, or say how to get it.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise CheckpointError("reading a GGUF file needs gguf", hint='pip install "graphopt[gguf]"') from None
    return gguf


@functools.cache
def block_of(code: int) -> tuple[str, int, int] | None:
    """Return a tensor type's name, the values of one of its blocks and their bytes; None for a type nobody knows."""
    gguf = require_gguf()
    try:
        kind = gguf.GGMLQuantizationType(code)
    except ValueError:
        return None
    values, size = gguf.GGML_QUANT_SIZES[kind]
    return str(kind.name), int(values), int(size)


@functools.cache
def dequantises(code: int) -> bool:
    """Tell whether the library has values for the blocks of a type: it is asked for those of an empty one."""
    import numpy

    gguf = require_gguf()
    block = block_of(code)
    if block is None:
        return False
    try:
        gguf.dequantize(numpy.zeros((1, block[2]), dtype=numpy.uint8), gguf.GGMLQuantizationType(code))
    except NotImplementedError:
        return False
    return True


@functools.cache
def dequantised_types() -> tuple[str, ...]:
    """Return the names of all types that can be read."""
    kinds = require_gguf().GGMLQuantizationType
    return tuple(str(kind.name) for kind in kinds if dequantises(int(kind)))


def dequantise(blocks: Any, code: int) -> Any:
    """Return the float32 values of rows of blocks, a numpy array (rows, bytes of a row)."""
    import numpy

    gguf = require_gguf()
    # a scale may be infinite; what comes of it is seen where it is used
    with numpy.errstate(all="ignore"):
        return gguf.dequantize(blocks, gguf.GGMLQuantizationType(code))
