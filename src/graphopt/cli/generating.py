"""``graphopt generate``: text that continues a prompt, as it comes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from ..data.tokenizer import Tokenizer
from ..decoding.answering import answer
from ..decoding.drafters import DraftProgram
from ..decoding.drafts import Drafter
from ..decoding.generation import as_strategy, named_strategy, stream
from ..decoding.speculating import Statistics
from ..ir.errors import UsageError
from .interrupts import on_interrupt
from .output import note, show_json, text
from .places import place
from .progress import ShownProgress
from .sources import read_program


def generate_text(
    source: str, prompt: str, count: int, strategy: str | None, draft: str | None, sampling: dict[str, Any],
    as_json: bool, trust: bool,
) -> None:  # fmt: skip
    """Print what a program makes of a prompt, with its rate."""
    if strategy is not None and draft is not None:
        raise UsageError("--strategy and --draft exclude one another")
    if strategy is not None:
        named_strategy(strategy)
    program = read_program(source, trust)
    proposing: Drafter | None = None if strategy is None else as_strategy(strategy, program)
    if draft is not None:
        proposing = DraftProgram(_same_tokenizer(program, read_program(draft, trust), source, draft))
    tokenizer = Tokenizer(program)
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UsageError("the prompt has no tokens")
    tokens = stream(program, [ids], max_new_tokens=count, strategy=proposing, **sampling)
    began, shown = time.perf_counter(), ""
    new: list[int] = []
    with on_interrupt(lambda: f"after {len(new)} tokens"):
        try:
            for _, piece in tokens:
                new.extend(piece)
                if not as_json:
                    whole = tokenizer.decode(new)
                    # bytes of a character that has not come to its end yet are shown with the next token
                    if not whole.endswith("\ufffd"):
                        sys.stdout.write(whole[len(shown) :])
                        sys.stdout.flush()
                        shown = whole
        finally:
            if not as_json and new:
                # what says how it ended has a line of its own
                sys.stdout.write("\n")
                sys.stdout.flush()
    seconds = time.perf_counter() - began
    found = tokens.statistics
    if as_json:
        show_json(
            {"prompt": prompt, "text": tokenizer.decode(new), "tokens": new, "seconds": seconds,
             "steps": found.steps, "tokens_per_step": found.tokens_per_step, "acceptance": found.acceptance,
             "time": found.seconds, "notes": found.notes}
        )  # fmt: skip
        return
    for remark in found.notes:
        note(remark)
    note(f"{len(new)} tokens in {seconds:.1f} s, {len(new) / max(seconds, 1e-9):.1f} a second" + _said(found))


def _said(found: Statistics) -> str:
    if not found.proposed:
        return ""
    depths = ", ".join(f"{share:.0%}" for share in found.acceptance)
    return f"; {found.tokens_per_step:.2f} a step, accepted by depth: {depths}"


def _same_tokenizer(program: Any, draft: Any, source: str, other: str) -> Any:
    ours, theirs = (p.origin.assets.get("tokenizer.json") for p in (program, draft))
    if ours is not None and theirs is not None and ours != theirs:
        raise UsageError(
            f"{other} has another tokenizer than {source}: its tokens mean something else",
            hint="a draft is trained on the tokens of the program that it drafts for",
        )
    return draft


def answer_texts(
    source: str, data: str, output: str, amount: tuple[int | None, int, int, int], strategy: str | None,
    temperature: float, seed: int, force: bool, as_json: bool, trust: bool,
) -> None:  # fmt: skip
    """Let a program write data, and say how much it wrote."""
    if strategy is not None:
        named_strategy(strategy)
    if not Path(data).is_file():
        raise UsageError(f"the data file {data} does not exist")
    sequences, prompt_tokens, count, batch = amount
    began = time.perf_counter()
    part = Path(f"{output}.part")
    with (
        place(output, force, (source, data), moved=True),
        on_interrupt(
            lambda: (
                f"the rows that are done stand in {part}; the same command goes on" if part.exists() else ""
            )
        ),
    ):
        found = answer(
            read_program(source, trust), data, output, sequences=sequences, prompt_tokens=prompt_tokens,
            max_new_tokens=count, batch=batch, temperature=temperature, seed=seed, strategy=strategy,
            progress=ShownProgress(),
        )  # fmt: skip
    seconds = time.perf_counter() - began
    if as_json:
        show_json({"output": output, **vars(found), "seconds": seconds})
        return
    text(
        f"{found.rows} rows, {found.tokens} tokens written in {seconds:.0f} s"
        + (
            f"; {found.left_out} rows left out: they do not fit into the model's positions"
            if found.left_out
            else ""
        )
        + f"\nsaved to {output}"
    )
