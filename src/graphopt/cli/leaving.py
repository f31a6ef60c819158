"""``graphopt export`` and ``graphopt run``: exports and forward passes."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import numpy
import torch

from ..data.rows import Rows, read_rows
from ..ir.checking.comparison import relative_error
from ..ir.errors import LoweringError, UsageError
from ..ir.groups import rank
from ..ir.infer import describe_value
from ..ir.program import Program
from ..ir.running import execute
from ..ir.running.examples import example_inputs
from ..ir.storage.atomic import atomic_file
from ..passes.heads.attach_multi_token_heads import write_heads
from .app import Export, Run
from .output import note, show_json, text
from .places import place
from .progress import ShownProgress, working, writing
from .sources import read_program
from .verifying import rounding


def export_program(args: Export) -> None:
    """Write a Hugging Face folder, a GGUF file, a .pt2 file or multi-token heads."""
    to, output = args.to, args.output
    if to not in ("huggingface", "gguf", "pt2", "medusa"):
        raise UsageError(f"programs are not exported to {to!r}", hint="--to huggingface, gguf, pt2 or medusa")
    if args.kind != "auto" and to != "gguf":
        raise UsageError("--type is for GGUF files", hint="give it with --to gguf")
    ending = {"medusa": ".safetensors", "pt2": ".pt2", "gguf": ".gguf"}.get(to, "")
    if not output.endswith(ending):
        raise UsageError(f"{output} should end in {ending}")
    with place(output, args.force, (args.program,), folder=to == "huggingface", moved=to == "medusa"):
        result = _export(read_program(args.program, args), to, output, args.kind)
    if args.as_json:
        show_json(result)
    elif to == "medusa":
        text(f"written: {output}, {len(result['tensors'])} tensors")
    else:
        worst = max(result["errors"].values(), default=0.0)
        if result.get("quantised") or result.get("plain"):
            text(
                f"matrices written in few bits: {result['quantised']}; plain, though they were: {len(result['plain'])}"
            )
        if result.get("not_reloaded"):
            text(f"captured again to compare it, not loaded by transformers: {result['not_reloaded']}")
        for reason, count in Counter(result.get("plain", {}).values()).items():
            text(f"  {count} plain: {reason}")
        if result.get("rounded"):
            text(
                f"{len(result['rounded'])} matrices rounded, relative error up to "
                f"{max(result['rounded'].values()):.2g}; the outputs are compared with these values"
            )
        text(f"read back and compared: largest relative error {worst:.2g}\nwritten: {output}")


def _export(program: Program, to: str, output: str, kind: str) -> dict[str, Any]:
    if to == "gguf":
        with writing(output) as progress:
            made = program.save_gguf(output, type=kind, progress=progress)
        return {
            "path": output, "errors": made.errors, "types": made.kinds, "copied": made.copied, "codes": made.codes,
            "rounded": made.rounded,
        }  # fmt: skip
    if to == "huggingface":
        with writing(output) as progress:
            report = program.save_pretrained(output, progress=progress)
        return {
            "path": output, "errors": report.errors, "checked": report.checked, "files": report.files,
            "not_reloaded": report.not_reloaded,
            "quantised": len(report.quantised), "plain": report.plain,
        }  # fmt: skip
    if to == "medusa":
        return {"path": output, "tensors": write_heads(program, output), "errors": {}}
    return {"path": output, "errors": _write_pt2(program, output)}


def _write_pt2(program: Any, output: str) -> dict[str, float]:
    with working("exporting"), atomic_file(output) as temporary:
        # through memory: on a full disk torch's own writer ends the process
        buffer = io.BytesIO()
        torch.export.save(program.exported_program(core_aten=True), buffer)
        temporary.write_bytes(buffer.getbuffer())
        del buffer
        inputs = example_inputs(program)
        with temporary.open("rb") as file:
            # the file was written just above, so it is trusted
            reloaded = torch.export.load(file).module()(**inputs)
        expected = execute.run(program, inputs)
        errors = {name: relative_error(reloaded[name], value) for name, value in expected.items()}
        worst = max(errors, key=lambda name: errors[name])
        if not errors[worst] <= rounding(program):
            raise LoweringError(f"the file's output {worst} differs by {errors[worst]:.2g} relative")
    return errors


def run_program(args: Run) -> None:
    """Run a program on every row of a file, in order."""
    output = args.output
    if output is not None and not output.endswith(".npz"):
        raise UsageError(f"{output} should end in .npz")
    with place(output, args.force, (args.program, args.inputs)):
        program = read_program(args.program, args)
        rows = read_rows(program, args.inputs)
        if rows.sample:
            note(f"input: {rows.sample!r}")
        values = _forward(program, rows)
        _write_values(values, rows, output)
    summary = {k: describe_value(v) for k, v in values.items()}
    if args.as_json:
        show_json({"rows": rows.count, "lengths": rows.lengths, "outputs": summary, "written": output})
        return
    for name, described in summary.items():
        value, stats = values[name], ""
        if value.numel() > 1:
            stats = f"  mean {value.float().mean():.4g}, standard deviation {value.float().std():.4g}"
        text(f"{name}: {described}{stats}")
    if rows.lengths and len(set(rows.lengths)) > 1:
        note(f"rows of {min(rows.lengths)} to {max(rows.lengths)} tokens, padded on the right")
    note(f"{rows.count} rows" + (f"; written: {output}" if output is not None else ""))


def _forward(program: Program, rows: Rows) -> dict[str, Any]:
    """Return the outputs, computed piece by piece if all inputs and outputs have rows, else all at once."""
    pieces = rows.pieces(program)
    results = []
    progress = ShownProgress()
    progress.start("running", len(pieces))
    for piece in pieces:
        results.append(execute.run(program, program.bind((), piece)))
        progress.step()
    progress.done()
    return results[0] if len(results) == 1 else {k: torch.cat([f[k] for f in results]) for k in results[0]}


def _write_values(values: dict[str, Any], rows: Rows, output: str | None) -> None:
    if output is not None and rank() == 0:
        arrays = {k: v.float().numpy() if v.dtype is torch.bfloat16 else v.numpy() for k, v in values.items()}
        if len(set(rows.lengths)) > 1 and "lengths" not in arrays:
            # beyond a row's own tokens its values are meaningless
            arrays["lengths"] = numpy.array(rows.lengths)
        with atomic_file(output) as temporary, temporary.open("wb") as file:
            numpy.savez(file, **arrays)
