"""Export of a program to ONNX, checked and compared before the file takes its place."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch

from ...ir.errors import LoweringError
from ...ir.facts import Quantized
from ...ir.program import Program
from ...ir.running.retype import retyped
from ...targets import FLOAT, Target, find_target
from .files import share_weights
from .genai_folder import beside_buckets
from .model import OnnxReport, Writing, write_models
from .qnn.run import require as require_compiler
from .sizes import fixed_sizes, uses_bfloat16
from .target import compile_buckets, require_fixed

Operators = Literal["standard", "runtime"]
OPSETS = (20, 21, 23)
PART_BYTES = 1_900_000_000
"""Largest weights of one graph for a device, in bytes: its compiler's buffers, like a protobuf, hold at most 2
GiB."""


def lower_onnx(
    program: Program,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    dynamic: bool | None = None,
    sizes: Mapping[str, int] | Sequence[Mapping[str, int]] | None = None,
    compare: bool = True,
    external_data: Literal["auto"] | bool = "auto",
    target: str | None = None,
    check: bool = False,
    part_bytes: int | None = None,
    float32: bool = True,
    tolerance: float | None = None,
    operators: Operators = "standard",
    float_products: bool = False,
) -> OnnxReport:
    """Write the program as an ONNX file, or as a folder of several.

    The file appears under its name only after ONNX's checker has accepted it and ONNX Runtime's outputs match the
    program's; a failure leaves no new file and does not touch an older one. Run-time settings are float64 scalar
    inputs.

    Args:
        program: not changed.
        path: of the file, whose folder must exist. For a device, several buckets or shards: a new folder, whose name
            does not end in ``.onnx``.
        opset: 20, 21 or 23. The default is the target's, or else 20, and 23 for quantised programs. At 23, attention,
            RMS norm and rotary embedding are one node each.
        dynamic: keep sizes dynamic, under their names; the default if ``sizes`` is not given. If False, sizes that
            are not given have the value seen at capture.
        sizes: values of sizes, for a static graph: ``{"batch": 1, "sequence": 128}``. With ``dynamic=True`` the sizes
            that are not given stay dynamic. A list defines buckets: a graph for each, such as prompt and step,
            sharing one file of weights.
        compare: run both and compare, at one size if static and two if dynamic, with padding on each side.
        external_data: weights beside the file, as ``<name>.data``; by default from 1.9 GB on.
        target: what the file is for. A device such as "qnn-htp-v75": fixed sizes, and only operators that its
            compiler supports. "onnx": only operators that ONNX Runtime supports and computes correctly in the
            program's types.
        check: run the device's compiler and simulator in a separate process, and require that no node is left on the
            CPU and that values match ONNX Runtime's; writes a context binary beside the file. Needs
            ``graphopt[qnn]``.
        part_bytes: split the graph, where only the residual stream crosses, into shards whose weights take at most
            this many bytes; by default 1.9 GB for a device, and no split otherwise.
        float32: write bfloat16 as float32, since ONNX Runtime has few kernels for bfloat16. float16 stays.
        tolerance: largest accepted relative error; by default 1e-4, and 2e-2 for float16.
        operators: "standard" for ONNX's own; "runtime" for those that ONNX Runtime has kernels for beside them, where
            they compute the same: faster, and for ONNX Runtime alone. The report says which were used, and why others
            were not (``kernels``). Weights that are stored in few bits stay so.
        float_products: with ``operators="runtime"``, products with few-bit weights take their inputs as they are. By
            default they are rounded to 8 bits, which is faster; what was compared before that rounding must be equal,
            and the report says what it changes (``kernels.rounding``).

    Raises:
        LoweringError: a package is missing, an opset or size is not supported, ONNX lacks an operator, the checker
            refuses the file, or results differ; the target does not support some nodes, which are listed; its
            compiler refuses, crashes or hangs, with its output; a shard cannot be made small enough.
    """
    started = time.perf_counter()
    _require(["onnx", "onnxscript", "onnx_ir"] + ["onnxruntime"] * compare)
    profile = _target(program, target, opset)
    device = profile if profile is not None and profile.compiled else None
    _check_operators(operators, program, device)
    if opset is None:
        opset = _usual_opset(program) if profile is None else profile.opset
    if opset not in OPSETS:
        raise LoweringError(f"opset {opset} is not supported", hint=f"use {', '.join(map(str, OPSETS))}")
    if check:
        if device is None:
            raise LoweringError("a check asks a device's compiler", hint="target= names the device")
        require_compiler()
    destination = Path(path).absolute()
    if sizes is not None and not isinstance(sizes, Mapping) and not len(sizes):
        raise LoweringError(
            "no sizes are given", hint="sizes=None keeps them dynamic; a list has a bucket for each graph"
        )
    buckets = [sizes or {}] if sizes is None or isinstance(sizes, Mapping) else list(sizes)
    folder = destination.suffix != ".onnx" and (
        device is not None or len(buckets) > 1 or part_bytes is not None
    )
    if not folder and (len(buckets) > 1 or part_bytes is not None):
        raise LoweringError(
            "several graphs are written into a folder",
            hint=f"name it, for example {destination.stem}, without .onnx",
        )
    dynamic = (sizes is None) if dynamic is None else dynamic
    fixed = [fixed_sizes(program, bucket, everything=not dynamic) for bucket in buckets]
    if len(fixed) != len({tuple(sorted(f.items())) for f in fixed}):
        raise LoweringError("two buckets have the same sizes")
    if device is not None:
        for sizes_of_bucket in fixed:
            require_fixed(program, sizes_of_bucket, device)
    elif part_bytes is not None and any(n not in f for f in fixed for n in program.signature.sizes):
        raise LoweringError(
            "a graph in parts has fixed sizes", hint="sizes= gives them; --shape on the command line"
        )
    quantized = program.facts.get(Quantized)
    kind = FLOAT
    if quantized is not None:
        kind = f"w{4 if quantized.four_bits else 8}a{quantized.activations}"
        program = retyped(program, torch.float32)
    if folder and destination.exists():
        raise LoweringError(f"{destination} exists already", hint="choose another place, or remove it")
    if not destination.parent.is_dir():
        raise LoweringError(f"the folder {destination.parent} does not exist")
    if not folder and destination.is_dir():
        raise LoweringError(f"{destination} is a folder", hint="name the file, for example model.onnx")
    if part_bytes is None and device is not None and folder:
        part_bytes = PART_BYTES
    writing = Writing(
        opset=opset, dynamic=dynamic, compare=compare, apart=True if len(buckets) > 1 else external_data,
        asked=profile, kind=kind, check=check, widen=float32 and uses_bfloat16(program), tolerance=tolerance,
        part_bytes=part_bytes, alone=len(buckets) == 1, kernels=operators == "runtime",
        float_products=float_products,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.") as name:
        if not folder:
            (report,) = write_models(program, Path(name) / destination.name, fixed[0], writing)
            files = _put_in_place(Path(name), destination)
            return _finished([report], destination.parent, files, started)
        draft = Path(name) / destination.name
        draft.mkdir()
        reports = []
        for requested, sizes_of_bucket in zip(buckets, fixed, strict=True):
            label = "".join(f"_{n}{sizes_of_bucket[n]}" for n in requested) if len(buckets) > 1 else ""
            reports += write_models(program, draft / f"model{label}.onnx", sizes_of_bucket, writing)
        if len(buckets) > 1:
            share_weights(draft)
            if check and device is not None:
                compiled = compile_buckets([r.path for r in reports], device)
                reports = [_with_context(r, compiled) for r in reports]
            beside_buckets(program, reports, draft, device, compare)
        files = tuple(destination / f.name for f in sorted(draft.iterdir()))
        report = _finished(reports, destination, files, started)
        (draft / "report.json").write_text(json.dumps(asdict(report), default=str, indent=1) + "\n")
        os.replace(draft, destination)
    return report


def _check_operators(operators: str, program: Program, device: Target | None) -> None:
    if operators not in ("standard", "runtime"):
        raise LoweringError(f"there are no operators {operators!r}", hint="standard or runtime")
    if operators == "standard":
        return
    if device is not None:
        raise LoweringError(
            f"{device.name} does not have ONNX Runtime's own operators", hint="--operators standard"
        )
    if Quantized in program.facts:
        raise LoweringError(
            "the values of this program are rounded between operators, which ONNX Runtime's own would leave out",
            hint="--operators standard",
        )


def _usual_opset(program: Program) -> int:
    return 23 if Quantized in program.facts else 20


def _target(program: Program, name: str | None, opset: int | None) -> Target | None:
    """Return the target profile; "onnx" means ONNX Runtime at the requested opset."""
    if name == "onnx":
        opset = _usual_opset(program) if opset is None else opset
        return find_target(f"onnx-{opset}") if opset in OPSETS else None
    profile = None if name is None else find_target(name)
    if profile is not None and not profile.compiled and opset not in (None, profile.opset):
        raise LoweringError(
            f"{profile.name} is opset {profile.opset}, not {opset}", hint="target=onnx takes any"
        )
    return profile


def _with_context(report: OnnxReport, files: tuple[Path, ...]) -> OnnxReport:
    checked = report.checked
    return report if checked is None else replace(report, checked=replace(checked, context=files))


def _finished(
    reports: Sequence[OnnxReport], folder: Path, files: tuple[Path, ...], started: float
) -> OnnxReport:
    """Return the reports merged into one, with the final paths of the files."""

    def moved(report: OnnxReport) -> OnnxReport:
        checked = report.checked
        if checked is not None:
            checked = replace(checked, context=tuple(folder / f.name for f in checked.context))
        return replace(report, path=folder / report.path.name, checked=checked)

    first, *others = (moved(r) for r in reports)
    return replace(first, files=files, seconds=time.perf_counter() - started, others=tuple(others))


def _require(packages: list[str]) -> None:
    missing = []
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise LoweringError(f"writing ONNX needs {', '.join(missing)}", hint='pip install "graphopt[onnx]"')


def _put_in_place(folder: Path, destination: Path) -> tuple[Path, ...]:
    """Move the written files into place, the model last; on failure restore the older files."""
    new_files = sorted((f for f in folder.iterdir() if f.is_file()), key=lambda f: f.name == destination.name)
    older = folder / "older"
    older.mkdir()
    installed: list[Path] = []
    try:
        for file in new_files:
            final = destination.parent / file.name
            installed.append(final)
            if final.exists():
                os.replace(final, older / file.name)
            os.replace(file, final)
    except BaseException:
        for final in installed:
            backup = older / final.name
            if backup.exists():
                os.replace(backup, final)
            elif not (folder / final.name).exists():
                final.unlink(missing_ok=True)
        raise
    return tuple(destination.parent / file.name for file in reversed(new_files))
