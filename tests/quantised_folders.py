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


def torchao(
    code: str, group: int, scale_type: torch.dtype
) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    def quantise(weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        out, inputs = weight.shape
        size = group or inputs
        low = 8 if code == "int4" else 128
        if code == "e4m3":
            codes = (torch.randn(out, inputs, generator=generator) * 100).to(torch.float8_e4m3fn)
        else:
            codes = torch.randint(-low, low, (out, inputs), generator=generator).to(torch.int8)
        scale = (torch.rand(out, inputs // size, generator=generator) * 0.02 / low + 1e-4).to(scale_type)
        parts = {"_weight_qdata": codes, "_weight_scale": scale}
        zero = torch.zeros(scale.shape)
        if code != "e4m3":
            zero = torch.randint(-3, 4, scale.shape, generator=generator)
            parts["_weight_zero_point"] = zero.to(torch.int8)
        value = (codes.float() - zero.repeat_interleave(size, 1)) * scale.float().repeat_interleave(size, 1)
        return parts, value.to(torch.bfloat16)

    return quantise


def _torchao_header(name: str, shape: list[int]) -> str:
    """Return what torchao writes of a weight into the header of its file."""
    dtype = {"_type": "torch.dtype", "_data": "bfloat16"}
    if name == "torchao-int8":
        data = {"act_quant_kwargs": None, "reduce_range": False, "block_size": [1, shape[1]], "dtype": dtype}
        return json.dumps(
            {"_type": "Int8Tensor", "_data": data, "_tensor_data_names": ["zero_point", "qdata", "scale"]}
        )
    if name == "torchao-float8":
        data = {"block_size": [1, shape[1]], "mm_config": None, "act_quant_kwargs": None, "dtype": dtype}
        return json.dumps({"_type": "Float8Tensor", "_data": data, "_tensor_data_names": ["qdata", "scale"]})
    target = {"_type": "torch.dtype", "_data": "int4"}
    data = {"target_dtype": target, "block_size": [1, 32], "dtype": dtype, "activation_quantization": None}
    names = ["qdata", "scale", "zero_point"]
    return json.dumps({"_type": "IntxUnpackedToInt8Tensor", "_data": data, "_tensor_data_names": names})


NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def nf4(double: bool) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    def quantise(weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        out, inputs = weight.shape
        count = out * inputs
        blocks = -(-count // 64)
        codes = torch.randint(0, 16, (count,), generator=generator)
        absmax = torch.rand(blocks, generator=generator) * 0.05 + 0.01
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [out, inputs]}
        parts = {
            "weight": (codes[::2] << 4 | codes[1::2]).to(torch.uint8).reshape(-1, 1),
            "weight.absmax": absmax,
            "weight.quant_map": NF4,
        }
        if double:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.03125}
            outer = torch.rand(-(-blocks // 256), generator=generator) * 0.02 + 0.01
            table = torch.linspace(-1, 1, 256)
            stored = torch.randint(0, 256, (blocks,), generator=generator).to(torch.uint8)
            absmax = table[stored.long()] * outer.repeat_interleave(256)[:blocks] + 0.03125
            parts |= {
                "weight.absmax": stored,
                "weight.nested_absmax": outer,
                "weight.nested_quant_map": table,
            }
        text = json.dumps(state).encode()
        parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
        value = NF4[codes] * absmax.repeat_interleave(64)[:count]
        return parts, value.reshape(out, inputs).to(torch.bfloat16)

    return quantise


def llm_int8(weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    codes = torch.randint(-127, 128, weight.shape, generator=generator).to(torch.int8)
    largest = torch.rand(weight.shape[0], generator=generator) * 0.05 + 0.01
    value = codes * largest.reshape(-1, 1) * 7.874015718698502e-3
    parts = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, value.to(torch.bfloat16)


def modelopt_float8(weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    codes = (torch.randn(weight.shape, generator=generator) * 100).to(torch.float8_e4m3fn)
    scale = torch.rand((), generator=generator) * 2e-4 + 1e-5
    parts = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.25)}
    return parts, (codes.float() * scale).to(torch.bfloat16)


def modelopt_nvfp4(weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    out, inputs = weight.shape
    codes = torch.randint(0, 16, (out, inputs), generator=generator)
    scale = (torch.rand(out, inputs // 16, generator=generator) * 8 + 0.5).to(torch.float8_e4m3fn)
    common = torch.tensor(0.0023)
    value = E2M1[codes] * (scale.float() * common).repeat_interleave(16, 1)
    return {
        "weight": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8),
        "weight_scale": scale,
        "weight_scale_2": common,
        "input_scale": torch.tensor(0.001),
    }, value.to(torch.bfloat16)


def power_scales(weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    parts, _ = block_float8(128)(weight, generator)
    scale = torch.exp2(torch.randint(-14, -8, parts["weight_scale_inv"].shape, generator=generator).float())
    whole = scale.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)[:, : weight.shape[1]]
    parts["weight_scale_inv"] = scale.to(torch.float8_e8m0fnu)
    return parts, (parts["weight"].float() * whole).to(torch.bfloat16)


def _bitsandbytes(**settings: Any) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": None,
        **settings,
    }


def _modelopt(algorithm: str, **settings: Any) -> dict[str, Any]:
    inner = {"quant_algo": algorithm, "kv_cache_quant_algo": None, **settings, "exclude_modules": ["lm_head"]}
    return {
        "producer": {"name": "modelopt", "version": "0.33"},
        "quantization": inner,
        "quant_method": "modelopt",
    }


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
    "fp8-power-scales": ({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", "scale_fmt": "ue8m0"},
                         power_scales),
    "gptq-old": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False,
                  "model_file_base_name": "gptq_model-4bit-32g", "checkpoint_format": "gptq_v2"},
                 gptq(4, 32, 2, False)),
    "torchao-int8": ({"quant_method": "torchao", "modules_to_not_convert": None}, torchao("int8", 0, torch.float32)),
    "torchao-int4": ({"quant_method": "torchao", "modules_to_not_convert": None}, torchao("int4", 32, torch.bfloat16)),
    "torchao-float8": ({"quant_method": "torchao", "modules_to_not_convert": None}, torchao("e4m3", 0, torch.float32)),
    "nf4": (_bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), nf4(False)),
    "nf4-double": (
        _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True), nf4(True)
    ),
    "llm-int8": (_bitsandbytes(load_in_8bit=True), llm_int8),
    "modelopt-float8": (_modelopt("FP8"), modelopt_float8),
    "modelopt-nvfp4": (_modelopt("NVFP4", group_size=16), modelopt_nvfp4),
    "fp8-small-blocks": ({"quant_method": "fp8", "weight_block_size": [32, 32], "fmt": "e4m3"}, block_float8(32)),
}  # fmt: skip
"""Methods by name: the ``quantization_config``, and what makes a matrix's tensors and its value."""
BESIDE = {"gptq-old": "quantize_config.json", "modelopt-float8": "hf_quant_config.json",
          "modelopt-nvfp4": "hf_quant_config.json"}  # fmt: skip
"""Methods whose settings are in a file of their own."""


def weight_file(folder: Path) -> Path:
    """Return the one file of weights in a folder."""
    (found,) = folder.glob("*.safetensors")
    return found


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
    values, written, header = {}, {}, {"format": "pt"}
    for key, value in tensors.items():
        if key.endswith("_proj.weight") and value.dim() == 2:
            parts, values[key] = quantise(value, generator)
            if change is not None:
                change(key.removesuffix("weight"), parts)
            written |= {key.removesuffix("weight") + n: p.contiguous().clone() for n, p in parts.items()}
            if name.startswith("torchao"):
                header[key] = _torchao_header(name, list(value.shape))
        else:
            written[key] = value
            if name.startswith("torchao"):
                header[key] = json.dumps({"_type": "Tensor"})
    save_file(written, folder / "model.safetensors", metadata=header)
    if name in BESIDE:
        without = {k: v for k, v in settings.items() if k != "quant_method"}
        (folder / BESIDE[name]).write_text(json.dumps(without))
        if "model_file_base_name" in settings:
            (folder / "model.safetensors").rename(folder / f"{settings['model_file_base_name']}.safetensors")
    else:
        configure(folder, {"quantization_config": settings})
    return values


def mxfp4_folder(folder: Path) -> dict[str, Tensor]:
    """Quantise the experts of a plain GPT-OSS folder in place, and return what their values are then."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    values, written = {}, {}
    for key, value in tensors.items():
        if not key.endswith(("gate_up_proj", "down_proj")):
            written[key] = value
            continue
        experts, inputs, outputs = value.shape
        codes = torch.randint(0, 16, (experts, outputs, inputs), generator=generator)
        power = torch.randint(118, 124, (experts, outputs, inputs // 32), generator=generator)
        written[key + "_blocks"] = (
            (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8).unflatten(-1, (-1, 16))
        )
        written[key + "_scales"] = power.to(torch.uint8)
        stored = E2M1[codes] * torch.exp2(power - 127.0).repeat_interleave(32, 2)
        values[key] = stored.transpose(1, 2).to(torch.bfloat16)
    written = {k: v.contiguous().clone() for k, v in written.items()}
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    configure(
        folder, {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    )
    return values


def configure(folder: Path, more: Mapping[str, Any]) -> None:
    """Add entries to a folder's config.json; None takes one away."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **more}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
