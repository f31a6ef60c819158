"""Each kernel against torch.compile of its operator's reference, and against the memory or compute roof, on the GPU here.

    python benchmarks/triton_kernels.py [--dtype bfloat16] [--device h200] [--repeat 50]

The sizes are those of a model of about a billion weights. Both sides run in turns in one process; the ratio is of
medians, above one where the kernel is faster. ``--device`` names the limits, see ``graphopt devices``. Needs a GPU and
``pip install "graphopt[triton]"``.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from graphopt.backends.triton.cases import Case, Made, cases
from graphopt.backends.triton.wiring import TABLE
from graphopt.ir.cost.devices import find_device
from graphopt.ir.cost.formulas import work
from graphopt.ir.cost.operands import Call, Operand


def milliseconds(call: Callable[[], Any], repeat: int) -> list[float]:
    """Return the times of a call, between events on the GPU."""
    found = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    return found


def moved(values: Any) -> int:
    """Return the bytes of all tensors among some values."""
    flat = values if isinstance(values, (list, tuple)) else [values]
    return sum(v.numel() * v.element_size() for v in flat if isinstance(v, torch.Tensor))


def operations(case: Case, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> int:
    """Return the floating-point operations of a call, by the formula of its operator; 0 where it has none."""
    places: list[Operand] = []

    def operand(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            places.append(Operand(tuple(value.shape), value.dtype, position=len(places)))
            return places[-1]
        return value

    bound = inspect.signature(TABLE[case.operator].reference).bind(*args, **options)
    bound.apply_defaults()
    arguments = {name: operand(value) for name, value in bound.arguments.items()}
    inputs = tuple(places)
    given = result if isinstance(result, tuple) else (result,)
    outputs = tuple(Operand(tuple(v.shape), v.dtype) for v in given)
    return int(work(Call(f"graphopt.{case.operator}", arguments, inputs, outputs)).flops)


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--device", default="h200")
    parser.add_argument("--repeat", type=int, default=50)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here")
    dtype, limits = getattr(torch, given.dtype), find_device(given.device)
    table = Table("operator", "call", "kernel, ms", "compiled, ms", "ratio", "of the roof", "which", box=None)
    for case in cases("large"):
        args, options = case.args(Made(dtype, "cuda"))
        kernel = TABLE[case.operator]
        compiled = torch.compile(kernel.reference)

        def ours(kernel: Any = kernel, args: Any = args, options: Any = options) -> Any:
            return kernel.launch(*args, **options)

        def theirs(compiled: Any = compiled, args: Any = args, options: Any = options) -> Any:
            return compiled(*args, **options)

        with torch.no_grad():
            result = ours()
            theirs()
            milliseconds(ours, 5), milliseconds(theirs, 5)
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(5):
                times[0].extend(milliseconds(ours, given.repeat // 5))
                times[1].extend(milliseconds(theirs, given.repeat // 5))
        own, other = (statistics.median(part) for part in times)
        # operands read and results written once; routed experts may read fewer weights
        memory = 1e3 * (moved(args) + moved(result)) / limits.bandwidth
        compute = 1e3 * operations(case, args, options, result) / limits.peak(given.dtype)
        table.add_row(
            case.operator, case.what, f"{own:.3f}", f"{other:.3f}", f"{other / own:.2f}",
            f"{max(memory, compute) / own:.0%}", "memory" if memory >= compute else "compute",
        )  # fmt: skip
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
