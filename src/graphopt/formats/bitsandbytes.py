"""The layouts of bitsandbytes: four-bit quantiles under a scale for each 64 numbers, and LLM.int8."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
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

METHOD = "bitsandbytes"
_STATE = "weight.quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_LONGEST = 1 << 12
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")


@dataclass(frozen=True)
class FourBits:
    """Codes of a table of sixteen numbers, two to a byte, the first in the high bits, over the flattened matrix.

    Scales (``absmax``) may themselves be codes of eight bits with scales (double quantisation). Matrices of which rows were
    taken or joined are written with plain scales, which is exact.

    Args:
        kind: "nf4" or "fp4".
        block: how many numbers share a scale.
        nested: None, or how many scales share a scale, and what is added to scales.
    """

    kind: str
    block: int
    nested: tuple[int, float] | None
    always_read: tuple[str, ...] = ()
    weight: str = "weight"

    def read(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> QuantisedTensor:
        """Return the matrix."""
        count = math.prod(shape)
        codes = unpack(parts["weight"].flatten(), 4, 0, count, (1, 0))
        scale = parts["weight.absmax"]
        if self.nested is not None:
            size, offset = self.nested
            if scale.device.type == "meta":
                scale = torch.empty(scale.shape, dtype=torch.float32, device="meta")
            else:
                whole = parts["weight.nested_absmax"].repeat_interleave(size)[: scale.numel()]
                scale = parts["weight.nested_quant_map"][scale.to(torch.int32)] * whole + offset
        flat = QuantisedTensor(codes, scale, "nf4", (self.block,), dtype, among=parts["weight.quant_map"])
        if shape[1] % self.block and self.block % shape[1]:
            # blocks cross the borders of rows: in parts that do not, each with the scale of its block
            part = math.gcd(shape[1], self.block)
            scale = scale.repeat_interleave(self.block // part)[: count // part]
            flat = replace(flat, scale=scale, block=(part,))
        return flat.reshape(shape)

    def write(self, tensor: QuantisedTensor) -> dict[str, torch.Tensor]:
        """Return the tensors of a file."""
        require_code(tensor, "nf4")
        if tensor.among is None or tensor.zero is not None or tensor.group is not None:
            raise CannotExpress("the layout has no zeros, and a table of numbers")
        shape = tuple(tensor.shape)
        count = math.prod(shape)
        flat = tensor.reshape((count,))
        scale, part = flat.scale.to(torch.float32), flat.block[0]
        if count > self.block and self.block % part:
            raise CannotExpress(f"the layout has a scale for {self.block} numbers, and this for {part}")
        if part < self.block and count > part:
            each, blocks = self.block // part, -(-count // self.block)
            missing = blocks * each - scale.numel()
            scale = torch.cat([scale, *([scale[-1:]] * missing)]).reshape(blocks, each)
            if scale.device.type != "meta" and not bool((scale == scale[:, :1]).all()):
                raise CannotExpress(f"numbers moved out of the {self.block} that share a scale")
            scale = scale[:, 0]
        state: dict[str, Any] = {
            "quant_type": self.kind, "blocksize": self.block, "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(shape),
        }  # fmt: skip
        return {
            "weight": pack(flat.codes, 4, 0, torch.uint8, (1, 0)).reshape(-1, 1),
            "weight.absmax": scale,
            "weight.quant_map": tensor.among,
            _STATE + self.kind: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }

    def depends_on_values(self, shape: tuple[int, ...]) -> bool:
        """Return whether only values tell that a matrix of this shape can be written."""
        return bool(shape[-1] % self.block)


@dataclass(frozen=True)
class Int8:
    """Integers of eight bits, with the largest size of each output's numbers, which the integer 127 stands for."""

    always_read: tuple[str, ...] = ()
    weight: str = "weight"

    def read(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> QuantisedTensor:
        """Return the matrix."""
        scale = parts["SCB"].reshape(shape[0], 1)
        # the constant as the library spells it
        return QuantisedTensor(
            parts["weight"], scale, "int8", (1, shape[1]), dtype, constant=7.874015718698502e-3
        )

    def write(self, tensor: QuantisedTensor) -> dict[str, torch.Tensor]:
        """Return the tensors of a file."""
        require_code(tensor, "int8")
        require_block(tensor, 1, 0)
        if tensor.zero is not None or tensor.group is not None or tensor.constant == 1:
            raise CannotExpress("the layout has no zeros, and the largest numbers in place of scales")
        return {
            "weight": tensor.codes,
            "SCB": tensor.scale.reshape(-1),
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        }


def open_matrices(
    settings: dict[str, Any], tensors: Mapping[str, FileTensor], dtype: torch.dtype
) -> tuple[dict[str, FileTensor], list[str]]:
    """Return a checkpoint's tensors with each quantised matrix in place of its parts, and notes.

    Args:
        settings: ``quantization_config`` of the configuration; what lies beside each matrix counts.
        tensors: of the files.
        dtype: of the model, of which the values of eight-bit matrices are; those of four bits say their own.

    Raises:
        CheckpointError: a kind is not known, or tensors contradict one another.
    """
    found = dict(tensors)
    notes: list[str] = []
    for key in tensors:
        module, dot, name = key.rpartition("weight.quant_state.")
        if dot:
            matrix = _four_bits(module, name, tensors)
        elif key.rpartition(".")[2] == "SCB":
            module = key.removesuffix("SCB")
            parts = {
                n: tensors[module + n] for n in ("weight", "SCB", "weight_format") if module + n in tensors
            }
            matrix = _int8(module, parts, dtype)
            notes = ["activations, which the library rounds to 8 bits but for outliers, stay as they are"]
        else:
            continue
        for part, _ in matrix.parts:
            del found[module + part]
        found[module + "weight"] = matrix
    for key, tensor in found.items():
        if key.endswith((".absmax", ".quant_map", ".weight_format")) and not isinstance(tensor, StoredMatrix):
            raise CheckpointError(
                f"{tensor.path}: {key!r} is part of a matrix of bitsandbytes whose other parts are missing",
                hint="fetch the checkpoint again",
            )
    return found, notes


def _four_bits(module: str, name: str, tensors: Mapping[str, FileTensor]) -> StoredMatrix:
    kind = name.removeprefix("bitsandbytes__")
    names = ["weight", "weight.absmax", "weight.quant_map", _STATE + kind, *_NESTED]
    parts = {n: tensors[module + n] for n in names if module + n in tensors}
    if kind not in _KINDS:
        raise CheckpointError(
            f"{module}weight is of the kind {name[:60]!r} of bitsandbytes, which is not read",
            hint=f"known are {', '.join(_KINDS)} and int8; transformers loads others with the library",
        )
    text = parts[_STATE + kind]
    if text.dtype != torch.uint8 or len(text.shape) != 1 or text.shape[0] > _LONGEST:
        raise wrong(module, parts, f"{name} is no text of JSON")
    try:
        state = json.loads(bytes(text.load().tolist()).decode())
        shape, block = tuple(state["shape"]), state["blocksize"]
        value = getattr(torch, str(state["dtype"]))
        nested = (
            (state["nested_blocksize"], float(state["nested_offset"])) if "nested_offset" in state else None
        )
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise wrong(
            module, parts, f"{name} does not say the matrix's shape, type and blocks: {error}"
        ) from error
    numbers = [*shape, block, *([nested[0]] if nested else [])]
    if (
        len(shape) != 2
        or not all(type(n) is int and 0 < n < 2**40 for n in numbers)
        or state.get("quant_type") != kind
        or not isinstance(value, torch.dtype)
        or not value.is_floating_point
        or (nested and not math.isfinite(nested[1]))
    ):
        raise wrong(module, parts, f"{name} says {str(state)[:200]}")
    count = math.prod(shape)
    blocks = -(-count // block)
    if module + "weight" in tensors and tensors[module + "weight"].dtype != torch.uint8:
        raise CheckpointError(
            f"{module}weight keeps its codes as {tensors[module + 'weight'].dtype}; bytes are read",
            hint="save it with bnb_4bit_quant_storage uint8",
        )
    expected: dict[str, tuple[int, ...]] = {
        "weight": (-(-count // 2), 1), "weight.absmax": (blocks,), "weight.quant_map": (16,)
    }  # fmt: skip
    if nested:
        expected |= {"weight.nested_absmax": (-(-blocks // nested[0]),), "weight.nested_quant_map": (256,)}
    require_shapes(module, parts, expected)
    types: dict[str, Any] = {n: [torch.float32] for n in expected if n != "weight"}
    if nested:
        types["weight.absmax"] = [torch.uint8]
    require_types(module, parts, **types)
    if nested:
        nested = (min(nested[0], blocks), nested[1])
    return StoredMatrix(module, FourBits(kind, block, nested), tuple(sorted(parts.items())), shape, value)


def _int8(module: str, parts: dict[str, FileTensor], dtype: torch.dtype) -> StoredMatrix:
    matrix = parts.get("weight")
    if matrix is None or matrix.dtype != torch.int8 or len(matrix.shape) != 2:
        raise wrong(module, parts, "it has scales (SCB), and no matrix of integers of eight bits")
    require_shapes(module, parts, {"SCB": (matrix.shape[0],)})
    require_types(module, parts, SCB=FLOATS)
    form = parts.get("weight_format")
    if form is not None and (tuple(form.shape) != () or int(form.load())):
        raise CheckpointError(
            f"{module}weight lies in an order of bitsandbytes for one kind of GPU, which is not read",
            hint="save it again with bitsandbytes 0.45 or later, which keeps rows",
        )
    return StoredMatrix(module, Int8(), tuple(sorted(parts.items())), tuple(matrix.shape), dtype)
