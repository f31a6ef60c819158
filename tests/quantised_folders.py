"""Small checkpoints quantised by the published layouts of each method, written without the code under test."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def words(values: Tensor, bits: int, dim: int, order: list[int] | None = None) -> Tensor:
    """Return numbers without sign as words of 32 bits, one after another, by plain loops."""
    rows = values.movedim(dim, 0).tolist()
    width = 32 // bits
    result = []
    for start in range(0, len(rows), width):
        part = rows[start : start + width]
        made = []
        for column in zip(*part, strict=True):
            word = 0
            for place in range(len(column)):
                number = column[place if order is None else order[place]]
                word |= int(number) << (bits * place)
            made.append(word - 2**32 if word >= 2**31 else word)
        result.append(made)
    return torch.tensor(result, dtype=torch.int32).movedim(0, dim).contiguous()


def pack_quantized(bits: int, group: int, symmetric: bool) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    def quantise(weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        out, inputs = weight.shape
        size = group or inputs
        low = 2 ** (bits - 1)
        codes = torch.randint(-low, low, (out, inputs), generator=generator)
        scale = (torch.rand(out, inputs // size, generator=generator) * 0.02 / low + 1e-3).to(torch.bfloat16)
        parts = {
            "weight_packed": words(codes + low, bits, 1),
            "weight_scale": scale,
            "weight_shape": torch.tensor([out, inputs]),
        }
        zero = torch.zeros(out, inputs // size)
        if not symmetric:
            zero = torch.randint(-low, low, zero.shape, generator=generator).float()
            parts["weight_zero_point"] = words(zero + low, bits, 0)
        value = (codes - zero.repeat_interleave(size, 1)) * scale.float().repeat_interleave(size, 1)
        return parts, value.to(torch.bfloat16)

    return quantise


def eight_bits(code: torch.dtype, per_tensor: bool) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    def quantise(weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        codes = (torch.randn(weight.shape, generator=generator) * 40).clamp(-127, 127).to(code)
        scale = torch.rand(1 if per_tensor else (weight.shape[0], 1), generator=generator) * 1e-3 + 1e-4
        scale = scale.to(torch.bfloat16)
        return {"weight": codes, "weight_scale": scale}, (codes.float() * scale.float()).to(torch.bfloat16)

    return quantise


def nvfp4(weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    out, inputs = weight.shape
    codes = torch.randint(0, 16, (out, inputs), generator=generator)
    scale = (torch.rand(out, inputs // 16, generator=generator) * 8 + 0.5).to(torch.float8_e4m3fn)
    whole = torch.tensor([400.0])
    value = E2M1[codes] * (scale.float() / whole).repeat_interleave(16, 1)
    return {
        "weight_packed": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8),
        "weight_scale": scale,
        "weight_global_scale": whole,
    }, value.to(torch.bfloat16)


def gptq(
    bits: int, group: int, version: int, ordered: bool
) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    def quantise(weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        out, inputs = weight.shape
        size = inputs if group == -1 else group
        codes = torch.randint(0, 2**bits, (inputs, out), generator=generator)
        zero = torch.randint(0, 2**bits, (inputs // size, out), generator=generator)
        scale = (torch.rand(zero.shape, generator=generator) * 0.02 / 2**bits + 1e-4).half()
        chosen = torch.arange(inputs) // size
        if ordered:
            chosen = chosen[torch.randperm(inputs, generator=generator)]
        value = (codes - zero[chosen]) * scale.float()[chosen]
        parts = {
            "qweight": words(codes, bits, 0),
            "qzeros": words((zero - int(version == 1)) % 2**bits, bits, 1),
            "scales": scale,
            "g_idx": chosen.int(),
        }
        return parts, value.half().t()

    return quantise


def awq(group: int) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    def quantise(weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        out, inputs = weight.shape
        codes = torch.randint(0, 16, (inputs, out), generator=generator)
        zero = torch.randint(0, 16, (inputs // group, out), generator=generator)
        scale = (torch.rand(zero.shape, generator=generator) * 2e-3 + 1e-4).half()
        value = (codes - zero.repeat_interleave(group, 0)) * scale.float().repeat_interleave(group, 0)
        parts = {
            "qweight": words(codes, 4, 1, AWQ_ORDER),
            "qzeros": words(zero, 4, 1, AWQ_ORDER),
            "scales": scale,
        }
        return parts, value.half().t()

    return quantise


def block_float8(block: int) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    def quantise(weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        out, inputs = weight.shape
        codes = (torch.randn(out, inputs, generator=generator) * 100).to(torch.float8_e4m3fn)
        scale = torch.rand(-(-out // block), -(-inputs // block), generator=generator) * 2e-4 + 1e-5
        whole = scale.repeat_interleave(block, 0)[:out].repeat_interleave(block, 1)[:, :inputs]
        return {"weight": codes, "weight_scale_inv": scale}, (codes.float() * whole).to(torch.bfloat16)

    return quantise


def _compressed(format_: str, **weights: Any) -> dict[str, Any]:
    base = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors", "format": format_, "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": {**base, **weights}, "input_activations": None, "output_activations": None,
        }},
    }  # fmt: skip


FORMATS: dict[str, tuple[dict[str, Any], Callable[..., tuple[dict[str, Tensor], Tensor]]]] = {
    "pack-4": (_compressed("pack-quantized"), pack_quantized(4, 32, True)),
    "pack-4-asymmetric": (_compressed("pack-quantized", symmetric=False), pack_quantized(4, 32, False)),
    "pack-8": (_compressed("pack-quantized", num_bits=8), pack_quantized(8, 32, True)),
    "pack-4-channel": (
        _compressed("pack-quantized", strategy="channel", group_size=None), pack_quantized(4, 0, True)
    ),
    "int8": (
        _compressed("int-quantized", num_bits=8, strategy="channel", group_size=None), eight_bits(torch.int8, False)
    ),
    "float8-channel": (
        _compressed("float-quantized", num_bits=8, type="float", strategy="channel", group_size=None),
        eight_bits(torch.float8_e4m3fn, False),
    ),
    "float8-tensor": (
        _compressed("float-quantized", num_bits=8, type="float", strategy="tensor", group_size=None),
        eight_bits(torch.float8_e4m3fn, True),
    ),
    "nvfp4": (
        _compressed("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16), nvfp4
    ),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False},
             gptq(4, 32, 1, False)),
    "gptq-v2": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False,
                 "checkpoint_format": "gptq_v2"}, gptq(4, 32, 2, False)),
    "gptq-ordered": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False},
                     gptq(4, 32, 1, True)),
    "gptq-8-whole": ({"quant_method": "gptq", "bits": 8, "group_size": -1, "desc_act": False, "sym": False},
                     gptq(8, -1, 1, False)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, awq(32)),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"},
            block_float8(128)),
    "fp8-small-blocks": ({"quant_method": "fp8", "weight_block_size": [32, 32], "fmt": "e4m3"}, block_float8(32)),
}  # fmt: skip
"""Methods by name: the ``quantization_config``, and what makes a matrix's tensors and its value."""


def quantise_folder(
    folder: Path, name: str, *, seed: int = 0, change: Callable[[str, dict[str, Tensor]], None] | None = None
) -> dict[str, Tensor]:
    """Quantise the matrices of a plain folder in place, and return what their values are then, by name.

    Args:
        folder: as transformers saved it, in one file.
        name: of ``FORMATS``.
        seed: of the codes and scales.
        change: called with each module and its tensors before they are written, to damage them.
    """
    settings, quantise = FORMATS[name]
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    values, written = {}, {}
    for key, value in tensors.items():
        if key.endswith("_proj.weight") and value.dim() == 2:
            parts, values[key] = quantise(value, generator)
            if change is not None:
                change(key.removesuffix("weight"), parts)
            written |= {key.removesuffix("weight") + n: p.contiguous().clone() for n, p in parts.items()}
        else:
            written[key] = value
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    configure(folder, {"quantization_config": settings})
    return values


def configure(folder: Path, more: Mapping[str, Any]) -> None:
    """Add entries to a folder's config.json; None takes one away."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **more}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
