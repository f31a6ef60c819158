"""What sharing keys and values between layers costs a trained model before any training, with fits and without.

    python benchmarks/shared_caches.py [--program SAVED | --checkpoint GGUF] [--rows 4] [--calibration 8] [--length 256] \
        [--distil STEPS] [--prompt TOKENS]

The model is that of ``benchmarks/real_models.py``, SmolLM2-135M-Instruct by default; so are the texts. A
change is that of the mean loss over all rows; ± is the standard error over rows of the difference. ``--distil`` trains the
followers of the upper third one by one, on the calibration rows. ``--prompt`` reads a prompt with whole caches, and with
caches that the upper half of the layers reads from the layer below it, in turns.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import torch
from real_models import bundled, read_sources
from real_pass import losses

import graphopt
from graphopt.decoding.cached import CachedDecoder
from graphopt.decoding.generation import with_cache
from graphopt.ir.program import Program
from graphopt.passes import Context, Plan
from graphopt.passes.caching.share_caches import ShareCaches
from graphopt.passes.framework.plan import Site
from graphopt.training import Settings
from graphopt.training.cache_distillation import distil_shared_caches


def told(name: str, found: list[float], original: list[float]) -> None:
    """Print a line of the table."""
    apart = [a - b for a, b in zip(found, original, strict=True)]
    error = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else 0.0
    factor = math.exp(statistics.fmean(apart))
    print(
        f"| {name} | {math.exp(statistics.fmean(found)):.1f} | {factor:.3g} times | "
        f"{statistics.fmean(apart):+.3f} ± {error:.3f} |",
        flush=True,
    )


def without_fit(sites: list[Site]) -> list[Site]:
    """Return the same sites, with keys and values read as they are."""
    return [Site(site.block, leader=site["leader"]) for site in sites]


def prompts(program: Program, length: int, start: int) -> None:
    """Print the time to read a prompt with and without layers that share a cache."""
    ids = torch.randint(3, 1000, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    decoders = {
        "whole caches": CachedDecoder(with_cache(program), 1, length),
        f"shared from layer {start} on": CachedDecoder(
            with_cache(graphopt.optimize(program, [ShareCaches(start=start, fit=False)])), 1, length
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for turn in range(4):
        for name, decoder in decoders.items():
            decoder.lengths = [0]
            began = time.process_time()
            decoder.prefill([ids])
            if turn:
                seconds[name].append(time.process_time() - began)
    first = statistics.median(next(iter(seconds.values())))
    for name, found in seconds.items():
        middle = statistics.median(found)
        bytes_ = decoders[name].bytes / 2**20
        print(
            f"prompt of {length}, {name}: {middle:.2f} s ({middle / first:.2f}), caches {bytes_:.1f} MiB",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--program", help="the model as a saved program")
    parser.add_argument("--checkpoint", help="the model as a GGUF file")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--calibration", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row, at most 256")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate of that training")
    parser.add_argument("--distil", type=int, default=0, help="steps of training for each follower")
    parser.add_argument("--prompt", type=int, default=0, help="tokens of a prompt whose reading is measured")
    given = parser.parse_args()
    source = Path(given.program) if given.program else Path(given.checkpoint or bundled())
    program = graphopt.load(source) if given.program else graphopt.capture(source, compare=False)
    rows, calibration = (
        [row[: given.length] for row in read_sources(program, split).draw(count, seed)]
        for split, count, seed in (("validation", given.rows, 0), ("calibration", given.calibration, 99))
    )
    # a pass calibrates on the first half of its data
    data = [{"input_ids": torch.tensor([row])} for row in (*calibration, *calibration)]
    context = Context(data)
    original = losses(program, rows)
    print("| shared | perplexity | of the original | loss in nats |\n| --- | --- | --- | --- |")
    told("nothing", original, original)
    count = len(program.anatomy.attention)
    third = count - count // 3
    for step, label in ((ShareCaches(), "pairs"), (ShareCaches(start=third), f"all from layer {third} on")):
        plan = step.plan(program, context)
        kinds = [(label, plan.sites)]
        if step.start is None:
            # halves of the same fits: what the upper layers bear, and how it adds up
            upper = [s for s in plan.sites if int(s.block.partition(".")[2]) >= third]
            kinds.append((f"pairs from layer {third} on", upper))
        for name, sites in kinds:
            for how, chosen in (("as they are", without_fit(sites)), ("fitted", sites)):
                shared = program.copy()
                shared.edit.author = step.name
                step.rewrite(shared, Plan(sites=chosen))
                shared.edit.end()
                told(f"{name}, {how}", losses(shared, rows), original)
        for what in ("keys", "values"):
            missed = [score for name, score in plan.scores.items() if name.endswith(what)]
            print(f"<!-- {label}: {what} missed {min(missed):.2f} to {max(missed):.2f} -->", flush=True)
    if given.distil:
        began = time.process_time()
        settings = Settings(steps=given.distil, learning_rate=given.rate)
        trained, records = distil_shared_caches(program, ShareCaches(start=third), data, settings)
        spent = time.process_time() - began
        told(f"all from layer {third} on, trained one by one", losses(trained, rows), original)
        falls = [record.losses[-1] / record.losses[0] for record in records.values()]
        print(
            f"<!-- {spent:.0f} s; last loss of the first: {min(falls):.2f} to {max(falls):.2f} -->",
            flush=True,
        )
    if given.prompt:
        prompts(program, given.prompt, count // 2)


if __name__ == "__main__":
    main()
