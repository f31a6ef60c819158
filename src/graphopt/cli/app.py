"""The commands of ``graphopt`` and what they take. Nothing here imports torch; the work is elsewhere."""

from __future__ import annotations

from typing import Annotated

import typer

from .app_generate import answer, generate
from .app_learn import oracle, recipes, sweep, train
from .options import Checkpoint, Data, Force, Json, Length, Output, Pipeline, Seed, Sequences, Trust, WorkDir

app = typer.Typer(
    name="graphopt",
    help="Change the structure of a trained model by checked passes over one graph.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def inspect(
    checkpoint: Checkpoint,
    device: Annotated[
        str | None, typer.Option(help="Estimate time on this device; see graphopt devices.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows for the cost.", min=1)] = 1,
    sequence: Annotated[int, typer.Option(help="Tokens a row for the cost.", min=1)] = 128,
    data: Annotated[
        str | None, typer.Option("--data", help="Show how good an exit after each layer would be on this.")
    ] = None,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Show blocks and the evidence for them, cost, and what each pass could do."""
    from .inspecting import inspect_checkpoint

    inspect_checkpoint(checkpoint, device, batch, sequence, data, as_json, trust)


@app.command()
def plan(
    checkpoint: Checkpoint,
    passes: Annotated[str, typer.Option("-p", "--passes", help="The pipeline to plan.")],
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Write the plan to this YAML file.")
    ] = None,
    why: Annotated[
        str | None, typer.Option("--why", help="Say what happens to this block or node, and why.")
    ] = None,
    data: Data = None,
    sequences: Sequences = 128,
    length: Length = 2048,
    seed: Seed = 0,
    work_dir: WorkDir = None,
    force: Force = False,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """List every site of a pipeline: taken, or refused and why. The file can be edited and obeyed."""
    from .planning import plan_checkpoint

    plan_checkpoint(
        checkpoint, passes, output, why, data, (sequences, length, seed), work_dir, force, as_json, trust
    )


@app.command()
def optimize(
    checkpoint: Checkpoint,
    output: Output,
    passes: Pipeline = None,
    plan_file: Annotated[str | None, typer.Option("--plan", help="Obey this plan file.")] = None,
    data: Data = None,
    sequences: Sequences = 128,
    length: Length = 2048,
    seed: Seed = 0,
    work_dir: WorkDir = None,
    verify_with: Annotated[str, typer.Option("--verify", help="sites, full or off.")] = "sites",
    print_after_all: Annotated[
        bool, typer.Option("--print-after-all", help="Print the graph after each pass.")
    ] = False,
    dump_dir: Annotated[
        str | None, typer.Option("--dump-dir", help="Write the graph after each pass to this folder.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Run passes and save the program they make."""
    from .optimizing import optimize_checkpoint

    optimize_checkpoint(
        checkpoint, output, passes, plan_file, data, (sequences, length, seed), work_dir,
        verify_with, print_after_all, dump_dir, force, as_json, trust,
    )  # fmt: skip


@app.command()
def verify(
    before: Annotated[str, typer.Argument(help="The original: a checkpoint or saved program.")],
    after: Annotated[str, typer.Argument(help="What was made of it.")],
    data: Data = None,
    budget: Annotated[
        float | None,
        typer.Option("--budget", help="Relative loss that is allowed, where no pass was given one.", min=0),
    ] = None,
    sequences: Sequences = 128,
    length: Length = 2048,
    seed: Seed = 0,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Check the contracts of a saved program again: numbers and a verdict."""
    from .verifying import verify_programs

    verify_programs(before, after, data, (sequences, length, seed), budget, as_json, trust)


@app.command()
def diff(
    first: Annotated[str, typer.Argument(help="A checkpoint or saved program.")],
    second: Annotated[str, typer.Argument(help="Another.")],
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Show how two graphs differ, as text."""
    from .verifying import diff_programs

    diff_programs(first, second, as_json, trust)


@app.command()
def evaluate(
    checkpoints: Annotated[
        list[str],
        typer.Argument(help="Hugging Face folders or cached ids, GGUF files, saved programs, .pt2 files."),
    ],
    data: Annotated[list[str], typer.Option("--data", help="A .jsonl, .txt or .npz file; may be repeated.")],
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="perplexity, accuracy, bits_per_byte, kl, agreement, cosine, or a function of yours, "
            "(program) or (program, batches), as FILE.py:FUNCTION; may be repeated.",
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="The original, for kl, agreement and cosine.")
    ] = None,
    sequences: Annotated[
        int | None, typer.Option("--sequences", help="Rows of data at most; all by default.", min=1)
    ] = None,
    length: Length = 2048,
    batch: Annotated[int, typer.Option("--batch", help="Rows a batch.", min=1)] = 8,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Compute as stored, or in float32 or float64.")
    ] = "stored",
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Measure programs on data: perplexity, next-token accuracy, distance to an original, or your own."""
    from .evaluating import evaluate_programs

    evaluate_programs(
        checkpoints, data, metric or [], against, (sequences, length, batch), dtype, as_json, trust
    )


@app.command()
def lower(
    program: Checkpoint,
    to: Annotated[str, typer.Option("--to", help="onnx, genai (a folder for onnxruntime-genai), or triton.")],
    output: Output,
    opset: Annotated[
        int | None,
        typer.Option(help="ONNX opset: 20, 21 or 23; the target's by default, or 20, or 23 in few bits."),
    ] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option(
            "--sizes",
            "--shape",
            help="Fix sizes: batch=1,sequence=128. Given several times: a graph for each.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="What it is for: onnx (what ONNX Runtime takes), qnn-htp-v75 or GPUs such as sm_80,sm_90 (a folder)."
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Try it: in the NPU's simulator (graphopt[qnn]), by onnxruntime-genai, in Triton's interpreter.",
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            help="Where an AOTInductor package is made, cuda or cpu; by default on a GPU that is there."
        ),
    ] = None,
    part_bytes: Annotated[
        int | None,
        typer.Option(help="Cut the graph into parts whose weights take at most so many bytes.", min=1),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Write a program for another runtime and compare it there."""
    from .lowering import lower_program

    lower_program(program, to, output, opset, sizes, target, check, device, part_bytes, force, as_json, trust)


@app.command()
def export(
    program: Checkpoint,
    to: Annotated[str, typer.Option("--to", help="huggingface, pt2, or medusa for the heads alone.")],
    output: Output,
    force: Force = False,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Write a Hugging Face folder, a .pt2 file or multi-token heads; they are read back and compared before they count."""
    from .leaving import export_program

    export_program(program, to, output, force, as_json, trust)


@app.command(name="run")
def run_command(
    program: Checkpoint,
    inputs: Annotated[str, typer.Option("--input", help="A .npz, .txt (a row a line) or .jsonl file.")],
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Write the outputs to this .npz file.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Run a forward on every row of a file, in its order."""
    from .leaving import run_program

    run_program(program, inputs, output, force, as_json, trust)


@app.command()
def passes(
    name: Annotated[str | None, typer.Argument(help="A pass, or words of a paper.")] = None,
    as_json: Json = False,
) -> None:
    """List passes, or describe one with its options."""
    from .catalogue import show_passes

    show_passes(name, as_json)


@app.command()
def devices(as_json: Json = False) -> None:
    """List the devices that costs can be estimated for."""
    from .catalogue import show_devices

    show_devices(as_json)


@app.command()
def links(
    fit: Annotated[
        bool,
        typer.Option("--fit", help="Measure the processes that torchrun started; latency and bandwidth."),
    ] = False,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Write the fitted link to this JSON file.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """List the links that communication can be estimated for, or fit one to your own machines."""
    if not fit and output is None:
        from .catalogue import show_links

        show_links(as_json)
        return
    from .linking import fit_link

    fit_link(fit, output, force, as_json)


for _command in (train, recipes, oracle, sweep, generate, answer):
    app.command()(_command)
