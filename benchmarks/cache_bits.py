"""KV caches in few bits on a trained model: perplexity, logits and greedy text beside caches of floats, and time.

    python benchmarks/cache_bits.py [--checkpoint FOLDER] [--rows 8] [--length 384] [--draws 3]

The reference Llama, in float32, reads rows of text that it was not trained on, piece by piece through its caches (a prompt,
then pieces of 1 to 32 tokens), and continues their beginnings greedily. A draw takes other rows; changes are means over
draws of the paired ratio to caches of floats, with their standard error. "same choice" is the share of positions whose most
likely token stays, given the same text; "same text" the share of written tokens before the first that differs. The error
of logits is that of their norm. Milliseconds are processor time of a step of one row at the full length, the least of
several.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from weight_methods import rows_of

import graphopt
from graphopt.decoding.cached import CachedDecoder
from graphopt.ir.running.retype import retyped

HERE = Path(__file__).parents[1] / "examples" / "reference_models"
sys.path.insert(0, str(HERE))
FORMS = {
    "8 bits": "quantize-cache{bits=8}",
    "8 bits, groups of 8": "quantize-cache{bits=8 group=8}",
    "4 bits": "quantize-cache{bits=4}",
    "4 bits, groups of 16": "quantize-cache{bits=4 group=16}",
}
PROMPT, STEPS = 32, 15


def logits_of(program: graphopt.Program, ids: torch.Tensor, seed: int) -> torch.Tensor:
    """Return the logits of rows that are read in pieces."""
    chance, decoder, found, start = random.Random(seed), CachedDecoder(program, *ids.shape), [], 0
    while start < ids.shape[1]:
        count = chance.choice((1, 7, 32)) if start else PROMPT
        piece = ids[:, start : start + count]
        found.append(decoder.extend(piece)["logits"].float())
        decoder.advance([piece.shape[1]] * len(ids))
        start += count
    return torch.cat(found, 1)


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Return the perplexity of rows given their logits."""
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return math.exp(float(loss))


def written(program: graphopt.Program, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Return the greedy continuation of the rows' beginnings."""
    return graphopt.generate(program, ids[:, :PROMPT], max_new_tokens=count, eos_token_id=None)[:, PROMPT:]


def step_of(program: graphopt.Program, ids: torch.Tensor) -> float:
    """Return the seconds of processor time of a step of one token after one row."""
    decoder = CachedDecoder(program, 1, ids.shape[1] + STEPS)
    decoder.extend(ids[:1])
    decoder.advance([ids.shape[1]])
    taken = []
    for _ in range(STEPS):
        began = time.thread_time()
        decoder.extend(ids[:1, :1])
        taken.append(time.thread_time() - began)
        decoder.advance([1])
    return min(taken)


def bytes_of(program: graphopt.Program) -> int:
    """Return the bytes that all caches take for each token."""
    caches = [spec for name, spec in program.signature.inputs.items() if "_cache_" in name]
    return sum(int(spec.shape[1]) * int(spec.shape[3]) * spec.dtype.itemsize for spec in caches)


def spread(values: list[float], text: str) -> str:
    """Return the mean and the standard error of values."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return f"{statistics.mean(values):{text}} ± {error:{text.lstrip('+')}}"


def main() -> None:
    """Print a table of forms."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=HERE / "models" / "llama")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--draws", type=int, default=3)
    given = parser.parse_args()
    from corpus import FOLDER, write_corpus

    if not (FOLDER / "manifest.json").is_file():
        write_corpus()
    program = retyped(graphopt.optimize(given.checkpoint, "insert-cache"), torch.float32)
    draws: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for seed in range(given.draws):
        rows = rows_of(program, FOLDER / "validation.jsonl", given.rows, given.length, 100 + seed)
        ids = torch.cat([row["input_ids"] for row in rows])
        draws.append((ids, logits_of(program, ids, seed), written(program, ids, given.new)))
    console = Console(width=130)
    plain = [perplexity(logits, ids) for ids, logits, _ in draws]
    console.print(
        f"caches of floats: perplexity {', '.join(f'{p:.3f}' for p in plain)}; {bytes_of(program):,} bytes a token; "
        f"{step_of(program, draws[0][0]) * 1e3:.2f} ms a step"
    )
    table = Table("caches", "bytes", "perplexity", "logits", "same choice", "same text", "ms a step")
    for name, text in FORMS.items():
        small: Any = graphopt.optimize(program, text)
        columns: list[list[float]] = [[], [], [], []]
        for seed, ((ids, before, said), perplexity_before) in enumerate(zip(draws, plain, strict=True)):
            logits = logits_of(small, ids, seed)
            columns[0].append(perplexity(logits, ids) / perplexity_before - 1)
            columns[1].append(float((logits - before).norm() / before.norm()))
            columns[2].append(float((logits.argmax(-1) == before.argmax(-1)).float().mean()))
            same = (written(small, ids, given.new) == said).long().cumprod(1)
            columns[3].append(float(same.float().mean()))
        formats = ("+.3%", ".2%", ".2%", ".1%")
        measured = [spread(c, text) for c, text in zip(columns, formats, strict=True)]
        table.add_row(name, f"{bytes_of(small):,}", *measured, f"{step_of(small, draws[0][0]) * 1e3:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
