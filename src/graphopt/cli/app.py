"""The commands of ``graphopt`` and what they take. Nothing here imports torch; the work is elsewhere."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import documents_shown, errors, show_json

# typer has a copy of click or uses the package, by its version; either way its errors are found here
_WrongUsage: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="graphopt",
    help="Change the structure of a trained model by checked passes over one graph.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Checkpoint = Annotated[
    str, typer.Argument(help="A Hugging Face folder or cached id, a saved program, or a .pt2 file.")
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
Output = Annotated[str, typer.Option("-o", "--output", help="Where to write.")]


@app.command()
def inspect(
    checkpoint: Checkpoint,
    device: Annotated[
        str | None, typer.Option(help="Estimate time on this device; see graphopt devices.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows for the cost.", min=1)] = 1,
    sequence: Annotated[int, typer.Option(help="Tokens a row for the cost.", min=1)] = 128,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Show blocks and the evidence for them, cost, and what each pass could do."""
    from .inspecting import inspect_checkpoint

    inspect_checkpoint(checkpoint, device, batch, sequence, as_json, trust)


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
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """List every site of a pipeline: taken, or refused and why. The file can be edited and obeyed."""
    from .planning import plan_checkpoint

    plan_checkpoint(
        checkpoint, passes, output, why, data, (sequences, length, seed), work_dir, as_json, trust
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
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Run passes and save the program they make."""
    from .optimizing import optimize_checkpoint

    optimize_checkpoint(
        checkpoint, output, passes, plan_file, data, (sequences, length, seed), work_dir,
        verify_with, print_after_all, dump_dir, as_json, trust,
    )  # fmt: skip


@app.command()
def verify(
    before: Annotated[str, typer.Argument(help="The original: a checkpoint or saved program.")],
    after: Annotated[str, typer.Argument(help="What was made of it.")],
    data: Data = None,
    sequences: Sequences = 128,
    length: Length = 2048,
    seed: Seed = 0,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Check the contracts of a saved program again: numbers and a verdict."""
    from .verifying import verify_programs

    verify_programs(before, after, data, (sequences, length, seed), as_json, trust)


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
        list[str], typer.Argument(help="Hugging Face folders or cached ids, saved programs, .pt2 files.")
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
    to: Annotated[str, typer.Option("--to", help="onnx.")],
    output: Output,
    opset: Annotated[int, typer.Option(help="ONNX opset: 20, 21 or 23.")] = 20,
    sizes: Annotated[str | None, typer.Option("--sizes", help="Fix sizes: batch=1,sequence=128.")] = None,
    target: Annotated[str | None, typer.Option(help="The runtime or chip it is for.")] = None,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Write a program for another runtime and compare it there."""
    from .leaving import lower_program

    lower_program(program, to, output, opset, sizes, target, as_json, trust)


@app.command()
def export(
    program: Checkpoint,
    to: Annotated[str, typer.Option("--to", help="huggingface or pt2.")],
    output: Output,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Write a Hugging Face folder or a .pt2 file; it is read back and compared before it counts."""
    from .leaving import export_program

    export_program(program, to, output, as_json, trust)


@app.command(name="run")
def run_command(
    program: Checkpoint,
    inputs: Annotated[str, typer.Option("--input", help="A .npz, .txt or .jsonl file.")],
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Write the outputs to this .npz file.")
    ] = None,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Run one forward."""
    from .leaving import run_program

    run_program(program, inputs, output, as_json, trust)


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
def generate(
    program: Checkpoint,
    prompt: Annotated[str, typer.Option("--prompt", help="What to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens at most.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.", min=0)] = 0.0,
    seed: Seed = 0,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Continue a text."""
    from .generating import generate_text

    generate_text(program, prompt, max_new_tokens, temperature, seed, as_json, trust)


@app.command()
def links(
    fit: Annotated[
        bool,
        typer.Option("--fit", help="Measure the processes that torchrun started; latency and bandwidth."),
    ] = False,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Write the fitted link to this JSON file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the links that communication can be estimated for, or fit one to your own machines."""
    from .linking import show_links

    show_links(fit, output, as_json)


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit status.

    Under torchrun every rank runs it; the first prints and writes, all print errors.
    """
    rank = int(os.environ.get("RANK", "0") or 0) if "WORLD_SIZE" in os.environ else 0
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    status = _run(arguments, f"rank {rank}: " if rank else "")
    if status and int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
        # the others may be waiting for this rank in a collective; ending at once tells them
        errors.file.flush()
        sys.stdout.flush()
        os._exit(status)
    return status


def _run(arguments: list[str], who: str) -> int:
    as_json = "--json" in arguments
    before = documents_shown()
    try:
        command = typer.main.get_command(app)
        result = command.main(arguments, prog_name="graphopt", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return int(stop.exit_code)
    except _WrongUsage as error:
        return _misused(error, as_json)
    except (KeyboardInterrupt, typer.Abort):
        errors.print("interrupted; nothing was written", markup=False)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # a command that shows what it found and then refuses has said it all
        return _failed(error, as_json and documents_shown() == before, who)


def _misused(error: Any, as_json: bool) -> int:
    message = str(error.format_message())
    if as_json:
        _show_error("UsageError", message, 2)
    if message:
        context = getattr(error, "ctx", None)
        where = f"\n  what to do: see {context.command_path} --help" if context is not None else ""
        errors.print(f"UsageError: {message}{where}", markup=False)
    return 2


def _show_error(name: str, message: str, code: int) -> None:
    show_json({"error": name, "message": message, "exit_status": code})


def _failed(error: Exception, as_json: bool, who: str = "") -> int:
    code = getattr(error, "exit_code", None)
    notes = list(getattr(error, "__notes__", []))
    if code is None:
        if os.environ.get("GRAPHOPT_TRACEBACK"):
            traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        message = f"internal error: {type(error).__name__}: {error}\n  at {place}"
        message += "\n  what to do: report it; GRAPHOPT_TRACEBACK=1 prints the whole traceback"
        code = 1
    else:
        message = f"{type(error).__name__}: {error}"
    for line in notes:
        message += f"\n  in {line}"
    if as_json:
        _show_error(type(error).__name__, str(error), int(code))
    errors.print(who + message, markup=False)
    return int(code)
