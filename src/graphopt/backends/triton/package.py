"""Export of a program to an AOTInductor package that contains these kernels beside Inductor's own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...ir.checking.comparison import relative_error
from ...ir.compat import compile_package, load_package
from ...ir.errors import LoweringError
from ...ir.program import Program
from ...ir.running.execute import run
from ..checking.cases import comparison_cases, counted
from ..torch.exported import exported_program
from .wiring import kernels_in_use

LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def write_package(program: Program, path: Path, device: str) -> tuple[dict[str, float], set[str]]:
    """Compile the program for a device, reload the package and compare it, at two sizes if sizes are dynamic.

    Returns:
        Largest relative error of each output, and the operators whose kernels are in it.

    Raises:
        LoweringError: an output differs.
    """
    from torch.export.passes import move_to_device_pass

    exported = exported_program(program)
    if device != "cpu":
        exported = move_to_device_pass(exported, device)
    reached: set[str] = set()
    with torch.no_grad(), kernels_in_use(everywhere=True, reached=reached):
        compile_package(exported, path)
    loaded = load_package(path)
    errors: dict[str, float] = {}
    limits: dict[str, float] = {}
    for case in comparison_cases(program, {}, dynamic=bool(program.signature.sizes)):
        inputs = {k: v for k, v in case.inputs.items() if k in program.input_nodes}
        outputs = loaded(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()})
        for name, value in run(program, inputs).items():
            pair = counted(outputs[name].cpu(), value, case)
            if pair is not None:
                errors[name] = max(errors.get(name, 0.0), relative_error(*pair))
                limits[name] = LIMITS.get(value.dtype, 0.0)
    worst = max(errors, key=lambda name: errors[name] - limits[name])
    if not errors[worst] <= limits[worst]:
        raise LoweringError(
            f"the package's output {worst} differs by {errors[worst]:.2g} relative on {device}"
        )
    return errors, reached
