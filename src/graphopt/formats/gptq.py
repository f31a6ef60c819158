"""The layouts of GPTQ and AWQ checkpoints, whose matrices lie transposed in words of 32 bits."""

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
    FileTensor,
    StoredMatrix,
    by_module,
    require_block,
    require_code,
    require_shapes,
    require_types,
    wrong,
)

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns each four bits of a word hold, the lowest first."""


@dataclass(frozen=True)
class Gptq:
    """Codes packed along the inputs, zeros along the outputs; a scale for each group of inputs and output.

    Args:
        bits: of a number: 2, 4 or 8.
        group: how many inputs share a scale, unless ``g_idx`` says otherwise.
        stored_less_one: whether zeros are stored less one (version 1).
    """

    bits: int
    group: int
    stored_less_one: bool
    always_read: tuple[str, ...] = ("g_idx",)
    weight: str = "weight"

    def read(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> QuantisedTensor:
        """Return the matrix."""
        rows, columns = shape
        codes = unpack(parts["qweight"], self.bits, 0, columns).t()
        zero = unpack(parts["qzeros"], self.bits, 1, rows).t()
        if self.stored_less_one:
            # a zero of 0 is stored as the largest number
            zero = (zero.to(torch.int16) + 1).bitwise_and(2**self.bits - 1).to(torch.uint8)
        scale = parts["scales"].t()
        chosen = parts.get("g_idx")
        if chosen is None or torch.equal(chosen, torch.arange(columns, dtype=chosen.dtype) // self.group):
            return QuantisedTensor(codes, scale, f"uint{self.bits}", (1, self.group), dtype, zero)
        group = chosen.to(torch.int64)
        return QuantisedTensor(
            codes, scale, f"uint{self.bits}", (1, 0), dtype, zero, group=group, group_dim=1
        )

    def write(self, tensor: QuantisedTensor) -> dict[str, torch.Tensor]:
        """Return the tensors of a file."""
        require_code(tensor, f"uint{self.bits}")
        rows, columns = tensor.shape
        word = 32 // self.bits
        if tensor.zero is None or rows % word or columns % word:
            raise CannotExpress(
                f"GPTQ stores zeros, and rows and columns in multiples of {word}; this is {rows} by {columns}"
            )
        if tensor.group is None:
            require_block(tensor, 1, self.group)
            chosen = torch.arange(columns, dtype=torch.int32) // self.group
        elif tensor.group_dim == 1:
            chosen = tensor.group.to(torch.int32)
        else:
            raise CannotExpress("in GPTQ inputs choose their scales, and here outputs do")
        zero = tensor.zero.to(torch.int16)
        if self.stored_less_one:
            zero = (zero - 1).bitwise_and(2**self.bits - 1)
        return {
            "qweight": pack(tensor.codes.t(), self.bits, 0, torch.int32),
            "qzeros": pack(zero.t(), self.bits, 1, torch.int32),
            "scales": tensor.scale.t(),
            "g_idx": chosen,
        }


@dataclass(frozen=True)
class Awq:
    """Codes of four bits packed along the outputs, in an order of their own (the version called GEMM)."""

    group: int
    always_read: tuple[str, ...] = ()
    weight: str = "weight"

    def read(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> QuantisedTensor:
        """Return the matrix."""
        codes = unpack(parts["qweight"], 4, 1, shape[0], AWQ_ORDER).t()
        zero = unpack(parts["qzeros"], 4, 1, shape[0], AWQ_ORDER).t()
        return QuantisedTensor(codes, parts["scales"].t(), "uint4", (1, self.group), dtype, zero)

    def write(self, tensor: QuantisedTensor) -> dict[str, torch.Tensor]:
        """Return the tensors of a file."""
        require_code(tensor, "uint4")
        require_block(tensor, 1, self.group)
        if tensor.zero is None or tensor.group is not None or tensor.shape[0] % 8:
            raise CannotExpress(
                f"AWQ stores zeros, and outputs in multiples of 8; this has {tensor.shape[0]}"
            )
        return {
            "qweight": pack(tensor.codes.t(), 4, 1, torch.int32, AWQ_ORDER),
            "qzeros": pack(tensor.zero.to(torch.uint8).t(), 4, 1, torch.int32, AWQ_ORDER),
            "scales": tensor.scale.t(),
        }


_PARTS = re.compile(r"(.*\.)?(qweight|qzeros|scales|g_idx)")


def open_matrices(
    settings: dict[str, Any], tensors: Mapping[str, FileTensor], dtype: torch.dtype
) -> tuple[dict[str, FileTensor], list[str]]:
    """Return a checkpoint's tensors with each quantised matrix in place of its parts, and notes.

    Args:
        settings: ``quantization_config`` of the configuration, of the method "gptq" or "awq".
        tensors: of the files.
        dtype: of the model; values have that of the scales.

    Raises:
        CheckpointError: a setting is not known, or tensors contradict it.
    """
    awq = settings.get("quant_method") == "awq"
    bits: Any = settings.get("bits", settings.get("w_bit"))
    group: Any = settings.get("group_size", settings.get("q_group_size"))
    if bits not in ((4,) if awq else (2, 4, 8)):
        raise CheckpointError(
            f"{'AWQ' if awq else 'GPTQ'} weights of {bits!r} bits are not read",
            hint="those of 4 bits are"
            if awq
            else "those of 2, 4 and 8 bits are; 3 bits cross the borders of words",
        )
    if not isinstance(group, int) or (group < 1 and group != -1):
        raise CheckpointError(f"quantization_config has a group_size of {group!r}")
    if awq and str(settings.get("version", "gemm")).lower() != "gemm":
        raise CheckpointError(
            f"AWQ weights of the version {settings['version']!r} lie in an order that is not known here",
            hint="convert them to the version gemm, for example with AutoAWQ",
        )
    form = settings.get("checkpoint_format", "gptq")
    if not awq and form not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"GPTQ weights in the format {form!r} are not read; gptq and gptq_v2 are")
    modules = by_module(tensors, _PARTS)
    found = dict(tensors)
    notes: set[str] = set()
    for module, parts in modules.items():
        words = parts.get("qweight")
        if words is None or len(words.shape) != 2 or words.dtype != torch.int32:
            raise wrong(module, parts, "it has no qweight of two dimensions and words of 32 bits")
        number = 32 // bits
        columns, rows = (
            (words.shape[0], words.shape[1] * number) if awq else (words.shape[0] * number, words.shape[1])
        )
        size = columns if group == -1 else group
        blocks = -(-columns // size)
        if columns % size and "g_idx" not in parts:
            raise wrong(module, parts, f"groups of {size} do not divide {columns} inputs")
        require_shapes(module, parts, {"qzeros": (blocks, -(-rows * bits // 32)), "scales": (blocks, rows)})
        if not parts["scales"].dtype.is_floating_point or parts["qzeros"].dtype != torch.int32:
            raise wrong(module, parts, "scales are floats, and zeros lie in words of 32 bits")
        chosen = parts.get("g_idx")
        if chosen is not None:
            require_shapes(module, parts, {"g_idx": (columns,)})
            require_types(module, parts, g_idx=[torch.int32, torch.int64])
            numbers = chosen.load()
            if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < blocks:
                raise wrong(module, parts, f"g_idx names groups beyond the {blocks} that there are")
        for name in parts:
            del found[module + name]
        layout = Awq(size) if awq else Gptq(bits, size, form == "gptq")
        found[module + "weight"] = StoredMatrix(
            module, layout, tuple(sorted(parts.items())), (rows, columns), parts["scales"].dtype
        )
    return found, sorted(notes)


def layout_for(settings: Mapping[str, Any], key: str, form: QuantisedTensor) -> Gptq | Awq:
    """Return the layout of GPTQ or AWQ, by the checkpoint's settings, for a matrix."""
    group = settings.get("group_size", settings.get("q_group_size", -1))
    size = form.shape[-1] if group == -1 else int(group)
    if settings.get("quant_method") == "awq":
        return Awq(size)
    return Gptq(int(settings["bits"]), size, settings.get("checkpoint_format", "gptq") == "gptq")
