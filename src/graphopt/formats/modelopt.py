"""The layouts of NVIDIA's ModelOpt (``hf_quant_config.json``): FP8 with one scale for a matrix, and NVFP4."""

from __future__ import annotations

import re
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
    by_module,
    require_block,
    require_code,
    require_shapes,
    require_types,
    wrong,
)

METHOD = "modelopt"
_GROUP = 16
_ALGORITHMS = ("FP8", "NVFP4")


@dataclass(frozen=True)
class Float8:
    """Floats of eight bits with one scale for the matrix.

    Args:
        scale_shape: () or (1,), as the file has it.
    """

    scale_shape: tuple[int, ...]
    always_read: tuple[str, ...] = ()
    weight: str = "weight"

    def read(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> QuantisedTensor:
        """Return the matrix."""
        return QuantisedTensor(parts["weight"], parts["weight_scale"].reshape(1, 1), "e4m3", shape, dtype)

    def write(self, tensor: QuantisedTensor) -> dict[str, torch.Tensor]:
        """Return the tensors of a file."""
        require_code(tensor, "e4m3")
        require_block(tensor, 0, 0)
        if tensor.zero is not None or tensor.group is not None:
            raise CannotExpress("the layout has no zeros")
        return {"weight": tensor.codes, "weight_scale": tensor.scale.reshape(self.scale_shape)}


@dataclass(frozen=True)
class Nvfp4:
    """Four-bit floats, two to a byte; a scale of eight bits for sixteen inputs, multiplied by one number for the matrix.

    Args:
        scale_shape: of that number, () or (1,), as the file has it.
    """

    scale_shape: tuple[int, ...]
    always_read: tuple[str, ...] = ()
    weight: str = "weight"

    def read(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> QuantisedTensor:
        """Return the matrix."""
        codes = unpack(parts["weight"], 4, 1, shape[1])
        common = parts["weight_scale_2"].reshape(1)
        return QuantisedTensor(codes, parts["weight_scale"], "e2m1", (1, _GROUP), dtype, multiplier=common)

    def write(self, tensor: QuantisedTensor) -> dict[str, torch.Tensor]:
        """Return the tensors of a file."""
        require_code(tensor, "e2m1")
        require_block(tensor, 1, _GROUP)
        if tensor.multiplier is None or tensor.scale.dtype != torch.float8_e4m3fn:
            raise CannotExpress("the layout has scales of eight bits under one for the matrix")
        return {
            "weight": pack(tensor.codes, 4, 1, torch.uint8),
            "weight_scale": tensor.scale,
            "weight_scale_2": tensor.multiplier.reshape(self.scale_shape),
        }


_PARTS = re.compile(r"(.*\.)?(weight_scale|weight_scale_2|input_scale|k_scale|v_scale|pre_quant_scale)")


def open_matrices(
    settings: dict[str, Any], tensors: Mapping[str, FileTensor], dtype: torch.dtype
) -> tuple[dict[str, FileTensor], list[str]]:
    """Return a checkpoint's tensors with each quantised matrix in place of its parts, and notes.

    Args:
        settings: the contents of hf_quant_config.json, or ``quantization_config``, which has them flat.
        tensors: of the files.
        dtype: of the model and of the values.

    Raises:
        CheckpointError: the algorithm is not known, or tensors contradict it.
    """
    inner = settings.get("quantization", settings)
    if not isinstance(inner, dict):
        raise CheckpointError("quantization of ModelOpt must hold an object")
    algorithm = inner.get("quant_algo")
    if algorithm not in _ALGORITHMS:
        producer = settings.get("producer")
        version = producer.get("version") if isinstance(producer, dict) else None
        raise CheckpointError(
            f"ModelOpt{f' {version}' if version else ''} has quantised the checkpoint with {str(algorithm)[:60]!r}, "
            "which is not read",
            hint=f"known are {', '.join(_ALGORITHMS)}; TensorRT-LLM and vLLM read others",
        )
    group = inner.get("group_size")
    if algorithm == "NVFP4" and group not in (None, _GROUP):
        raise CheckpointError(
            f"ModelOpt's NVFP4 has a scale for {_GROUP} inputs; the settings say {str(group)[:40]}"
        )
    modules = by_module(tensors, _PARTS)
    found = dict(tensors)
    for module, parts in modules.items():
        if module + "weight" in tensors:
            parts["weight"] = tensors[module + "weight"]
        if "pre_quant_scale" in parts:
            raise wrong(
                module, parts, f"{algorithm} has no pre_quant_scale, by which inputs would be multiplied"
            )
        beside = {n: parts.pop(n) for n in ("input_scale", "k_scale", "v_scale") if n in parts}
        if not {"weight_scale", "weight_scale_2"} & set(parts):
            continue
        for other in beside:
            del found[module + other]
        matrix = _matrix(module, algorithm, parts, dtype)
        for name in parts:
            del found[module + name]
        found[module + "weight"] = StoredMatrix(module, *matrix, tuple(sorted(beside.items())))
    for key, stored in found.items():
        if not isinstance(stored, StoredMatrix) and stored.dtype == torch.float8_e4m3fn:
            raise wrong(key, {key: stored}, "it is of eight-bit floats, and has no weight_scale")
    notes = []
    if any("input_scale" in parts for parts in modules.values()) or algorithm == "FP8":
        notes.append("activations, which the checkpoint means to be rounded too, stay as they are")
    if inner.get("kv_cache_quant_algo") or inner.get("kv_cache_scheme"):
        notes.append("keys and values, which the checkpoint means to be rounded too, stay as they are")
    return found, notes


def _matrix(
    module: str, algorithm: str, parts: dict[str, FileTensor], dtype: torch.dtype
) -> tuple[Any, tuple[tuple[str, FileTensor], ...], tuple[int, ...], torch.dtype]:
    matrix = parts.get("weight")
    kind = torch.float8_e4m3fn if algorithm == "FP8" else torch.uint8
    if matrix is None or matrix.dtype != kind or len(matrix.shape) != 2:
        raise wrong(module, parts, f"it has scales, and no matrix of {algorithm}")
    common = "weight_scale" if algorithm == "FP8" else "weight_scale_2"
    if common not in parts or tuple(parts[common].shape) not in ((), (1,)):
        raise wrong(module, parts, f"{common} must be one number")
    require_types(module, parts, **{common: FLOATS})
    layout: Any
    if algorithm == "FP8":
        if "weight_scale_2" in parts:
            raise wrong(module, parts, "FP8 has no weight_scale_2")
        layout, shape = Float8(tuple(parts[common].shape)), tuple(matrix.shape)
    else:
        shape = (matrix.shape[0], matrix.shape[1] * 2)
        if shape[1] % _GROUP:
            raise wrong(module, parts, f"groups of {_GROUP} do not divide {shape[1]} inputs")
        require_shapes(module, parts, {"weight_scale": (shape[0], shape[1] // _GROUP)})
        require_types(module, parts, weight_scale=[torch.float8_e4m3fn])
        layout = Nvfp4(tuple(parts[common].shape))
    return layout, tuple(sorted(parts.items())), shape, dtype


def left_out(settings: dict[str, Any], modules: list[str]) -> dict[str, Any]:
    """Return settings that leave more modules alone."""
    inner = settings.get("quantization")
    if isinstance(inner, dict):
        names = sorted({*(inner.get("exclude_modules") or ()), *modules})
        return {**settings, "quantization": {**inner, "exclude_modules": names}}
    return {**settings, "ignore": sorted({*(settings.get("ignore") or ()), *modules})}
