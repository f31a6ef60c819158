"""An ONNX file, run by ONNX Runtime, against the program it was written from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..ir.errors import GraphoptError, LoweringError
from ..ir.examples import example_inputs
from ..ir.execute import run
from ..ir.program import Program
from .onnx_calibrated import within_ranges
from .onnx_sizes import namesake, static_sizes

_TOLERANCE = 1e-4
_QUANTIZED_TOLERANCE = {8: 0.2, 16: 2e-2}
"""A value that lies between two steps goes to either, in one arithmetic or the other."""
_HALF_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 8e-2}


@dataclass(frozen=True)
class Case:
    """Inputs to compare on. ``mask`` has the positions that count; ``left``: padding comes first."""

    label: str
    inputs: dict[str, torch.Tensor]
    mask: torch.Tensor | None = None
    left: bool = False


def compare_with_runtime(
    path: Path, program: Program, cases: list[Case], tolerance: float | None = None
) -> dict[str, float]:
    """Return the largest relative error of each output over the cases.

    Errors are relative to the largest value of the output. Where rows see no key, ONNX and torch differ by
    design, so that padded positions do not count.

    Raises:
        LoweringError: ONNX Runtime does not run the file, or an error exceeds the tolerance.
    """
    # single values of a quantised program go to either of two steps; all together tell more
    whole = isinstance(program.facts.get("quantized"), dict)
    session = _session(path)
    limit = tolerance if tolerance is not None else tolerance_of(program)
    errors: dict[str, float] = {}
    places: dict[str, str] = {}
    taken = {value.name for value in session.get_inputs()}
    for case in cases:
        wanted = run(program, {n: v for n, v in case.inputs.items() if n in program.input_nodes})
        feed = {name: _to_numpy(value) for name, value in case.inputs.items() if name in taken}
        try:
            results = session.run(list(wanted), feed)
        except Exception as error:
            text = str(error).strip().splitlines()[0]
            raise LoweringError(
                f"ONNX Runtime does not run the file on {case.label}: {text}",
                hint="target=onnx names the nodes that it is known not to take in these types",
            ) from error
        for (name, reference), result in zip(wanted.items(), results, strict=True):
            found = _error(torch.from_numpy(result.copy()), reference, case, whole)
            if found is not None and not found <= errors.get(name, -1.0):
                errors[name], places[name] = found, case.label
    wrong = {name: error for name, error in errors.items() if not error <= limit}
    if wrong:
        told = "; ".join(f"{name}: {error:.2e} on {places[name]}" for name, error in wrong.items())
        raise LoweringError(
            f"what ONNX Runtime computes differs from the program by more than {limit:.0e}: {told}",
            hint="tolerance= accepts more"
            + (", as where rounding sends a token to another expert" if limit > _TOLERANCE else "")
            + "; compare=False writes the file all the same",
        )
    return errors


def tolerance_of(program: Program) -> float:
    """Return the largest relative error that rounding explains, by the narrowest type of the weights."""
    quantized = program.facts.get("quantized")
    if isinstance(quantized, dict):
        return _QUANTIZED_TOLERANCE[int(quantized["activations"])]
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
            "ONNX Runtime takes no bfloat16 from numpy, so that the file cannot be compared",
            hint="float32=True writes the program in float32; compare=False leaves it unchecked",
        )
    return tensor.contiguous().numpy()


def counted(
    result: torch.Tensor, reference: torch.Tensor, case: Case
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return what is to be compared of two values: no padded places; None where the case says nothing about them."""
    mask = case.mask
    if mask is not None:
        if reference.dim() >= 2 and reference.shape[:2] == mask.shape:
            result, reference = result[mask], reference[mask]
        elif case.left:
            return None
    return (result, reference) if reference.numel() else None


def _error(result: torch.Tensor, reference: torch.Tensor, case: Case, whole: bool = False) -> float | None:
    """Return the relative error, or None where the case says nothing about this output."""
    if result.shape != reference.shape:
        return float("inf")
    pair = counted(result, reference, case)
    if pair is None:
        return None
    result, reference = pair
    got, expected = result.to(torch.float64), reference.to(torch.float64)
    difference = torch.where(got == expected, 0.0, (got - expected).abs())
    finite = expected[expected.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 1.0
    if whole:
        return float(difference.norm() / expected.norm().clamp(min=1e-30))
    worst = float(difference.max())
    return float("inf") if worst != worst else worst / max(scale, 1e-30)


# -- inputs -----------------------------------------------------------------------------------------


def comparison_cases(program: Program, sizes: Mapping[str, int], dynamic: bool) -> Iterator[Case]:
    """Yield inputs: at one size, or two if dynamic; padded right and left where there is an attention mask.

    Args:
        program: whose inputs they are.
        sizes: fixed sizes by name.
        dynamic: compare at a second size too.
    """
    first = static_sizes(program, sizes)
    settings = [first]
    if dynamic:
        settings.append(_another(program, first, sizes))
    for values in settings:
        named = [f"{name} {value}" for name, value in values.items() if namesake(name) == name]
        label = ", ".join(named) or "the captured sizes"
        yield Case(f"inputs of {label}", _inputs(program, values, "none"))
        for side in ("right", "left"):
            padded = _inputs(program, values, side)
            mask = padded.get("attention_mask")
            if mask is not None and mask.dim() == 2 and not bool(mask.bool().all()):
                yield Case(f"inputs of {label}, padded {side}", padded, mask.bool(), side == "left")


def _inputs(program: Program, sizes: Mapping[str, int], padding: str) -> dict[str, torch.Tensor]:
    dials = {name: torch.tensor(dial.default, dtype=torch.float64) for name, dial in program.dials.items()}
    inputs = example_inputs(program, dict(sizes), padding=padding) | dials
    if isinstance(program.facts.get("quantized"), dict):
        return within_ranges(program, inputs)
    return inputs


def _another(program: Program, first: Mapping[str, int], fixed: Mapping[str, int]) -> dict[str, int]:
    """Return other sizes that the program itself takes."""
    other = dict(first)
    for name in first:
        if name in fixed or namesake(name) in fixed:
            continue
        limits = program.signature.sizes[name]
        for value in (first[name] + 2, first[name] * 2, first[name] - 2):
            if value < max(limits.low, 1) or (limits.high is not None and value > limits.high):
                continue
            trial = {n: value if namesake(n) == namesake(name) else v for n, v in other.items()}
            if _runs(program, trial):
                other = trial
                break
    return other


def _runs(program: Program, sizes: Mapping[str, int]) -> bool:
    try:
        run(program, _inputs(program, sizes, "none"))
    except (RuntimeError, IndexError, ValueError, GraphoptError):
        return False
    return True
