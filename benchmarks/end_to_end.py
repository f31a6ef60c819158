"""A Llama of a billion weights through passes and kernels, against torch.compile of what it was, in one run.

    python benchmarks/end_to_end.py [--dtype bfloat16] [--batch 8] [--sequence 512] [--repeat 20]
    python benchmarks/end_to_end.py --device cpu --layers 2 --hidden 128 --dtype float32 --sequence 32      # does it run?

Weights are random. Each row is one program against another, in turns, as medians: a whole batch after fuse-projections and
fuse-kernels, the same with a quarter of each feed-forward (split-ffn at its least), one step over a cache that verifies
eight candidates against eight steps of one token, and what a rank does to send a sum in four bits against bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import graphopt
from graphopt.backends.triton.wiring import kernels_in_use
from graphopt.ir.operators.quantized import payload_bytes, quantize_pack, unpack_sum
from graphopt.ir.program import Program

CANDIDATES = 8
RANKS = 4


def llama(given: argparse.Namespace) -> Program:
    """Return the program of a Llama with random weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=given.vocabulary, hidden_size=given.hidden, intermediate_size=given.hidden * 11 // 4 // 64 * 64,
        num_hidden_layers=given.layers, num_attention_heads=max(given.hidden // 64, 2),
        num_key_value_heads=max(given.hidden // 256, 1), max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, given.dtype)).eval()
    return graphopt.capture(model, {"input_ids": torch.randint(3, 100, (2, 9))})


def seconds(run: Callable[[], Any], device: str) -> float:
    """Return how long a call takes, the device's work included."""
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turns(runs: tuple[Callable[[], Any], Callable[[], Any]], given: argparse.Namespace) -> list[float]:
    """Return the median time of each of two calls."""
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for number in range(given.repeat + 3):
            for run, found in zip(runs, times, strict=True):
                here = seconds(run, given.device)
                if number >= 3:
                    found.append(here)
    return [statistics.median(found) for found in times]


def compiled(program: Program, given: argparse.Namespace, kernels: bool) -> Callable[..., Any]:
    """Return a program as torch.compile makes it, with kernels of ours or without."""
    module = torch.compile(program.module().to(given.device))

    def call(**inputs: Any) -> Any:
        with kernels_in_use(everywhere=given.device == "cpu") if kernels else nullcontext():
            return module(**inputs)

    return call


def steps(program: Program, given: argparse.Namespace, count: int, kernels: bool) -> Callable[[], Any]:
    """Return a step of so many candidate tokens over a cache of ``sequence`` slots."""
    call, signature = compiled(program, given, kernels), program.signature
    first = given.sequence - CANDIDATES - 1
    inputs: dict[str, torch.Tensor] = {
        "input_ids": torch.full((1, count), 5),
        "position_ids": torch.full((1, count), first),
        "cache_slots": torch.arange(first, first + count)[None],
        "step_mask": torch.eye(count, dtype=torch.bool)[None],
    }
    for name, spec in signature.inputs.items():
        if "_cache_" in name:
            inputs[name] = torch.zeros(
                1, int(spec.shape[1]), given.sequence, int(spec.shape[3]), dtype=spec.dtype
            )
    moved = {k: v.to(given.device) for k, v in inputs.items()}
    return lambda: call(**moved)


def message(given: argparse.Namespace) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return a sum over ranks in four bits as one rank computes it, and in the model's own type."""
    x = torch.randn(
        given.batch * given.sequence, given.hidden, dtype=getattr(torch, given.dtype), device=given.device
    )
    columns = torch.arange(given.hidden, device=given.device)
    width = payload_bytes(given.hidden, 0, 4, 32)
    operator = torch.compile(quantize_pack), torch.compile(unpack_sum)

    def few() -> Any:
        with kernels_in_use(everywhere=given.device == "cpu"):
            packed = operator[0](x, columns, None, 0, 4, 32, width)
            return operator[1](
                packed.expand(RANKS, *packed.shape).contiguous(), columns, None, given.hidden, 0, 4, 32
            )

    gathered = x.expand(RANKS, *x.shape).contiguous()
    return few, torch.compile(lambda: gathered.float().sum(0).to(x.dtype))


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    for name, value in (
        ("batch", 8),
        ("sequence", 512),
        ("repeat", 20),
        ("layers", 16),
        ("hidden", 2048),
        ("vocabulary", 32000),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --device cpu with small sizes tries whether this runs")
    plain = llama(given)
    fused = graphopt.optimize(plain, "fuse-projections, fuse-kernels")
    narrow = graphopt.optimize(
        plain, "fuse-projections, split-ffn{score=peak widths=[1/4 1]}, freeze-dial{value=0.0}, fuse-kernels"
    )
    tree = graphopt.optimize(plain, "insert-cache{tree=true}")
    quick = graphopt.optimize(plain, "fuse-projections, insert-cache{tree=true}, fuse-kernels")
    ids = torch.randint(3, 100, (given.batch, given.sequence), device=given.device)
    original = compiled(plain, given, False)
    table = Table("what", "with passes, ms", "torch.compile, ms", "ratio", box=None)

    def row(what: str, ours: Callable[[], Any], theirs: Callable[[], Any], calls: int = 1) -> None:
        try:
            own, other = in_turns((ours, theirs), given)
        except Exception as error:  # what was measured before must not be lost
            print(f"{what}: {type(error).__name__}: {str(error).strip().splitlines()[0]}", flush=True)
            return
        print(f"{what}: {1e3 * own:.3f} ms, {1e3 * other * calls:.3f} ms", flush=True)
        table.add_row(what, f"{1e3 * own:.3f}", f"{1e3 * other * calls:.3f}", f"{other * calls / own:.2f}")

    for what, program in (("fused", fused), ("fused, a quarter of each feed-forward", narrow)):
        call = compiled(program, given, True)
        row(what, lambda call=call: call(input_ids=ids), lambda: original(input_ids=ids))
    one, many = steps(tree, given, 1, False), steps(quick, given, CANDIDATES, True)
    row(f"{CANDIDATES} candidates in a step, against steps of one", many, one, CANDIDATES)
    row(f"a sum over {RANKS} ranks in four bits, without sending", *message(given))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
