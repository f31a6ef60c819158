"""Quantised folders that the library of each method writes: our values, and what transformers loads of our folders.

A small Llama is quantised by transformers with the method's own library, or by the method's published layout where no
library writes it on a CPU. One line for each format: whether our values equal, bit for bit, those that the library
dequantises; and, after a layer is skipped and the folder written by us, how far the outputs of transformers on that folder
are from ours (in float32, relative). Libraries that are missing are named: compressed-tensors, torchao,
bitsandbytes; none is needed by graphopt itself. Run it where they are installed:

    python benchmarks/quantised_formats.py [name ...]
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import graphopt
from graphopt.backends.huggingface.reload import plain
from graphopt.formats.stored import stored_matrices
from graphopt.frontends.huggingface import read_checkpoint


def llama(folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Save a small Llama of three layers."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=64, tie_word_embeddings=False,
        pad_token_id=None, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)


def by_transformers(folder: Path, settings: Any) -> None:
    """Quantise the plain folder beside ``folder`` with transformers and the method's library."""
    import transformers

    plain_folder = folder.with_name(folder.name + "-plain")
    llama(plain_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        plain_folder, quantization_config=settings, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)


def torchao(kind: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerGroup
        from transformers import TorchAoConfig

        config = {
            "int8": lambda: Int8WeightOnlyConfig(version=2),
            "int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
            "intx8": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerGroup(32)),
            "float8": lambda: Float8WeightOnlyConfig(),
        }[kind]()
        by_transformers(folder, TorchAoConfig(config))

    return write


def bitsandbytes(**options: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        from transformers import BitsAndBytesConfig

        by_transformers(folder, BitsAndBytesConfig(**options))

    return write


def compressed(format_: str, **weights: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import (
            QuantizationConfig,
            QuantizationStatus,
            apply_quantization_config,
        )
        from transformers import AutoModelForCausalLM

        plain_folder = folder.with_name(folder.name + "-plain")
        llama(plain_folder)
        model = AutoModelForCausalLM.from_pretrained(plain_folder, dtype=torch.bfloat16)
        base = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
        config = QuantizationConfig(
            config_groups={"group_0": {"targets": ["Linear"], "weights": {**base, **weights}}},
            ignore=["lm_head"],
            format=format_,
        )
        apply_quantization_config(model, config)
        _scale(model)
        for module in model.modules():
            if hasattr(module, "quantization_status"):
                module.quantization_status = QuantizationStatus.FROZEN
        compressor = ModelCompressor.from_pretrained_model(model, quantization_format=format_)
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(folder)

    return write


def _scale(model: Any) -> None:
    """Choose scales by the largest sizes, as an observer of the library does."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            continue
        weights, value = scheme.weights, module.weight.detach().float()
        rows, columns = value.shape
        size = weights.group_size or columns
        parts = (
            value.reshape(rows, columns // size, size)
            if weights.strategy != "tensor"
            else value.reshape(1, 1, -1)
        )
        least, most = parts.amin(-1), parts.amax(-1)
        common = {}
        if hasattr(module, "weight_global_scale"):
            module.weight_global_scale.data.copy_(generate_gparam(value.min(), value.max()))
            common = {"global_scale": module.weight_global_scale.data}
        scale, zero = calculate_qparams(least, most, weights, **common)
        module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))


def by_layout(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from quantised_folders import quantise_folder

        llama(folder)
        quantise_folder(folder, name)

    return write


FORMATS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "pack-4": ("compressed_tensors", compressed("pack-quantized")),
    "pack-4-asymmetric": ("compressed_tensors", compressed("pack-quantized", symmetric=False)),
    "pack-4-channel": ("compressed_tensors", compressed("pack-quantized", strategy="channel", group_size=None)),
    "pack-8": ("compressed_tensors", compressed("pack-quantized", num_bits=8)),
    "int8": (
        "compressed_tensors", compressed("int-quantized", num_bits=8, strategy="channel", group_size=None)
    ),
    "float8": (
        "compressed_tensors",
        compressed("float-quantized", num_bits=8, type="float", strategy="channel", group_size=None),
    ),
    "nvfp4": (
        "compressed_tensors",
        compressed("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16),
    ),
    "torchao-int8": ("torchao", torchao("int8")),
    "torchao-int4": ("torchao", torchao("int4")),
    "torchao-intx8": ("torchao", torchao("intx8")),
    "torchao-float8": ("torchao", torchao("float8")),
    "nf4": ("bitsandbytes", bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "nf4-double": (
        "bitsandbytes",
        bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "fp4": ("bitsandbytes", bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4")),
    "llm-int8": ("bitsandbytes", bitsandbytes(load_in_8bit=True)),
    "fp8": ("", by_layout("fp8")),
    "fp8-power-scales": ("", by_layout("fp8-power-scales")),
}  # fmt: skip


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """Return the plain values that transformers has of a folder, by name."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    settings = config.quantization_config
    if settings["quant_method"] in ("compressed-tensors", "fp8", "mxfp4"):
        config.quantization_config = {**settings, "dequantize": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=config.dtype)
    return dict(plain(model).named_parameters())


def check(write: Callable[[Path], None], folder: Path) -> str:
    """Return what one line says of a format."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        write(folder / "in")
        values = loaded(folder / "in")
    files = read_checkpoint(folder / "in")
    matrices = {k: t for k, t in files.tensors.items() if stored_matrices(t)}
    differ = sum(not torch.equal(values[k].detach(), t.load()) for k, t in matrices.items())
    equal = (
        f"{len(matrices)} matrices equal" if not differ else f"{differ} of {len(matrices)} matrices DIFFER"
    )
    program = graphopt.capture(folder / "in")
    shorter = graphopt.optimize(program, passes=["skip-layers{layers=[1]}"])
    report = shorter.save_pretrained(folder / "out")
    worst = max(report.errors.values())
    again = f"{report.checked}, relative error {worst:.1g}"
    if report.not_reloaded:
        again += f" ({report.not_reloaded})"
    return f"{equal}; a layer skipped, written: {len(report.quantised)} matrices in the layout, {again}"


def main() -> None:
    """Check the formats that are named, or all."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    names = sys.argv[1:] or list(FORMATS)
    for name in names:
        library, write = FORMATS[name]
        if library and importlib.util.find_spec(library) is None:
            print(f"{name}: {library} is not installed", flush=True)
            continue
        with tempfile.TemporaryDirectory() as directory:
            try:
                said = check(write, Path(directory))
            except Exception as error:
                said = f"FAILED: {type(error).__name__}: {str(error)[:300]}"
        print(f"{name} (written by {library or 'its layout'}): {said}", flush=True)


if __name__ == "__main__":
    main()
