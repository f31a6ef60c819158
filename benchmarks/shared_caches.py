"""What sharing keys and values between layers costs a trained model before any training, with fits and without.

    python benchmarks/shared_caches.py [--program SAVED | --checkpoint GGUF] [--rows 4] [--calibration 8] [--length 256]

The model is that of ``benchmarks/real_models.py``, SmolLM2-135M-Instruct by default; so are the texts. A
change is that of the mean loss over all rows; ± is the standard error over rows of the difference.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import torch
from real_models import bundled, read_sources
from real_pass import losses

import graphopt
from graphopt.passes import Context, Plan
from graphopt.passes.caching.share_caches import ShareCaches
from graphopt.passes.framework.plan import Site


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


if __name__ == "__main__":
    main()
