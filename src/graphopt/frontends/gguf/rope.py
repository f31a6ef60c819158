"""Translation of a GGUF file's rotary embedding settings to those of a transformers configuration."""

from __future__ import annotations

import math
from typing import Any

import numpy

from .header import Header
from .tensors import tensor_of

FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_MEANS_NONE = ("none", "")


def rope_parameters(header: Header, prefix: str, dimensions: int) -> dict[str, Any]:
    """Return the ``rope_parameters`` of a configuration.

    Args:
        header: of the file.
        prefix: of its hyperparameters, the architecture's name.
        dimensions: how many of a head's dimensions are rotated.

    Raises:
        CheckpointError: the file scales positions in a way that the library does not support.
    """
    parameters: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": header.number(f"{prefix}.rope.freq_base", 10000.0),
    }
    if FREQUENCIES in header.tensors:
        return {**parameters, **_llama3(header, parameters["rope_theta"], dimensions)}
    if LONG in header.tensors or SHORT in header.tensors:
        return {**parameters, **_longrope(header, prefix, dimensions)}
    kind = header.text(f"{prefix}.rope.scaling.type", "none")
    if kind in _MEANS_NONE:
        # old files have this instead of a type
        if header.has(f"{prefix}.rope.scale_linear"):
            factor = header.number(f"{prefix}.rope.scale_linear")
            return parameters if factor == 1 else {**parameters, "rope_type": "linear", "factor": factor}
        return parameters
    if kind == "linear":
        return {**parameters, "rope_type": "linear", "factor": header.number(f"{prefix}.rope.scaling.factor")}
    if kind == "yarn":
        parameters |= {"rope_type": "yarn", "factor": header.number(f"{prefix}.rope.scaling.factor")}
        parameters["original_max_position_embeddings"] = header.count(
            f"{prefix}.rope.scaling.original_context_length"
        )
        for name, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if header.has(f"{prefix}.rope.scaling.{key}"):
                parameters[name] = header.number(f"{prefix}.rope.scaling.{key}")
        return parameters
    raise header.wrong(
        f"its scaling of rotary positions, {kind!r}, is not supported",
        hint="supported are none, linear, yarn, and tables of factors",
    )


def _table(header: Header, name: str, dimensions: int) -> numpy.ndarray[Any, Any]:
    stored = header.tensors.get(name)
    if stored is None:
        raise header.wrong(f"it has no tensor {name}, which belongs to its other tables of rotary factors")
    if stored.shape != (dimensions // 2,):
        raise header.wrong(f"{name} has shape {list(stored.shape)}, and {dimensions} dimensions are rotated")
    values = tensor_of(header, stored).load().double().numpy()
    if not (numpy.isfinite(values) & (values > 0)).all():
        raise header.wrong(f"{name} holds factors that are not positive numbers")
    return values


def _llama3(header: Header, theta: float, dimensions: int) -> dict[str, Any]:
    """Return the parameters that produce the factors in the file.

    The file has one factor per frequency instead of the four numbers that they were computed from. Between the two
    ends (1 and the largest factor) the inverse of a factor is linear in the frequency, which yields two of the
    numbers; the original length and both limits only matter up to a common factor, so the lower limit is taken as 1.
    """
    factors = _table(header, FREQUENCIES, dimensions)
    frequencies = theta ** (-numpy.arange(0, dimensions, 2) / dimensions)
    factor = round(float(factors.max()), 6)
    if numpy.allclose(factors, factor, rtol=1e-6):
        return {} if factor == 1 else {"rope_type": "linear", "factor": factor}
    usual = (1.0, 4.0, 8192.0)
    guesses = [usual]
    between = (factors > 1 + 1e-5) & (factors < factor * (1 - 1e-5))
    if between.sum() >= 2:
        smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        slope, start = numpy.polyfit(frequencies[between] / (2 * math.pi), smooth, 1)
        if slope > 0 > start:
            high = 1 - 1 / start
            guesses.append((1.0, float(high), float(round(slope * (high - 1)))))
            guesses.append((1.0, float(round(high)), float(round(slope * (round(high) - 1)))))
    for low, high, length in guesses:
        smooth = (length * frequencies / (2 * math.pi) - low) / (high - low)
        expected = 1 / ((1 - smooth.clip(0, 1)) / factor + smooth.clip(0, 1))
        if numpy.allclose(expected, factors, rtol=2e-6):
            return {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": int(length),
            }  # fmt: skip
    raise header.wrong(
        f"the factors in {FREQUENCIES} follow no rule that transformers has for llama",
        hint="convert the model from its Hugging Face folder with a current llama.cpp",
    )


def _longrope(header: Header, prefix: str, dimensions: int) -> dict[str, Any]:
    parameters = {
        "rope_type": "longrope",
        "long_factor": _table(header, LONG, dimensions).tolist(),
        "short_factor": _table(header, SHORT, dimensions).tolist(),
        "original_max_position_embeddings": header.count(f"{prefix}.rope.scaling.original_context_length"),
    }
    if header.has(f"{prefix}.rope.scaling.attn_factor"):
        parameters["attention_factor"] = header.number(f"{prefix}.rope.scaling.attn_factor")
    return parameters
