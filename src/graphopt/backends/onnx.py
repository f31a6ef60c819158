"""A Program as an ONNX file: standard operators only, checked and compared before it is in its place."""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..ir.errors import LoweringError
from ..ir.program import Program
from .onnx_check import check_file
from .onnx_compare import compare_with_runtime, comparison_cases
from .onnx_graph import build_graph
from .onnx_sizes import fixed_sizes, uses_bfloat16, with_sizes

OPSETS = (20, 21, 23)
EXTERNAL_FROM = 1_900_000_000
"""Bytes of weights from which they are written beside the file: a protobuf holds 2 GiB at most."""


@dataclass(frozen=True)
class OnnxReport:
    """What was written.

    ``nodes`` counts operators; ``errors`` has the largest relative error of each output against the program
    (empty if not compared); ``inputs`` and ``outputs`` have sizes as numbers or names; ``seconds`` covers
    everything, checks included.
    """

    path: Path
    opset: int
    nodes: dict[str, int]
    initialiser_bytes: int
    errors: dict[str, float]
    files: tuple[Path, ...]
    seconds: float
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]


def lower_onnx(
    program: Program,
    path: str | os.PathLike[str],
    *,
    opset: int = 20,
    dynamic: bool | None = None,
    sizes: Mapping[str, int] | None = None,
    compare: bool = True,
    external_data: Literal["auto"] | bool = "auto",
    target: str | None = None,
    float32: bool = True,
    tolerance: float | None = None,
) -> OnnxReport:
    """Write the program as an ONNX file of standard operators.

    The file appears under its name only when ONNX's checker has passed it and ONNX Runtime has computed
    what the program computes; a failure leaves nothing, and an older file as it was. Dials are inputs,
    float64 scalars.

    Args:
        program: not changed.
        path: of the file; its folder must exist.
        opset: 20, 21 or 23. At 23 attention, RMS norm and rotary embedding are one node each.
        dynamic: keep sizes dynamic, under their names. By default so if ``sizes`` is not given. With False,
            sizes not given have the value seen at capture.
        sizes: values of sizes, for a static graph: ``{"batch": 1, "sequence": 128}``. With ``dynamic=True``
            the sizes not given stay dynamic.
        compare: run both and compare, at one size if static, at two if dynamic, with padding on either side.
        external_data: weights beside the file, as ``<name>.data``; by default from 1.9 GB on.
        target: rules of a device to follow; none are known here yet.
        float32: write bfloat16 as float32, since ONNX Runtime has few kernels for bfloat16. float16 stays.
        tolerance: largest relative error that is accepted; by default 1e-4, and 2e-2 for float16.

    Raises:
        LoweringError: missing packages, an opset or size that is not supported, an operator that ONNX lacks,
            a file that the checker refuses, or results that differ.
    """
    started = time.perf_counter()
    _require(["onnx", "onnxscript", "onnx_ir"] + ["onnxruntime"] * compare)
    if opset not in OPSETS:
        raise LoweringError(f"opset {opset} is not supported", hint=f"use {', '.join(map(str, OPSETS))}")
    if target is not None:
        raise LoweringError(f"no rules are known for the target {target!r}", hint="leave target out")
    place = Path(path).absolute()
    if not place.parent.is_dir():
        raise LoweringError(f"the folder {place.parent} does not exist")
    if place.is_dir():
        raise LoweringError(f"{place} is a folder", hint="name the file, for example model.onnx")
    dynamic = (sizes is None) if dynamic is None else dynamic
    fixed = fixed_sizes(program, sizes or {}, everything=not dynamic)
    widen = float32 and uses_bfloat16(program)
    lowered = with_sizes(program, fixed, float32=widen)
    graph = build_graph(lowered, opset)
    total = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    apart = total >= EXTERNAL_FROM if external_data == "auto" else bool(external_data)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as folder:
        draft = Path(folder) / place.name
        _write(graph, draft, apart)
        nodes = check_file(draft, opset)
        errors: dict[str, float] = {}
        if compare:
            # a copy, so that the weights it loads to run leave with it
            reference = with_sizes(program, {}, float32=True) if widen else program.copy()
            cases = list(comparison_cases(reference, fixed, dynamic))
            errors = compare_with_runtime(draft, reference, cases, tolerance)
        files = _put_in_place(Path(folder), place)
    return OnnxReport(
        path=place,
        opset=opset,
        nodes=dict(nodes.most_common()),
        initialiser_bytes=total,
        errors=errors,
        files=files,
        seconds=time.perf_counter() - started,
        inputs={value.name: _shape(value) for value in graph.graph.inputs},
        outputs={value.name: _shape(value) for value in graph.graph.outputs},
    )


def _require(packages: list[str]) -> None:
    missing = []
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise LoweringError(f"writing ONNX needs {', '.join(missing)}", hint='pip install "graphopt[onnx]"')


def _write(graph: Any, path: Path, apart: bool) -> None:
    import onnx_ir

    if apart:
        onnx_ir.save(graph, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)
    else:
        onnx_ir.save(graph, path)


def _put_in_place(folder: Path, place: Path) -> tuple[Path, ...]:
    """Move the files written into place, the model last; on failure the older files come back."""
    written = sorted((f for f in folder.iterdir() if f.is_file()), key=lambda f: f.name == place.name)
    older = folder / "older"
    older.mkdir()
    done: list[Path] = []
    try:
        for file in written:
            final = place.parent / file.name
            done.append(final)
            if final.exists():
                os.replace(final, older / file.name)
            os.replace(file, final)
    except BaseException:
        for final in done:
            kept = older / final.name
            if kept.exists():
                os.replace(kept, final)
            elif not (folder / final.name).exists():
                final.unlink(missing_ok=True)
        raise
    return tuple(place.parent / file.name for file in reversed(written))


def _shape(value: Any) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
