"""Export of a program with Triton kernels: compiled ahead of time anywhere, and as an AOTInductor package on a GPU."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.cost.resolve import Numbers
from ...ir.errors import LoweringError
from ...ir.program import Program
from ...ir.ranks.rank_programs import ranks_of
from ...ir.schema import arguments, normal_call, operator_name
from ...ir.sizes import expression
from ...ir.storage.atomic import atomic_folder
from .run import call_of, compile_ahead, interpret, require

USUAL = {"batch": 1, "sequence": 512}
"""Default sizes that kernels are specialised for: divisibility and tiles depend on them."""


@dataclass(frozen=True)
class KernelUse:
    """A kernel that the program launches, on one architecture.

    Attributes:
        operator: of the program.
        kernel: its name.
        architecture: what it was compiled for.
        nodes: how many nodes of the program launch it with these shapes.
        registers, spilled, shared, warps: see ``Resources``.
        file: name of its binary, without the suffix.
    """

    operator: str
    kernel: str
    architecture: str
    nodes: int
    registers: int
    spilled: int
    shared: int
    warps: int
    file: str


@dataclass(frozen=True)
class TritonReport:
    """What was written.

    Attributes:
        path: the folder.
        sizes: those that kernels were specialised for.
        kernels: each kernel on each architecture, with its resources.
        without: nodes that their operator's kernel does not support, and why.
        compared: largest error of each operator's kernels in Triton's interpreter, if they were checked.
        package: the AOTInductor package; None if there is none.
        errors: largest relative error of each output of the package.
        seconds: in total.
    """

    path: Path
    sizes: dict[str, int]
    kernels: list[KernelUse]
    without: dict[str, str]
    compared: dict[str, float]
    package: Path | None
    errors: dict[str, float]
    seconds: float


def lower_triton(
    program: Program,
    path: str | os.PathLike[str],
    *,
    sizes: Mapping[str, int] | None = None,
    architectures: Sequence[str] = ("sm_80", "sm_90"),
    check: bool = False,
    device: str | None = None,
) -> TritonReport:
    """Compile the kernels of a program's operators, and on a GPU the whole program, into a folder.

    The folder holds ``kernels/`` (a binary for each kernel, shape and architecture), ``report.json`` (registers, spills,
    shared memory) and, with a device, ``model.pt2``: an AOTInductor package that contains these kernels beside
    Inductor's.

    Args:
        program: not changed. ``fuse-kernels`` and ``take-top-k`` give it more operators that have kernels.
        path: of the folder, which does not exist.
        sizes: those that kernels are specialised for; by default batch 1 and sequence 512, within the program's
            limits.
        architectures: of GPUs, see ``ARCHITECTURES``; the GPUs need not be present.
        check: run the kernels of these operators in Triton's interpreter and compare them with their references.
        device: on which a package is compiled and compared: "cuda", "cpu" (using the operators' references), or None
            for a GPU if there is one.

    Raises:
        UsageError: Triton is not installed.
        LoweringError: an architecture is unknown, no operator has a kernel, a kernel needs more resources than a GPU
            has, or its result differs from its operator's.
    """
    require()
    from .stub_driver import ARCHITECTURES

    began = time.perf_counter()
    for name in architectures:
        if name not in ARCHITECTURES:
            raise LoweringError(f"there is no architecture {name!r}", hint=", ".join(ARCHITECTURES))
    if Path(path).exists():
        raise LoweringError(f"{path} exists already", hint="choose another folder, or remove it")
    numbers = Numbers(program, _sizes(program, sizes))
    calls, without = _calls(program, numbers)
    if device is None and torch.cuda.is_available():
        device = "cuda"
    if device is not None and ranks_of(program):
        raise LoweringError(
            "a package holds one graph, the program is for several ranks",
            hint="its kernels alone are compiled where no device is asked for",
        )
    if not calls and device is None:
        reasons = "".join(f"\n    {node}: {reason}" for node, reason in list(without.items())[:8])
        raise LoweringError(
            f"no operator of this program has a kernel{reasons}",
            hint="fuse-kernels, split-ffn, insert-cache, take-top-k quantize-communication bring operators with one",
        )
    with atomic_folder(path, may_replace=lambda _: False) as folder:
        (folder / "kernels").mkdir()
        kernels = _compiled(calls, architectures, folder / "kernels")
        compared = _compared(sorted({call["operator"] for call in calls})) if check else {}
        errors: dict[str, float] = {}
        if device is not None:
            from .package import write_package

            errors, reached = write_package(program, folder / "model.pt2", device)
            without |= {
                call["what"]: f"the package accepts dynamic sizes, and computes {call['operator']} by its reference"
                for call in calls if call["operator"] not in reached
            }  # fmt: skip
        package = None if device is None else Path(path) / "model.pt2"
        report = TritonReport(
            Path(path),
            numbers.sizes,
            kernels,
            without,
            compared,
            package,
            errors,
            time.perf_counter() - began,
        )
        (folder / "report.json").write_text(json.dumps(as_json(report), indent=1) + "\n", encoding="utf-8")
    return report


def as_json(report: TritonReport) -> dict[str, Any]:
    """Return a report as plain data."""
    plain = {k: v for k, v in vars(report).items() if k not in ("path", "kernels", "package")}
    package = None if report.package is None else report.package.name
    return {**plain, "kernels": [vars(k) for k in report.kernels], "package": package}


def _sizes(program: Program, values: Mapping[str, int] | None) -> dict[str, int]:
    sizes = {}
    for name, limits in program.signature.sizes.items():
        usual = USUAL.get(name)
        if usual is not None:
            sizes[name] = max(limits.low, usual if limits.high is None else min(usual, limits.high))
    near = program.signature.nearest(sizes)
    return {**{name: near[name] for name in sizes}, **(values or {})}


def _calls(program: Program, numbers: Numbers) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the distinct calls of operators with kernels, with node counts, and why other nodes have no kernel."""
    from .wiring import TABLE

    calls: dict[str, dict[str, Any]] = {}
    without: dict[str, str] = {}

    def add(operator: str, node: fx.Node, args: Sequence[Any], options: Mapping[str, Any]) -> None:
        if not TABLE[operator].takes(*args, **options):
            if operator == "attention" and arguments(node)["visible"] is None:
                # whole rows use torch's own attention; this kernel is for a few tokens over a cache
                return
            kinds = sorted({str(a.dtype).removeprefix("torch.") for a in args if isinstance(a, Tensor)})
            without[node.name] = f"the kernel of {operator} does not support this call ({', '.join(kinds)})"
            return
        call = call_of(operator, node.name, args, options)
        key = json.dumps([call["operator"], call["args"], call["options"]])
        calls.setdefault(key, {**call, "nodes": 0})["nodes"] += 1

    for node in program.nodes:
        name = operator_name(node.target).removeprefix("graphopt.") if node.op == "call_function" else ""
        if name == "quantized_all_reduce":
            for operator, args in _messages(node, numbers, ranks_of(program) or 2):
                add(operator, node, args, {})
        elif name in TABLE:
            operands, options = normal_call(node.target, arguments(node))
            add(
                name,
                node,
                [_shown(a, numbers) for a in operands],
                {k: _shown(v, numbers) for k, v in options.items()},
            )
    return list(calls.values()), without


def _shown(value: Any, numbers: Numbers) -> Any:
    """Return an argument at these sizes; tensors have no values."""
    if isinstance(value, fx.Node):
        return _shown(value.meta["val"], numbers)
    if isinstance(value, Tensor):
        shape = [numbers(_number(s)) for s in value.shape]
        stride = [numbers(_number(s)) for s in value.stride()]
        return torch.empty_strided(shape, stride, dtype=value.dtype, device="meta")
    if isinstance(value, torch.SymInt):
        return numbers(expression(value))
    if isinstance(value, (list, tuple)):
        return [_shown(v, numbers) for v in value]
    return value


def _number(size: int | torch.SymInt) -> Any:
    return expression(size) if isinstance(size, torch.SymInt) else int(size)


def _messages(node: fx.Node, numbers: Numbers, ranks: int) -> list[tuple[str, list[Any]]]:
    """Return the kernel calls of a quantised all-reduce that gathers."""
    from ...ir.operators.quantized import payload_bytes

    args = {k: _shown(v, numbers) for k, v in arguments(node).items()}
    x, kept, bits, block = args["x"], args["kept"], args["bits"], args["block"]
    features = x.shape[-1]
    width = payload_bytes(features, kept, bits, block)
    static = None if block else args["scales"]
    payload = torch.empty(ranks, *x.shape[:-1], width, dtype=torch.uint8, device="meta")
    order = None if static is None else static[0]
    return [
        ("quantize_pack", [x, args["order"], order, kept, bits, block, width]),
        ("unpack_sum", [payload, args["order"], static, features, kept, bits, block]),
    ]


def _compiled(
    calls: Sequence[Mapping[str, Any]], architectures: Sequence[str], folder: Path
) -> list[KernelUse]:
    rows = compile_ahead(calls, architectures, str(folder)) if calls else []
    wrong = [row for row in rows if row["reason"]]
    if wrong:
        lines = "".join(
            f"\n    {r['architecture']}: {r['kernel'] or r['operator']} of {r['what']}: {r['reason']}"
            for r in wrong[:8]
        )
        raise LoweringError(
            f"kernels cannot run on these architectures{lines}", hint="--target names other architectures"
        )
    counts = {call["what"]: int(call["nodes"]) for call in calls}
    names = [f for f in KernelUse.__dataclass_fields__ if f != "nodes"]
    return [KernelUse(**{n: row[n] for n in names}, nodes=counts[row["what"]]) for row in rows]


def _compared(operators: Sequence[str]) -> dict[str, float]:
    rows = interpret(operators) if operators else []
    wrong = [row for row in rows if not row["holds"]]
    if wrong:
        first = wrong[0]
        raise LoweringError(
            f"the kernel of {first['operator']} ({first['what']}, {first['dtype']}) differs from its "
            f"operator: error {first['error']:.2g}, {first['reason'] or 'limit'} {first['limit']:.2g}"
        )
    return {name: max(r["error"] for r in rows if r["operator"] == name) for name in operators}
