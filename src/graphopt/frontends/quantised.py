"""Checkpoints whose matrices are stored in few bits, read as if they were plain; the codes stay behind the values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..formats.registry import open_quantised
from ..ir.errors import CheckpointError
from .checkpoint_files import CheckpointFiles, read_json

# settings in files of their own: of AutoGPTQ before it wrote them into config.json, and of NVIDIA's ModelOpt
_BESIDE = {"quantize_config.json": "gptq", "hf_quant_config.json": "modelopt"}


def dequantised(files: CheckpointFiles) -> CheckpointFiles:
    """Return a checkpoint with plain matrices, each dequantised when it is loaded; one without quantisation as it is.

    Raises:
        CheckpointError: the method of quantisation is not known, or the tensors contradict it.
    """
    settings = _settings(files)
    if settings is None:
        return files
    where = str(files.folder / "config.json")
    if not isinstance(settings, dict):
        raise CheckpointError(f"{where}: quantization_config must hold an object")
    try:
        tensors, notes = open_quantised(settings, files.tensors, _dtype(files), where)
    except CheckpointError as error:
        if str(files.folder) in str(error):
            raise
        raise CheckpointError(f"{where}: {error.message}", hint=error.hint) from error
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise CheckpointError(f"{where}: quantization_config is not of its method: {error}") from error
    config = {**files.config, "quantization_config": settings}
    note = "; ".join(
        [f"quantised with {settings.get('quant_method')}; codes are kept as they are stored", *notes]
    )
    return replace(files, config=config, tensors=tensors, note=note, quantised=True)


def _settings(files: CheckpointFiles) -> Any:
    text = files.config.get("text_config")
    for config in (files.config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if config.get(key) is not None:
                return config[key]
    for name, method in _BESIDE.items():
        path = files.folder / name
        if path.is_file():
            found = read_json(path)
            if not isinstance(found, dict):
                raise CheckpointError(f"{path} must hold an object")
            return {**found, "quant_method": method}
    return None


def _dtype(files: CheckpointFiles) -> torch.dtype:
    """Return the type that the model runs in, by its configuration, else that of most plain tensors."""
    text = files.config.get("text_config")
    for config in (files.config, text if isinstance(text, dict) else {}):
        name = config.get("dtype", config.get("torch_dtype"))
        dtype = getattr(torch, str(name), None)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            return dtype
    plain = [t.dtype for n, t in files.tensors.items() if "scale" not in n and t.dtype.is_floating_point]
    wide = [d for d in plain if d.itemsize > 1]
    return max(wide, key=wide.count) if wide else torch.float32


def without_quantisation(config: Any) -> Any:
    """Return a configuration of transformers that describes the plain model; changed in place."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        if part is not None and getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return config
