"""Sources of values that are kept as codes, and the codes of a value that was moved about since."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx

from ..operators.traits import Trait, has
from ..running.evaluate import evaluate
from ..running.fold import Computed
from ..schema import arguments, operator_name
from ..weights import TensorSource, numel
from .codes import RANGES, CannotExpress, bits_of, from_offset_binary, offset_binary, pack, slot_of, unpack
from .tensor import QuantisedTensor, concatenate

_LARGEST = 1 << 24


@runtime_checkable
class QuantisedSource(Protocol):
    """A source of values that are stored as codes with scales."""

    @property
    def stored_bytes(self) -> int:
        """Bytes that the codes, scales and zeros take where they are kept."""
        ...

    def quantised(self, *, values: bool = True) -> QuantisedTensor:
        """Return the codes and scales; without ``values``, tensors on the meta device, nothing read."""
        ...


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor kept in memory as packed codes.

    Args:
        words: codes as numbers without sign, packed along the last dimension, the first in the lowest bits; plain where a
            code takes eight bits.
        parts: the rest of the :class:`QuantisedTensor`: its ``codes`` have no values.
    """

    words: torch.Tensor
    parts: QuantisedTensor
    shape: tuple[int, ...] = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.parts.shape)
        object.__setattr__(self, "dtype", self.parts.value_dtype)

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return self.parts.stored_bytes

    @property
    def kept_as(self) -> str:
        """What a listing says of it."""
        return self.parts.kept_as

    def quantised(self, *, values: bool = True) -> QuantisedTensor:
        """Return the codes and scales."""
        if not values:
            return on_meta(self.parts)
        code = self.parts.code
        if bits_of(code) == 8:
            return replace(self.parts, codes=self.words)
        codes = unpack(self.words, slot_of(code), -1, self.shape[-1])
        return replace(self.parts, codes=from_offset_binary(codes, code) if code in RANGES else codes)

    def load(self) -> torch.Tensor:
        """Return the values, dequantised anew."""
        return self.quantised().dequantise()


@dataclass(frozen=True)
class Plain:
    """The values of a source that is kept as codes, without them: what is made of it is plain."""

    source: TensorSource

    @property
    def shape(self) -> tuple[int, ...]:
        """The source's shape."""
        return tuple(self.source.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The source's type."""
        return self.source.dtype

    def load(self) -> torch.Tensor:
        """Return the values, dequantised anew."""
        return self.source.load()


class Making:
    """Makes the tensors that sources are written as; of what was made, that of the last source alone is kept."""

    def __init__(self) -> None:
        self._source: TensorSource | None = None
        self._made: dict[str, torch.Tensor] = {}

    def __call__(
        self, source: TensorSource, make: Callable[[TensorSource], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Return what ``make`` makes of a source."""
        if self._source is not source:
            self._source, self._made = source, make(source)
        return self._made


@dataclass(frozen=True, eq=False)
class MadePart:
    """One of the tensors that a source is written as, made when it is loaded."""

    source: TensorSource
    make: Callable[[TensorSource], dict[str, torch.Tensor]]
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    making: Making

    def load(self) -> torch.Tensor:
        """Return its values."""
        return self.making(self.source, self.make)[self.name].contiguous()


def made_parts(
    source: TensorSource,
    make: Callable[[TensorSource], dict[str, torch.Tensor]],
    shapes: Mapping[str, torch.Tensor],
    making: Making,
) -> dict[str, TensorSource]:
    """Return the tensors that a source is written as, by name; nothing is made yet.

    Args:
        source: what they are made of.
        make: makes all of them.
        shapes: tensors of their shapes and types, by name.
        making: shared by all that is written together.
    """
    return {n: MadePart(source, make, n, tuple(p.shape), p.dtype, making) for n, p in shapes.items()}


def packed(tensor: QuantisedTensor) -> Packed:
    """Return a source that keeps a tensor's codes in memory, packed."""
    code = tensor.code
    if bits_of(code) == 8:
        words = tensor.codes.contiguous()
    else:
        codes = offset_binary(tensor.codes, code) if code in RANGES else tensor.codes
        words = pack(codes, slot_of(code), -1, torch.uint8)
    return Packed(
        words, replace(tensor, codes=torch.empty(tensor.shape, dtype=tensor.codes.dtype, device="meta"))
    )


def on_meta(tensor: QuantisedTensor) -> QuantisedTensor:
    """Return a tensor without values: shapes and types alone, but for which columns choose which scales."""

    def empty(part: torch.Tensor | None) -> torch.Tensor | None:
        return None if part is None else torch.empty(part.shape, dtype=part.dtype, device="meta")

    scale, codes = empty(tensor.scale), empty(tensor.codes)
    assert scale is not None
    assert codes is not None
    return replace(tensor, codes=codes, scale=scale, zero=empty(tensor.zero), offset=empty(tensor.offset))


def stored_bytes(source: TensorSource) -> int:
    """Return the bytes that a weight takes as it is kept: few-bit codes where it still has them."""
    if isinstance(source, QuantisedSource):
        return source.stored_bytes
    form = quantised_form(source, values=False)
    return numel(source.shape) * source.dtype.itemsize if form is None else form.stored_bytes


def is_quantised(source: TensorSource) -> bool:
    """Return whether a value is kept as codes with scales, moved about since or not."""
    return quantised_form(source, values=False) is not None


def quantised_form(source: TensorSource, *, values: bool = True) -> QuantisedTensor | None:
    """Return the codes and scales whose dequantised value a source has, or None if it has none.

    A value computed from quantised tensors by selecting, moving and joining entries has them where every block of entries
    that share a scale stays whole.

    Args:
        source: of a weight.
        values: whether to read them; otherwise the result tells shapes and types alone.
    """
    try:
        return quantised_or_why(source, values=values)
    except CannotExpress:
        return None


def quantised_or_why(source: TensorSource, *, values: bool = True) -> QuantisedTensor | None:
    """Do as :func:`quantised_form`, but tell why a value computed from quantised tensors has none.

    Returns:
        None if no part of the value was quantised.

    Raises:
        CannotExpress: says which operator broke the form.
    """
    if isinstance(source, QuantisedSource):
        return source.quantised(values=values)
    if not isinstance(source, Computed) or not any(_leads_to_codes(s) for s in source.inputs):
        return None
    found: dict[fx.Node, Any] = {}
    sources = iter(source.inputs)
    for node in source.graph.nodes:
        if node.op == "placeholder":
            operand = next(sources)
            form = quantised_or_why(operand, values=values)
            found[node] = operand if form is None else form
        elif node.op == "output":
            result = found[node.args[0]]
            if not isinstance(result, QuantisedTensor):
                raise CannotExpress("the value does not come from codes alone")
            return result.cast(source.dtype)
        else:
            found[node] = _moved(node, found)
    raise AssertionError("a graph without an output")


def _leads_to_codes(source: TensorSource) -> bool:
    return isinstance(source, QuantisedSource) or (
        isinstance(source, Computed) and any(_leads_to_codes(s) for s in source.inputs)
    )


def _moved(node: fx.Node, found: dict[fx.Node, Any]) -> Any:
    operands = [found[n] for n in node.all_input_nodes]
    if not any(_has_codes(o) for o in operands):
        for used in node.all_input_nodes:
            value = found[used]
            if not isinstance(value, (torch.Tensor, list, tuple)):
                if numel(value.shape) > _LARGEST:
                    raise CannotExpress(f"{used.name} is no table of numbers of entries")
                found[used] = value.load()
        return evaluate(node, found)
    name = operator_name(node.target)
    rule = _RULES.get(name)
    if rule is None:
        if has(node, Trait.IDENTITY):
            return operands[0]
        if has(node, Trait.RESHAPE):
            return operands[0].reshape([int(s) for s in node.meta["val"].shape])
        raise CannotExpress(f"{name} computes with the values")
    given = arguments(node) if name != "getitem" else {"all": node.args[0], "index": node.args[1]}
    for value in node.all_input_nodes:
        if (
            isinstance(found[value], torch.Tensor)
            or _has_codes(found[value])
            or not hasattr(found[value], "load")
        ):
            continue
        # indices of entries are values also where weights are not read
        found[value] = found[value].load() if numel(found[value].shape) <= _LARGEST else found[value]
    return rule(*fx.map_arg(tuple(given.values()), lambda n: found[n]))


def _has_codes(value: Any) -> bool:
    return isinstance(value, QuantisedTensor) or (
        isinstance(value, (list, tuple)) and any(isinstance(v, QuantisedTensor) for v in value)
    )


def _codes(value: Any) -> QuantisedTensor:
    if not isinstance(value, QuantisedTensor):
        raise CannotExpress("codes are joined with plain values")
    return value


def _slice(
    x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> QuantisedTensor:
    form = _codes(x)
    return form.take(dim, torch.arange(form.shape[dim % len(form.shape)])[slice(start, end, step)])


def _narrow(x: Any, dim: int, start: int, length: int) -> QuantisedTensor:
    start = start + _codes(x).shape[dim % len(x.shape)] if start < 0 else start
    return _slice(x, dim, start, start + length)


def _select(x: Any, dim: int, index: int) -> QuantisedTensor:
    form = _codes(x)
    dim %= len(form.shape)
    one = form.take(dim, torch.tensor([index % form.shape[dim]]))
    return one.reshape([s for d, s in enumerate(one.shape) if d != dim])


def _index(x: Any, indices: Any) -> QuantisedTensor:
    form = _codes(x)
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(given) != 1 or not isinstance(given[0][1], torch.Tensor) or given[0][1].dim() != 1:
        raise CannotExpress("entries are chosen by several indices at once")
    ((dim, entries),) = given
    if entries.dtype == torch.bool:
        entries = entries.nonzero().flatten()
    return form.take(dim, torch.where(entries < 0, entries + form.shape[dim], entries))


def _pieces(x: Any, sizes: list[int], dim: int) -> list[QuantisedTensor]:
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [_narrow(x, dim, start, size) for start, size in zip(starts, sizes, strict=True)]


def _split(x: Any, size: Any, dim: int = 0) -> list[QuantisedTensor]:
    total = _codes(x).shape[dim % len(x.shape)]
    return _pieces(x, [min(size, total - start) for start in range(0, total, size)], dim)


def _chunk(x: Any, chunks: int, dim: int = 0) -> list[QuantisedTensor]:
    total = _codes(x).shape[dim % len(x.shape)]
    return _split(x, -(-total // chunks), dim)


def _unbind(x: Any, dim: int = 0) -> list[QuantisedTensor]:
    return [_select(x, dim, k) for k in range(_codes(x).shape[dim % len(x.shape)])]


def _cat(parts: Any, dim: int = 0) -> QuantisedTensor:
    return concatenate([_codes(p) for p in parts], dim)


def _unsqueeze(x: Any, dim: int) -> QuantisedTensor:
    shape = list(_codes(x).shape)
    shape.insert(dim % (len(shape) + 1), 1)
    return _codes(x).reshape(shape)


def _stack(parts: Any, dim: int = 0) -> QuantisedTensor:
    return _cat([_unsqueeze(p, dim) for p in parts], dim)


def _flip(x: Any, dims: list[int]) -> QuantisedTensor:
    for dim in dims:
        x = _codes(x).take(dim, torch.arange(_codes(x).shape[dim]).flip(0))
    return _codes(x)


_RULES: dict[str, Callable[..., Any]] = {
    "aten.slice": _slice,
    "aten.narrow": _narrow,
    "aten.select": _select,
    "aten.index_select": lambda x, dim, entries: _codes(x).take(dim, entries),
    "aten.index": _index,
    "aten.split": _split,
    "aten.split_with_sizes": lambda x, sizes, dim=0: _pieces(x, list(sizes), dim),
    "aten.chunk": _chunk,
    "aten.unbind": _unbind,
    "aten.cat": _cat,
    "aten.stack": _stack,
    "aten.permute": lambda x, order: _codes(x).permute(order),
    "aten.flip": _flip,
    "aten.to": lambda x, dtype, *_: _codes(x).cast(dtype),
    "getitem": lambda all, index: all[index],
}
