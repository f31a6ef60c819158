"""Every pass on every causal language model of transformers that can be made small: taken, or refused with a reason.

    python benchmarks/sweep_architectures.py [NAMES...] [--workers 2] [--work build/sweep] [--again] [--page FILE]

Each class is made from the defaults of its own configuration, but for width, depth, vocabulary and counts of heads and
experts, with random weights. What ends in anything but an error of graphopt's own is a fault, and so is a program whose
run fails; the command's status then is 1. One process a class; what is done is kept, so that a run can go on.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import sys
import tempfile
from pathlib import Path
from typing import Any

from small_models import (
    broken,
    counts,
    fault,
    first_line,
    in_a_process,
    names_of_decoders,
    refusal,
    small_model,
    try_passes,
)

ROOT = Path(__file__).parents[1]
SECONDS = 900


def try_class(name: str) -> dict[str, Any]:
    """Save the class's folder, capture it, and run every pass."""
    try:
        model = small_model(name)
    except Exception as error:
        return {"name": name, "not made": first_line(error)}
    import torch

    import graphopt

    found: dict[str, Any] = {"name": name}
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            program = graphopt.capture(folder)
        except graphopt.GraphoptError as error:
            return {**found, "passes": {}, "refused": refusal(error)}
        except Exception as error:
            return {**found, "passes": {}, "fault": fault(error)}
        generator = torch.Generator().manual_seed(0)
        ids = [torch.randint(4, 120, (2, 12), generator=generator) for _ in range(4)]
        return {**found, "passes": try_passes(program, [{"input_ids": i} for i in ids])}


def summary(results: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Return the lines of a table, a class a line, and the faults."""
    lines = ["| class | passes taken | refused | why it was not captured |", "| --- | --- | --- | --- |"]
    faults = []
    for found in results:
        name = found["name"]
        if "fault" in found:
            faults.append(f"{name}: capture: {found['fault']}")
        if "passes" not in found or "refused" in found or "fault" in found:
            if "not made" not in found:
                lines.append(f"| {name} | | | {found.get('refused', found.get('fault', ''))[:160]} |")
            continue
        taken = sum("taken" in p for p in found["passes"].values())
        refused = sum("refused" in p for p in found["passes"].values())
        faults += [f"{name}: {told}" for told in broken(found["passes"])]
        lines.append(f"| {name} | {taken} | {refused} | |")
    return lines, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "sweep")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--page", type=Path, default=None, help="write the table to this file")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    names = given.names or names_of_decoders()
    results = []
    with concurrent.futures.ThreadPoolExecutor(given.workers) as pool:
        for found in pool.map(
            lambda n: in_a_process(try_class, n, given.work, SECONDS, again=given.again), names
        ):
            results.append(found)
            told = found.get("not made") or found.get("refused") or found.get("fault")
            print(found["name"], told or counts(found["passes"]), flush=True)
    lines, faults = summary(results)
    made = sum("not made" not in r for r in results)
    if given.page:
        given.page.write_text("\n".join(lines) + "\n")
    print("\n".join(faults))
    print(f"{made} classes of {len(results)} could be made small; {len(faults)} faults")
    if faults:
        sys.exit(1)


if __name__ == "__main__":
    main()
