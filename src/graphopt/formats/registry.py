"""The quantisation methods that are known, by the name that a checkpoint's configuration gives them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from ..ir.errors import CheckpointError
from ..ir.quantised.codes import CannotExpress
from ..ir.quantised.stored import Making, is_quantised, quantised_form
from ..ir.quantised.tensor import QuantisedTensor
from ..ir.weights import TensorSource
from . import bitsandbytes, compressed_tensors, floats, gptq, modelopt, torchao
from .stored import FileTensor, Layout, StoredMatrix, Written, encoded, layout_of

Opened = tuple[dict[str, FileTensor], list[str]]
Opener = Callable[[dict[str, Any], Mapping[str, FileTensor], torch.dtype], Opened]

OPENERS: dict[str, Opener] = {
    "compressed-tensors": compressed_tensors.open_matrices,
    "gptq": gptq.open_matrices,
    "awq": gptq.open_matrices,
    "fp8": floats.open_block_float8,
    "mxfp4": floats.open_mxfp4,
    "bitsandbytes": bitsandbytes.open_matrices,
    "modelopt": modelopt.open_matrices,
    "torchao": torchao.open_matrices,
}
LAYOUTS: dict[str, Callable[[Mapping[str, Any], str, QuantisedTensor], Layout]] = {
    "gptq": gptq.layout_for,
    "awq": gptq.layout_for,
    "fp8": floats.block_float8_for,
    "mxfp4": floats.mxfp4_for,
}
"""The layout of each method for a matrix that is quantised, by the checkpoint's settings and the matrix's name."""
# the key under which each method lists modules that stay as they are
_LEFT_OUT = {
    "compressed-tensors": "ignore",
    "awq": "modules_to_not_convert",
    "fp8": "modules_to_not_convert",
    "mxfp4": "modules_to_not_convert",
    "torchao": "modules_to_not_convert",
    "bitsandbytes": "llm_int8_skip_modules",
}


def open_quantised(
    settings: dict[str, Any], tensors: Mapping[str, FileTensor], dtype: torch.dtype, where: str
) -> Opened:
    """Return a checkpoint's tensors with each quantised matrix in place of what it is stored in, and notes.

    Args:
        settings: ``quantization_config`` of the checkpoint's configuration.
        tensors: of its files, by name.
        dtype: of the model.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: the method is not known, or the tensors contradict it.
    """
    method = settings.get("quant_method")
    opener = OPENERS.get(str(method))
    if opener is None:
        version = settings.get("version") or settings.get("checkpoint_format")
        raise CheckpointError(
            f"{where} is quantised with {method!r}{f' (version {version})' if version else ''}, which is not read",
            hint=f"known are {', '.join(sorted(OPENERS))}; transformers loads others, and can save some dequantised",
        )
    found, notes = opener(settings, tensors, dtype)
    # codes without scales are named by their tensor, later
    plain = all(tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1 for tensor in tensors.values())
    if plain and not any(isinstance(tensor, StoredMatrix) for tensor in found.values()):
        raise CheckpointError(
            f"{where} says that it is quantised with {method}, and none of its tensors is",
            hint="take quantization_config out of the configuration if the weights are plain; else fetch it again",
        )
    return found, notes


def write_quantised(
    settings: Mapping[str, Any] | None, tensors: Mapping[str, TensorSource], tables: Collection[str] = ()
) -> Written:
    """Return the tensors to write for a checkpoint whose matrices may be quantised; nothing is read.

    Matrices that came in a layout leave in it. Others that are quantised, as passes leave them, are written in the
    layouts of compressed-tensors. What a layout cannot express is written plain, and listed.

    Args:
        settings: ``quantization_config`` of the checkpoint that the program came from, if it had one.
        tensors: by the names that the model has for them.
        tables: which of them are looked up; libraries read codes of linears alone, and would find none there.
    """
    written, making = Written(), Making()
    method = str((settings or {}).get("quant_method", "compressed-tensors"))
    fresh: dict[str, Any] | None = None
    fresh_layout: Any = None
    layouts: dict[str, Any] = {}
    added: list[tuple[dict[str, Any], str]] = []
    for key, source in tensors.items():
        if not is_quantised(source):
            written.tensors[key] = source
            if layout_of(source) is not None:
                written.plain[key] = "a pass computed with its values"
            continue
        layout = layout_of(source)
        try:
            form = quantised_form(source, values=False)
            assert form is not None
            if layout is None and settings is not None and method in LAYOUTS:
                layout = LAYOUTS[method](settings, key, form)
            elif layout is None:
                if settings is not None and method != "compressed-tensors":
                    raise CannotExpress(f"it was quantised anew, and {method} has no place for it")
                if key in tables:
                    raise CannotExpress("it is looked up, and compressed-tensors has codes for linears alone")
                layout, described = compressed_tensors.settings_of(form, [])
                if settings is not None:
                    added.append((described, key.removesuffix(".weight")))
                elif fresh is None:
                    fresh, fresh_layout = described, layout
                elif layout != fresh_layout:
                    fresh = compressed_tensors.also(fresh, described, key.removesuffix(".weight"))
            elif not key.endswith(layout.weight):
                raise CannotExpress(f"{key} is not what the layout calls a weight")
            parts = encoded(source, layout, making)
        except CannotExpress as reason:
            written.plain[key] = str(reason)
            written.tensors[key] = source
            continue
        written.kept.append(key)
        module = key.removesuffix(layout.weight)
        stored = {module + name: part for name, part in parts.items()}
        written.parts[key] = list(stored)
        written.tensors |= stored
        layouts[key] = layout
        if isinstance(layout, bitsandbytes.FourBits) and layout.depends_on_values(tuple(source.shape)):
            written.not_on_cpu = (
                "bitsandbytes on a CPU gives other values where rows are no multiple of its blocks"
            )
    base = dict(settings) if settings is not None else fresh
    if base is not None and written.kept:
        for described, module in added:
            base = compressed_tensors.also(base, described, module)
        left = _LEFT_OUT.get(method)
        # matrices that are plain: in a folder that came quantised, those that its files do not have so
        plain = {
            key
            for key, source in tensors.items()
            if key.endswith(".weight")
            and len(source.shape) == 2
            and key not in written.kept
            and (settings is None or not hasattr(source, "path"))
        }
        modules = sorted(key.removesuffix(".weight") for key in plain | set(written.plain))
        if settings is None:
            base = compressed_tensors.left_out(base, modules)
        elif method == "modelopt" and modules:
            base = modelopt.left_out(base, modules)
        elif left is not None and modules:
            base[left] = sorted({*(base.get(left) or ()), *modules})
        written.settings = base
        if method == "torchao":
            torchao.describe(written, {k: (layouts[k], tuple(tensors[k].shape)) for k in written.kept})
        if "quantization" in base and method == "modelopt":
            written.files["hf_quant_config.json"] = {k: v for k, v in base.items() if k != "quant_method"}
    return written
