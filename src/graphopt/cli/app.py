"""The commands of ``graphopt``: what each takes, and where its work is done. Nothing here imports torch."""

from __future__ import annotations

from typing import Any

from .options import app, argument, command, option

__all__ = ["app"]

DRAWN = option("Seed of everything random.", 0)
NEW_FILE = option("Where to write.", ..., "-o")
PROGRAM = argument("A Hugging Face folder or cached id, a GGUF file, a saved program, or a .pt2 file.")
SCORES = option("Where scores are kept, so that a run can go on.")
TEMPERATURE = option("0 takes the most likely token.", 0.0, min=0)
TEXTS = option("A .jsonl, .txt or .npz file.")


def tokens_a_row(default: int) -> Any:
    """Describe the option that limits rows."""
    return option("Tokens a row at most.", default, min=2)


class Showing:
    """What every command takes."""

    as_json: bool = option("Print JSON.", False, "--json")


class Reading(Showing):
    """What commands take that read programs."""

    trust: bool = option("Read a .pt2 file although reading can run code from it.", False)


class Writing(Showing):
    """What commands take that write."""

    force: bool = option("Replace what is there: a plain file, or a folder that graphopt wrote.", False)


class Calibrating(Reading):
    """What commands take that run passes."""

    data: str | None = option("Calibration and judging data: .jsonl, .txt or .npz.")
    sequences: int = option("Rows of data at most.", 128, min=1)
    length: int = tokens_a_row(2048)
    seed: int = DRAWN


class Measuring(Reading):
    """What commands take that go through all of their data."""

    sequences: int | None = option("Rows of data at most; all by default.", min=1)
    length: int = tokens_a_row(2048)
    batch: int = option("Rows a batch.", 8, min=1)


@command("inspecting.inspect_checkpoint")
class Inspect(Reading):
    """Show blocks and the evidence for them, cost, and what each pass could do."""

    checkpoint: str = PROGRAM
    device: str | None = option("Estimate time on this device; see graphopt devices.")
    batch: int = option("Rows for the cost.", 1, min=1)
    sequence: int = option("Tokens a row for the cost.", 128, min=1)
    data: str | None = option("Show how good an exit after each layer would be on this.")


@command("optimizing.plan_checkpoint")
class Plan(Calibrating, Writing):
    """List every site of a pipeline: taken, or refused and why. The file can be edited and obeyed."""

    checkpoint: str = PROGRAM
    passes: str = option("The pipeline to plan.", ..., "-p")
    output: str | None = option("Write the plan to this YAML file.", None, "-o")
    why: str | None = option("Say what happens to this block or node, and why.")
    work_dir: str | None = SCORES


@command("optimizing.optimize_checkpoint")
class Optimize(Calibrating, Writing):
    """Run passes and save the program they make."""

    checkpoint: str = PROGRAM
    output: str = NEW_FILE
    passes: str | None = option("Passes, e.g. 'fuse-projections, skip-layers{remove=2}'.", None, "-p")
    plan_file: str | None = option("Obey this plan file.", None, "--plan")
    verify_with: str = option("sites, full or off.", "sites", "--verify")
    print_after_all: bool = option("Print the graph after each pass.", False)
    dump_dir: str | None = option("Write the graph after each pass to this folder.")
    work_dir: str | None = SCORES


@command("verifying.verify_programs")
class Verify(Calibrating):
    """Check the contracts of a saved program again: numbers and a verdict."""

    before: str = argument("The original: a checkpoint or saved program.")
    after: str = argument("What was made of it.")
    budget: float | None = option("Relative loss that is allowed, where no pass was given one.", min=0)


@command("verifying.diff_programs")
class Diff(Reading):
    """Show how two graphs differ, as text."""

    first: str = argument("A checkpoint or saved program.")
    second: str = argument("Another.")


@command("evaluating.evaluate_programs")
class Evaluate(Measuring):
    """Measure programs on data: perplexity, next-token accuracy, distance to an original, or your own."""

    checkpoints: list[str] = argument(
        "Hugging Face folders or cached ids, GGUF files, saved programs, .pt2 files."
    )
    data: list[str] = option("A .jsonl, .txt or .npz file; may be repeated.")
    metric: list[str] | None = option(
        "perplexity, accuracy, bits_per_byte, kl, agreement, cosine, or a function of yours, "
        "(program) or (program, batches), as FILE.py:FUNCTION; may be repeated."
    )
    against: str | None = option("The original, for kl, agreement and cosine.")
    dtype: str = option("Compute as stored, or in float32 or float64.", "stored")


@command("lowering.lower_program")
class Lower(Reading, Writing):
    """Write a program for another runtime and compare it there."""

    program: str = PROGRAM
    to: str = option("onnx, genai (a folder for onnxruntime-genai), or triton.")
    output: str = NEW_FILE
    opset: int | None = option("ONNX opset: 20, 21 or 23; the target's by default, or 20, or 23 in few bits.")
    sizes: list[str] | None = option(
        "Fix sizes: batch=1,sequence=128. Given several times: a graph for each.", None, "--sizes", "--shape"
    )
    target: str | None = option(
        "What it is for: onnx (what ONNX Runtime takes), qnn-htp-v75 or GPUs such as sm_80,sm_90 (a folder)."
    )
    check: bool = option(
        "Try it: in the NPU's simulator (graphopt[qnn]), by onnxruntime-genai, in Triton's interpreter.",
        False,
    )
    device: str | None = option(
        "Where an AOTInductor package is made, cuda or cpu; by default on a GPU that is there."
    )
    part_bytes: int | None = option(
        "Cut the graph into parts whose weights take at most so many bytes.", min=1
    )


@command("leaving.export_program")
class Export(Reading, Writing):
    """Write a Hugging Face folder, a .pt2 file or multi-token heads; they are read back and compared before they count."""

    program: str = PROGRAM
    to: str = option("huggingface, pt2, or medusa for the heads alone.")
    output: str = NEW_FILE


@command("leaving.run_program")
class Run(Reading, Writing):
    """Run a forward on every row of a file, in its order."""

    program: str = PROGRAM
    inputs: str = option("A .npz, .txt (a row a line) or .jsonl file.", ..., "--input")
    output: str | None = option("Write the outputs to this .npz file.", None, "-o")


@command("catalogue.show_passes")
class Passes(Showing):
    """List passes, or describe one with its options."""

    name: str | None = argument("A pass, or words of a paper.")


@command("catalogue.show_devices")
class Devices(Showing):
    """List the devices that costs can be estimated for."""


@command("catalogue.show_links")
class Links(Writing):
    """List the links that communication can be estimated for, or fit one to your own machines."""

    fit: bool = option("Measure the processes that torchrun started; latency and bandwidth.", False)
    output: str | None = option("Write the fitted link to this JSON file.", None, "-o")


@command("learning.train_program")
class Train(Measuring, Writing):
    """Train a program by a recipe; an interrupted run goes on. Under torchrun, on several processes."""

    program: str = PROGRAM
    recipe: str = option("What to learn, e.g. 'dynamoe{theta=0.9}'; see graphopt recipes.")
    data: str = TEXTS
    output: str = NEW_FILE
    steps: int = option("Updates of the weights.")
    learning_rate: float = option("Its highest value.", 1e-4)
    warmup: int = option("Steps over which it rises.", 0)
    schedule: str = option("cosine, linear or constant.", "cosine")
    weight_decay: float = option("On matrices alone.", 0.0)
    accumulate: int = option("Batches averaged for one update.", 1)
    length: int = tokens_a_row(256)
    validation: str | None = option("Data of which the recipe's loss is shown too.")
    measure_every: int = option("Steps between such measurements; 0: at the end.", 0, min=0)
    dtype: str = option("Learn in float32, or as stored; saved as stored.", "float32")
    loss_on: str = option("all tokens, or those that the assistant says in conversations.", "all")
    seed: int = DRAWN
    work_dir: str | None = option("Where the run is kept; OUTPUT.training by default.")
    save_every: float = option("Seconds between states on disk.", 60.0, min=0)


@command("catalogue.show_recipes")
class Recipes(Showing):
    """List what programs can be trained by, or describe one recipe with its options."""

    name: str | None = argument("A recipe.")


@command("learning.show_oracle")
class Oracle(Reading):
    """Try every path of some tokens through feed-forwards of several widths: a bound for routers."""

    program: str = PROGRAM
    data: str = option("A .jsonl or .txt file.")
    tokens: int = option("How many tokens are tried.", 64, min=1)
    budget: int | None = option("Only paths with so many feed-forwards at their largest.")
    length: int = tokens_a_row(128)
    seed: int = DRAWN


@command("learning.sweep_program")
class Sweep(Measuring, Writing):
    """Measure quality and active FLOPs at every setting of a dial."""

    program: str = PROGRAM
    data: str = TEXTS
    dial: str | None = option("Which dial; may be left out where there is one.")
    values: str | None = option("Where to put it: '0 0.5 1'.")
    points: int = option("How many settings, without --values.", 5, min=2)
    metric: list[str] | None = option("As of graphopt evaluate; may be repeated.")
    against: str | None = option("The original; else the program at the dial's default.")
    csv: str | None = option("Write the table to this file.")
    picture: str | None = option("Draw quality against FLOPs: a .png, .svg or .pdf file.")
    work_dir: str | None = SCORES


@command("generating.generate_text")
class Generate(Reading):
    """Continue a text, one token after the other or several a step."""

    program: str = PROGRAM
    prompt: str = option("What to continue.")
    max_new_tokens: int = option("Tokens at most.", 64, min=1)
    strategy: str | None = option(
        "Who proposes candidates, e.g. 'prompt-lookup{tokens=8}'; the text stays the same."
    )
    draft: str | None = option("A smaller program with the same tokenizer, which proposes candidates.")
    temperature: float = TEMPERATURE
    top_k: int | None = option("Draw among so many most likely tokens.", min=1)
    top_p: float | None = option("Draw among the most likely tokens of this probability.", min=0, max=1)
    seed: int = DRAWN
    dtype: str = option("auto (float32 where a CPU would compute in 16 bits), stored or float32.", "auto")
    compiled: bool = option("Compile what lies between attentions; CUDA graphs on a GPU.", False, "--compile")


@command("generating.answer_texts")
class Answer(Reading, Writing):
    """Let a model write data itself: it continues texts, and speaks for the assistant in conversations."""

    program: str = PROGRAM
    data: str = option("Texts or conversations: a .jsonl or .txt file.")
    output: str = NEW_FILE
    sequences: int | None = option("Rows at most; all by default.", min=1)
    prompt_tokens: int = option("Tokens that are kept of a text.", 32, min=1)
    max_new_tokens: int = option("Tokens that are written at most, a turn.", 128, min=1)
    batch: int = option("Rows side by side.", 32, min=1)
    strategy: str | None = option("Who proposes candidates; the text stays the same.")
    temperature: float = TEMPERATURE
    seed: int = DRAWN
