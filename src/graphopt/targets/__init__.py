"""Operators that devices and runtimes support, from data files made by sweeps of single operators through each."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from ..ir.errors import LoweringError

FLOAT = "float"


@dataclass(frozen=True)
class Verdict:
    """The result of compiling one operator in one type.

    Attributes:
        placed: the operator is supported, and no other node is left in the graph.
        snr: signal-to-noise ratio of the simulator against ONNX Runtime on the same file, in decibels; None where
            nothing was computed.
        why: the reason given, where it is not supported.
    """

    placed: bool
    snr: float | None
    why: str

    @property
    def right(self) -> bool:
        """Tell whether the operator is supported and computes correct values."""
        return self.placed and (self.snr is None or self.snr >= LEAST_SNR)


LEAST_SNR = 25.0
"""Decibels below which an operator counts as wrong; rounding alone leaves a higher ratio in every type."""


@dataclass(frozen=True)
class Target:
    """A device or runtime to write files for.

    Attributes:
        name: as given to ``target=``.
        opset: the one its compiler supports best, or the one of the runtime's operators.
        soc: Qualcomm's number of the system on a chip; 0 for a runtime.
        arch: version of the HTP; 0 for a runtime.
        wheel: package and version of the compiler or runtime that the sweep ran on.
        operators: for each ONNX operator the verdict in each type (float, w8a8, w8a16, w4a8, w4a16), the worst over
            its variants.
        most_dimensions: the largest number of dimensions of operators that support fewer than ONNX allows.
        blocks: operators and types whose weights may have a scale for each block of inputs.
    """

    name: str
    opset: int
    soc: int
    arch: int
    wheel: str
    operators: Mapping[str, Mapping[str, Verdict]]
    most_dimensions: Mapping[str, int]
    blocks: frozenset[tuple[str, str]] = frozenset()

    @property
    def compiled(self) -> bool:
        """Tell whether files are compiled ahead of time, which requires fixed sizes."""
        return self.soc > 0

    def refuses(self, operator: str, dimensions: int, kind: str = FLOAT) -> str:
        """Return why an operator cannot run on the device; empty if it can.

        Args:
            operator: an ONNX operator.
            dimensions: of its first operand.
            kind: "float", "w8a8", "w8a16", "w4a8" or "w4a16".
        """
        verdicts = self.operators.get(operator)
        if verdicts is None:
            # results of a runtime are always compared; a compiler may generate wrong code for a device
            return f"{operator} was never tried on {self.name}" if self.compiled else ""
        verdict = verdicts.get(kind)
        if verdict is None:
            # operators without weights do not depend on the bits of weights
            verdict = verdicts.get(kind.replace("w4", "w8"), verdicts.get(FLOAT))
        if verdict is not None and not verdict.placed:
            return f"{self.name} does not take {operator}" + (f": {verdict.why}" if verdict.why else "")
        if verdict is not None and not verdict.right:
            return f"{self.name} computes {operator} wrongly in {kind} ({verdict.snr:.0f} dB)"
        most = self.most_dimensions.get(operator)
        if most is not None and dimensions > most:
            return f"{self.name} takes {operator} with at most {most} dimensions, not {dimensions}"
        return ""

    def takes_blocks(self, operator: str, kind: str) -> bool:
        """Tell whether a weight may have a scale for each block of inputs."""
        return (operator, kind) in self.blocks


def names() -> list[str]:
    """Return the names of the known targets."""
    files = [f.name for f in resources.files(__name__).iterdir()]
    return sorted(f.removesuffix(".json") for f in files if f.endswith(".json"))


@cache
def find_target(name: str) -> Target:
    """Return a device or runtime by name; "onnx" is ONNX Runtime at the newest opset.

    Raises:
        LoweringError: there is no target of that name.
    """
    if name == "onnx":
        name = max(n for n in names() if n.startswith("onnx-"))
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        raise LoweringError(
            f"there is no target {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            hint=f"targets are {', '.join(names())}; without one, the file is plain ONNX",
        )
    return read_target(name, json.loads((resources.files(__name__) / f"{name}.json").read_text()))


def read_target(name: str, data: Mapping[str, Any]) -> Target:
    """Return a target from the data of its file; the worst verdict over an operator's usual variants counts."""
    operators: dict[str, dict[str, Verdict]] = {}
    most: dict[str, int] = {}
    blocks: set[tuple[str, str]] = set()
    for case in data["cases"]:
        for kind, entry in case["verdicts"].items():
            verdict = Verdict(bool(entry["placed"]), entry.get("snr"), entry.get("why", ""))
            name_of, dimensions = case["operator"], int(case["dimensions"])
            if case["limit"] == "dimensions" and not verdict.placed:
                most[name_of] = dimensions - 1
            elif case["limit"] == "block" and verdict.right:
                blocks.add((name_of, kind))
            if case["limit"]:
                continue
            by_kind = operators.setdefault(case["operator"], {})
            if kind not in by_kind or _badness(verdict) > _badness(by_kind[kind]):
                by_kind[kind] = verdict
    device = data["device"]
    return Target(
        name, int(device["opset"]), int(device.get("soc", 0)), int(device.get("arch", 0)), str(data["wheel"]),
        operators, most, frozenset(blocks),
    )  # fmt: skip


def _badness(verdict: Verdict) -> tuple[bool, float]:
    return not verdict.placed, -(verdict.snr if verdict.snr is not None else 1e9)
