"""The commands ``graphopt generate`` and ``graphopt answer`` and what they take. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Checkpoint, Force, Json, Output, Seed, Trust


def generate(
    program: Checkpoint,
    prompt: Annotated[str, typer.Option("--prompt", help="What to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens at most.", min=1)] = 64,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="Who proposes candidates, e.g. 'prompt-lookup{tokens=8}'; the text stays the same."
        ),
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="A smaller program with the same tokenizer, which proposes candidates.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.", min=0)] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among so many most likely tokens.", min=1)] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw among the most likely tokens of this probability.", min=0, max=1),
    ] = None,
    seed: Seed = 0,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="auto (float32 where a CPU would compute in 16 bits), stored or float32."
        ),
    ] = "auto",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile what lies between attentions; CUDA graphs on a GPU.")
    ] = False,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Continue a text, one token after the other or several a step."""
    from .generating import generate_text

    sampling = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "dtype": dtype,
        "compiled": compiled,
    }  # fmt: skip
    generate_text(program, prompt, max_new_tokens, strategy, draft, sampling, as_json, trust)


def answer(
    program: Checkpoint,
    data: Annotated[str, typer.Option("--data", help="Texts or conversations: a .jsonl or .txt file.")],
    output: Output,
    sequences: Annotated[
        int | None, typer.Option("--sequences", help="Rows at most; all by default.", min=1)
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens that are kept of a text.", min=1)] = 32,
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens that are written at most, a turn.", min=1)
    ] = 128,
    batch: Annotated[int, typer.Option("--batch", help="Rows side by side.", min=1)] = 32,
    strategy: Annotated[
        str | None, typer.Option(help="Who proposes candidates; the text stays the same.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.", min=0)] = 0.0,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Let a model write data itself: it continues texts, and speaks for the assistant in conversations."""
    from .generating import answer_texts

    amount = (sequences, prompt_tokens, max_new_tokens, batch)
    answer_texts(program, data, output, amount, strategy, temperature, seed, force, as_json, trust)
