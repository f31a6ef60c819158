"""``graphopt lower``, ``export`` and ``run``: programs that leave, and one forward."""

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
from .output import note, show_json, table, text
from .progress import Working, Written
from .sources import read_program
from .verifying import rounding


def lower_program(
    source: str,
    to: str,
    output: str,
    opset: int | None,
    sizes: str | None,
    target: str | None,
    check: bool,
    device: str | None,
    as_json: bool,
    trust: bool,
) -> None:
    """Write a program for another runtime."""
    if to not in ("onnx", "genai", "triton"):
        raise UsageError(f"programs are not lowered to {to!r}", hint="--to onnx, genai or triton")
    fixed = _sizes(sizes)
    if to == "triton":
        if opset is not None:
            raise UsageError("--opset is ONNX's", hint="--to onnx")
        if device not in (None, "cpu", "cuda"):
            raise UsageError(f"--device is cpu or cuda, not {device!r}")
        _lower_triton(source, output, fixed, target, check, device, as_json, trust)
        return
    if device is not None:
        raise UsageError("--device is for AOTInductor packages", hint="--to triton")
    options: dict[str, Any] = {"opset": opset, "check": check}
    if to == "onnx":
        options |= {"sizes": fixed, "target": target}
    elif fixed is not None or target is not None:
        raise UsageError(
            "onnxruntime-genai takes sizes that vary", hint="--to onnx takes --shape and --target"
        )
    program = read_program(source, trust)
    with Working(f"lowering to {to}"):
        report = program.lower(to, output, **options)
    if as_json:
        show_json(_plain(report))
    else:
        text(str(report) if not dataclasses.is_dataclass(report) else _lines(report))


def _lower_triton(
    source: str,
    output: str,
    sizes: dict[str, int] | None,
    target: str | None,
    check: bool,
    device: str | None,
    as_json: bool,
    trust: bool,
) -> None:
    from ..backends.triton import as_json as plain

    program = read_program(source, trust)
    options: dict[str, Any] = {"sizes": sizes, "check": check, "device": device}
    if target is not None:
        options["architectures"] = tuple(name.strip() for name in target.split(","))
    with Working("compiling kernels"):
        report = program.lower("triton", output, **options)
    if as_json:
        show_json({"path": output, **plain(report)})
        return
    table(
        "",
        ("operator", "kernel", "for", "nodes", "registers", "spilled", "shared", "warps"),
        [
            (k.operator, k.kernel, k.architecture, k.nodes, k.registers, k.spilled, f"{k.shared:,}", k.warps)
            for k in report.kernels
        ],
    )
    sizes_text = ", ".join(f"{name} {size}" for name, size in report.sizes.items()) or "fixed sizes"
    text(f"compiled for {sizes_text}: {report.path}/kernels")
    for node, reason in report.without.items():
        text(f"without a kernel: {node}: {reason}")
    if report.compared:
        worst = max(report.compared, key=lambda name: report.compared[name])
        text(f"interpreter against references: largest error {report.compared[worst]:.2g} ({worst})")
    if report.package is not None:
        text(f"package: {report.package}, largest error {max(report.errors.values(), default=0.0):.2g}")
    else:
        text("no package: there is no GPU here; --device cpu makes one for this machine")


def _sizes(given: str | None) -> dict[str, int] | None:
    if given is None:
        return None
    sizes = {}
    for part in given.split(","):
        name, _, value = part.partition("=")
        if not value.strip().isdigit() or not name.strip():
            raise UsageError(f"--sizes is name=number, separated by commas, not {given!r}")
        sizes[name.strip()] = int(value)
    return sizes


def _plain(report: Any) -> Any:
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(report).items()}


def _lines(report: Any) -> str:
    return "\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in _plain(report).items())


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
    from ..ir.examples import example_inputs
    from ..ir.execute import run
    from ..ir.sites import value_error

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
        errors = {name: value_error(again[name], value) for name, value in expected.items()}
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
