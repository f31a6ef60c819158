"""A matrix as checkpoints store it in few bits: several tensors, and the layout that tells what they mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ..ir.errors import CheckpointError
from ..ir.quantised.codes import CannotExpress
from ..ir.quantised.stored import quantised_form
from ..ir.quantised.tensor import QuantisedTensor
from ..ir.running.fold import Computed
from ..ir.weights import TensorSource


class FileTensor(TensorSource, Protocol):
    """A tensor of a file."""

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def key(self) -> str:
        """Its name in the file."""
        ...


class Layout(Protocol):
    """What the tensors of one quantised matrix mean."""

    @property
    def always_read(self) -> tuple[str, ...]:
        """Parts whose values decide shapes, read also where only shapes are asked."""
        ...

    @property
    def weight(self) -> str:
        """What follows the module's name in the name of the matrix itself."""
        ...

    def read(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> QuantisedTensor:
        """Return the matrix. Parts are named by what follows the module's name, and may be on the meta device."""
        ...

    def write(self, tensor: QuantisedTensor) -> dict[str, torch.Tensor]:
        """Return the tensors of a file for a matrix, named as for :meth:`read`.

        Raises:
            CannotExpress: the layout has no place for it.
        """
        ...


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix that is stored in several tensors, dequantised when it is loaded.

    Args:
        module: the name before that of each part.
        layout: what the parts mean.
        parts: names, as the layout has them, and tensors of the files.
        shape: of the matrix.
        dtype: of its values.
    """

    module: str
    layout: Layout
    parts: tuple[tuple[str, FileTensor], ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def key(self) -> str:
        """The name of the matrix."""
        return self.module + self.layout.weight

    @property
    def path(self) -> Path:
        """The file of its first part."""
        return self.parts[0][1].path

    @property
    def stored_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(torch.Size(p.shape).numel() * p.dtype.itemsize for _, p in self.parts)

    @property
    def kept_as(self) -> str:
        """What a listing says of it."""
        return self.quantised(values=False).kept_as

    def quantised(self, *, values: bool = True) -> QuantisedTensor:
        """Return the codes and scales.

        Raises:
            CheckpointError: the stored scales are no numbers, or hide what the codes say.
        """
        read = {
            name: part.load()
            if values or name in self.layout.always_read
            else torch.empty(part.shape, dtype=part.dtype, device="meta")
            for name, part in self.parts
        }
        found = self.layout.read(read, self.shape, self.dtype)
        if values:
            self._require_numbers(found)
        return found

    def _require_numbers(self, found: QuantisedTensor) -> None:
        scales = found.scales()
        if not bool(torch.isfinite(scales).all()):
            raise CheckpointError(f"{self.path}: scales of {self.key!r} are not finite; the file is damaged")
        if bool((scales == 0).any()):
            lost = found.spread(scales) == 0
            zero = 0 if found.zero is None else found.spread(found.zero.to(torch.float32))
            if found.code.startswith(("int", "uint", "e4m3")) and bool(
                (lost & (found.codes.float() != zero)).any()
            ):
                raise CheckpointError(
                    f"{self.path}: {self.key!r} has scales of 0 for codes that are not 0; the file is damaged"
                )

    def load(self) -> torch.Tensor:
        """Return the values."""
        return self.quantised().dequantise()


def wrong(module: str, parts: Mapping[str, FileTensor], why: str) -> CheckpointError:
    """Return the error that a matrix is stored inconsistently."""
    path = next((p.path for p in parts.values()), Path("the checkpoint"))
    return CheckpointError(
        f"{path}: {module} is stored inconsistently: {why}", hint="fetch the checkpoint again"
    )


def require_shapes(
    module: str, parts: Mapping[str, FileTensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Require that parts are there, with these shapes.

    Raises:
        CheckpointError: one is missing or of another shape.
    """
    for name, shape in expected.items():
        if name not in parts:
            raise wrong(module, parts, f"it has no {name}")
        if tuple(parts[name].shape) != shape:
            raise wrong(
                module,
                parts,
                f"{name} has the shape {list(parts[name].shape)}, and {list(shape)} goes with the others",
            )


def leaves(source: TensorSource) -> Iterator[TensorSource]:
    """Yield the stored tensors that a value is computed from."""
    if isinstance(source, Computed):
        for operand in source.inputs:
            yield from leaves(operand)
    else:
        yield source


def layout_of(source: TensorSource) -> Layout | None:
    """Return the layout that the quantised matrices behind a value were stored in, or None."""
    return next((leaf.layout for leaf in leaves(source) if isinstance(leaf, StoredMatrix)), None)


class _Encoder:
    """Encodes one matrix at a time, whose parts are asked for one after another."""

    def __init__(self) -> None:
        self.of: tuple[TensorSource, Layout] | None = None
        self.parts: dict[str, torch.Tensor] = {}

    def __call__(self, source: TensorSource, layout: Layout) -> dict[str, torch.Tensor]:
        if self.of is None or self.of[0] is not source or self.of[1] != layout:
            form = quantised_form(source)
            if form is None:
                raise CannotExpress("the value has no codes")
            self.of, self.parts = (source, layout), layout.write(form)
        return self.parts


@dataclass(frozen=True, eq=False)
class EncodedPart:
    """One of the tensors that a matrix is written as, encoded when it is loaded."""

    source: TensorSource
    layout: Layout
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    encoder: _Encoder

    def load(self) -> torch.Tensor:
        """Return its values."""
        return self.encoder(self.source, self.layout)[self.name].contiguous()


def encoded(sources: Mapping[str, tuple[TensorSource, Layout]]) -> dict[str, dict[str, TensorSource]]:
    """Return, for each matrix by name, the tensors to write, by what follows the module's name; nothing is read.

    Raises:
        CannotExpress: a layout has no place for one; ask for one matrix at a time to know which.
    """
    encoder = _Encoder()
    found: dict[str, dict[str, TensorSource]] = {}
    for key, (source, layout) in sources.items():
        form = quantised_form(source, values=False)
        if form is None:
            raise CannotExpress(f"{key} has no codes")
        found[key] = {
            name: EncodedPart(source, layout, name, tuple(part.shape), part.dtype, encoder)
            for name, part in layout.write(form).items()
        }
    return found


def require_code(tensor: QuantisedTensor, code: str, rank: int = 2) -> None:
    """Require the code and rank that a layout has.

    Raises:
        CannotExpress: the tensor has others.
    """
    if tensor.code != code:
        raise CannotExpress(f"the layout stores {code}, and this is {tensor.code}")
    if len(tensor.shape) != rank:
        raise CannotExpress(
            f"the layout stores tensors of {rank} dimensions, and this has {len(tensor.shape)}"
        )
    if tensor.offset is not None:
        raise CannotExpress("the layout has no offsets")


def require_block(tensor: QuantisedTensor, *block: int) -> None:
    """Require the blocks that a layout has; 0 stands for all entries along a dimension.

    Raises:
        CannotExpress: the tensor has others, or its last block is not whole.
    """
    for dim, (size, has, wanted) in enumerate(zip(tensor.shape, tensor.block, block, strict=True)):
        expected = wanted or size
        if min(has, size) != min(expected, size) or (wanted and size % wanted):
            raise CannotExpress(
                f"the layout has a scale for each {wanted or 'all'} entries of dimension {dim}, and this has one for each "
                f"{has} of {size}"
            )
