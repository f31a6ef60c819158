"""What is said where this processor may be what computes wrongly."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest

from graphopt.backends.onnx import compare, processors
from graphopt.ir.facts import Quantized


class Rounded:
    def __init__(self, activations: int | None):
        self.facts: dict[type, Any] = {}
        if activations is not None:
            self.facts[Quantized] = Quantized(weights=8, activations=activations)


@pytest.mark.parametrize(
    ("activations", "overflow", "said"),
    [(8, True, True), (8, False, False), (16, True, False), (None, True, False)],
)
def test_who_is_told_of_overflow(
    activations: int | None, overflow: bool, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "sums_overflow", lambda: overflow)
    assert ("VNNI" in compare._of_processor(Rounded(activations))) == said  # type: ignore[arg-type]


CPU = Path("/proc/cpuinfo")


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not CPU.is_file(),
    reason="the instructions of this processor are unknown",
)
def test_sums_overflow_without_vnni() -> None:
    assert processors.sums_overflow() == ("vnni" not in CPU.read_text())
