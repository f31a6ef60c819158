"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Checkpoint = Annotated[
    str,
    typer.Argument(help="A Hugging Face folder or cached id, a GGUF file, a saved program, or a .pt2 file."),
]
Pipeline = Annotated[
    str | None,
    typer.Option("-p", "--passes", help="Passes, e.g. 'fuse-projections, skip-layers{remove=2}'."),
]
Data = Annotated[
    str | None, typer.Option("--data", help="Calibration and judging data: .jsonl, .txt or .npz.")
]
Sequences = Annotated[int, typer.Option("--sequences", help="Rows of data at most.", min=1)]
Length = Annotated[int, typer.Option("--length", help="Tokens a row at most.", min=2)]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Read a .pt2 file although reading can run code from it.")
]
WorkDir = Annotated[
    str | None, typer.Option("--work-dir", help="Where scores are kept, so that a run can go on.")
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Replace what is there: a plain file, or a folder that graphopt wrote."),
]
Output = Annotated[str, typer.Option("-o", "--output", help="Where to write.")]
