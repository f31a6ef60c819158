"""Each kernel against torch.compile of its operator's reference, and against the memory or compute roof, on the GPU here.

    python benchmarks/triton_kernels.py [--dtype bfloat16] [--device h200] [--repeat 50]

The sizes are those of a model of about a billion weights. Both sides are compiled (but for the routed reference, which is
faster as it is) and run in turns in one process, with a second-level cache that holds nothing of theirs; the ratio is of
medians, above one where the kernel is faster. The roof counts a nested feed-forward at its full width. ``--device`` names
the limits, see ``graphopt devices``. Needs a GPU and ``pip install "graphopt[triton]"``.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from graphopt.backends.triton.cases import Case, Made, cases
from graphopt.backends.triton.wiring import TABLE, kernels_in_use, operator
from graphopt.ir.cost.devices import find_device
from graphopt.ir.cost.formulas import work
from graphopt.ir.operators.work import Call, Operand


def milliseconds(calls: Sequence[Callable[[], Any]], repeat: int) -> list[float]:
    """Return the median time of each call on the GPU, in turns, each with a cache that holds nothing of it."""
    from triton.testing import do_bench

    found: list[list[float]] = [[] for _ in calls]
    for _ in range(3):
        for call, times in zip(calls, found, strict=True):
            times.append(do_bench(call, warmup=10, rep=repeat, return_mode="median"))
    return [statistics.median(times) for times in found]


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
    parser.add_argument("--repeat", type=int, default=50, help="milliseconds a measurement takes")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here")
    dtype, limits = getattr(torch, given.dtype), find_device(given.device)
    table = Table("operator", "call", "kernel, ms", "compiled, ms", "ratio", "of the roof", "which", box=None)
    for case in cases("large"):
        args, options = case.args(Made(dtype, "cuda"))
        kernel = TABLE[case.operator]
        if not kernel.takes(*args, **options):
            continue
        torch._dynamo.reset()  # else the second shape of an operator is compiled for sizes that vary
        mine = torch.compile(operator(case.operator))
        # compiled, this reference gathers a matrix for each token and choice; as it is, it sorts tokens
        plain = kernel.reference if case.operator == "routed_ffn" else torch.compile(kernel.reference)

        def ours(mine: Any = mine, args: Any = args, options: Any = options) -> Any:
            return mine(*args, **options)

        def theirs(plain: Any = plain, args: Any = args, options: Any = options) -> Any:
            return plain(*args, **options)

        try:
            with torch.no_grad(), kernels_in_use():
                result = ours()
                own, other = milliseconds((ours, theirs), given.repeat)
        except Exception as error:  # what was measured before must not be lost
            print(
                f"{case.operator}, {case.what}: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
            )
            continue
        print(f"{case.operator}, {case.what}: {own:.3f} ms, {other:.3f} ms", flush=True)
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
