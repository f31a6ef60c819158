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
from .accepting import REFUSALS, accepts, typed
from .architecture import ask_no_caches, model_class
from .checkpoint_files import CheckpointFiles
from .checkpoint_names import filled
from .compare import Remembered, compare_outputs, require_equal, resized, tolerance_of
from .example_inputs import Given, example_inputs
from .fixed_values import Bound
from .size_trials import numbers_in, settle_limits, share_sizes, trial

# inputs whose sizes are those of rows of text, which need not be found by trying
_TEXT = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}


class OwnPositions(CaptureError):
    """The model computes positions by a rule that is not known here, and must do so itself."""


def compare_with_checkpoint(
    program: Program,
    config: Any,
    files: CheckpointFiles,
    dtype: torch.dtype,
    small: Callable[[Program], None],
    given: Given | None = None,
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
        if files.folder.is_dir() and not files.quantised:
            model = model_class(config).from_pretrained(files.folder, dtype=dtype, local_files_only=True)
        else:
            model = filled(config, files.tensors, dtype)
    model.eval()
    with _loaded_once(program, files, model):
        compare_with_model(program, model, given)


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


def compare_with_model(program: Program, model: Any, given: Given | None = None) -> dict[str, float]:
    """Compare a program with a transformers model on its example and at sizes near it; return the errors by case.

    Sizes that the model itself refuses say nothing of the program.

    Args:
        program: captured from the same example.
        model: with values.
        given: what the user gave as inputs.

    Raises:
        OwnPositions: the model computes positions by a rule that is not known here.
        CaptureError: they differ by more than rounding explains.
    """
    ask_no_caches(model)
    made = example_inputs(model, given)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    example = {k: v for k, v in made.inputs.items() if k in program.signature.parameters}
    example, asked = typed(example, dtype), Remembered(Bound(model, typed(made.fixed, dtype)))
    flat = set(describe(example, lambda v: isinstance(v, torch.Tensor), "")[1])
    if not set(program.signature.inputs) <= flat:
        raise CaptureError(f"no example for {sorted(set(program.signature.inputs) - flat)}")
    counted = dict(example)
    if _counts(program, "position_ids"):
        counted.pop("position_ids", None)
    _require_types(program, asked, example)
    if _counts(program, "token_type_ids"):
        counted.pop("token_type_ids", None)
    if "position_ids" in example and "position_ids" not in counted:
        _require_counting(asked, example, counted, tolerance_of(program))
    if set(example) - _TEXT:
        share_sizes(program, asked, example)
    settle_limits(program, trial(program, asked, counted), numbers_in(model.config.to_dict()))
    cases: list[tuple[str, dict[str, Any], Any]] = [("the captured size", example, None)]
    cases += [case for case in _sizes_near(program, counted) if accepts(asked, case[1])]
    masked = example.get("attention_mask")
    if masked is not None and masked.dim() == 2 and "sequence" in program.signature.sizes:
        cases.extend(case for case in _padded(counted) if accepts(asked, case[1]))
        _choose_positions(program, asked, cases)
    errors = require_equal(program, asked, cases)
    if "position_ids" in example and "position_ids" not in counted:
        _packed(program, asked, example)
    return errors


def _counts(program: Program, name: str) -> bool:
    """Return whether an input may be left out."""
    spec = program.signature.inputs.get(name)
    return spec is not None and spec.fill is not None


def _sizes_near(program: Program, example: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yield the example at other sizes: a batch of one, shorter and longer, without a mask."""
    signature = program.signature
    if "batch" in signature.sizes and signature.takes({"batch": 1}):
        one = resized(program, example, {"batch": 1})
        if one is not None:
            yield "a batch of one", one, None
    others = [n for n, limits in signature.sizes.items() if n != "batch" and limits.low != limits.high]
    for name in others:
        hint = signature.sizes[name].hint
        for wished in (9, hint + 3) if "sequence" in name else (hint - 2, hint + 3):
            length = signature.nearest({name: max(1, wished)})[name]
            other = resized(program, example, {name: length}) if length != hint else None
            if other is not None:
                yield f"another length, {name} = {length}", other, None
    if "attention_mask" in example and _counts(program, "attention_mask"):
        yield "no mask", {k: v for k, v in example.items() if k != "attention_mask"}, None


def _require_types(program: Program, model: Any, example: dict[str, Any]) -> None:
    """Require types of tokens at each call, where the model means something else by leaving them out."""
    spec = program.signature.inputs.get("token_type_ids")
    if spec is None or spec.fill is None or "token_type_ids" not in example:
        return
    without = {k: v for k, v in example.items() if k != "token_type_ids"}
    # whether a mask hides anything decides for some models what types that are left out mean
    padded = _padded(without) if "attention_mask" in without else []
    try:
        limit = tolerance_of(program)
        cases = [(without, None), *((inputs, where) for _, inputs, where in padded)]
        same = all(compare_outputs(program, model, inputs, where) <= limit for inputs, where in cases)
    except REFUSALS:
        same = False
    if not same:
        program.signature.inputs["token_type_ids"] = replace(spec, fill=None)


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
