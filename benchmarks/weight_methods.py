"""Weight-only quantisation by its methods on a trained model: the change of perplexity, and the error of the products.

    python benchmarks/weight_methods.py [--checkpoint FOLDER] [--groups 32 64] [--rows 16] [--draws 3]

The reference Llama (width 192, float16, never quantised before) is rounded to 4 bits by each method, calibrated on text it
was trained on, and judged on text that it was not. A draw changes the rows of both; the change of perplexity is the mean
over draws of the paired ratio to the float model, with its standard error. Groups of 128 do not divide 192 inputs; 64 do.
SmolLM2 as it is published here lies on a grid of four bits already and cannot judge these methods.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import graphopt
from graphopt.data.tokenizer import Tokenizer
from graphopt.ir.quantised.stored import stored_bytes

HERE = Path(__file__).parents[1] / "examples" / "reference_models"
sys.path.insert(0, str(HERE))
WAYS = {
    "nearest": "method=rtn",
    "nearest, zeros": "method=rtn symmetric=false",
    "hqq": "method=hqq symmetric=false",
    "awq": "method=awq",
    "awq, zeros": "method=awq symmetric=false",
    "gptq": "method=gptq",
    "gptq, zeros": "method=gptq symmetric=false",
    "gptq, zeros, in order": "method=gptq symmetric=false ordered=false",
}


def rows_of(
    program: graphopt.Program, file: Path, count: int, length: int, seed: int
) -> list[dict[str, torch.Tensor]]:
    """Return rows of text from a file, at random."""
    tokenizer = Tokenizer(program)
    text = "\n\n".join(json.loads(line)["text"] for line in file.read_text().splitlines())
    ids = tokenizer.encode(text[:2_000_000])
    chance = random.Random(seed)
    starts = [chance.randrange(len(ids) - length) for _ in range(count)]
    return [{"input_ids": torch.tensor([ids[start : start + length]])} for start in starts]


def perplexity(program: graphopt.Program, rows: list[dict[str, torch.Tensor]]) -> float:
    """Return the perplexity in float32."""
    return float(graphopt.evaluate(program, rows, "perplexity", dtype="float32").values["perplexity"])


def main() -> None:
    """Print a table of methods and groups."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=HERE / "models" / "llama")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--groups", type=int, nargs="*", default=[32, 64])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--draws", type=int, default=3)
    given = parser.parse_args()
    from corpus import FOLDER, write_corpus

    if not (FOLDER / "manifest.json").is_file():
        write_corpus()
    program = graphopt.capture(given.checkpoint)
    train = FOLDER / "train.jsonl"
    draws: list[tuple[Any, Any, float]] = []
    for seed in range(given.draws):
        judged = rows_of(program, FOLDER / "validation.jsonl", given.rows, given.length, 100 + seed)
        draws.append(
            (rows_of(program, train, given.rows, given.length, seed), judged, perplexity(program, judged))
        )
    console, plain = Console(width=120), sum(w.bytes for w in program.weights.values())
    console.print(
        f"float: perplexity {', '.join(f'{p:.3f}' for *_, p in draws)}; weights {plain / 1e6:.2f} MB"
    )
    table = Table("method", "group", "change of perplexity", "error of products", "weights")
    for group in given.groups:
        for name, options in WAYS.items():
            changes, errors, kept = [], [], 0
            for calibration, judged, before in draws:
                small = graphopt.optimize(
                    program,
                    passes=[f"quantize-weights{{bits={given.bits} group={group} {options}}}"],
                    data=calibration,
                )
                changes.append(perplexity(small, judged) / before - 1)
                scores = small.history[-1].get("plan", {}).get("scores", {})
                errors.append(statistics.mean(scores.values()) if scores else math.nan)
                kept = sum(stored_bytes(w.source) for w in small.weights.values())
            spread = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else math.nan
            error = "" if math.isnan(errors[0]) else f"{statistics.mean(errors):.4f}"
            table.add_row(
                name,
                str(group),
                f"{statistics.mean(changes):+.2%} ± {spread:.2%}",
                error,
                f"{kept / 1e6:.2f} MB",
            )
    console.print(table)


if __name__ == "__main__":
    main()
