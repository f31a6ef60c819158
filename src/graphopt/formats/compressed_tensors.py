"""The layouts of the library compressed-tensors, which llm-compressor writes and vLLM and transformers read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..ir.errors import CheckpointError
from ..ir.quantised.codes import CannotExpress, from_offset_binary, offset_binary, pack, unpack
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

METHOD = "compressed-tensors"
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized")


@dataclass(frozen=True)
class PackQuantized:
    """Integers of 2, 4 or 8 bits in words of 32 bits, along the inputs; zeros packed along the outputs.

    Args:
        bits: of a number.
        group: how many inputs share a scale; 0: all of an output.
        symmetric: whether there are no zeros.
    """

    bits: int
    group: int
    symmetric: bool
    always_read: tuple[str, ...] = ()
    weight: str = "weight"

    def read(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> QuantisedTensor:
        """Return the matrix."""
        code = f"int{self.bits}"
        codes = from_offset_binary(unpack(parts["weight_packed"], self.bits, 1, shape[1]), code)
        zero = None
        if not self.symmetric:
            zero = from_offset_binary(unpack(parts["weight_zero_point"], self.bits, 0, shape[0]), code)
        return QuantisedTensor(codes, parts["weight_scale"], code, (1, self.group or shape[1]), dtype, zero)

    def write(self, tensor: QuantisedTensor) -> dict[str, torch.Tensor]:
        """Return the tensors of a file."""
        code = f"int{self.bits}"
        tensor = _signed(tensor)
        require_code(tensor, code)
        require_block(tensor, 1, self.group)
        if (tensor.zero is None) != self.symmetric or tensor.group is not None:
            raise CannotExpress("the layout has zeros where this has none, or the other way round")
        parts = {
            "weight_packed": pack(offset_binary(tensor.codes, code), self.bits, 1, torch.int32),
            "weight_scale": tensor.scale,
            "weight_shape": torch.tensor(tensor.shape, dtype=torch.int64),
        }
        if tensor.zero is not None:
            zeros = offset_binary(tensor.zero.to(torch.int8), code)
            parts["weight_zero_point"] = pack(zeros, self.bits, 0, torch.int32)
        return parts


@dataclass(frozen=True)
class Quantized:
    """Integers or floats of eight bits, one to an element.

    Args:
        code: "int8" or "e4m3".
        block: how many outputs and inputs share a scale; 0: all.
        symmetric: whether there are no zeros.
    """

    code: str
    block: tuple[int, int]
    symmetric: bool
    always_read: tuple[str, ...] = ()
    weight: str = "weight"

    def read(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> QuantisedTensor:
        """Return the matrix."""
        block = (self.block[0] or shape[0], self.block[1] or shape[1])
        size = tuple(-(-s // b) for s, b in zip(shape, block, strict=True))
        zero = None if self.symmetric else parts["weight_zero_point"].reshape(size)
        return QuantisedTensor(
            parts["weight"], parts["weight_scale"].reshape(size), self.code, block, dtype, zero
        )

    def write(self, tensor: QuantisedTensor) -> dict[str, torch.Tensor]:
        """Return the tensors of a file."""
        require_code(tensor, self.code)
        require_block(tensor, *self.block)
        if (tensor.zero is None) != self.symmetric or tensor.group is not None:
            raise CannotExpress("the layout has zeros where this has none, or the other way round")
        whole = self.block == (0, 0)
        parts = {"weight": tensor.codes, "weight_scale": tensor.scale.reshape(1) if whole else tensor.scale}
        if tensor.zero is not None:
            parts["weight_zero_point"] = tensor.zero.reshape(1) if whole else tensor.zero
        return parts


@dataclass(frozen=True)
class Nvfp4:
    """Four-bit floats, two to a byte; a scale of eight bits for sixteen inputs, divided by one number for the matrix."""

    always_read: tuple[str, ...] = ()
    weight: str = "weight"

    def read(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> QuantisedTensor:
        """Return the matrix."""
        codes = unpack(parts["weight_packed"], 4, 1, shape[1])
        divisor = parts["weight_global_scale"].reshape(1)
        return QuantisedTensor(codes, parts["weight_scale"], "e2m1", (1, 16), dtype, divisor=divisor)

    def write(self, tensor: QuantisedTensor) -> dict[str, torch.Tensor]:
        """Return the tensors of a file."""
        require_code(tensor, "e2m1")
        require_block(tensor, 1, 16)
        if tensor.divisor is None or tensor.scale.dtype != torch.float8_e4m3fn:
            raise CannotExpress("the layout has scales of eight bits under one for the matrix")
        return {
            "weight_packed": pack(tensor.codes, 4, 1, torch.uint8),
            "weight_scale": tensor.scale,
            "weight_global_scale": tensor.divisor.reshape(1),
        }


def _signed(tensor: QuantisedTensor) -> QuantisedTensor:
    """Return codes without sign as codes with one, which have the same values under zeros moved alike.

    Raises:
        CannotExpress: its zeros are no whole numbers.
    """
    if tensor.zero is not None and tensor.zero.dtype.is_floating_point:
        raise CannotExpress("compressed-tensors stores zeros as whole numbers")
    if not tensor.code.startswith("uint") or tensor.zero is None:
        return tensor
    code = tensor.code.removeprefix("u")
    return replace(
        tensor,
        codes=from_offset_binary(tensor.codes, code),
        zero=from_offset_binary(tensor.zero, code),
        code=code,
    )


def open_matrices(
    settings: dict[str, Any], tensors: Mapping[str, FileTensor], dtype: torch.dtype
) -> tuple[dict[str, FileTensor], list[str]]:
    """Return a checkpoint's tensors with each quantised matrix in place of its parts, and notes.

    Args:
        settings: ``quantization_config`` of the configuration.
        tensors: of the files.
        dtype: of the model.

    Raises:
        CheckpointError: a format is not known, or tensors contradict it.
    """
    for key in ("transform_config", "sparsity_config"):
        if settings.get(key) and (settings[key] or {}).get("format") != "dense":
            raise CheckpointError(
                f"the checkpoint is compressed with a {key} of compressed-tensors, which is not read",
                hint="decompress it with the library, or quantise the model without",
            )
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(g, dict) for g in groups.values()):
        raise CheckpointError("quantization_config of compressed-tensors has no config_groups")
    found = dict(tensors)
    notes: list[str] = []
    for module, parts in _modules(tensors).items():
        group = _group_of(module.rstrip("."), groups)
        layout, shape = _layout(module, parts, group, settings)
        if "weight_g_idx" in parts:
            raise wrong(
                module, parts, "weight_g_idx, which compressed-tensors before 0.20 wrote, is not read"
            )
        for name in parts:
            del found[module + name]
        kept = {n: p for n, p in parts.items() if not n.startswith(("input_", "output_"))}
        scale = parts["weight_scale"].dtype
        value = dtype if scale in (torch.float32, torch.float8_e4m3fn) else scale
        beside = {n: p for n, p in parts.items() if n not in kept}
        found[module + "weight"] = StoredMatrix(
            module, layout, tuple(sorted(kept.items())), shape, value, tuple(sorted(beside.items()))
        )
        activations = group.get("input_activations")
        if activations:
            notes = [
                f"activations, which the checkpoint means to be rounded to {activations.get('num_bits')} bits, "
                "stay as they are"
            ]
    return found, notes


_PARTS = re.compile(
    r"(.*\.)?((?:weight_(?:packed|scale|shape|zero_point|g_idx|global_scale)|(?:input|output)_(?:scale|zero_point|global_scale)))"
)


def _modules(tensors: Mapping[str, FileTensor]) -> dict[str, dict[str, FileTensor]]:
    modules = by_module(tensors, _PARTS)
    for module, parts in modules.items():
        if "weight_packed" not in parts and module + "weight" in tensors:
            parts["weight"] = tensors[module + "weight"]
        if "weight_scale" not in parts or not {"weight", "weight_packed"} & set(parts):
            raise wrong(module, parts, f"it has {', '.join(sorted(parts))} and nothing that goes with it")
    return modules


def _group_of(module: str, groups: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a module: those that name it, or those of its class."""
    general = None
    for group in groups.values():
        for target in group.get("targets") or ():
            named = re.match(target[3:], module) if target.startswith("re:") else target == module
            if named:
                return dict(group)
        general = general or group
    assert general is not None
    return dict(general)


def _layout(
    module: str, parts: Mapping[str, FileTensor], group: dict[str, Any], settings: dict[str, Any]
) -> tuple[Any, tuple[int, int]]:
    weights = group.get("weights") or {}
    format_ = group.get("format") or settings.get("format")
    if format_ == "mixed-precision":
        format_ = None
    if format_ is not None and format_ not in FORMATS:
        raise CheckpointError(
            f"the compressed-tensors format {format_!r} is not read",
            hint=f"known are {', '.join(FORMATS)}; transformers decompresses others when it loads them dequantised",
        )
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    symmetric = bool(weights.get("symmetric", True))
    size = weights.get("group_size") or 0
    if not isinstance(size, int):
        raise CheckpointError(
            f"quantization_config has a group_size of {str(size)[:60]!r} for {module}weight"
        )
    scale = parts["weight_scale"]
    if "weight_global_scale" in parts:
        packed = parts.get("weight_packed")
        if packed is None or len(packed.shape) != 2 or packed.dtype != torch.uint8:
            raise wrong(module, parts, "four-bit floats are stored as weight_packed, of bytes")
        shape = (packed.shape[0], packed.shape[1] * 2)
        require_shapes(module, parts, {"weight_scale": (shape[0], shape[1] // 16)})
        require_types(module, parts, weight_scale=[torch.float8_e4m3fn], weight_global_scale=FLOATS)
        if shape[1] % 16 or torch.Size(parts["weight_global_scale"].shape).numel() != 1:
            raise wrong(module, parts, "sixteen inputs share a scale, and all scales one number")
        return Nvfp4(), shape
    if "weight_packed" in parts:
        if bits not in (2, 4, 8) or kind not in ("int", None):
            raise CheckpointError(
                f"{module}weight is packed with {bits} bits of type {kind}, which is not read"
            )
        if "weight_shape" not in parts or tuple(parts["weight_shape"].shape) != (2,):
            raise wrong(module, parts, "weight_shape is missing, or is no pair of numbers")
        require_types(
            module,
            parts,
            weight_shape=[torch.int64, torch.int32],
            weight_packed=[torch.int32],
            weight_zero_point=[torch.int32],
            weight_scale=FLOATS,
        )
        rows, columns = (int(s) for s in parts["weight_shape"].load().tolist())
        if rows < 1 or columns < 1:
            raise wrong(module, parts, f"weight_shape says {[rows, columns]}")
        group_size = 0 if strategy in ("channel", "tensor") else size
        if group_size < 0 or (group_size and columns % group_size):
            raise wrong(module, parts, f"groups of {group_size} do not divide {columns} inputs")
        blocks = columns // group_size if group_size else 1
        expected: dict[str, tuple[int, ...]] = {
            "weight_packed": (rows, -(-columns * bits // 32)),
            "weight_scale": (rows, blocks),
        }
        if not symmetric:
            expected["weight_zero_point"] = (-(-rows * bits // 32), blocks)
        require_shapes(module, parts, expected)
        return PackQuantized(bits, group_size, symmetric), (rows, columns)
    stored = parts["weight"]
    code = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}.get(stored.dtype)
    if code is None or len(stored.shape) != 2:
        raise wrong(
            module, parts, f"a quantised weight of type {stored.dtype} and shape {list(stored.shape)}"
        )
    rows, columns = stored.shape
    require_types(module, parts, weight_scale=FLOATS, weight_zero_point=[torch.int8, torch.float8_e4m3fn])
    numbers = torch.Size(scale.shape).numel()
    structure = weights.get("block_structure")
    if numbers == 1:
        block = (0, 0)
    elif isinstance(structure, (list, tuple)) and len(structure) == 2:
        block = (int(structure[0]), int(structure[1]))
        require_shapes(module, parts, {"weight_scale": (-(-rows // block[0]), -(-columns // block[1]))})
    else:
        group_size = size if strategy == "group" and size > 0 else 0
        if group_size and columns % group_size:
            raise wrong(module, parts, f"groups of {group_size} do not divide {columns} inputs")
        block = (1, group_size)
        require_shapes(module, parts, {"weight_scale": (rows, columns // group_size if group_size else 1)})
    if not symmetric:
        require_shapes(module, parts, {"weight_zero_point": tuple(scale.shape)})
    return Quantized(code, block, symmetric), (rows, columns)


def left_out(settings: dict[str, Any], modules: list[str]) -> dict[str, Any]:
    """Return settings that leave more modules alone."""
    return {**settings, "ignore": sorted({*(settings.get("ignore") or ()), *modules})}


def settings_of(form: QuantisedTensor, ignore: list[str]) -> tuple[Any, dict[str, Any]]:
    """Return the layout and the ``quantization_config`` for matrices that are quantised alike.

    Args:
        form: one of them, whose values are not looked at.
        ignore: modules that stay as they are.

    Raises:
        CannotExpress: the library has no format for it.
    """
    if len(form.shape) != 2:
        raise CannotExpress(f"compressed-tensors stores matrices, and this has {len(form.shape)} dimensions")
    if form.block[1] == 1 < form.block[0]:
        raise CannotExpress(
            "the architecture stores it inputs first, and compressed-tensors has codes for linears alone"
        )
    form = _signed(form)
    symmetric, rows, columns = form.zero is None, *form.shape
    group = 0 if form.block[1] >= columns else form.block[1]
    weights: dict[str, Any] = {
        "num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": "group" if group else "channel",
        "group_size": group or None, "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax",
        "observer_kwargs": {},
    }  # fmt: skip
    layout: Any
    if form.code in ("int2", "int4", "int8"):
        weights["num_bits"] = int(form.code[3:])
        layout, format_ = PackQuantized(weights["num_bits"], group, symmetric), "pack-quantized"
    elif form.code == "e4m3":
        whole = form.block[0] >= rows and not group
        weights |= {"type": "float", "strategy": "tensor" if whole else "channel"}
        layout, format_ = Quantized("e4m3", (0, 0) if whole else (1, 0), symmetric), "float-quantized"
    elif form.code == "e2m1" and form.divisor is not None:
        weights |= {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
        layout, format_ = Nvfp4(), "nvfp4-pack-quantized"
    else:
        raise CannotExpress(f"compressed-tensors has no format for {form.code}")
    return layout, {
        "quant_method": METHOD, "format": format_, "quantization_status": "compressed", "ignore": sorted(ignore),
        "kv_cache_scheme": None, "global_compression_ratio": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None,
                "format": format_,
            }
        },
    }  # fmt: skip


def also(settings: dict[str, Any], other: dict[str, Any], module: str) -> dict[str, Any]:
    """Return settings with one module that is quantised as other settings say."""
    groups = dict(settings["config_groups"])
    (group,) = other["config_groups"].values()
    plain = {**group, "targets": []}
    for name, existing in groups.items():
        if {**existing, "targets": []} == plain and existing["targets"] != ["Linear"]:
            groups[name] = {**existing, "targets": [*existing["targets"], module]}
            break
    else:
        groups[f"group_{len(groups)}"] = {**group, "targets": [module]}
    mixed = len({g["format"] for g in groups.values()}) > 1
    return {**settings, "config_groups": groups, "format": "mixed-precision" if mixed else settings["format"]}
