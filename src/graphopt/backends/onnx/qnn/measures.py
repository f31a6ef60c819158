"""Reference results of a file on the CPU, and the distance of a device's results from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def reference(path: Path, feed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the outputs of ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [v.name for v in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def signal_to_noise(actual: Any, expected: Any) -> float:
    """Return the signal-to-noise ratio in decibels: 200 if both are equal, -200 if there is a NaN."""
    import numpy

    a, b = numpy.asarray(actual, "float64"), numpy.asarray(expected, "float64")
    if not (numpy.isfinite(a).all() and numpy.isfinite(b).all()):
        return -200.0
    noise, power = float(((a - b) ** 2).sum()), float((b**2).sum())
    if noise == 0:
        return 200.0
    return float(numpy.clip(10 * numpy.log10(max(power, 1e-30) / noise), -200, 200))
