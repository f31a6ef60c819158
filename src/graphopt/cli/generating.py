"""``graphopt generate``: text that continues a prompt, as it comes; ``graphopt answer``: data that a model writes."""

from __future__ import annotations

import time
from pathlib import Path

from ..data.tokenizer import Tokenizer
from ..decoding.answering import answer
from ..decoding.drafters import DraftProgram
from ..decoding.generation import named_strategy, stream
from ..decoding.speculating import Statistics
from ..ir.errors import UsageError
from ..ir.program import Program
from .app import Answer, Generate
from .output import note, show_json, text
from .places import on_interrupt, place
from .progress import ShownProgress
from .sources import read_program, require_files


def generate_text(given: Generate) -> None:
    """Print what a program makes of a prompt, with its rate."""
    if given.strategy is not None and given.draft is not None:
        raise UsageError("--strategy and --draft exclude one another")
    if given.strategy is not None:
        named_strategy(given.strategy)
    program = read_program(given.program, given.trust)
    proposing = given.strategy if given.draft is None else _drafting(given.draft, given, program)
    tokenizer = Tokenizer(program)
    ids = tokenizer.encode(given.prompt)
    if not ids:
        raise UsageError("the prompt has no tokens")
    tokens = stream(
        program, [ids], max_new_tokens=given.max_new_tokens, strategy=proposing, temperature=given.temperature,
        top_k=given.top_k, top_p=given.top_p, seed=given.seed, dtype=given.dtype, compiled=given.compiled,
    )  # fmt: skip
    began, shown = time.perf_counter(), ""
    new: list[int] = []
    with on_interrupt(lambda: f"after {len(new)} tokens"):
        try:
            for _, piece in tokens:
                new.extend(piece)
                if not given.as_json:
                    whole = tokenizer.decode(new)
                    # bytes of a character that has not come to its end yet are shown with the next token
                    if not whole.endswith("\ufffd"):
                        print(whole[len(shown) :], end="", flush=True)
                        shown = whole
        finally:
            if not given.as_json and new:
                # what says how it ended has a line of its own
                print(flush=True)
    seconds = time.perf_counter() - began
    found = tokens.statistics
    if given.as_json:
        show_json(
            {"prompt": given.prompt, "text": tokenizer.decode(new), "tokens": new, "seconds": seconds,
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


def _drafting(source: str, given: Generate, program: Program) -> DraftProgram:
    draft = read_program(source, given.trust)
    ours, theirs = (p.origin.assets.get("tokenizer.json") for p in (program, draft))
    if ours is not None and theirs is not None and ours != theirs:
        raise UsageError(
            f"{source} has another tokenizer than {given.program}: its tokens mean something else",
            hint="a draft is trained on the tokens of the program that it drafts for",
        )
    return DraftProgram(draft)


def answer_texts(given: Answer) -> None:
    """Let a program write data, and say how much it wrote."""
    if given.strategy is not None:
        named_strategy(given.strategy)
    require_files(given.data)
    began = time.perf_counter()
    part = Path(f"{given.output}.part")
    goes_on = f"the rows that are done stand in {part}; the same command goes on"
    with (
        place(given.output, given.force, (given.program, given.data), moved=True),
        on_interrupt(lambda: goes_on if part.exists() else ""),
    ):
        found = answer(
            read_program(given.program, given.trust), given.data, given.output, sequences=given.sequences,
            prompt_tokens=given.prompt_tokens, max_new_tokens=given.max_new_tokens, batch=given.batch,
            temperature=given.temperature, seed=given.seed, strategy=given.strategy, progress=ShownProgress(),
        )  # fmt: skip
    seconds = time.perf_counter() - began
    if given.as_json:
        show_json({"output": given.output, **vars(found), "seconds": seconds})
        return
    left_out = f"; {found.left_out} rows left out: they do not fit into the model's positions"
    text(
        f"{found.rows} rows, {found.tokens} tokens written in {seconds:.0f} s"
        f"{left_out if found.left_out else ''}\nsaved to {given.output}"
    )
