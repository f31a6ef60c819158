"""Eight-bit floats with a scale for each block, and four-bit floats with scales that are powers of two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.errors import CheckpointError
from ..ir.quantised.codes import CannotExpress, pack, unpack
from ..ir.quantised.tensor import QuantisedTensor
from .stored import (
    FLOATS,
    FileTensor,
    StoredMatrix,
    require_block,
    require_code,
    require_shapes,
    require_types,
    wrong,
)


@dataclass(frozen=True)
class BlockFloat8:
    """Floats of eight bits with a scale for each block of rows and columns, as DeepSeek V3 and Qwen3 are published.

    ``weight_scale_inv`` multiplies, whatever its name says.

    Args:
        block: rows and columns of a block; (0, 0): one scale for all.
    """

    block: tuple[int, int]
    always_read: tuple[str, ...] = ()
    weight: str = "weight"

    def read(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> QuantisedTensor:
        """Return the matrix."""
        block = (self.block[0] or shape[0], self.block[1] or shape[1])
        size = tuple(-(-s // b) for s, b in zip(shape, block, strict=True))
        return QuantisedTensor(parts["weight"], parts["weight_scale_inv"].reshape(size), "e4m3", block, dtype)

    def write(self, tensor: QuantisedTensor) -> dict[str, torch.Tensor]:
        """Return the tensors of a file."""
        require_code(tensor, "e4m3")
        wanted = tuple(b or s for b, s in zip(self.block, tensor.shape, strict=True))
        has = tuple(min(b, s) for b, s in zip(tensor.block, tensor.shape, strict=True))
        if has != tuple(min(b, s) for b, s in zip(wanted, tensor.shape, strict=True)):
            raise CannotExpress(
                f"the layout has blocks of {wanted[0]} by {wanted[1]}, and this of {has[0]} by {has[1]}"
            )
        if tensor.zero is not None or tensor.group is not None:
            raise CannotExpress("the layout has no zeros")
        return {"weight": tensor.codes, "weight_scale_inv": tensor.scale}


@dataclass(frozen=True)
class Mxfp4:
    """Experts in four-bit floats, 32 of an output under a scale that is a power of two, as GPT-OSS is published.

    The model has the experts' matrices transposed: (experts, inputs, outputs).

    Args:
        weight: what follows the module's name in the name of the matrix.
    """

    weight: str
    always_read: tuple[str, ...] = ()

    def read(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> QuantisedTensor:
        """Return the matrices."""
        experts, inputs, outputs = shape
        blocks = parts[f"{self.weight}_blocks"].reshape(experts, outputs, inputs // 2)
        # as powers of two, exactly; 255, not a number, stays none
        power = parts[f"{self.weight}_scales"].to(torch.float32) - 127
        stored = QuantisedTensor(unpack(blocks, 4, 2, inputs), torch.exp2(power), "e2m1", (1, 1, 32), dtype)
        return stored.permute((0, 2, 1))

    def write(self, tensor: QuantisedTensor) -> dict[str, torch.Tensor]:
        """Return the tensors of a file."""
        require_code(tensor, "e2m1", 3)
        if tensor.divisor is not None or tensor.zero is not None:
            raise CannotExpress("the layout has scales that are powers of two, and no zeros")
        stored = tensor.permute((0, 2, 1))
        require_block(stored, 1, 1, 32)
        experts, outputs, inputs = stored.shape
        packed = pack(stored.codes, 4, 2, torch.uint8).reshape(experts, outputs, inputs // 32, 16)
        power = torch.log2(stored.scale.to(torch.float32))
        if power.device.type != "meta" and not torch.equal(power, power.round()):
            raise CannotExpress("the layout has scales that are powers of two")
        return {f"{self.weight}_blocks": packed, f"{self.weight}_scales": (power + 127).to(torch.uint8)}


def open_block_float8(
    settings: dict[str, Any], tensors: Mapping[str, FileTensor], dtype: torch.dtype
) -> tuple[dict[str, FileTensor], list[str]]:
    """Return a checkpoint's tensors with each matrix of eight-bit floats in place of its parts, and notes.

    Raises:
        CheckpointError: a setting is not known, or tensors contradict it.
    """
    block = settings.get("weight_block_size") or (0, 0)
    if (
        not isinstance(block, (list, tuple))
        or len(block) != 2
        or not all(isinstance(b, int) and b >= 0 for b in block)
    ):
        raise CheckpointError(
            f"quantization_config has a weight_block_size of {block!r}; two numbers were expected"
        )
    if settings.get("fmt", "e4m3") != "e4m3":
        raise CheckpointError(f"eight-bit floats of the kind {settings['fmt']!r} are not read; e4m3 are")
    found = dict(tensors)
    for key in tensors:
        if not key.endswith("weight_scale_inv"):
            continue
        module = key.removesuffix("weight_scale_inv")
        parts = {n: tensors[module + n] for n in ("weight", "weight_scale_inv") if module + n in tensors}
        matrix = parts.get("weight")
        if matrix is None or matrix.dtype != torch.float8_e4m3fn or len(matrix.shape) != 2:
            raise wrong(module, parts, "it has scales, and no matrix of eight-bit floats")
        require_types(module, parts, weight_scale_inv=[*FLOATS, torch.float8_e8m0fnu])
        size = tuple(b or s for b, s in zip(block, matrix.shape, strict=True))
        if torch.Size(tensors[key].shape).numel() != 1 or block != (0, 0):
            expected = tuple(-(-s // b) for s, b in zip(matrix.shape, size, strict=True))
            require_shapes(module, parts, {"weight_scale_inv": expected})
        del found[key]
        layout = BlockFloat8((int(block[0]), int(block[1])))
        found[module + "weight"] = StoredMatrix(
            module, layout, tuple(sorted(parts.items())), tuple(matrix.shape), dtype
        )
    for key, tensor in found.items():
        if tensor.dtype == torch.float8_e4m3fn and not isinstance(tensor, StoredMatrix):
            raise wrong(key, {key: tensor}, "it is of eight-bit floats, and has no weight_scale_inv")
    notes = []
    if settings.get("activation_scheme"):
        notes.append("activations, which the checkpoint means to be rounded to 8 bits, stay as they are")
    return found, notes


def open_mxfp4(
    settings: dict[str, Any], tensors: Mapping[str, FileTensor], dtype: torch.dtype
) -> tuple[dict[str, FileTensor], list[str]]:
    """Return a checkpoint's tensors with each stack of experts' matrices in place of its parts, and notes.

    Raises:
        CheckpointError: tensors contradict one another.
    """
    found = dict(tensors)
    for key in tensors:
        if not key.endswith("_blocks"):
            continue
        stem = key.removesuffix("_blocks")
        module, _, weight = stem.rpartition(".")
        module = f"{module}." if module else ""
        parts = {
            f"{weight}{end}": tensors[stem + end] for end in ("_blocks", "_scales") if stem + end in tensors
        }
        shape = parts[f"{weight}_blocks"].shape
        if len(shape) != 4 or shape[3] != 16 or parts[f"{weight}_blocks"].dtype != torch.uint8:
            raise wrong(
                module, parts, f"blocks of {list(shape)}; (experts, outputs, groups, 16) were expected"
            )
        require_shapes(module, parts, {f"{weight}_scales": tuple(shape[:3])})
        require_types(module, parts, **{f"{weight}_scales": [torch.uint8]})
        for end in ("_blocks", "_scales"):
            del found[stem + end]
        found[stem] = StoredMatrix(
            module, Mxfp4(weight), tuple(sorted(parts.items())), (shape[0], shape[2] * 32, shape[1]), dtype
        )
    return found, []


def block_float8_for(settings: Mapping[str, Any], key: str, form: QuantisedTensor) -> BlockFloat8:
    """Return the layout of eight-bit floats in blocks, by the checkpoint's settings."""
    rows, columns = settings.get("weight_block_size") or (0, 0)
    return BlockFloat8((int(rows), int(columns)))


def mxfp4_for(settings: Mapping[str, Any], key: str, form: QuantisedTensor) -> Mxfp4:
    """Return the layout of four-bit floats for a stack of experts' matrices, by its name."""
    return Mxfp4(key.rpartition(".")[2])
