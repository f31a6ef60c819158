"""Comparison of a captured checkpoint with the model: sizes, a batch of one, padding on both sides, packing."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from ..ir.checking.comparison import relative_error
from ..ir.errors import CaptureError
from ..ir.facts import note_capture
from ..ir.program import Program
from ..ir.running.execute import memory_available, release
from ..ir.signature import Fill
from ..ir.structure import describe
from ..ir.weights import InMemory
from .architecture import filled, model_class
from .checkpoint_files import CheckpointFiles
from .compare import compare_outputs, require_equal, tolerance_of
from .example_inputs import example_inputs
from .size_trials import numbers_in, settle_limits, trial


class OwnPositions(CaptureError):
    """The model computes positions by a rule that is not known here, and must do so itself."""


def compare_with_checkpoint(
    program: Program,
    config: Any,
    files: CheckpointFiles,
    dtype: torch.dtype,
    small: Callable[[Program], None],
) -> None:
    """Load the model with its own library and compare the program with it.

    A checkpoint that would take more than a quarter of the free memory is not loaded: ``small`` compares its
    architecture with one layer of each kind.

    Raises:
        CaptureError: they differ by more than rounding explains.
    """
    if files.bytes > memory_available() // 4:
        small(program)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if files.folder.is_dir():
            model = model_class(config).from_pretrained(files.folder, dtype=dtype, local_files_only=True)
        else:
            model = filled(config, files.tensors, dtype)
    model.eval()
    with _loaded_once(program, files, model):
        compare_with_model(program, model)


@contextlib.contextmanager
def _loaded_once(program: Program, files: CheckpointFiles, model: Any) -> Iterator[None]:
    """Let the program read values that the model has already loaded from the same source, and free them afterwards."""
    before = dict(program.weights)
    if not files.folder.is_dir():
        state = model.state_dict()
        values = {id(source): state[name] for name, source in files.tensors.items() if name in state}
        for name, weight in before.items():
            value = values.get(id(weight.source))
            if value is not None and value.dtype == weight.source.dtype:
                program.weights[name] = weight.with_source(InMemory(value))
    try:
        yield
    finally:
        program.weights.update(before)
        release(program)


def compare_with_model(program: Program, model: Any) -> dict[str, float]:
    """Compare a program with a transformers model on typical inputs; return the errors by case.

    Raises:
        OwnPositions: the model computes positions by a rule that is not known here.
        CaptureError: they differ by more than rounding explains.
    """
    model.config.use_cache = False
    example = {k: v for k, v in example_inputs(model).items() if k in program.signature.inputs}
    example = {
        k: v.to(next(model.parameters()).dtype) if v.is_floating_point() else v for k, v in example.items()
    }
    if not set(program.signature.inputs) <= set(example):
        raise CaptureError(f"no example for {sorted(set(program.signature.inputs) - set(example))}")
    counted = {k: v for k, v in example.items() if k not in ("position_ids", "token_type_ids")}
    if "position_ids" in example:
        _require_counting(model, example, counted, tolerance_of(program))
    settle_limits(program, trial(program, model, counted), numbers_in(model.config.to_dict()))
    cases: list[tuple[str, dict[str, Any], Any]] = [("the captured size", example, None)]
    sizes = program.signature.sizes
    if "batch" in sizes and program.signature.takes({"batch": 1}):
        cases.append(("a batch of one", {k: v[:1] for k, v in counted.items()}, None))
    if "sequence" in sizes:
        length = program.signature.nearest({"sequence": 9})["sequence"]
        shortened = {k: v[:, :length] if v.dim() == 2 else v for k, v in counted.items()}
        cases.append(("another length", shortened, None))
        bare = {k: v for k, v in counted.items() if k != "attention_mask"}
        cases.append(("no mask", bare, None))
    if "attention_mask" in example and "sequence" in sizes:
        cases.extend(_padded(counted))
        _choose_positions(program, model, cases)
    errors = require_equal(program, model, cases)
    if "position_ids" in example:
        _packed(program, model, example)
    return errors


def _require_counting(model: Any, example: dict[str, Any], counted: dict[str, Any], limit: float) -> None:
    """Check that, without a mask, omitted positions count from 0; RoBERTa counts from after its padding index.

    Raises:
        OwnPositions: they do not.
    """
    with torch.no_grad():
        explicit, implicit = (
            describe(model(**i), lambda v: isinstance(v, torch.Tensor))[1] for i in (example, counted)
        )
    if not all(
        relative_error(implicit[name], explicit[name]) <= limit for name in explicit if name in implicit
    ):
        raise OwnPositions(
            "positions that are left out do not count from 0", hint="give an example without position_ids"
        )


def _padded(example: dict[str, Any]) -> list[tuple[str, dict[str, Any], Any]]:
    length = example["attention_mask"].shape[1]
    left_mask, right_mask = example["attention_mask"].clone(), example["attention_mask"].clone()
    left_mask[0, : length // 3] = 0
    right_mask[0, -(length // 3) :] = 0
    right_mask[-1, -1:] = 0
    return [
        ("right-padded inputs", {**example, "attention_mask": right_mask}, right_mask),
        ("left-padded inputs", {**example, "attention_mask": left_mask}, left_mask),
    ]


def _choose_positions(program: Program, model: Any, cases: list[tuple[str, dict[str, Any], Any]]) -> None:
    """Find out how the model computes omitted positions: by counting, or by counting over the mask."""
    spec = program.signature.inputs.get("position_ids")
    if spec is None or spec.fill is None:
        return
    _, inputs, where = cases[-1]
    limit = tolerance_of(program)
    for rule, like in (("positions", "input_ids"), ("positions_from_mask", "attention_mask")):
        program.signature.inputs["position_ids"] = replace(spec, fill=Fill(rule, like))  # type: ignore[arg-type]
        if compare_outputs(program, model, inputs, where) <= limit:
            return
    program.signature.inputs["position_ids"] = spec


def _packed(program: Program, model: Any, example: dict[str, torch.Tensor]) -> None:
    """Check restarted positions with a mask; without one, the program rejects them when called."""
    positions = example["position_ids"].clone()
    half = positions.shape[1] // 2
    positions[:, half:] -= half
    inputs = {**example, "position_ids": positions}
    error = compare_outputs(program, model, inputs)
    if error > tolerance_of(program):
        note_capture(
            program, packed_positions=f"differ from the model by {error:.2g} although a mask is given"
        )
