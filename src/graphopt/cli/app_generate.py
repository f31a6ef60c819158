"""The command ``graphopt generate`` and what it takes. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Checkpoint, Json, Seed, Trust


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
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Continue a text, one token after the other or several a step."""
    from .generating import generate_text

    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "dtype": dtype}
    generate_text(program, prompt, max_new_tokens, strategy, draft, sampling, as_json, trust)
