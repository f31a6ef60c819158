"""``graphopt generate``: text that continues a prompt, as it comes."""

from __future__ import annotations

import sys
import time
from typing import Any

from ..decoding.drafters import DraftProgram
from ..decoding.speculating import Statistics
from ..frontends.data import Tokenizer
from ..generation import as_strategy, stream
from ..ir.errors import UsageError
from .output import note, show_json
from .sources import read_program


def generate_text(
    source: str, prompt: str, count: int, strategy: str | None, draft: str | None, sampling: dict[str, Any],
    as_json: bool, trust: bool,
) -> None:  # fmt: skip
    """Print what a program makes of a prompt, with its rate."""
    if strategy is not None and draft is not None:
        raise UsageError("--strategy and --draft exclude one another")
    proposing = None if strategy is None else as_strategy(strategy)
    program = read_program(source, trust)
    if draft is not None:
        proposing = DraftProgram(_same_tokenizer(program, read_program(draft, trust), source, draft))
    tokenizer = Tokenizer(program)
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UsageError("the prompt has no tokens")
    tokens = stream(program, [ids], max_new_tokens=count, strategy=proposing, **sampling)
    began, shown = time.perf_counter(), ""
    new: list[int] = []
    for _, piece in tokens:
        new.extend(piece)
        if not as_json:
            whole = tokenizer.decode(new)
            # bytes of a character that has not come to its end yet are shown with the next token
            if not whole.endswith("\ufffd"):
                sys.stdout.write(whole[len(shown) :])
                sys.stdout.flush()
                shown = whole
    seconds = time.perf_counter() - began
    found = tokens.statistics
    if as_json:
        show_json(
            {"prompt": prompt, "text": tokenizer.decode(new), "tokens": new, "seconds": seconds,
             "steps": found.steps, "tokens_per_step": found.tokens_per_step, "acceptance": found.acceptance,
             "time": found.seconds, "notes": found.notes}
        )  # fmt: skip
        return
    sys.stdout.write("\n")
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
