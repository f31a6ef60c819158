"""ONNX files for a device: unsupported nodes are listed before its compiler and simulator are run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...ir.errors import LoweringError
from ...ir.program import Program
from ...ir.running.execute import run
from ...targets import FLOAT, Target
from ...targets.faults import misread
from ..checking.cases import Case, counted
from .qnn.measures import reference, signal_to_noise
from .qnn.run import compile_together, simulate
from .quantized import DEQUANTIZE, QUANTIZE, without_rounding

LEAST = {FLOAT: 25.0, "w8a8": 20.0, "w8a16": 30.0, "w4a8": 20.0, "w4a16": 30.0}
"""Signal-to-noise ratio in dB that a simulator must reach against ONNX Runtime; less indicates an error, not
rounding."""


@dataclass(frozen=True)
class TargetReport:
    """Results of a device's compiler and simulator; nothing ran on a device.

    Attributes:
        target: name of the device.
        wheel: the compiler's version.
        nodes: how many nodes it compiled, which is all of them.
        compile_seconds: for the context binary.
        simulate_seconds: for all inputs.
        against_runtime: for each output, least signal-to-noise ratio of the simulator to ONNX Runtime on the same file, dB.
        against_float: the same against the program in PyTorch, without quantisation.
        context: the compiled files.
    """

    target: str
    wheel: str
    nodes: int
    compile_seconds: float
    simulate_seconds: float
    against_runtime: dict[str, float]
    against_float: dict[str, float]
    context: tuple[Path, ...]


def require_fixed(program: Program, fixed: Mapping[str, int], target: Target) -> None:
    """Raise an error if a program has dynamic sizes.

    Raises:
        LoweringError: it has some.
    """
    moving = [name for name in program.signature.sizes if name not in fixed]
    if moving:
        raise LoweringError(
            f"{target.name} does not support dynamic sizes, and {', '.join(moving)} would vary",
            hint="--shape "
            + ",".join(f"{n}={1 if n == 'batch' else program.signature.sizes[n].hint}" for n in moving)
            + " fixes them; in Python, sizes=",
        )


def require_taken(model: Any, program: Program, target: Target, kind: str) -> None:
    """Check that the device or runtime supports every node, before it is run.

    Raises:
        LoweringError: lists each unsupported node with the reason and the source line in the user's model.
    """
    origins = {node.name: node for node in program.nodes} | dict(program.outputs)
    refused = []
    for node in model.graph:
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            continue
        first = next((v for v in node.inputs if v is not None and v.shape is not None), None)
        rank = len(first.shape) if first is not None else 0
        why = target.refuses(node.op_type, rank, kind)
        if not why and any(map(_blocked, node.inputs)) and not target.takes_blocks(node.op_type, kind):
            why = f"{target.name} supports no scale per block of inputs in {kind}; quantize{{target={target.name}}}"
        if why:
            origin = _origin(node, origins)
            line = program.source_line(origin) if origin is not None else ""
            refused.append(f"{node.op_type} {node.outputs[0].name}: {why}" + (f"  [{line}]" if line else ""))
    if target.compiled and kind == FLOAT:
        refused += [
            f"{n.name}: {target.name} computes depthwise convolutions of this length wrongly where they are dilated; "
            f"fit-target writes them otherwise  [{program.source_line(n)}]"
            for n in program.nodes if misread(n)
        ]  # fmt: skip
    if refused:
        more = f"\n  and {len(refused) - 20} more" if len(refused) > 20 else ""
        raise LoweringError(
            f"{len(refused)} nodes cannot go to {target.name}:\n  " + "\n  ".join(refused[:20]) + more,
            hint="change the model there, or leave target out and let a runtime decide where nodes run",
        )


def _blocked(value: Any) -> bool:
    """Tell whether a value is restored with a scale for each block."""
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != DEQUANTIZE:
        return False
    size = producer.attributes.get("block_size")
    return size is not None and size.value > 0


def _origin(node: Any, origins: Mapping[str, Any]) -> Any:
    """Return the program's node of an ONNX node: its own, or that of the first named value computed from it."""
    work, steps = [node], 0
    while work and steps < 60:
        current = work.pop(0)
        steps += 1
        for value in current.outputs:
            name = (value.name or "").removesuffix("_inner")
            if name in origins:
                return origins[name]
            work.extend(use.node for use in value.uses())
    return None


def check_on_target(
    path: Path, program: Program, cases: Sequence[Case], target: Target, kind: str, context: Path | None
) -> TargetReport:
    """Compile a file strictly, simulate it, and compare the results.

    Args:
        path: of the file.
        program: what the file was written from; its values without quantisation are the reference.
        cases: inputs.
        target: the device.
        kind: the type that it computes in.
        context: where to write the compiled context; not written if None.

    Raises:
        LoweringError: a node is left on the CPU, the compiler refuses, crashes or hangs, or the simulator's values
            differ from ONNX Runtime's.
    """
    original = without_rounding(program)
    feeds = [{n: t.contiguous().numpy() for n, t in case.inputs.items()} for case in cases]
    accepted = _input_names(path)
    feeds = [{n: a for n, a in feed.items() if n in accepted} for feed in feeds]
    simulated = simulate(path, feeds, soc=target.soc, arch=target.arch, context=context)
    if simulated.error:
        raise LoweringError(
            f"{target.name}'s compiler: {simulated.error}",
            hint="ONNX Runtime accepts the file, and without the check it is written; bisecting the program with "
            "skip-layers finds the operator that the compiler refuses",
        )
    if simulated.elsewhere:
        on_cpu = ", ".join(f"{op} {name}" for op, name in simulated.elsewhere[:8])
        raise LoweringError(f"{len(simulated.elsewhere)} nodes are left on the CPU: {on_cpu}")
    runtime: dict[str, float] = {}
    floating: dict[str, float] = {}
    for case, feed, outputs in zip(cases, feeds, simulated.outputs, strict=True):
        expected = reference(path, feed)
        truth = run(original, {n: v for n, v in case.inputs.items() if n in original.input_nodes})
        for name, value in outputs.items():
            for ratios, other in ((runtime, torch.from_numpy(expected[name])), (floating, truth[name])):
                pair = counted(torch.from_numpy(value), other, case)
                if pair is not None:
                    ratio = signal_to_noise(pair[0].float().numpy(), pair[1].float().numpy())
                    ratios[name] = min(ratios.get(name, 200.0), ratio)
    wrong = {n: r for n, r in runtime.items() if r < LEAST[kind]}
    if wrong:
        listing = ", ".join(f"{n}: {r:.1f} dB" for n, r in wrong.items())
        raise LoweringError(
            f"{target.name} differs from ONNX Runtime on the same file: {listing}; "
            f"{LEAST[kind]:.0f} dB are required",
            hint="it computes an operator wrongly; tools/target_sweep in the repository tests them one by one",
        )
    files = () if context is None else tuple(sorted(context.parent.glob(f"{context.stem}*")))
    return TargetReport(
        target.name, simulated.wheel, sum(simulated.nodes.values()), simulated.compile_seconds, simulated.simulate_seconds,
        runtime, floating, files,
    )  # fmt: skip


def _input_names(path: Path) -> set[str]:
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    return {value.name for value in model.graph.input}


def compile_buckets(paths: Sequence[Path], target: Target) -> tuple[Path, ...]:
    """Compile graphs that share weights into one binary and return its files.

    Raises:
        LoweringError: the compiler refuses, crashes or hangs.
    """
    files, error = compile_together(paths, soc=target.soc, arch=target.arch)
    if error:
        raise LoweringError(f"{target.name}'s compiler, given all graphs together: {error}")
    return tuple(files)
