"""A configuration of transformers as the hyperparameters of a GGUF file, after llama.cpp's convert_hf_to_gguf.py."""

from __future__ import annotations

import math
from typing import Any

import numpy
import torch

from ...ir.errors import LoweringError

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2",
    "gemma3_text": "gemma3", "phi3": "phi3",
}  # fmt: skip
"""What GGUF files call each kind of model that can be written."""
_PERIOD = 6  # of Gemma 3: each sixth layer sees all positions


def require_gguf() -> Any:
    """Return the library ``gguf``.

    Raises:
        LoweringError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise LoweringError("writing a GGUF file needs gguf", hint='pip install "graphopt[gguf]"') from None
    return gguf


def architecture_of(config: Any) -> str:
    """Return what a GGUF file calls a model's architecture.

    Raises:
        LoweringError: it has none, or none for these settings.
    """
    kind = str(config.model_type)
    if kind not in ARCHITECTURES:
        raise LoweringError(
            f"models of the type {kind!r} are not written as GGUF files",
            hint=f"{', '.join(ARCHITECTURES)} are; llama.cpp's convert_hf_to_gguf.py takes a Hugging Face folder of others",
        )
    window = getattr(config, "sliding_window", None)
    windowed = kind == "mistral" or getattr(config, "use_sliding_window", False)
    if windowed and window and window < config.max_position_embeddings:
        raise LoweringError(
            f"GGUF files of {ARCHITECTURES[kind]} have no place for a window of {window} positions"
        )
    return ARCHITECTURES[kind]


def _rope(config: Any) -> dict[str, Any]:
    parameters = config.rope_parameters
    found: dict[str, Any] = parameters.get("full_attention", parameters)
    return found


def _head(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def write_parameters(writer: Any, architecture: str, config: Any) -> None:
    """Add the hyperparameters to a file.

    Args:
        writer: ``gguf.GGUFWriter``.
        architecture: as the file calls it.
        config: of transformers.

    Raises:
        LoweringError: the file has no place for a setting.
    """
    head, rope = _head(config), _rope(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture != "phi3":
        writer.add_key_length(head)
        writer.add_value_length(head)
    if architecture in ("llama", "phi3"):
        writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    _write_scaling(writer, architecture, config, rope)
    if architecture == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
    if architecture.startswith("gemma"):
        _write_gemma(writer, architecture, config, head)


def _write_scaling(writer: Any, architecture: str, config: Any, rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type", "default")
    gguf = require_gguf()
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        known = {
            "rope_type",
            "rope_theta",
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
        }
        more = sorted(k for k, v in rope.items() if k not in known and v is not None)
        if more:
            raise LoweringError(f"GGUF files have no place for {', '.join(more)} of positions scaled by yarn")
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for name, add in (
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(name) is not None:
                add(rope[name])
    if architecture == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if kind not in ("default", "linear", "yarn") and (architecture, kind) != ("llama", "llama3"):
        raise LoweringError(f"GGUF files of {architecture} have no place for positions scaled by {kind}")


def _write_gemma(writer: Any, architecture: str, config: Any, head: int) -> None:
    count, types = config.num_hidden_layers, list(config.layer_types)
    exception = 46 if architecture == "gemma2" else 62
    divisor = config.hidden_size // config.num_attention_heads if count == exception else head
    if config.query_pre_attn_scalar != divisor:
        raise LoweringError(
            f"queries are divided by the root of {config.query_pre_attn_scalar}, and GGUF files of {architecture} have no "
            f"place for that: llama.cpp takes {divisor}"
        )
    writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        period, rule = 2, [("full" if i % 2 else "sliding") + "_attention" for i in range(count)]
    else:
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        if config.attn_logit_softcapping:
            raise LoweringError("GGUF files of gemma3 have no place for a cap of attention scores")
        period = next((i + 1 for i, t in enumerate(types) if t == "full_attention"), _PERIOD)
        period = _PERIOD if period > count or (period - 1 >= count) else period
        rule = [("full" if (i + 1) % period == 0 else "sliding") + "_attention" for i in range(count)]
        if period != _PERIOD:
            writer.add_uint32("gemma3.attention.sliding_window_pattern", period)
        local = config.rope_parameters["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            raise LoweringError("GGUF files of gemma3 have no place for scaled positions in windows")
        writer.add_float32("gemma3.rope.freq_base_swa", local["rope_theta"])
    if types != rule:
        raise LoweringError(
            f"in a GGUF file of {architecture}, each {period}. layer sees all positions, and here other layers do",
            hint="remove layers in multiples of that number, or use program.save or program.lower",
        )


def tables(architecture: str, config: Any) -> dict[str, torch.Tensor]:
    """Return the tensors by which a file describes scaled rotary positions."""
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if architecture == "llama" and kind == "llama3":
        return {"rope_freqs.weight": _llama3(rope, _head(config))}
    return {}


def _llama3(rope: dict[str, Any], dimensions: int) -> torch.Tensor:
    """Return the numbers by which each frequency is divided: 1 for short waves, the factor for long ones."""
    length = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    waves = 2 * math.pi * rope["rope_theta"] ** (numpy.arange(0, dimensions, 2) / dimensions)
    smooth = ((length / waves - low) / (high - low)).clip(0, 1)
    return torch.from_numpy(1 / ((1 - smooth) / factor + smooth)).float()
