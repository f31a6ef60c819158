"""Prompts of different lengths, packed into lines and padded to the longest, on SmolLM2-135M.

    python benchmarks/packed_prompts.py [--checkpoint FILE.gguf] [--rounds 3]

Seconds of the processor until all rows have their first token, one thread, rounds interleaved. The bound is the number of
tokens with padding over that of tokens without.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch
from torch_decoding import bundled

import graphopt
from graphopt.decoding.cached import CachedDecoder
from graphopt.decoding.generation import typed, with_cache

LENGTHS = {
    "one long": [384, 60, 48, 40, 30, 24, 20, 16],
    "even": [96] * 8,
    "spread": [256, 224, 160, 96, 64, 32],
}


def main() -> None:
    """Print a line for each set of lengths."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="a GGUF file or a folder; by default that of the package")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    program = with_cache(typed(graphopt.capture(given.checkpoint or str(bundled())), "float32", "cpu"))
    print("| lengths | padded, s | packed, s | ratio | bound | largest difference of logits |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, lengths in LENGTHS.items():
        drawn = random.Random(0)
        rows = [[drawn.randrange(100, 40_000) for _ in range(n)] for n in lengths]
        seconds: dict[bool, list[float]] = {True: [], False: []}
        found = {}
        for _ in range(given.rounds):
            for packs in (False, True):
                decoder = CachedDecoder(program, len(rows), max(lengths) + 1)
                decoder.packs = packs
                began = time.process_time()
                found[packs] = torch.stack([o["logits"] for o in decoder.prefill(rows)])
                seconds[packs].append(time.process_time() - began)
        ratios = [a / b for a, b in zip(seconds[False], seconds[True], strict=True)]
        apart = float((found[True] - found[False]).abs().max())
        bound = len(lengths) * max(lengths) / sum(lengths)
        print(
            f"| {name} | {statistics.median(seconds[False]):.2f} | {statistics.median(seconds[True]):.2f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {bound:.2f} | {apart:.1g} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
