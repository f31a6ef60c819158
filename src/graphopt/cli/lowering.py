"""``graphopt lower``: write programs for other runtimes, and report on the files."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..backends.onnx.genai import GenaiReport
from ..backends.onnx.model import OnnxReport
from ..ir.errors import UsageError
from .app import Lower
from .output import show_json, table, text
from .places import place
from .progress import working
from .sources import is_shape, read_program


def lower_program(args: Lower) -> None:
    """Write a program for another runtime."""
    to = args.to
    if to not in ("onnx", "genai", "triton"):
        raise UsageError(f"programs are not lowered to {to!r}", hint="--to onnx, genai or triton")
    fixed = [_sizes(spec) for spec in args.sizes or () if not is_shape(spec)]
    options = _options(args, fixed)
    several = len(fixed) > 1 or args.part_bytes is not None or args.target not in (None, "onnx")
    folder = to != "onnx" or (several and not args.output.endswith(".onnx"))
    kind: dict[str, Any] = {"folder": True, "moved": True} if folder else {"beside": [".data"]}
    with place(args.output, args.force, (args.program,), **kind):
        program = read_program(args.program, args)
        with working("compiling kernels" if to == "triton" else f"lowering to {to}"):
            report = program.lower(to, args.output, **options)
    if to == "triton":
        _show_kernels(args, report)
    elif args.as_json:
        show_json({k: str(v) if isinstance(v, Path) else v for k, v in asdict(report).items()})
    elif isinstance(report, GenaiReport):
        _show([report.model], report.files)
        comparison = "not compared: onnxruntime-genai is not installed"
        if report.compared is not None:
            comparison = (
                f"onnxruntime-genai generated {report.compared} tokens, each the program's most likely one"
            )
        text(comparison)
    else:
        _show([report, *report.others], report.files)


def _options(args: Lower, fixed: list[dict[str, int]]) -> dict[str, Any]:
    to, target, sizes = args.to, args.target, fixed[0] if len(fixed) == 1 else fixed or None
    if to != "onnx" and args.part_bytes is not None:
        raise UsageError("--part-bytes cuts ONNX graphs", hint="--to onnx")
    if args.operators not in (None, "standard", "runtime"):
        raise UsageError(f"there are no operators {args.operators!r}", hint="--operators standard or runtime")
    if to == "triton" and args.operators is not None:
        raise UsageError("--operators is for ONNX files", hint="--to onnx or genai")
    if to == "triton" and args.float_products:
        raise UsageError("--float-products is for ONNX files", hint="--to onnx or genai")
    if to != "triton":
        if args.device is not None:
            raise UsageError("--device is for AOTInductor packages", hint="--to triton")
        if to == "genai" and (fixed or target is not None):
            raise UsageError(
                "onnxruntime-genai needs sizes that vary", hint="use --shape and --target with --to onnx"
            )
        options: dict[str, Any] = {"opset": args.opset, "check": args.check}
        if args.operators is not None:
            options["operators"] = args.operators
        if args.float_products:
            options["float_products"] = True
        onnx_options = {"sizes": sizes, "target": target, "part_bytes": args.part_bytes}
        return options | onnx_options if to == "onnx" else options
    if args.opset is not None:
        raise UsageError("--opset is for ONNX files", hint="--to onnx")
    if len(fixed) > 1:
        raise UsageError("kernels are compiled for one set of sizes", hint="one --shape")
    if args.device not in (None, "cpu", "cuda"):
        raise UsageError(f"--device must be cpu or cuda, not {args.device!r}")
    options = {"sizes": sizes, "check": args.check, "device": args.device}
    if target is not None:
        options["architectures"] = tuple(name.strip() for name in target.split(","))
    return options


def _show(reports: list[OnnxReport], files: tuple[Any, ...]) -> None:
    rows = []
    for report in reports:
        shapes = "; ".join(f"{n} {'x'.join(map(str, s))}" for n, s in list(report.inputs.items())[:3])
        more = len(report.inputs) - 3
        worst = f"{max(report.errors.values()):.2g}" if report.errors else "not compared"
        rows.append(
            (report.path.name, sum(report.nodes.values()), f"{report.initialiser_bytes:,}", worst,
             shapes + (f" and {more} more" if more > 0 else ""))
        )  # fmt: skip
    table("", ("file", "nodes", "bytes of weights", "largest error", "inputs"), rows)
    for report in reports:
        check = report.checked
        if check is not None:
            text(
                f"{report.path.name}: compiled and simulated for {check.target}, all {check.nodes} nodes on the target; "
                f"{min(check.against_runtime.values()):.1f} dB to ONNX Runtime, "
                f"{min(check.against_float.values()):.1f} dB to the program in floats"
            )
        if report.kernels is not None:
            _show_use(report)
    limits = dict.fromkeys(limit for report in reports for limit in report.limits)
    if limits:
        text(f"valid where {'; '.join(limits)}; a runtime may not detect other sizes")
    text(f"opset {reports[0].opset}; written: " + ", ".join(str(f) for f in files))


def _show_use(report: OnnxReport) -> None:
    use = report.kernels
    assert use is not None
    listing = ", ".join(f"{name} {count}" for name, count in use.used.items())
    rotated = f", {use.rotated} with the rotation inside" if use.rotated else ""
    text(f"{report.path.name}: kernels of ONNX Runtime: {listing or 'none'}{rotated}")
    if use.rounding is not None:
        text(
            f"{report.path.name}: products with few-bit weights round their inputs to 8 bits, which changes outputs by "
            f"{use.rounding:.2g}; --float-products does not"
        )
    for kernel, reasons in use.left.items():
        for reason, count in reasons.items():
            text(f"{report.path.name}: {count} without {kernel}: {reason}")


def _show_kernels(args: Lower, report: Any) -> None:
    from ..backends.triton import as_json as plain

    if args.as_json:
        show_json({"path": args.output, **plain(report)})
        return
    columns = ("operator", "kernel", "for", "nodes", "registers", "spilled", "shared", "warps")
    rows = [
        (k.operator, k.kernel, k.architecture, k.nodes, k.registers, k.spilled, f"{k.shared:,}", k.warps)
        for k in report.kernels
    ]
    table("", columns, rows)
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
        text("no package, because there is no GPU; --device cpu makes one for this machine's CPU")


def _sizes(spec: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for item in spec.split(","):
        name, _, value = item.partition("=")
        number = re.fullmatch(r"\s*([0-9]+)\s*", value)
        if number is None or not name.strip() or int(number[1]) < 1:
            raise UsageError(f"--shape takes name=number, separated by commas, numbers from 1, not {spec!r}")
        if name.strip() in sizes:
            raise UsageError(
                f"--shape gives {name.strip()} twice: {spec!r}",
                hint="repeat the option for each graph: --shape A --shape B",
            )
        sizes[name.strip()] = int(number[1])
    return sizes
