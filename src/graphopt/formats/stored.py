"""A matrix as checkpoints store it in few bits: several tensors, and the layout that tells what they mean."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from ..ir.errors import CheckpointError
from ..ir.quantised.codes import CannotExpress
from ..ir.quantised.stored import Making, made_parts, quantised_form
from ..ir.quantised.tensor import QuantisedTensor
from ..ir.running.fold import Computed
from ..ir.weights import TensorSource

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Types that scales have, where a layout does not say more."""


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
        beside: what the files have beside it for other purposes, such as scales of activations; written again.
    """

    module: str
    layout: Layout
    parts: tuple[tuple[str, FileTensor], ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    beside: tuple[tuple[str, FileTensor], ...] = ()

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
        f"{path}: {module.rstrip('.')} is stored inconsistently: {why}", hint="fetch the checkpoint again"
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


def require_types(module: str, parts: Mapping[str, FileTensor], **allowed: Collection[torch.dtype]) -> None:
    """Require that parts that are there have one of the types that are allowed for each.

    Raises:
        CheckpointError: one has another.
    """
    for name, types in allowed.items():
        part = parts.get(name)
        if part is not None and part.dtype not in types:
            listed = " or ".join(str(t).removeprefix("torch.") for t in types)
            raise wrong(
                module, parts, f"{name} has the type {str(part.dtype).removeprefix('torch.')}, not {listed}"
            )


def leaves(source: TensorSource) -> Iterator[TensorSource]:
    """Yield the stored tensors that a value is computed from."""
    if isinstance(source, Computed):
        for operand in source.inputs:
            yield from leaves(operand)
    else:
        yield source


def stored_matrices(source: TensorSource) -> list[StoredMatrix]:
    """Return the quantised matrices behind a value, each once."""
    return list(dict.fromkeys(leaf for leaf in leaves(source) if isinstance(leaf, StoredMatrix)))


def layout_of(source: TensorSource) -> Layout | None:
    """Return the layout that the quantised matrices behind a value were stored in, or None."""
    return next((leaf.layout for leaf in leaves(source) if isinstance(leaf, StoredMatrix)), None)


@dataclass
class Written:
    """What a checkpoint's tensors are written as.

    Attributes:
        tensors: by name in the files.
        settings: ``quantization_config``, or None if nothing is quantised.
        kept: matrices that are written as codes.
        plain: matrices written as plain numbers, although they were quantised, with the reasons.
        parts: names of the tensors that each matrix of ``kept`` makes.
        header: strings for the headers of the files.
        not_on_cpu: why the method's library gives other values on a CPU, for some of the matrices.
        files: contents of small JSON files that tell how the folder is quantised, by name.
    """

    tensors: dict[str, TensorSource] = field(default_factory=dict)
    settings: dict[str, Any] | None = None
    kept: list[str] = field(default_factory=list)
    plain: dict[str, str] = field(default_factory=dict)
    parts: dict[str, list[str]] = field(default_factory=dict)
    header: dict[str, str] = field(default_factory=dict)
    not_on_cpu: str = ""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def encoded(source: TensorSource, layout: Layout, making: Making) -> dict[str, TensorSource]:
    """Return the tensors that a matrix is written as, by what follows the module's name.

    Nothing is read, but for the few layouts in which only values tell whether they can hold a matrix. A matrix that is
    still the one that was read is written in the tensors that it was read from.

    Args:
        source: of the matrix, which has codes.
        layout: to write it in.
        making: shared by all that is written together.

    Raises:
        CannotExpress: the layout has no place for it.
    """
    if isinstance(source, StoredMatrix) and source.layout == layout:
        return dict((*source.parts, *source.beside))

    def make(source: TensorSource) -> dict[str, torch.Tensor]:
        form = quantised_form(source)
        assert form is not None
        return layout.write(form)

    form = quantised_form(source, values=False)
    if form is None:
        raise CannotExpress("the value has no codes")
    written = layout.write(form)
    depends = getattr(layout, "depends_on_values", None)
    if depends is not None and depends(form.shape):
        making(source, make)
    found = made_parts(source, make, written, making)
    matrices = stored_matrices(source)
    if len(matrices) == 1:
        found |= dict(matrices[0].beside)
    elif any(m.beside for m in matrices):
        raise CannotExpress("matrices with scales of activations of their own were joined")
    return found


def by_module(tensors: Mapping[str, FileTensor], parts: re.Pattern[str]) -> dict[str, dict[str, FileTensor]]:
    """Return the tensors whose names match, by the module before and by part.

    Args:
        tensors: of the files, by name.
        parts: two groups: the module with its point, or nothing, and the part.
    """
    found: dict[str, dict[str, FileTensor]] = {}
    for key, tensor in tensors.items():
        match = parts.fullmatch(key)
        if match:
            found.setdefault(match.group(1) or "", {})[match.group(2)] = tensor
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
