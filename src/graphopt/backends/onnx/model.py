"""Graphs of one program at one set of sizes: built, written, checked and compared."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ...ir.errors import LoweringError
from ...ir.facts import KVCache
from ...ir.program import Program
from ...ir.running.execute import run
from ...targets import Target
from ..checking.cases import Case, comparison_cases
from .check import check_file
from .compare import compare_with_runtime, error_of_rounding
from .few_bits import FLOAT, PRODUCT, ROUNDED, round_inputs, value_types
from .graph import build_graph
from .host_partition import Split, prepared, split
from .kernel_cases import row_by_row
from .kernels import ROWS, KernelUse, use_kernels
from .parts import in_parts
from .sizes import limits_of, with_sizes
from .target import TargetReport, check_on_target, require_taken

EXTERNAL_FROM = 1_900_000_000
"""Size in bytes from which weights are written beside the file: a protobuf holds at most 2 GiB."""


@dataclass(frozen=True)
class OnnxReport:
    """What was written.

    ``nodes`` counts operators; ``errors`` has the largest relative error of each output against the program (empty if
    not compared); ``inputs`` and ``outputs`` have sizes as numbers or names; ``limits`` are the constraints on the
    named ones, stored in the file's metadata and checked by no runtime; ``seconds`` covers everything, checks
    included; ``others`` are further shards and buckets, in order; ``kernels`` says which sites are operators of ONNX
    Runtime's own, None if standard operators were asked for.
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
    limits: tuple[str, ...] = ()
    checked: TargetReport | None = None
    others: tuple[OnnxReport, ...] = ()
    kernels: KernelUse | None = None


@dataclass(frozen=True)
class Writing:
    """Options of an export: see :func:`graphopt.backends.onnx.lower.lower_onnx`."""

    opset: int
    dynamic: bool
    compare: bool
    apart: Literal["auto"] | bool
    asked: Target | None
    kind: str
    check: bool
    widen: bool
    tolerance: float | None
    part_bytes: int | None
    alone: bool
    kernels: bool = False
    float_products: bool = False

    @property
    def device(self) -> Target | None:
        """The target if it is a device with a compiler, else None."""
        return self.asked if self.asked is not None and self.asked.compiled else None


def write_models(program: Program, draft: Path, fixed: Mapping[str, int], how: Writing) -> list[OnnxReport]:
    """Write a program's graph, or its shards, and their host graphs into one folder.

    Args:
        program: not changed.
        draft: path of the file, in a temporary folder that is removed on failure.
        fixed: sizes that become numbers.
        how: the other options.

    Raises:
        LoweringError: see :func:`graphopt.backends.onnx.lower.lower_onnx`.
    """
    lowered = with_sizes(program, fixed, float32=how.widen)
    halves = Split(None, lowered) if how.device is None else split(lowered)
    # a copy, so that the weights that it loads to run are freed with it
    reference = with_sizes(program, {}, float32=True) if how.widen else program.copy()
    cases = list(comparison_cases(reference, fixed, how.dynamic)) if how.compare or how.check else []
    paths = []
    if halves.host is not None:
        paths.append(draft.with_name(f"{draft.stem}_host.onnx"))
        _write(build_graph(halves.host, how.opset), paths[0], False)
        check_file(paths[0], how.opset)
    shards = [halves.device] if how.part_bytes is None else in_parts(halves.device, how.part_bytes)
    reports = []
    for number, shard in enumerate(shards, start=1):
        paths.append(draft if len(shards) == 1 else draft.with_name(f"{draft.stem}_part{number}.onnx"))
        reports.append(_write_model(shard, paths[-1], how))
    if how.compare:
        # run in order, all files together are the program, whatever each of them computes
        shared = how.kernels and KVCache in reference.facts
        if shared and any(r.kernels is not None and ROWS in r.kernels.conditions for r in reports):
            cases = row_by_row(cases, reference)
        types = value_types(lowered) if how.kernels else set()
        errors = compare_with_runtime(paths, reference, cases, how.tolerance, shared=shared, types=types)
        reports = [replace(r, errors={n: e for n, e in errors.items() if n in r.outputs}) for r in reports]
        if not how.float_products and any(
            r.kernels is not None and PRODUCT in r.kernels.used for r in reports
        ):
            for path in paths:
                round_inputs(path)
            error = error_of_rounding(paths, reference, cases, shared)
            reports = [
                replace(r, kernels=None if r.kernels is None else replace(r.kernels, rounding=error))
                for r in reports
            ]
    if how.check and how.device is not None:
        if halves.host is not None:
            cases = [prepared(case, halves.host) for case in cases]
        for number, (shard, report) in enumerate(zip(shards, reports, strict=True)):
            # several graphs are compiled into one binary once all of them are written
            context = report.path.with_name(f"{report.path.stem}_ctx.onnx") if how.alone else None
            measured = check_on_target(report.path, shard, cases, how.device, how.kind, context)
            reports[number] = replace(report, checked=measured)
            if number + 1 < len(shards):
                cases = [replace(case, inputs=case.inputs | _inputs_of_next(shard, case)) for case in cases]
    return reports


def _inputs_of_next(program: Program, case: Case) -> dict[str, Any]:
    """Return the inputs of the next shard that this one computes."""
    outputs = run(program, {n: v for n, v in case.inputs.items() if n in program.input_nodes})
    return {n: v for n, v in outputs.items() if n.startswith("part_")}


def _write_model(program: Program, path: Path, how: Writing) -> OnnxReport:
    started = time.perf_counter()
    use = None
    if how.kernels:
        # what is compared computes in floats; only then are inputs rounded
        program, use = use_kernels(program, FLOAT if how.compare or how.float_products else ROUNDED)
    graph = build_graph(program, how.opset, how.kernels)
    if how.asked is not None:
        require_taken(graph, program, how.asked, how.kind)
    total = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    if how.apart is False and total >= EXTERNAL_FROM:
        raise LoweringError(
            f"the weights take {total:,} bytes, and a file of its own holds 2 GiB at most",
            hint="external_data=True writes them beside it",
        )
    limits = limits_of(program) + (use.conditions if use is not None else ())
    if limits:
        graph.metadata_props["graphopt.sizes"] = "; ".join(limits)
    apart = total >= EXTERNAL_FROM if how.apart == "auto" else bool(how.apart)
    _write(graph, path, apart)
    nodes = check_file(path, how.opset, how.kernels)
    return OnnxReport(
        path=path,
        opset=how.opset,
        nodes=dict(nodes.most_common()),
        initialiser_bytes=total,
        errors={},
        files=(),
        seconds=time.perf_counter() - started,
        inputs={value.name: _shape(value) for value in graph.graph.inputs},
        outputs={value.name: _shape(value) for value in graph.graph.outputs},
        limits=limits,
        kernels=use,
    )


def _write(graph: Any, path: Path, apart: bool) -> None:
    import onnx_ir

    if apart:
        onnx_ir.save(graph, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)
    else:
        onnx_ir.save(graph, path)


def _shape(value: Any) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
