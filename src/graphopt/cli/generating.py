"""``graphopt generate``: streams the continuation of a prompt; ``graphopt answer``: data that a model writes."""

from __future__ import annotations

import time
from pathlib import Path

from ..data.tokenizer import Tokenizer
from ..decoding.answering import answer
from ..decoding.drafters import DraftProgram
from ..decoding.generation import named_strategy, stream
from ..decoding.policies import as_policy
from ..decoding.speculating import Statistics
from ..ir.errors import UsageError
from ..ir.program import Program
from .app import Answer, Generate
from .output import note, show_json, text
from .places import on_interrupt, place
from .progress import ShownProgress
from .sources import read_program, require_files


def generate_text(args: Generate) -> None:
    """Print a program's continuation of a prompt, and its speed."""
    if args.strategy is not None and args.draft is not None:
        raise UsageError("--strategy and --draft exclude one another")
    if args.strategy is not None:
        named_strategy(args.strategy)
    as_policy(args.cache)
    program = read_program(args.program, args)
    proposing = args.strategy if args.draft is None else _draft_program(args.draft, args, program)
    tokenizer = Tokenizer(program)
    ids = _asked(args, tokenizer) if args.chat else tokenizer.encode(args.prompt)
    if not ids:
        raise UsageError("the prompt has no tokens")
    tokens = stream(
        program, [ids], max_new_tokens=args.max_new_tokens, strategy=proposing, temperature=args.temperature,
        top_k=args.top_k, top_p=args.top_p, seed=args.seed, dtype=args.dtype, compiled=args.compiled,
        kernels=args.kernels, cache=args.cache,
    )  # fmt: skip
    began, printed = time.perf_counter(), ""
    new: list[int] = []
    with on_interrupt(lambda: f"after {len(new)} tokens"):
        try:
            for _, piece in tokens:
                new.extend(piece)
                if not args.as_json:
                    decoded = tokenizer.decode(new)
                    # bytes of an incomplete character are shown with the next token
                    if not decoded.endswith("\ufffd"):
                        print(decoded[len(printed) :], end="", flush=True)
                        printed = decoded
        finally:
            if not args.as_json and new:
                # messages about how it ended start on a new line
                print(flush=True)
    seconds = time.perf_counter() - began
    statistics = tokens.statistics
    if args.as_json:
        show_json(
            {"prompt": args.prompt, "text": tokenizer.decode(new), "tokens": new, "seconds": seconds,
             "steps": statistics.steps, "tokens_per_step": statistics.tokens_per_step, "acceptance": statistics.acceptance,
             "time": statistics.seconds, "notes": statistics.notes}
        )  # fmt: skip
        return
    for remark in statistics.notes:
        note(remark)
    note(
        f"{len(new)} tokens in {seconds:.1f} s, {len(new) / max(seconds, 1e-9):.1f} a second"
        + _speculation_text(statistics)
    )


def _asked(args: Generate, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of the prompt as a user's message, and of the beginning of an answer."""
    if not tokenizer.template:
        raise UsageError(
            f"{args.program} has no chat template", hint="leave out --chat: the prompt is continued"
        )
    messages = [{"role": "user", "content": args.prompt}]
    return tokenizer.encode_chat(tokenizer.chat(messages, answering=True))[0]


def _speculation_text(statistics: Statistics) -> str:
    if not statistics.proposed:
        return ""
    depths = ", ".join(f"{share:.0%}" for share in statistics.acceptance)
    return f"; {statistics.tokens_per_step:.2f} a step, accepted by depth: {depths}"


def _draft_program(source: str, args: Generate, program: Program) -> DraftProgram:
    draft = read_program(source, args)
    program_tokenizer, draft_tokenizer = (p.origin.assets.get("tokenizer.json") for p in (program, draft))
    if program_tokenizer is not None and draft_tokenizer is not None and program_tokenizer != draft_tokenizer:
        raise UsageError(
            f"{source} has another tokenizer than {args.program}, so its tokens mean something else",
            hint="a draft must use the tokenizer of the program that it drafts for",
        )
    return DraftProgram(draft)


def answer_texts(args: Answer) -> None:
    """Let a program write data, and print how much it wrote."""
    if args.strategy is not None:
        named_strategy(args.strategy)
    require_files(args.data)
    began = time.perf_counter()
    part = Path(f"{args.output}.part")
    resumable = f"finished rows are kept in {part}; the same command resumes"
    with (
        place(args.output, args.force, (args.program, args.data), moved=True),
        on_interrupt(lambda: resumable if part.exists() else ""),
    ):
        answered = answer(
            read_program(args.program, args), args.data, args.output, sequences=args.sequences,
            prompt_tokens=args.prompt_tokens, max_new_tokens=args.max_new_tokens, batch=args.batch,
            temperature=args.temperature, seed=args.seed, strategy=args.strategy, progress=ShownProgress(),
        )  # fmt: skip
    seconds = time.perf_counter() - began
    if args.as_json:
        show_json({"output": args.output, **vars(answered), "seconds": seconds})
        return
    left_out = f"; {answered.left_out} rows left out because they do not fit into the model's positions"
    text(
        f"{answered.rows} rows, {answered.tokens} tokens written in {seconds:.0f} s"
        f"{left_out if answered.left_out else ''}\nsaved to {args.output}"
    )
