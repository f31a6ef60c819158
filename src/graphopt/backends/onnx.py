"""A Program as an ONNX file: standard operators only, checked and compared before it is in its place."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..ir.errors import LoweringError
from ..ir.program import Program
from ..ir.retype import retyped
from ..ir.targets import FLOAT, find_target
from .host_split import Split, prepared, split
from .onnx_check import check_file
from .onnx_compare import compare_with_runtime, comparison_cases
from .onnx_graph import build_graph
from .onnx_sizes import fixed_sizes, uses_bfloat16, with_sizes
from .onnx_target import TargetReport, check_on_target, require_fixed, require_taken
from .qnn.run import require as require_compiler

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
    checked: TargetReport | None = None


def lower_onnx(
    program: Program,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    dynamic: bool | None = None,
    sizes: Mapping[str, int] | None = None,
    compare: bool = True,
    external_data: Literal["auto"] | bool = "auto",
    target: str | None = None,
    check: bool = False,
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
        opset: 20, 21 or 23; the target's by default, or 20. At 23 attention, RMS norm and rotary embedding are one node
            each.
        dynamic: keep sizes dynamic, under their names. By default so if ``sizes`` is not given. With False,
            sizes not given have the value seen at capture.
        sizes: values of sizes, for a static graph: ``{"batch": 1, "sequence": 128}``. With ``dynamic=True``
            the sizes not given stay dynamic.
        compare: run both and compare, at one size if static, at two if dynamic, with padding on either side.
        external_data: weights beside the file, as ``<name>.data``; by default from 1.9 GB on.
        target: a device to write for, such as "qnn-htp-v75": fixed sizes, and nothing that its compiler would not take.
        check: let the device's compiler and simulator run in a process of their own: no node on the CPU, a context binary
            beside the file, and the same values as ONNX Runtime. Needs ``graphopt[qnn]``.
        float32: write bfloat16 as float32, since ONNX Runtime has few kernels for bfloat16. float16 stays.
        tolerance: largest relative error that is accepted; by default 1e-4, and 2e-2 for float16.

    Raises:
        LoweringError: missing packages, an opset or size that is not supported, an operator that ONNX lacks,
            a file that the checker refuses, or results that differ; nodes that a target does not take, one by one; a
            compiler that refuses, crashes or hangs, with what it said.
    """
    started = time.perf_counter()
    _require(["onnx", "onnxscript", "onnx_ir"] + ["onnxruntime"] * compare)
    device = None if target is None or target == "onnx" else find_target(target)
    if opset is None:
        opset = 20 if device is None else device.opset
    if opset not in OPSETS:
        raise LoweringError(f"opset {opset} is not supported", hint=f"use {', '.join(map(str, OPSETS))}")
    if check:
        if device is None:
            raise LoweringError("a check asks a device's compiler", hint="target= names the device")
        require_compiler()
    place = Path(path).absolute()
    if device is not None and place.suffix != ".onnx":
        if place.exists():
            raise LoweringError(f"{place} exists already", hint="choose another place, or remove it")
        return _in_folder(
            place, program, opset=opset, dynamic=dynamic, sizes=sizes, compare=compare, external_data=external_data,
            target=target, check=check, float32=float32, tolerance=tolerance,
        )  # fmt: skip
    if not place.parent.is_dir():
        raise LoweringError(f"the folder {place.parent} does not exist")
    if place.is_dir():
        raise LoweringError(f"{place} is a folder", hint="name the file, for example model.onnx")
    dynamic = (sizes is None) if dynamic is None else dynamic
    fixed = fixed_sizes(program, sizes or {}, everything=not dynamic)
    if device is not None:
        require_fixed(program, fixed, device)
    quantized = program.facts.get("quantized")
    kind = FLOAT
    if isinstance(quantized, dict):
        kind = f"w{4 if quantized.get('four_bits') else 8}a{quantized['activations']}"
    if kind != FLOAT:
        program = retyped(program, torch.float32)
    widen = float32 and uses_bfloat16(program)
    lowered = with_sizes(program, fixed, float32=widen)
    parts = Split(None, lowered) if device is None else split(lowered)
    graph = build_graph(parts.device, opset)
    if device is not None:
        require_taken(graph, parts.device, device, kind)
    total = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    apart = total >= EXTERNAL_FROM if external_data == "auto" else bool(external_data)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as folder:
        draft = Path(folder) / place.name
        _write(graph, draft, apart)
        nodes = check_file(draft, opset)
        errors: dict[str, float] = {}
        # a copy, so that the weights it loads to run leave with it
        reference = with_sizes(program, {}, float32=True) if widen else program.copy()
        cases = list(comparison_cases(reference, fixed, dynamic)) if compare or check else []
        if parts.host is not None:
            beside = draft.with_name(f"{draft.stem}_host.onnx")
            _write(build_graph(parts.host, opset), beside, False)
            check_file(beside, opset)
            if compare:
                errors |= compare_with_runtime(beside, parts.host, cases, tolerance)
            reference, cases = parts.device, [prepared(case, parts.host) for case in cases]
        if compare:
            errors |= compare_with_runtime(draft, reference, cases, tolerance)
        checked = None
        if check and device is not None:
            context = draft.with_name(f"{draft.stem}_ctx.onnx")
            checked = check_on_target(draft, reference, cases, device, kind, context)
            checked = replace(checked, context=tuple(place.parent / f.name for f in checked.context))
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
        checked=checked,
    )


def _in_folder(place: Path, program: Program, **options: Any) -> OnnxReport:
    """Write model.onnx, what was compiled, and report.json into a folder that appears when all of it is there."""
    with tempfile.TemporaryDirectory(dir=_existing(place.parent), prefix=f".{place.name}.") as name:
        draft = Path(name) / place.name
        draft.mkdir()
        report = lower_onnx(program, draft / "model.onnx", **options)
        moved = _elsewhere(report, draft, place)
        written = json.dumps(asdict(moved), default=str, indent=1)
        (draft / "report.json").write_text(written + "\n")
        os.replace(draft, place)
    return moved


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise LoweringError(f"the folder {folder} does not exist")
    return folder


def _elsewhere(report: OnnxReport, draft: Path, place: Path) -> OnnxReport:
    def moved(files: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(place / file.relative_to(draft) for file in files)

    checked = report.checked
    if checked is not None:
        checked = replace(checked, context=moved(checked.context))
    return replace(report, path=place / "model.onnx", files=moved(report.files), checked=checked)


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
