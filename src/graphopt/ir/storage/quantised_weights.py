"""Weights of a saved program that are kept as codes: their tensors in its files, and how they are put together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import CheckpointError
from ..quantised.codes import RANGES, STORED, bits_of, packed_width
from ..quantised.stored import Making, Packed, made_parts, packed, quantised_form
from ..quantised.tensor import QuantisedTensor
from ..weights import InMemory, TensorSource
from .encode import dtype_name, dtype_of

_BESIDE = ("scale", "zero", "offset", "group", "divisor", "multiplier", "among")


def _parts(source: Packed) -> dict[str, torch.Tensor]:
    beside = {name: getattr(source.parts, name) for name in _BESIDE}
    return {"codes": source.words, **{name: part for name, part in beside.items() if part is not None}}


def _made(source: TensorSource) -> dict[str, torch.Tensor]:
    form = quantised_form(source)
    assert form is not None
    return _parts(packed(form))


def describe_codes(
    source: TensorSource, making: Making
) -> tuple[dict[str, Any], dict[str, TensorSource]] | None:
    """Return how a weight's codes are put together, as plain data, and the tensors to write; None if it has no codes.

    Args:
        source: of the weight; nothing is read.
        making: shared by the weights of one program.
    """
    form = quantised_form(source, values=False)
    if form is None:
        return None
    described = {
        "code": form.code,
        "shape": list(form.shape),
        "block": list(form.block),
        "dtype": dtype_name(form.dtype),
        "casts": [dtype_name(dtype) for dtype in form.casts],
        "group_dim": form.group_dim,
        "constant": form.constant,
    }
    if isinstance(source, Packed):
        return described, {name: InMemory(part.contiguous()) for name, part in _parts(source).items()}
    return described, made_parts(source, _made, _parts(packed(form)), making)


@dataclass(frozen=True, eq=False)
class SavedCodes:
    """A weight of a saved program that is kept as codes.

    Args:
        parts: "codes", packed, "scale" and whatever else there is, in the program's files.
        form: what they are put together to; its tensors have no values.
    """

    parts: tuple[tuple[str, TensorSource], ...]
    form: QuantisedTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.form.shape

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""
        return self.form.value_dtype

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return self.form.stored_bytes

    @property
    def kept_as(self) -> str:
        """What a listing says of it."""
        return self.form.kept_as

    def quantised(self, *, values: bool = True) -> QuantisedTensor:
        """Return the codes and scales."""
        if not values:
            return self.form
        loaded = {name: part.load() for name, part in self.parts}
        beside = {name: loaded.get(name) for name in _BESIDE}
        group = loaded.get("group")
        if group is not None and group.numel():
            count = self.form.scale.shape[self.form.group_dim]
            if not 0 <= int(group.min()) <= int(group.max()) < count:
                raise CheckpointError(
                    f"a saved weight's columns choose scales beyond the {count} that there are"
                )
        return Packed(loaded["codes"], replace(self.form, **beside)).quantised()  # type: ignore[arg-type]

    def load(self) -> torch.Tensor:
        """Return the values, dequantised anew."""
        return self.quantised().dequantise()


def _sizes(given: object) -> bool:
    return isinstance(given, list) and all(type(size) is int and 0 <= size < 2**40 for size in given)


def saved_codes(name: str, described: Any, tensors: Mapping[str, TensorSource]) -> SavedCodes:
    """Return a weight from its description and the tensors of its files.

    Args:
        name: of the weight.
        described: see :func:`describe_codes`.
        tensors: of a file, by name.

    Raises:
        CheckpointError: the description is damaged, or the tensors do not fit it.
    """

    def wrong(why: str) -> CheckpointError:
        return CheckpointError(f"the codes of the weight {name!r} are damaged: {why}")

    if not isinstance(described, dict):
        raise wrong("they are not described")
    parts = {n: tensors[f"{name}.{n}"] for n in ("codes", *_BESIDE) if f"{name}.{n}" in tensors}
    code, shape, block = described.get("code"), described.get("shape"), described.get("block")
    if code not in STORED or not _sizes(shape) or not _sizes(block) or not {"codes", "scale"} <= set(parts):
        raise wrong(f"{str(described)[:100]} with {', '.join(sorted(parts)) or 'no tensors'}")
    assert isinstance(shape, list)
    assert isinstance(block, list)
    assert isinstance(code, str)
    if len(shape) != len(block) or not shape:
        raise wrong(f"blocks of {block} of a tensor of {shape}")
    words = parts["codes"]
    last, dtype = packed_width(code, shape[-1])
    if tuple(words.shape) != (*shape[:-1], last) or words.dtype != dtype:
        raise wrong(f"words of the shape {list(words.shape)} for {shape}")
    group, group_dim = parts.get("group"), described.get("group_dim", -1)
    if group is not None and (
        group.dtype != torch.int64 or type(group_dim) is not int or not 0 <= group_dim < len(shape)
        or tuple(group.shape) != (shape[group_dim],)
    ):  # fmt: skip
        raise wrong("columns choose no scales")
    for d, (size, entries) in enumerate(zip(shape, block, strict=True)):
        if entries < 1 and not (group is not None and d == group_dim):
            raise wrong(f"blocks of {block}")
        expected = None if group is not None and d == group_dim else math.ceil(size / entries)
        for n in ("scale", "zero", "offset"):
            part = parts.get(n)
            if part is not None and (len(part.shape) != len(shape) or expected not in (None, part.shape[d])):
                raise wrong(f"{n} of the shape {list(part.shape)} for blocks of {block}")
    if "among" in parts and (
        code not in ("nf4", "e2m1") or tuple(parts["among"].shape) != (2 ** bits_of(code),)
    ):
        raise wrong("a table that does not go with them")
    casts = described.get("casts", [])
    if not isinstance(casts, list) or len(casts) > 4 or (code in RANGES and "among" in parts):
        raise wrong("types")

    def empty(part: TensorSource | None) -> torch.Tensor | None:
        return None if part is None else torch.empty(part.shape, dtype=part.dtype, device="meta")

    scale = empty(parts["scale"])
    assert scale is not None
    constant = described.get("constant", 1.0)
    if not isinstance(constant, float):
        raise wrong(f"a factor of {constant!r}")
    beside = {n: empty(parts.get(n)) for n in ("zero", "offset", "divisor", "multiplier", "among")}
    chosen = group_dim if group is not None else -1
    casts = tuple(dtype_of(d, name) for d in casts)
    codes = torch.empty(shape, dtype=STORED[code], device="meta")
    dtype = dtype_of(described.get("dtype"), name)
    form = QuantisedTensor(
        codes, scale, code, tuple(block), dtype, group=empty(group), group_dim=chosen, constant=constant, casts=casts,
        **beside,
    )  # fmt: skip
    return SavedCodes(tuple(parts.items()), form)
