"""Weights as blocks of a GGUF file: copied where they came from one, codes where they fit exactly, else quantised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from ...ir.errors import LoweringError
from ...ir.quantised.codes import CannotExpress
from ...ir.quantised.stored import quantised_form
from ...ir.quantised.tensor import QuantisedTensor
from ...ir.running.fold import Computed
from ...ir.weights import TensorSource, numel
from .parameters import require_gguf

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
"""Types that matrices are written in."""
_BLOCK = 32
# how codes of our own are named, how far they lie from the file's, and the type whose blocks they fill
_EXACT = {"int8": ("Q8_0", 0), "int4": ("Q4_0", 8)}


@runtime_checkable
class StoredBlocks(Protocol):
    """A tensor of a GGUF file, as it is stored."""

    @property
    def code(self) -> int:
        """The number of its type."""
        ...

    @property
    def rotated(self) -> int:
        """For how many heads rows were reordered; 0: not."""
        ...

    @property
    def offset(self) -> float:
        """What was added to the values."""
        ...

    def blocks(self) -> torch.Tensor:
        """Return its bytes."""
        ...


@dataclass(frozen=True)
class Entry:
    """A tensor to write.

    Args:
        name: in the file.
        kind: of its type, such as Q8_0.
        shape: of its values.
        how: "copied", "codes", "exact" or "rounded".
        load: returns its bytes as a numpy array, (rows, bytes of a row) for types with blocks.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    how: str
    load: Callable[[], Any]


def entry(name: str, source: TensorSource, wanted: str, *, heads: int = 0, offset: float = 0.0) -> Entry:
    """Return how a weight is written; nothing is read but what tells whether codes fit.

    Args:
        name: in the file.
        source: of the values, as the model's library has them.
        wanted: one of ``TYPES``, or "auto": as it came, else by the type of its values.
        heads: how many heads' rows the file has in pairs; 0: none.
        offset: what the file adds to the values.

    Raises:
        LoweringError: a type is not known.
    """
    gguf = require_gguf()
    kinds = gguf.GGMLQuantizationType
    shape = tuple(int(s) for s in source.shape)
    if wanted not in (*TYPES, "auto"):
        raise LoweringError(f"matrices are not written as {wanted!r}", hint=f"auto, {', '.join(TYPES)}")
    if isinstance(source, StoredBlocks) and (source.rotated, source.offset) == (heads, offset):
        kind = str(kinds(source.code).name)
        if wanted == "auto" or wanted == kind:
            return Entry(name, kind, shape, "copied", lambda: _bytes_of(source, kind, shape))
    if len(shape) != 2:
        return Entry(name, "F32", shape, "exact", lambda: _values(source, heads, offset, "F32"))
    form = None if offset else exact_form(source, heads)
    if form is not None and wanted in ("auto", form[0]):
        return Entry(name, form[0], shape, "codes", lambda: _blocks_of(source, heads))
    kind = _plain_kind(source) if wanted == "auto" else wanted
    if kind.startswith("Q") and shape[1] % _BLOCK:
        kind = "F16"
    exact = kind == "F32" or kind == {torch.float16: "F16", torch.bfloat16: "BF16"}.get(source.dtype)
    return Entry(
        name, kind, shape, "exact" if exact else "rounded", lambda: _values(source, heads, offset, kind)
    )


def _plain_kind(source: TensorSource) -> str:
    """Return the type of values that were moved about since they came from a file, or computed."""
    origin = source
    while isinstance(origin, Computed) and len(origin.inputs) > 0:
        origin = origin.inputs[0]
    if isinstance(origin, StoredBlocks):
        kind = str(require_gguf().GGMLQuantizationType(origin.code).name)
        return kind if kind in TYPES else "Q8_0"
    return {torch.float16: "F16", torch.bfloat16: "BF16"}.get(source.dtype, "F32")


def exact_form(source: TensorSource, heads: int) -> tuple[str, QuantisedTensor] | None:
    """Return the type whose blocks hold a matrix's codes and scales as they are, and these; None if none does.

    Scales are kept in half precision there, one for 32 numbers of a row.
    """
    form = quantised_form(source, values=False)
    if form is None or form.code not in _EXACT or form.zero is not None or form.offset is not None:
        return None
    rows, columns = form.shape
    whole = min(form.block[1], columns)
    if form.group is not None or form.block[0] != 1 or whole % _BLOCK or columns % whole or rows == 1:
        return None
    form = quantised_form(source)
    assert form is not None
    scales = form.scales()
    if not torch.equal(scales.to(torch.float16).float(), scales):
        return None
    if heads:
        try:
            form = form.take(0, pairs(rows, heads))
        except CannotExpress:
            return None
    return _EXACT[form.code][0], form


def pairs(rows: int, heads: int) -> torch.Tensor:
    """Return the order of rows in which halves of each head's dimensions alternate, as llama.cpp rotates them."""
    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).flatten()


def _bytes_of(source: StoredBlocks, kind: str, shape: tuple[int, ...]) -> Any:
    raw = source.blocks().numpy()
    gguf = require_gguf()
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return raw.reshape(numel(shape[:-1]), shape[-1] // values * size)


def _blocks_of(source: TensorSource, heads: int) -> Any:
    """Return blocks of a scale in half precision and 32 codes."""
    found = exact_form(source, heads)
    assert found is not None
    kind, form = found
    rows, columns = form.shape
    scale = form.scales().to(torch.float16)
    scale = scale.repeat_interleave(min(form.block[1], columns) // _BLOCK, 1).reshape(rows, -1, 1)
    codes = form.codes.reshape(rows, -1, _BLOCK)
    if kind == "Q8_0":
        stored = codes.to(torch.int8).view(torch.uint8)
    else:
        nibbles = (codes.to(torch.int16) + 8).to(torch.uint8)
        stored = nibbles[..., : _BLOCK // 2] | nibbles[..., _BLOCK // 2 :] << 4
    return torch.cat([scale.contiguous().view(torch.uint8), stored], -1).reshape(rows, -1).numpy()


def _values(source: TensorSource, heads: int, offset: float, kind: str) -> Any:
    value = source.load().to(torch.float32)
    if heads:
        value = value.index_select(0, pairs(value.shape[0], heads))
    if offset:
        value = value + offset
    gguf = require_gguf()
    return gguf.quantize(value.contiguous().numpy(), gguf.GGMLQuantizationType[kind])
