"""Comparison of ONNX files, run by ONNX Runtime, with the program that they were written from."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ...ir.checking.comparison import relative_error
from ...ir.errors import LoweringError
from ...ir.facts import KVCache, Quantized, QuantizedCache
from ...ir.program import Program
from ...ir.running.execute import run
from ...ir.running.retype import retyped, widen
from ...ir.schema import arguments, is_operator
from ..checking.cases import Case, counted
from .processors import sums_overflow
from .quantized import without_rounding

_TOLERANCE = 1e-4
_ROUNDINGS, _MOST_ROUNDED = 4.0, 1e-2
"""Two orders of summation in one type may differ by a few times that type's own error, more so in deep models: 30
layers with random caches lose 1e-4. Above the second number, rounding is no explanation."""
_QUANTIZED_TOLERANCE = {8: 0.2, 16: 2e-2}
"""A value halfway between two steps may be rounded either way, depending on the arithmetic."""
_SHARE_LOST = {8: 1.0, 16: 0.4}
"""Difference between two ways of rounding, relative to the loss from quantising: measured up to 0.8 and 0.08, with
the optimiser of ONNX Runtime 1.32 up to 0.8 and 0.22."""
_RELATIVE_DIVERGENCE = 2.0
"""Above that share: how far a runtime may differ, relative to the program's own difference between float64 and
float32. Over 30 layers whose stream holds values in the thousands, at 16 bits per value: 0.06 of the logits, a
runtime 0.05."""
_INPUTS_ROUNDED = 0.3
"""Above that, no rounding of inputs to 8 bits: each product loses 5e-3 to 8e-3, which layers add up."""
_CODES_APART = 0.01
"""Share of a cache's codes that may be the next ones: what lies halfway between two is rounded either way."""
_HALF_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 8e-2}


def compare_with_runtime(
    paths: Sequence[Path],
    program: Program,
    cases: list[Case],
    tolerance: float | None = None,
    shared: bool = False,
    types: Collection[torch.dtype] = (),
) -> dict[str, float]:
    """Return the largest relative error of each output over the cases.

    Errors are relative to an output's values; small values are compared with the largest usual one. Padded positions
    do not count, because ONNX and torch differ by design for rows that see no key. An error above the tolerance is
    measured against the program's own rounding error, found by running it in float64. A quantised output is judged as
    a whole, by its distance relative to the loss from quantising, because single values may be rounded to either of
    two steps; if that is not enough, by the distance relative to the program's own difference from float64, which
    later rounding amplifies.

    Args:
        paths: of files that run one after another, each with the outputs of those before it.
        program: the program that the files implement together.
        cases: inputs.
        tolerance: largest error; by default what rounding explains.
        shared: caches are updated in place, as in onnxruntime-genai: ``next_NAME`` in the memory of ``NAME``.
        types: that values of few-bit weights are rounded to in the program, and not in the files.

    Raises:
        LoweringError: ONNX Runtime does not run a file, or an error exceeds the tolerance.
    """
    quantized = Quantized in program.facts
    limit = tolerance
    if limit is None:
        limit = max([tolerance_of(program), *(_HALF_TOLERANCE.get(t, 0.0) for t in types)])
    plain = without_rounding(program) if quantized and tolerance is None else None
    results = _results(paths, cases, shared)
    coded: set[str] = set()
    if QuantizedCache in program.facts:
        coded = {f"next_{name}" for name in program.facts[QuantizedCache].caches}
    errors: dict[str, float] = {}
    wrong: dict[str, tuple[float, float, str]] = {}
    for case, outputs in zip(cases, results, strict=True):
        inputs = {n: v for n, v in case.inputs.items() if n in program.input_nodes}
        expected = run(program, inputs)
        floats = run(plain, inputs) if plain is not None else {}
        exact: dict[str, Any] = {}
        for name, reference in expected.items():
            found = torch.from_numpy(outputs[name].copy())
            error: float | None
            if name in coded:
                error = _codes_apart(found, reference, program.facts[QuantizedCache].bits)
            else:
                error = _error(found, reference, case, quantized)
            if error is None:
                continue
            most = limit
            if name in floats:
                share = _SHARE_LOST[program.facts[Quantized].activations]
                lost = _quantization_loss(program.outputs[name], reference, floats[name], case)
                most = min(limit, max(lost.step, share * lost.all))
                if most < error <= lost.all:
                    exact = exact or _without_own_rounding(program, inputs)
                    apart = _error(reference, exact[name], case, quantized)
                    most = max(most, min(_RELATIVE_DIVERGENCE * (apart or 0.0), lost.all))
            elif tolerance is None and limit < error <= _MOST_ROUNDED:
                exact = exact or _without_own_rounding(program, inputs)
                apart = _error(reference, exact[name], case)
                most = min(max(limit, _ROUNDINGS * (apart or 0.0)), _MOST_ROUNDED)
            if not error <= errors.get(name, -1.0):
                errors[name] = error
            if not error <= most and not error <= wrong.get(name, (-1.0,))[0]:
                wrong[name] = error, most, case.label
    if wrong:
        listing = "; ".join(f"{name}: {error:.2e} on {label}" for name, (error, _, label) in wrong.items())
        most = min(most for _, most, _ in wrong.values())
        raise LoweringError(
            f"what ONNX Runtime computes differs from the program by more than {most:.0e}: {listing}",
            hint=_of_processor(program)
            + "tolerance= accepts more"
            + (", for example if rounding sends a token to another expert" if limit > _TOLERANCE else "")
            + "; compare=False writes the file anyway",
        )
    return errors


def _of_processor(program: Program) -> str:
    """Return what to do if this processor may be what is wrong."""
    quantized = program.facts.get(Quantized)
    if quantized is None or quantized.activations != 8 or not sums_overflow():
        return ""
    return (
        "this processor adds products of bytes in sixteen bits, which overflow (no VNNI instructions): "
        "write the file on one that has them, or on any for a device; "
    )


def error_of_rounding(paths: Sequence[Path], program: Program, cases: list[Case], shared: bool) -> float:
    """Return the largest relative error of an output, by norm, of files that round inputs of products to 8 bits.

    Args:
        paths: of files that were compared without that rounding, by :func:`compare_with_runtime`.
        program: the program that they implement.
        cases: the same inputs.
        shared: caches are updated in place.

    Raises:
        LoweringError: the error is more than rounding explains.
    """
    worst = 0.0
    cache = program.facts.get(KVCache)
    if cache is not None:
        # what a random cache holds is no text, and small differences grow without bound in it
        cases = [
            c for c in cases if cache.positions not in c.inputs or not c.inputs[cache.positions][..., 0].any()
        ]
    for case, outputs in zip(cases, _results(paths, cases, shared), strict=True):
        expected = run(program, {n: v for n, v in case.inputs.items() if n in program.input_nodes})
        for name, reference in expected.items():
            pair = counted(torch.from_numpy(outputs[name].copy()), reference, case)
            if pair is None or not reference.is_floating_point():
                continue
            found, exact = (value.to(torch.float64) for value in pair)
            error = float((found - exact).norm() / exact.norm().clamp(min=1e-30))
            if not error <= _INPUTS_ROUNDED:
                raise LoweringError(
                    f"rounding the inputs of products to 8 bits changes {name} by {error:.2g} of its size",
                    hint="--float-products keeps them; they are slower",
                )
            worst = max(worst, error)
    return worst


def _results(paths: Sequence[Path], cases: list[Case], shared: bool) -> list[dict[str, Any]]:
    """Return the outputs of running the files in order, by case and name; only one file is in memory at a time."""
    values_by_case = [{name: _to_numpy(value) for name, value in case.inputs.items()} for case in cases]
    for path in paths:
        session = _session(path)
        input_names = [value.name for value in session.get_inputs()]
        output_names = [value.name for value in session.get_outputs()]
        for case, values in zip(cases, values_by_case, strict=True):
            try:
                feed = {name: values[name] for name in input_names}
                results = _in_place(session, feed) if shared else session.run(output_names, feed)
            except Exception as error:
                text = str(error).strip().splitlines()[0]
                raise LoweringError(
                    f"ONNX Runtime does not run the file on {case.label}: {text}",
                    hint="target=onnx names the nodes that it is known not to support in these types",
                ) from error
            values.update(zip(output_names, results, strict=True))
    return values_by_case


def _in_place(session: Any, feed: dict[str, Any]) -> list[Any]:
    """Return the outputs of a run that writes each ``next_NAME`` into the memory of the input ``NAME``."""
    import onnxruntime

    binding = session.io_binding()
    # a copy, since the memory is written to
    held = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value.copy()) for name, value in feed.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        before = held.get(output.name.removeprefix("next_"))
        if before is not None and output.name.startswith("next_"):
            binding.bind_ortvalue_output(output.name, before)
        else:
            binding.bind_output(output.name)
    session.run_with_iobinding(binding)
    results: list[Any] = binding.copy_outputs_to_cpu()
    return results


def _without_own_rounding(program: Program, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the program's outputs in float64, loading one weight at a time."""
    return run(retyped(program, shapes=False), {k: widen(v) for k, v in inputs.items()}, streamed=True)


@dataclass(frozen=True)
class _QuantizationLoss:
    """The loss of an output from quantising, relative to its norm: in total, and that of a few quantisation steps."""

    all: float
    step: float


def _quantization_loss(
    node: fx.Node, reference: torch.Tensor, floats: torch.Tensor, case: Case
) -> _QuantizationLoss:
    pair = counted(floats, reference, case)
    if pair is None:
        return _QuantizationLoss(0.0, 0.0)
    before, after = (v.to(torch.float64) for v in pair)
    size = float(after.norm().clamp(min=1e-30))
    step: float = arguments(node)["scale"] if is_operator(node, "graphopt.fake_quantize") else 0.0
    steps = step * math.sqrt(max(2.0, 0.05 * after.numel()))
    return _QuantizationLoss(float((before - after).norm()) / size, max(_TOLERANCE, steps / size))


def tolerance_of(program: Program) -> float:
    """Return the largest relative error that rounding explains, by the narrowest type of the weights."""
    quantized = program.facts.get(Quantized)
    if quantized is not None:
        return _QUANTIZED_TOLERANCE[quantized.activations]
    types = {w.source.dtype for w in program.weights.values() if w.source.dtype.is_floating_point}
    return max((_HALF_TOLERANCE.get(t, _TOLERANCE) for t in types), default=_TOLERANCE)


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        text = str(error).strip().splitlines()[0]
        raise LoweringError(
            f"ONNX Runtime does not load the file: {text}",
            hint="compare=False writes it for another runtime, unchecked",
        ) from error


def _to_numpy(tensor: torch.Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:
        raise LoweringError(
            "ONNX Runtime takes no bfloat16 from numpy, so the file cannot be compared",
            hint="float32=True writes the program in float32; compare=False leaves it unchecked",
        )
    return tensor.contiguous().numpy()


def _error(result: torch.Tensor, reference: torch.Tensor, case: Case, by_norm: bool = False) -> float | None:
    """Return the relative error, or None if the case does not cover this output."""
    if result.shape != reference.shape:
        return float("inf")
    pair = counted(result, reference, case)
    if pair is None:
        return None
    result, reference = pair
    return relative_error(result, reference, beside="norm" if by_norm else "element")


def _codes_apart(result: torch.Tensor, reference: torch.Tensor, bits: int) -> float:
    """Return 0 if all codes of a cache are the same or, for few of them, the next ones; else infinity."""
    if result.shape != reference.shape or result.dtype != reference.dtype:
        return float("inf")
    pairs = (
        [(result, reference)] if bits == 8 else [(result & 15, reference & 15), (result >> 4, reference >> 4)]
    )
    steps = torch.stack([(a.short() - b.short()).abs() for a, b in pairs])
    few = max(2.0, _CODES_APART * steps.numel())
    return 0.0 if int(steps.max()) <= 1 and int(steps.sum()) <= few else float("inf")
