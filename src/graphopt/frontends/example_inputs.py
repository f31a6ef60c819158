"""Example inputs for a checkpoint when the user gives none, at sizes that export does not specialise."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..ir.errors import UsageError

BATCH, LENGTH = 3, 13

# candidate inputs in order; those that a model does not take are left out
_TEXT = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "decoder_input_ids")


def main_input(model: Any) -> str:
    """Return the name of a model's main input."""
    return str(getattr(model, "main_input_name", "input_ids"))


def example_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Return an example of batch 3 for a transformers model, by the parameters of its forward.

    Raises:
        UsageError: the model takes an input for which there is no example.
    """
    config, takes = model.config, inspect.signature(model.forward).parameters
    main = main_input(model)
    if main == "input_ids":
        return _text(config, takes)
    if main == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {main: torch.randn(BATCH, getattr(config, "num_channels", 3), height, width)}
    raise UsageError(
        f"{type(model).__name__} takes {main}, for which there is no example",
        hint="give inputs=, an example of what the model takes",
    )


def _text(config: Any, takes: Any) -> dict[str, torch.Tensor]:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = int(getattr(text, "vocab_size", 2) or 2)
    low = min(5, vocabulary - 1)
    ids = torch.randint(low, vocabulary, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    inputs: dict[str, torch.Tensor] = {"input_ids": ids}
    if "attention_mask" in takes:
        inputs["attention_mask"] = torch.ones_like(ids)
    if "token_type_ids" in takes and getattr(text, "type_vocab_size", None):
        inputs["token_type_ids"] = torch.zeros_like(ids)
    if "position_ids" in takes and causal(config):
        inputs["position_ids"] = torch.arange(LENGTH).expand(BATCH, LENGTH).clone()
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = ids[:, :7].clone()
    return inputs


def causal(config: Any) -> bool:
    """Return whether a configuration is that of a decoder that predicts the next token."""
    names = " ".join(getattr(config, "architectures", None) or [])
    return "CausalLM" in names or "LMHead" in names or bool(getattr(config, "is_decoder", False))


def size_names(inputs: dict[str, torch.Tensor]) -> dict[str, dict[int, str]]:
    """Return which sizes vary and under which name, for inputs of known kinds."""
    names: dict[str, dict[int, str]] = {}
    for name, value in inputs.items():
        if value.dim() == 0:
            continue
        names[name] = {0: "batch"}
        if value.dim() == 2 and not value.dtype.is_floating_point:
            names[name][1] = "decoder_sequence" if name.startswith("decoder") else "sequence"
    return names
