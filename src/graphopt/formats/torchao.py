"""The layouts of torchao, whose safetensors files say in their headers what the tensors of each weight mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..ir.errors import CheckpointError
from ..ir.quantised.codes import RANGES, CannotExpress
from ..ir.quantised.tensor import QuantisedTensor
from ..ir.storage.safetensors_file import read_metadata
from .stored import (
    FLOATS,
    FileTensor,
    StoredMatrix,
    Written,
    require_block,
    require_code,
    require_shapes,
    require_types,
    wrong,
)

METHOD = "torchao"
KINDS = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
_PLAIN = json.dumps({"_type": "Tensor"})
_LONGEST = 1 << 16
# settings of a weight that say how activations are rounded at run time
_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization", "act_quant_scale", "act_pre_scale")


@dataclass(frozen=True)
class TorchAo:
    """Codes, one to a byte, scales, and where the type has them zeros; named ``_weight_qdata`` and so on.

    Args:
        kind: the class of the weight.
        code: what a code stands for.
        block: how many outputs and inputs share a scale; 0: all.
        described: the rest of what the header says of the weight, as JSON.
        names: of its tensors, in the header's order.
    """

    kind: str
    code: str
    block: tuple[int, int]
    described: str
    names: tuple[str, ...]
    always_read: tuple[str, ...] = ()
    weight: str = "weight"

    def read(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> QuantisedTensor:
        """Return the matrix."""
        block = (self.block[0] or shape[0], self.block[1] or shape[1])
        zero = parts["_weight_zero_point"] if "zero_point" in self.names else None
        return QuantisedTensor(parts["_weight_qdata"], parts["_weight_scale"], self.code, block, dtype, zero)

    def write(self, tensor: QuantisedTensor) -> dict[str, torch.Tensor]:
        """Return the tensors of a file."""
        require_code(tensor, self.code)
        require_block(tensor, *self.block)
        if (tensor.zero is None) != ("zero_point" not in self.names) or tensor.group is not None:
            raise CannotExpress("the layout has zeros where this has none, or the other way round")
        parts = {"_weight_qdata": tensor.codes, "_weight_scale": tensor.scale}
        if tensor.zero is not None:
            parts["_weight_zero_point"] = tensor.zero
        return parts

    def header(self, shape: tuple[int, ...]) -> str:
        """Return what the header of a file says of a weight of this shape."""
        block = [b or s for b, s in zip(self.block, shape, strict=True)]
        data = {k: block if k == "block_size" else v for k, v in json.loads(self.described).items()}
        return json.dumps({"_type": self.kind, "_data": data, "_tensor_data_names": list(self.names)})


def open_matrices(
    settings: dict[str, Any], tensors: Mapping[str, FileTensor], dtype: torch.dtype
) -> tuple[dict[str, FileTensor], list[str]]:
    """Return a checkpoint's tensors with each quantised matrix in place of its parts, and notes.

    Args:
        settings: ``quantization_config`` of the configuration; the headers of the files say what counts.
        tensors: of the files.
        dtype: of the model; values have the type that the header names.

    Raises:
        CheckpointError: a class of weights is not known, or tensors contradict the headers.
    """
    headers: dict[str, tuple[Path, Any]] = {}
    for path in sorted({t.path for t in tensors.values()}):
        for name, text in read_metadata(path).items():
            headers[name] = (path, text)
    found = dict(tensors)
    notes: set[str] = set()
    for name, (path, text) in headers.items():
        if name in ("format", "tensor_names", "writer") or not isinstance(text, str) or len(text) > _LONGEST:
            continue
        try:
            said = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if not isinstance(said, dict) or said.get("_type") in (None, "Tensor"):
            continue
        module = name.removesuffix("weight")
        if module == name:
            raise CheckpointError(f"{path}: torchao has quantised {name!r}, which is no weight of a module")
        parts = {
            n: tensors[module + n]
            for n in ("_weight_qdata", "_weight_scale", "_weight_zero_point")
            if module + n in tensors
        }
        layout, value = _layout(path, module, said, parts)
        if any(said["_data"].get(key) is not None for key in _ACTIVATIONS):
            notes.add("activations, which the checkpoint means to be rounded at run time, stay as they are")
        for part in parts:
            del found[module + part]
        matrix = parts["_weight_qdata"]
        found[name] = StoredMatrix(
            module, layout, tuple(sorted(parts.items())), tuple(matrix.shape), value or dtype
        )
    for key, tensor in found.items():
        if "_weight_" in key.rpartition(".")[2] and not isinstance(tensor, StoredMatrix):
            raise CheckpointError(
                f"{tensor.path}: {key!r} is part of a weight of torchao of which the file's header says nothing",
                hint="weights that torchao pickled, or wrote before its version 0.15, are read by torchao alone",
            )
    return found, sorted(notes)


def _layout(
    path: Path, module: str, said: dict[str, Any], parts: dict[str, FileTensor]
) -> tuple[TorchAo, torch.dtype | None]:
    kind, data, names = said["_type"], said.get("_data"), said.get("_tensor_data_names")
    if kind not in KINDS:
        raise CheckpointError(
            f"{path}: {module}weight is a {str(kind)[:60]!r} of torchao, which is not read",
            hint=f"known are {', '.join(KINDS)}; torchao itself reads it, and can dequantise it",
        )
    if (
        not isinstance(data, dict)
        or not isinstance(names, list)
        or not all(isinstance(n, str) for n in names)
        or not {"qdata", "scale"} <= set(names) <= {"qdata", "scale", "zero_point"}
    ):
        raise wrong(module, parts, f"the header has {str(names)[:100]} for a {kind}")
    for n in names:
        if f"_weight_{n}" not in parts:
            raise wrong(module, parts, f"it has no _weight_{n}")
    matrix, block = parts["_weight_qdata"], data.get("block_size")
    if kind == "IntxUnpackedToInt8Tensor":
        code = _named(data.get("target_dtype"))
        if code not in RANGES or code.startswith("u"):
            raise wrong(module, parts, f"its codes are said to be of the type {code[:40]!r}")
    else:
        code = "int8" if kind == "Int8Tensor" else "e4m3"
    require_types(
        module,
        parts,
        _weight_qdata=[torch.float8_e4m3fn if code == "e4m3" else torch.int8],
        _weight_scale=FLOATS,
        _weight_zero_point=[torch.int8],
    )
    if (
        len(matrix.shape) != 2
        or not isinstance(block, list)
        or len(block) != 2
        or not all(type(b) is int and b > 0 for b in block)
        or any(s % b for s, b in zip(matrix.shape, block, strict=True))
    ):
        raise wrong(
            module, parts, f"blocks of {str(block)[:60]} do not divide a matrix of {list(matrix.shape)}"
        )
    size = tuple(s // b for s, b in zip(matrix.shape, block, strict=True))
    require_shapes(
        module,
        parts,
        {"_weight_scale": size, **({"_weight_zero_point": size} if "zero_point" in names else {})},
    )
    # the whole width stays the whole width when columns go
    of = (0 if block[0] == matrix.shape[0] != 1 else block[0], 0 if block[1] == matrix.shape[1] else block[1])
    value = getattr(torch, _named(data.get("dtype")), None)
    is_float = isinstance(value, torch.dtype) and value.is_floating_point
    return TorchAo(kind, code, of, json.dumps(data), tuple(names)), value if is_float else None


def _named(value: Any) -> str:
    """Return the name of a type as the library encodes it."""
    return str(value.get("_data")) if isinstance(value, dict) else ""


def describe(written: Written, matrices: Mapping[str, tuple[TorchAo, tuple[int, ...]]]) -> None:
    """Put what the headers of files say of each weight beside the tensors to write."""
    stored = {n for k in matrices for n in written.parts.get(k, ())}
    names = [*matrices, *(n for n in written.tensors if n not in stored)]
    written.header = dict.fromkeys(names, _PLAIN) | {
        key: layout.header(shape) for key, (layout, shape) in matrices.items()
    }
    written.header["tensor_names"] = json.dumps(names)
