"""Several tokens a step: tokens a step, acceptance by depth, and time against one token a step, strategy by strategy.

    python benchmarks/decoding.py [--texts FILE] [--heads FOLDER] [--drafted FOLDER] [--masked FOLDER] [--rows 8]

The reference Llama continues texts of its own kind and of another, one row at a time; all strategies in turns, operator
by operator and compiled, medians of ``--rounds``. Every text is compared with the one that the plain loop writes.
``--texts`` is what ``graphopt answer`` wrote; ``--heads``, ``--drafted`` and ``--masked`` are programs with trained heads,
draft and mask tokens. What is not given is left out.
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
from graphopt.data.tokenizer import Tokenizer
from graphopt.decoding import AttachedDraft, Drafter, DraftProgram, EarlyExit, MaskTokens, MultiTokenHeads, PromptLookup, Retrieval, TokenRecycling
from graphopt.decoding.generation import texts_of
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
    program: Program, rows: list[list[int]], new: int, strategy: Drafter | None, compiled: bool = False
) -> tuple[float, list, list]:
    """Return seconds, texts and statistics of all rows one after the other."""
    seconds, texts, found = 0.0, [], []
    for row in rows:
        stream = graphopt.stream(
            program, [row], max_new_tokens=new, eos_token_id=None, strategy=strategy, compiled=compiled
        )
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
    parser.add_argument("--texts", help="a .jsonl file that the program wrote")
    parser.add_argument("--plainly", action="store_true", help="leave out what is compiled")
    parser.add_argument("--heads", help="a program with trained heads")
    parser.add_argument("--drafted", help="a program with a trained draft of its own")
    parser.add_argument("--masked", help="a program with trained mask tokens")
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
        "draft-program, 3": (plain, lambda: DraftProgram(draft, 3)),
        "draft-program, 4": (plain, lambda: DraftProgram(draft, 4)),
        "early-exit after 3 of 8, 2": (exits, lambda: EarlyExit(2)),
        "retrieval, nothing before, 8": (plain, lambda: Retrieval(nodes=8)),
    }
    if given.texts:
        texts = texts_of(plain, given.texts)
        ways |= {f"retrieval, {n}": (plain, lambda n=n: Retrieval(texts, n)) for n in (8, 16, 24)}  # type: ignore[misc]
    if heads is not None:
        ways |= {f"multi-token-heads, {n}": (heads, lambda n=n: MultiTokenHeads(n)) for n in (3, 6)}  # type: ignore[misc]
    if given.drafted:
        drafted = graphopt.load(given.drafted)
        ways |= {f"attached-draft, {n}": (drafted, lambda n=n: AttachedDraft(n)) for n in (2, 3, 4)}  # type: ignore[misc]
    if given.masked:
        masked = graphopt.load(given.masked)
        for layout, counts in (("quadratic", (2, 3)), ("linear", (3,))):
            for n in counts:
                way = f"mask-tokens, {n}, {layout}"
                ways[way] = (masked, lambda n=n, layout=layout: MaskTokens(n, layout))  # type: ignore[misc]
    tokenizer, console = Tokenizer(plain), Console(width=150)
    modes = (False,) if given.plainly else (False, True)
    for name in ("validation", "out_of_domain"):
        rows = prompts(tokenizer, HERE / "data" / f"{name}.jsonl", given.rows, given.prompt)
        times: dict[tuple[str, bool], list[float]] = {}
        shown, expected = {}, None
        for turn in range(-1, given.rounds):
            for way, (program, make) in ways.items():
                for compiled in modes:
                    if turn < 0 and not compiled:
                        continue  # the first round is for the compiler
                    strategy = make()
                    seconds, written, found = run(program, rows, given.new, strategy, compiled)
                    expected = expected or written
                    assert written == expected, f"{way} writes another text"
                    if turn >= 0:
                        times.setdefault((way, compiled), []).append(seconds)
                        if not compiled:
                            shown[way] = found
        table = Table(
            "strategy", "tokens a step", "accepted by depth", "candidates, %", "ms a token", "of plain",
            title=name, box=None,
        )  # fmt: skip
        if not given.plainly:
            for column in ("compiled, ms", "of plain", "of compiled plain"):
                table.add_column(column)
        median = {key: statistics.median(values) for key, values in times.items()}
        for way, found in shown.items():
            tokens, steps = sum(s.tokens for s in found), sum(s.row_steps for s in found)
            shares = []
            for d in range(max(len(s.proposed) for s in found)):
                asked = sum(s.proposed[d] for s in found if d < len(s.proposed))
                shares.append(sum(s.accepted[d] for s in found if d < len(s.accepted)) / max(asked, 1))
            total = sum(sum(s.seconds.values()) for s in found)
            cells = [
                way, f"{tokens / steps:.2f}", " ".join(f"{a:.2f}" for a in shares[:6]),
                f"{sum(s.seconds['candidates'] for s in found) / total:.0%}",
                f"{median[way, False] / tokens * 1e3:.2f}", f"{median['plain', False] / median[way, False]:.2f}",
            ]  # fmt: skip
            if not given.plainly:
                cells += [
                    f"{median[way, True] / tokens * 1e3:.2f}", f"{median['plain', False] / median[way, True]:.2f}",
                    f"{median['plain', True] / median[way, True]:.2f}",
                ]  # fmt: skip
            table.add_row(*cells)
        console.print(table)


if __name__ == "__main__":
    main()
