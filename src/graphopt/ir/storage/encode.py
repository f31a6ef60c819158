"""Encoding of arguments and values as JSON, and decoding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..errors import CheckpointError

_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
    )
}  # fmt: skip
_LAYOUTS = {"strided": torch.strided}
_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of an element type."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: Any, where: str) -> torch.dtype:
    """Return an element type by name.

    Raises:
        CheckpointError: there is none of that name.
    """
    if not isinstance(name, str) or name not in _DTYPES:
        raise CheckpointError(f"{where}: {name!r} is not an element type")
    return _DTYPES[name]


def encode(value: Any, where: str) -> Any:
    """Return an argument as JSON: plain values as they are, everything else as an object with one key."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, (list, tuple)):
        return [encode(item, where) for item in value]
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": value.type}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    raise CheckpointError(f"{where}: an argument of type {type(value).__name__} cannot be saved")


def decode(value: Any, nodes: dict[str, fx.Node], where: str, depth: int = 0) -> Any:
    """Return an argument from JSON.

    Raises:
        CheckpointError: it is not of the form that :func:`encode` writes.
    """
    if depth > 6:
        raise CheckpointError(f"{where}: arguments are nested too deeply")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [decode(item, nodes, where, depth + 1) for item in value]
    if isinstance(value, dict) and len(value) == 1:
        ((kind, inner),) = value.items()
        if kind == "node" and isinstance(inner, str):
            if inner not in nodes:
                raise CheckpointError(f"{where}: it reads {inner!r}, which is not defined before it")
            return nodes[inner]
        if kind == "float" and inner in ("inf", "-inf", "nan"):
            return float(inner)
        if kind == "dtype":
            return dtype_of(inner, where)
        if kind == "device" and inner in ("cpu", "cuda"):
            return torch.device(inner)
        if kind == "layout" and inner in _LAYOUTS:
            return _LAYOUTS[inner]
        if kind == "memory_format" and inner in _FORMATS:
            return _FORMATS[inner]
    raise CheckpointError(f"{where}: {str(value)[:60]!r} is not an argument")
