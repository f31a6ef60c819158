"""``graphopt generate``: text that continues a prompt, as it comes."""

from __future__ import annotations

import json
import sys
import time

import torch

from ..decoding import continuations
from ..frontends.data import Tokenizer
from ..ir.errors import UsageError
from ..ir.program import Program
from .output import note, show_json
from .sources import read_program


def generate_text(
    source: str, prompt: str, count: int, temperature: float, seed: int, as_json: bool, trust: bool
) -> None:
    """Print what a program makes of a prompt, with its rate."""
    program = read_program(source, trust)
    tokenizer = Tokenizer(program)
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UsageError("the prompt has no tokens")
    began, new, shown = time.perf_counter(), [], ""
    stream = continuations(
        program, torch.tensor([ids]), max_new_tokens=count, eos_token_id=end_tokens(program),
        temperature=temperature, seed=seed,
    )  # fmt: skip
    for token in stream:
        new.append(token)
        if not as_json:
            whole = tokenizer.decode(new)
            # bytes of a character that has not come to its end yet are shown with the next token
            if not whole.endswith("\ufffd"):
                sys.stdout.write(whole[len(shown) :])
                sys.stdout.flush()
                shown = whole
    seconds = time.perf_counter() - began
    if as_json:
        show_json({"prompt": prompt, "text": tokenizer.decode(new), "tokens": new, "seconds": seconds})
        return
    sys.stdout.write("\n")
    note(f"{len(new)} tokens in {seconds:.1f} s, {len(new) / max(seconds, 1e-9):.1f} a second")


def end_tokens(program: Program) -> list[int]:
    """Return the tokens after which the checkpoint's configuration says to stop."""
    found = program.origin.config.get("eos_token_id")
    given = program.origin.assets.get("generation_config.json")
    if given is not None:
        try:
            found = json.loads(given).get("eos_token_id", found)
        except ValueError:
            note("generation_config.json is not JSON and was left aside")
    if isinstance(found, int):
        return [found]
    return [int(t) for t in found] if isinstance(found, list) else []
