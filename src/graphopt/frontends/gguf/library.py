"""Access to the library ``gguf``: names of types, sizes of their blocks, and dequantisation."""

from __future__ import annotations

import functools
from typing import Any

from ...ir.errors import CheckpointError


def require_gguf() -> Any:
    """Return the library, or raise an error that says how to install it.

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
    """Return a tensor type's name, and the values and bytes of one of its blocks; None for an unknown type."""
    gguf = require_gguf()
    try:
        kind = gguf.GGMLQuantizationType(code)
    except ValueError:
        return None
    values, size = gguf.GGML_QUANT_SIZES[kind]
    return str(kind.name), int(values), int(size)


@functools.cache
def dequantises(code: int) -> bool:
    """Return whether the library can dequantise a type, by trying an empty array."""
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
    """Return the float32 values of rows of blocks, given as a numpy array (rows, bytes per row)."""
    import numpy

    gguf = require_gguf()
    # a scale may be infinite; the result is checked where it is used
    with numpy.errstate(all="ignore"):
        return gguf.dequantize(blocks, gguf.GGMLQuantizationType(code))
