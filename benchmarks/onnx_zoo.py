"""Architectures of transformers as ONNX: the largest error against PyTorch; heads, experts and Q/DQ counted.

    python benchmarks/onnx_zoo.py [--opset 21] [--only llama --only bert]

Every architecture of the tests' zoo, with random weights, is captured from a saved checkpoint and written with sizes that
vary; ONNX Runtime's values are compared with the original model's, at two sizes, with padding on the right and on the left.
Then programs with more in them: heads for later tokens, split feed-forwards, quantised ones, whose parts are counted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import graphopt
from graphopt.backends.checking.cases import comparison_cases
from graphopt.backends.onnx.quantized import pairs_in
from graphopt.ir.errors import GraphoptError
from graphopt.ir.program import Program
from graphopt.ir.running.examples import example_inputs

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
MORE = {
    "attach-multi-token-heads{heads=3}": ("llama", "qwen3", "gpt2"),
    "split-ffn{score=peak}": ("llama", "gpt_neox", "gemma2"),
    "dial-top-k": ("mixtral", "olmoe"),
    "fit-target{allow_no_match=true}, quantize{weights=8 activations=8}": ("llama", "bert", "vit"),
    "fit-target{allow_no_match=true}, quantize{weights=4 activations=16 block=16}": ("llama", "bert"),
}


def captured(name: str, folder: Path) -> Program:
    """Return the program of an architecture, from a checkpoint written here."""
    import zoo

    model = zoo.make(name)
    model.save_pretrained(folder / name)
    return graphopt.capture(folder / name, cache=False)


def lowered(program: Program, path: Path, opset: int) -> tuple[Any, int]:
    """Return the report, and how many sets of inputs with padding it was compared on."""
    padded = sum(case.mask is not None for case in comparison_cases(program, {}, True))
    if pairs_in(program):
        opset = 23  # attention and norms are one node each, so that every value has its rounding
    return program.lower("onnx", path, opset=opset), padded


def counted(program: Program, report: Any) -> str:
    """Return in words what is in the program beside the model, and in the file."""
    told = []
    heads = [name for name in program.outputs if name.startswith("multi_token")]
    if heads:
        shape = report.outputs[heads[0]]
        told.append(f"heads as {list(shape)}")
    experts = sum(program.operators.get(f"graphopt.{name}", 0) for name in ("nested_ffn", "routed_ffn"))
    if experts:
        told.append(f"{experts} feed-forwards of several experts or widths")
    if program.dials:
        missing = [d for d in program.dials if d not in report.inputs]
        told.append(f"dials {', '.join(program.dials)}" + (f" LOST {missing}" if missing else ""))
    pairs = pairs_in(program)
    if pairs:
        told.append(f"{pairs} roundings, {report.nodes['DequantizeLinear']} DQ")
    return "; ".join(told)


def programs(only: list[str], folder: Path) -> Iterator[tuple[str, str, Program]]:
    """Yield architectures as they are, then programs with more in them."""
    import zoo

    for name in track([n for n in zoo.CASES if not only or n in only], "architectures"):
        yield name, "", captured(name, folder)
    for passes, names in MORE.items():
        for name in names:
            if only and name not in only:
                continue
            program = captured(name, folder / passes.split("{")[0])
            sizes = {
                n: 2 if "batch" in n else min(8, r.high or 8) for n, r in program.signature.sizes.items()
            }
            data = [example_inputs(program, sizes, seed=s) for s in range(4)]
            yield name, passes, graphopt.optimize(program, passes, data=data)


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--opset", type=int, default=21)
    parser.add_argument("--only", action="append", default=[])
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    table = Table("architecture", "passes", "largest error", "padded cases", "seconds", "counted", box=None)
    right, wrong = set(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for architecture, passes, program in programs(given.only, folder):
            began = time.perf_counter()
            try:
                report, padded = lowered(program, folder / "model.onnx", given.opset)
            except GraphoptError as error:
                wrong.append(f"{architecture} {passes}: {error.message}")
                continue
            if not passes:
                right.add(architecture)
            table.add_row(
                architecture, passes, f"{max(report.errors.values()):.1e}", str(padded),
                f"{time.perf_counter() - began:.1f}", counted(program, report),
            )  # fmt: skip
    console = Console(width=170)
    console.print(table)
    console.print(f"{len(right)} architectures agree with PyTorch", *wrong, sep="\n")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
