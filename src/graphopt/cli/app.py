"""The commands of ``graphopt``: their arguments, and the functions that implement them. This does not import torch."""

from __future__ import annotations

from typing import Any

from .options import app, argument, command, option

__all__ = ["app"]

DRAWN = option("Seed for everything random.", 0)
NEW_FILE = option("Where to write.", ..., "-o")
PROGRAM = argument("A Hugging Face folder or cached id, a GGUF file, a saved program, or a .pt2 file.")
SCORES = option("Folder for scores, so that an interrupted run can resume.")
TEMPERATURE = option("0 takes the most likely token.", 0.0, min=0)
TEXTS = option("A .jsonl, .txt or .npz file.")


def tokens_a_row(default: int) -> Any:
    """Describe the option that limits the length of rows."""
    return option("Maximum number of tokens per row.", default, min=2)


class Showing:
    """Options of every command."""

    as_json: bool = option("Print JSON.", False, "--json")


class Opening(Showing):
    """Options of commands that read programs, of which checkpoints are captured."""

    trust: bool = option("Read a .pt2 file although reading can run code from it.", False)
    no_cache: bool = option("Capture again, and keep nothing in the cache folder.", False)
    example: str | None = option(
        "Capture a checkpoint on these inputs: a .npz file with an array for each; by default made from its configuration.",
        None,
        "--inputs",
    )


class Reading(Opening):
    """Options of commands that read programs and have no sizes of their own."""

    shape: list[str] | None = option(
        "Shape of an example input of a checkpoint, such as pixel_values=1x3x384x384; may be repeated."
    )


class Writing(Showing):
    """Options of commands that write."""

    force: bool = option("Replace an existing plain file, or a folder that graphopt wrote.", False)


class Calibrating(Reading):
    """Options of commands that run passes."""

    data: str | None = option("Calibration and evaluation data: .jsonl, .txt or .npz.")
    sequences: int = option("Maximum number of rows of data.", 128, min=1)
    length: int = tokens_a_row(2048)
    seed: int = DRAWN


class Measuring(Reading):
    """Options of commands that go through all of their data."""

    sequences: int | None = option("Maximum number of rows of data; all by default.", min=1)
    length: int = tokens_a_row(2048)
    batch: int = option("Rows per batch.", 8, min=1)


@command("inspecting.inspect_checkpoint", starting="loading torch ...")
class Inspect(Reading):
    """Show the recognised blocks and the evidence for them, cost, and what each pass could do."""

    checkpoint: str = PROGRAM
    device: str | None = option("Estimate time on this device; see graphopt devices.")
    batch: int = option("Number of rows for the cost.", 1, min=1)
    sequence: int = option("Tokens per row for the cost.", 128, min=1)
    data: str | None = option("Show how accurate an exit after each layer would be on this data.")


@command("optimizing.plan_checkpoint")
class Plan(Calibrating, Writing):
    """List every site of a pipeline: taken, or refused and why. The file can be edited and followed by optimize."""

    checkpoint: str = PROGRAM
    passes: str = option("The pipeline to plan.", ..., "-p")
    output: str | None = option("Write the plan to this YAML file.", None, "-o")
    why: str | None = option("Explain what happens to this block or node.")
    work_dir: str | None = SCORES


@command("optimizing.optimize_checkpoint")
class Optimize(Calibrating, Writing):
    """Run passes and save the resulting program."""

    checkpoint: str = PROGRAM
    output: str = NEW_FILE
    passes: str | None = option("Passes, e.g. 'fuse-projections, skip-layers{remove=2}'.", None, "-p")
    plan_file: str | None = option("Follow this plan file.", None, "--plan")
    verify_with: str = option("sites, full or off.", "sites", "--verify")
    print_after_all: bool = option("Print the graph after each pass.", False)
    dump_dir: str | None = option("Write the graph after each pass to this folder.")
    work_dir: str | None = SCORES


@command("verifying.verify_programs")
class Verify(Calibrating):
    """Check the contracts of a saved program again; print numbers and a verdict."""

    before: str = argument("The original: a checkpoint or saved program.")
    after: str = argument("The program made from it.")
    budget: float | None = option("Relative loss that is allowed, if no pass has a budget of its own.", min=0)


@command("verifying.diff_programs")
class Diff(Reading):
    """Show the differences of two graphs as text."""

    first: str = argument("A checkpoint or saved program.")
    second: str = argument("Another.")


@command("evaluating.evaluate_programs")
class Evaluate(Measuring):
    """Measure programs on data: perplexity, next-token accuracy, distance to an original, or your own metric."""

    checkpoints: list[str] = argument(
        "Hugging Face folders or cached ids, GGUF files, saved programs, .pt2 files."
    )
    data: list[str] = option("A .jsonl, .txt or .npz file; may be repeated.")
    metric: list[str] | None = option(
        "perplexity, accuracy, bits_per_byte, kl, agreement, cosine, or your own function, "
        "(program) or (program, batches), as FILE.py:FUNCTION; may be repeated."
    )
    against: str | None = option("The original, for kl, agreement and cosine.")
    dtype: str = option("Compute in the stored types, or in float32 or float64.", "stored")


@command("lowering.lower_program")
class Lower(Opening, Writing):
    """Write a program for another runtime and compare its outputs there."""

    program: str = PROGRAM
    to: str = option("onnx, genai (a folder for onnxruntime-genai), or triton.")
    output: str = NEW_FILE
    opset: int | None = option(
        "ONNX opset: 20, 21 or 23; by default the target's, or 20, or 23 for weights in few bits."
    )
    sizes: list[str] | None = option(
        "Fix sizes: batch=1,sequence=128. If repeated, one graph is written for each. With several numbers, such as "
        "pixel_values=1x3x384x384: the shape on which a checkpoint is captured.",
        None,
        "--sizes",
        "--shape",
    )
    target: str | None = option(
        "Target: onnx (what ONNX Runtime supports), qnn-htp-v75, or GPUs such as sm_80,sm_90 (a folder)."
    )
    check: bool = option(
        "Run it: in the NPU's simulator (graphopt[qnn]), in onnxruntime-genai, or in Triton's interpreter.",
        False,
    )
    device: str | None = option(
        "Device that an AOTInductor package is compiled for, cuda or cpu; by default a GPU if there is one."
    )
    operators: str | None = option(
        "Operators of ONNX files: standard, or runtime for those that ONNX Runtime alone has kernels for, which are "
        "faster; by default standard with --to onnx and runtime with --to genai."
    )
    float_products: bool = option(
        "With operators=runtime: do not round the inputs of products with few-bit weights to 8 bits; slower.",
        False,
    )
    part_bytes: int | None = option(
        "Cut the graph into shards whose weights take at most this many bytes.", min=1
    )


@command("leaving.export_program")
class Export(Reading, Writing):
    """Write a Hugging Face folder, a GGUF file, a .pt2 file or multi-token heads, then read them back and compare."""

    program: str = PROGRAM
    to: str = option("huggingface, gguf, pt2, or medusa for only the heads.")
    output: str = NEW_FILE
    kind: str = option(
        "Of matrices in a GGUF file: F32, F16, BF16, Q8_0, Q4_0, Q4_1, or auto, as they are.",
        "auto",
        "--type",
    )


@command("leaving.run_program")
class Run(Reading, Writing):
    """Run a forward pass on every row of a file, in order."""

    program: str = PROGRAM
    inputs: str = option("A .npz, .txt (one row per line) or .jsonl file.", ..., "--input")
    output: str | None = option("Write the outputs to this .npz file.", None, "-o")


@command("catalogue.show_passes")
class Passes(Showing):
    """List passes, or describe one with its options."""

    name: str | None = argument("A pass, or words from its paper's title or its description.")


@command("catalogue.show_devices")
class Devices(Showing):
    """List the devices that costs can be estimated for."""


@command("catalogue.show_links")
class Links(Writing):
    """List the links for which communication can be estimated, or fit one to your own machines."""

    fit: bool = option("Measure latency and bandwidth between the processes that torchrun started.", False)
    output: str | None = option("Write the fitted link to this JSON file.", None, "-o")


@command("learning.train_program")
class Train(Measuring, Writing):
    """Train a program by a recipe; an interrupted run resumes. Under torchrun, on several processes."""

    program: str = PROGRAM
    recipe: str = option("Recipe with options, e.g. 'dynamoe{theta=0.9}'; see graphopt recipes.")
    data: str = TEXTS
    output: str = NEW_FILE
    steps: int = option("Number of updates of the weights.")
    learning_rate: float = option("Highest learning rate.", 1e-4)
    warmup: int = option("Steps over which the learning rate rises.", 0)
    schedule: str = option("cosine, linear or constant.", "cosine")
    weight_decay: float = option("Weight decay, on matrices only.", 0.0)
    accumulate: int = option("Batches averaged for one update.", 1)
    length: int = tokens_a_row(256)
    validation: str | None = option("Data on which the recipe's loss is also measured.")
    measure_every: int = option("Steps between such measurements; 0 measures at the end.", 0, min=0)
    dtype: str = option("Train in float32 or in the stored types; saved in the stored types.", "float32")
    loss_on: str = option("all tokens, or those of the assistant in conversations.", "all")
    seed: int = DRAWN
    work_dir: str | None = option("Folder of the run's state; OUTPUT.training by default.")
    save_every: float = option("Seconds between saved states.", 60.0, min=0)


@command("catalogue.show_recipes")
class Recipes(Showing):
    """List the training recipes, or describe one with its options."""

    name: str | None = argument("A recipe.")


@command("learning.show_oracle")
class Oracle(Reading):
    """Try every path of some tokens through feed-forwards of several widths, which bounds what routers can reach."""

    program: str = PROGRAM
    data: str = option("A .jsonl or .txt file.")
    tokens: int = option("Number of tokens to try.", 64, min=1)
    budget: int | None = option("Try only paths with this many feed-forwards at their largest.")
    length: int = tokens_a_row(128)
    seed: int = DRAWN


@command("learning.sweep_program")
class Sweep(Measuring, Writing):
    """Measure quality and active FLOPs at several values of a run-time setting."""

    program: str = PROGRAM
    data: str = TEXTS
    dial: str | None = option("Which run-time setting; may be left out if there is only one.")
    values: str | None = option("Its values: '0 0.5 1'.")
    points: int = option("Number of values, without --values.", 5, min=2)
    metric: list[str] | None = option("As in graphopt evaluate; may be repeated.")
    against: str | None = option("The original; by default the program at the setting's default.")
    csv: str | None = option("Write the table to this file.")
    picture: str | None = option("Draw quality against FLOPs: a .png, .svg or .pdf file.")
    work_dir: str | None = SCORES


@command("generating.generate_text")
class Generate(Reading):
    """Continue a text, one token or several tokens per step."""

    program: str = PROGRAM
    prompt: str = option("The text to continue.")
    chat: bool = option(
        "The prompt is a user's message, which the assistant answers: in the checkpoint's chat template.",
        False,
        "--chat",
    )
    max_new_tokens: int = option("Maximum number of new tokens.", 64, min=1)
    cache: str = option(
        "What caches keep: full, or a policy with a budget, beyond which the text changes: 'window{budget=1024}'.",
        "full",
    )
    strategy: str | None = option(
        "How candidates are proposed, e.g. 'prompt-lookup{tokens=8}'; the text is the same with any strategy."
    )
    draft: str | None = option("A smaller program with the same tokenizer, which proposes candidates.")
    temperature: float = TEMPERATURE
    top_k: int | None = option("Sample among this many most likely tokens.", min=1)
    top_p: float | None = option(
        "Sample among the most likely tokens of this total probability.", min=0, max=1
    )
    seed: int = DRAWN
    dtype: str = option("auto (float32 where a CPU would compute in 16 bits), stored or float32.", "auto")
    compiled: bool = option(
        "Compile everything between attentions; CUDA graphs on a GPU.", False, "--compile"
    )
    kernels: str = option(
        "How matrices in few bits are multiplied: auto (in bfloat16 on a CPU) or exact (by their values).",
        "auto",
    )


@command("generating.answer_texts")
class Answer(Reading, Writing):
    """Let a model write its own data: it continues texts, and writes the assistant's turns in conversations."""

    program: str = PROGRAM
    data: str = option("Texts or conversations: a .jsonl or .txt file.")
    output: str = NEW_FILE
    sequences: int | None = option("Maximum number of rows; all by default.", min=1)
    prompt_tokens: int = option("Number of tokens of each text kept as its prompt.", 32, min=1)
    max_new_tokens: int = option("Maximum number of tokens written per turn.", 128, min=1)
    batch: int = option("Number of rows generated together.", 32, min=1)
    strategy: str | None = option("How candidates are proposed; the text is the same with any strategy.")
    temperature: float = TEMPERATURE
    seed: int = DRAWN
