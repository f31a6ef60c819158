"""``graphopt export`` and ``run``: programs that leave, and one forward."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import torch

from ..frontends.data import read_data
from ..ir.atomic import atomic_file
from ..ir.errors import LoweringError, UsageError
from ..ir.groups import rank
from ..ir.infer import describe_value
from ..passes.attach_multi_token_heads import write_heads
from .output import note, show_json, text
from .progress import Working, Written
from .sources import read_program
from .verifying import rounding


def plain(report: Any) -> Any:
    """Return a report as plain data."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(report).items()}


def export_program(source: str, to: str, output: str, as_json: bool, trust: bool) -> None:
    """Write a Hugging Face folder or a .pt2 file."""
    if to not in ("huggingface", "pt2", "medusa"):
        raise UsageError(f"programs are not exported to {to!r}", hint="--to huggingface, pt2 or medusa")
    if to == "medusa" and not output.endswith(".safetensors"):
        raise UsageError(f"{output} should end in .safetensors")
    if to == "pt2" and not output.endswith(".pt2"):
        raise UsageError(f"{output} should end in .pt2")
    program = read_program(source, trust)
    if to == "huggingface":
        with Written(f"writing {output}") as written:
            report = program.save_pretrained(output, progress=written)
        result: dict[str, Any] = {
            "path": output,
            "errors": report.errors,
            "checked": report.checked,
            "files": report.files,
        }
    elif to == "medusa":
        result = {"path": output, "tensors": write_heads(program, output), "errors": {}}
    else:
        result = {"path": output, "errors": _write_pt2(program, output)}
    if as_json:
        show_json(result)
    else:
        if to == "medusa":
            text(f"written: {output}, {len(result['tensors'])} tensors")
            return
        worst = max(result["errors"].values(), default=0.0)
        text(f"written: {output}\nread back and compared: largest relative error {worst:.2g}")


def _write_pt2(program: Any, output: str) -> dict[str, float]:
    from ..ir.comparison import relative_error
    from ..ir.examples import example_inputs
    from ..ir.execute import run

    with Working("exporting"), atomic_file(output) as place:
        # through memory: on a full disk torch's own writer ends the process
        buffer = io.BytesIO()
        torch.export.save(program.exported_program(core_aten=True), buffer)
        place.write_bytes(buffer.getbuffer())
        del buffer
        inputs = example_inputs(program)
        with place.open("rb") as file:
            # our own file of a moment ago
            again = torch.export.load(file).module()(**inputs)
        expected = run(program, inputs)
        errors = {name: relative_error(again[name], value) for name, value in expected.items()}
        worst = max(errors, key=lambda name: errors[name])
        if not errors[worst] <= rounding(program):
            raise LoweringError(f"the file's output {worst} differs by {errors[worst]:.2g} relative")
    return errors


def run_program(source: str, inputs: str, output: str | None, as_json: bool, trust: bool) -> None:
    """Run one forward on the first batch of a file."""
    from ..ir.execute import run

    if output is not None and not output.endswith(".npz"):
        raise UsageError(f"{output} should end in .npz")
    program = read_program(source, trust)
    batches, sample = read_data(program, inputs)
    if sample:
        note(f"input: {sample!r}")
    known = {k: v for k, v in batches[0].items() if k in program.signature.parameters}
    values = run(program, program.bind((), known))
    if output is not None and rank() == 0:
        import numpy

        arrays = {k: v.float().numpy() if v.dtype is torch.bfloat16 else v.numpy() for k, v in values.items()}
        with atomic_file(output) as place, place.open("wb") as file:
            numpy.savez(file, **arrays)
    summary = {k: describe_value(v) for k, v in values.items()}
    if as_json:
        show_json({"outputs": summary, "written": output})
    else:
        for name, described in summary.items():
            value = values[name]
            stats = (
                f"  mean {value.float().mean():.4g}, standard deviation {value.float().std():.4g}"
                if value.numel() > 1
                else ""
            )
            text(f"{name}: {described}{stats}")
