"""The commands ``graphopt train``, ``recipes``, ``oracle`` and ``sweep`` and what they take. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Checkpoint, Force, Json, Length, Output, Seed, Trust, WorkDir


def train(
    program: Checkpoint,
    recipe: Annotated[
        str, typer.Option("--recipe", help="What to learn, e.g. 'dynamoe{theta=0.9}'; see graphopt recipes.")
    ],
    data: Annotated[str, typer.Option("--data", help="A .jsonl, .txt or .npz file.")],
    output: Output,
    steps: Annotated[int, typer.Option("--steps", help="Updates of the weights.")],
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Its highest value.")] = 1e-4,
    warmup: Annotated[int, typer.Option("--warmup", help="Steps over which it rises.")] = 0,
    schedule: Annotated[str, typer.Option("--schedule", help="cosine, linear or constant.")] = "cosine",
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="On matrices alone.")] = 0.0,
    accumulate: Annotated[int, typer.Option("--accumulate", help="Batches averaged for one update.")] = 1,
    batch: Annotated[int, typer.Option("--batch", help="Rows a batch.", min=1)] = 8,
    length: Annotated[int, typer.Option("--length", help="Tokens a row at most.", min=2)] = 256,
    sequences: Annotated[
        int | None, typer.Option("--sequences", help="Rows of data at most; all by default.", min=1)
    ] = None,
    validation: Annotated[
        str | None, typer.Option("--validation", help="Data of which the recipe's loss is shown too.")
    ] = None,
    measure_every: Annotated[
        int, typer.Option("--measure-every", help="Steps between such measurements; 0: at the end.", min=0)
    ] = 0,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Learn in float32, or as stored; saved as stored.")
    ] = "float32",
    loss_on: Annotated[
        str, typer.Option("--loss-on", help="all tokens, or those that the assistant says in conversations.")
    ] = "all",
    seed: Seed = 0,
    work_dir: Annotated[
        str | None, typer.Option("--work-dir", help="Where the run is kept; OUTPUT.training by default.")
    ] = None,
    save_every: Annotated[
        float, typer.Option("--save-every", help="Seconds between states on disk.", min=0)
    ] = 60.0,
    force: Force = False,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Train a program by a recipe; an interrupted run goes on. Under torchrun, on several processes."""
    from .learning import train_program

    settings = {
        "steps": steps, "learning_rate": learning_rate, "warmup": warmup, "schedule": schedule,
        "weight_decay": weight_decay, "accumulate": accumulate, "seed": seed,
    }  # fmt: skip
    train_program(
        program, output, recipe, data, settings, (sequences, length, batch), validation, measure_every,
        (work_dir, save_every, dtype), loss_on, force, as_json, trust,
    )  # fmt: skip


def recipes(
    name: Annotated[str | None, typer.Argument(help="A recipe.")] = None, as_json: Json = False
) -> None:
    """List what programs can be trained by, or describe one recipe with its options."""
    from .catalogue import show_recipes

    show_recipes(name, as_json)


def oracle(
    program: Checkpoint,
    data: Annotated[str, typer.Option("--data", help="A .jsonl or .txt file.")],
    tokens: Annotated[int, typer.Option("--tokens", help="How many tokens are tried.", min=1)] = 64,
    budget: Annotated[
        int | None, typer.Option("--budget", help="Only paths with so many feed-forwards at their largest.")
    ] = None,
    length: Annotated[int, typer.Option("--length", help="Tokens a row at most.", min=2)] = 128,
    seed: Seed = 0,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Try every path of some tokens through feed-forwards of several widths: a bound for routers."""
    from .learning import show_oracle

    show_oracle(program, data, tokens, budget, length, seed, as_json, trust)


def sweep(
    program: Checkpoint,
    data: Annotated[str, typer.Option("--data", help="A .jsonl, .txt or .npz file.")],
    dial: Annotated[
        str | None, typer.Option("--dial", help="Which dial; may be left out where there is one.")
    ] = None,
    values: Annotated[str | None, typer.Option("--values", help="Where to put it: '0 0.5 1'.")] = None,
    points: Annotated[int, typer.Option("--points", help="How many settings, without --values.", min=2)] = 5,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="As of graphopt evaluate; may be repeated.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="The original; else the program at the dial's default.")
    ] = None,
    sequences: Annotated[
        int | None, typer.Option("--sequences", help="Rows of data at most; all by default.", min=1)
    ] = None,
    length: Length = 2048,
    batch: Annotated[int, typer.Option("--batch", help="Rows a batch.", min=1)] = 8,
    csv: Annotated[str | None, typer.Option("--csv", help="Write the table to this file.")] = None,
    picture: Annotated[
        str | None, typer.Option("--picture", help="Draw quality against FLOPs: a .png, .svg or .pdf file.")
    ] = None,
    work_dir: WorkDir = None,
    force: Force = False,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Measure quality and active FLOPs at every setting of a dial."""
    from .learning import sweep_program

    sweep_program(
        program, data, dial, values, points, metric or [], against, (sequences, length, batch), csv, picture, work_dir,
        force, as_json, trust,
    )  # fmt: skip
