"""Several tokens a step: tokens a step, acceptance by depth, and time against one token a step, strategy by strategy.

    python benchmarks/decoding.py [--heads FOLDER] [--drafted FOLDER] [--rows 8] [--new 128] [--prompt 64] [--threads 1]

The reference Llama continues texts of its own kind and of another, one row at a time; all strategies in turns, medians of
``--rounds``. Every text is compared with the one that the plain loop writes. ``--heads`` is a program with trained heads
(attach-multi-token-heads, then ``graphopt train --recipe medusa``), ``--drafted`` one with a trained draft (attach-draft,
then ``--recipe draft``); what is not given is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import graphopt
from graphopt.decoding import (
    AttachedDraft,
    Drafter,
    DraftProgram,
    EarlyExit,
    MultiTokenHeads,
    PromptLookup,
    TokenRecycling,
)
from graphopt.frontends.tokenizer import Tokenizer
from graphopt.ir.program import Program

HERE = Path(__file__).parents[1] / "examples" / "reference_models"


def prompts(tokenizer: Tokenizer, file: Path, rows: int, length: int) -> list[list[int]]:
    """Return beginnings of texts that are long enough."""
    found: list[list[int]] = []
    for line in file.read_text().splitlines():
        ids = tokenizer.encode(json.loads(line)["text"])
        if len(ids) > length:
            found.append(ids[:length])
        if len(found) == rows:
            break
    return found


def run(
    program: Program, rows: list[list[int]], new: int, strategy: Drafter | None
) -> tuple[float, list, list]:
    """Return seconds, texts and statistics of all rows one after the other."""
    seconds, texts, found = 0.0, [], []
    for row in rows:
        stream = graphopt.stream(program, [row], max_new_tokens=new, eos_token_id=None, strategy=strategy)
        began = time.perf_counter()
        for _ in stream:
            pass
        seconds += time.perf_counter() - began
        texts.append(stream.rows[0])
        found.append(stream.statistics)
    return seconds, texts, found


def main() -> None:
    """Run and print a table for each kind of text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", help="a program with trained heads")
    parser.add_argument("--drafted", help="a program with a trained draft of its own")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    plain = graphopt.capture(HERE / "models" / "llama")
    draft = graphopt.capture(HERE / "models" / "draft")
    exits = graphopt.optimize(plain, "attach-early-exit{layers=[2]}")
    heads = graphopt.load(given.heads) if given.heads else None
    ways: dict[str, tuple[Program, Callable[[], Drafter | None]]] = {
        "plain": (plain, lambda: None),
        "prompt-lookup, 8": (plain, PromptLookup),
        "token-recycling, 20": (plain, TokenRecycling),
        "draft-program, 2": (plain, lambda: DraftProgram(draft, 2)),
        "draft-program, 3": (plain, lambda: DraftProgram(draft, 3)),
        "draft-program, 4": (plain, lambda: DraftProgram(draft, 4)),
        "draft-program, 6, sure of 0.5": (plain, lambda: DraftProgram(draft, 6, 0.5)),
        "early-exit after 3 of 8, 2": (exits, lambda: EarlyExit(2)),
    }
    if heads is not None:
        ways |= {f"multi-token-heads, {n}": (heads, lambda n=n: MultiTokenHeads(n)) for n in (3, 6, 12)}  # type: ignore[misc]
    if given.drafted:
        drafted = graphopt.load(given.drafted)
        ways |= {f"attached-draft, {n}": (drafted, lambda n=n: AttachedDraft(n)) for n in (2, 3, 4)}  # type: ignore[misc]
    tokenizer, console = Tokenizer(plain), Console(width=120)
    for name in ("validation", "out_of_domain"):
        rows = prompts(tokenizer, HERE / "data" / f"{name}.jsonl", given.rows, given.prompt)
        times: dict[str, list[float]] = {way: [] for way in ways}
        shown = {}
        expected = None
        for _ in range(given.rounds):
            for way, (program, make) in ways.items():
                seconds, texts, found = run(program, rows, given.new, make())
                expected = expected or texts
                assert texts == expected, f"{way} writes another text"
                times[way].append(seconds)
                shown[way] = found
        table = Table(
            "strategy",
            "tokens a step",
            "accepted by depth",
            "ms a token",
            "candidates, %",
            "faster",
            title=name,
            box=None,
        )
        base = statistics.median(times["plain"])
        for way, found in shown.items():
            seconds = statistics.median(times[way])
            tokens, steps = sum(s.tokens for s in found), sum(s.row_steps for s in found)
            depth = max(len(s.proposed) for s in found)
            shares = []
            for d in range(depth):
                asked = sum(s.proposed[d] for s in found if d < len(s.proposed))
                shares.append(sum(s.accepted[d] for s in found if d < len(s.accepted)) / max(asked, 1))
            drafting = sum(s.seconds["candidates"] for s in found) / sum(
                sum(s.seconds.values()) for s in found
            )
            table.add_row(
                way,
                f"{tokens / steps:.2f}",
                " ".join(f"{a:.2f}" for a in shares[:6]),
                f"{seconds / tokens * 1e3:.2f}",
                f"{drafting:.0%}",
                f"{base / seconds:.2f}",
            )
        console.print(table)


if __name__ == "__main__":
    main()
