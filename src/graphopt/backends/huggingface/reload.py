"""Standalone script, run in its own process: load a folder with transformers alone and run it.

Usage: python huggingface_reload.py FOLDER CLASS INPUTS OUTPUTS DTYPE, where INPUTS and OUTPUTS are
safetensors files; the part of a tensor's name before the slash is the run that it belongs to. The script imports
nothing from graphopt, so that it computes what users of the folder will get.
"""

import sys
from typing import Any


def main() -> None:
    """Load the model, run it, and write the outputs."""
    folder, class_name, inputs, outputs, dtype = sys.argv[1:6]
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    transformers.logging.set_verbosity_error()
    model_class = getattr(transformers, class_name)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    settings = getattr(config, "quantization_config", None)
    options = {"local_files_only": True, "output_loading_info": True, "config": config}
    if settings is None:
        model, info = model_class.from_pretrained(folder, dtype=getattr(torch, dtype), **options)
    else:
        # in the type of the folder first: a value is rounded to it once, and then widened as it is
        if isinstance(settings, dict) and settings.get("quant_method") in (
            "compressed-tensors",
            "fp8",
            "mxfp4",
        ):
            config.quantization_config = {**settings, "dequantize": True}
        model, info = model_class.from_pretrained(folder, dtype=config.dtype, **options)
        model = plain(model).to(getattr(torch, dtype))
    missing = list(info["missing_keys"])
    if missing:
        raise SystemExit(f"transformers finds no tensor for {', '.join(sorted(missing)[:5])}")
    if info.get("mismatched_keys"):
        raise SystemExit(f"transformers finds tensors of other shapes: {list(info['mismatched_keys'])[:3]}")
    model.eval()
    model.config.use_cache = False
    runs: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in load_file(inputs).items():
        run, _, name = name.partition("/")
        runs.setdefault(run, {})[name] = value
    tensors_of_runs = {}
    for run, arguments in runs.items():
        with torch.no_grad():
            result = flat(model(**arguments))
        tensors_of_runs.update(
            {f"{run}/{name}": value.contiguous().clone() for name, value in result.items()}
        )
    save_file(tensors_of_runs, outputs)


def plain(model: Any) -> Any:
    """Return a model with plain matrices in place of those that its library keeps quantised."""
    import torch

    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = model.dequantize()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = parameter.detach()
            if type(value) is not torch.Tensor and hasattr(value, "dequantize"):
                value = value.dequantize()
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    model.hf_quantizer = None
    model.is_quantized = False
    return model


def flat(value: object, name: str = "") -> dict:  # type: ignore[type-arg]
    """Return the tensors of a nested value, named by their path."""
    import torch

    if isinstance(value, torch.Tensor):
        return {name or "output": value}
    items: list = []  # type: ignore[type-arg]
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    inner = [flat(item, f"{name}_{key}" if name else str(key)) for key, item in items]
    return {key: tensor for tensors in inner for key, tensor in tensors.items()}


if __name__ == "__main__":
    main()
