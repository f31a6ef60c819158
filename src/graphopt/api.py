"""The public functions: capture, optimize, load; and the functions that export a program."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from .data.reading import read_data
from .frontends.calling import Inputs, original, wrapped
from .frontends.torch_module import bind_inputs
from .ir.cost import cost
from .ir.errors import CheckpointError, LoweringError, UsageError
from .ir.program import METHODS, Model, Program
from .ir.ranks.rank_programs import ranks_of
from .ir.running.examples import example_inputs
from .ir.storage import load_program, save_program
from .ir.storage.manifest import is_saved_program
from .measure.context import Context, Progress
from .passes.framework.base import Pass
from .passes.framework.holding import Verify
from .passes.framework.manager import check_order, run_pass, run_pipeline
from .passes.framework.pipeline import as_passes
from .passes.framework.plan import Plan, read_plans

Data = str | os.PathLike[str] | Iterable[Mapping[str, torch.Tensor]] | None


def capture(
    model: Model | Program,
    inputs: Any = None,
    *,
    dynamic: Any = "auto",
    trust: bool = False,
    compare: bool = True,
    cache: bool = True,
) -> Program:
    """Return a model as a Program, after comparing its outputs with the model's.

    Args:
        model: an ``nn.Module``; a module that ``program.module()`` returned and that was trained since; a Hugging Face
            folder or an id in the local cache; a GGUF file; a folder written by ``Program.save``; a ``.pt2`` file; an
            ExportedProgram; or a Program, which is returned unchanged.
        inputs: example inputs: tensor, tuple, dict, or (args, kwargs). May be left out for checkpoints.
        dynamic: "auto" lets sizes vary where the model does; None fixes them; or
            ``{"input_ids": {0: "batch", 1: "sequence"}}``.
        trust: read a ``.pt2`` file although reading can run code from it.
        compare: compare the program with the model at several sizes and paddings.
        cache: read and write captures of checkpoints in the user's cache folder (:mod:`graphopt.cache`); only those
            that were compared are kept.

    Raises:
        CaptureError: the model cannot be captured.
        CheckpointError: the checkpoint cannot be read.
    """
    if isinstance(model, Program):
        return model
    if isinstance(model, ExportedProgram):
        from .frontends.exported import capture_exported

        return capture_exported(model)
    if isinstance(model, nn.Module):
        from .backends.torch.module import ProgramModule, program_of

        if isinstance(model, ProgramModule):
            return program_of(model)
        return _module(model, inputs, dynamic, compare)
    if not isinstance(model, (str, os.PathLike)):
        raise UsageError(
            f"a {type(model).__name__} is not a model", hint="give a module, a folder, or a Program"
        )
    path = Path(model)
    if is_saved_program(path):
        return load_program(path)
    if path.suffix == ".pt2":
        from .frontends.exported import capture_pt2

        return capture_pt2(path, trust=trust)
    named = None
    if inputs is not None:
        if not isinstance(inputs, Mapping):
            raise UsageError("inputs for a checkpoint are given by name", hint='inputs={"input_ids": ids}')
        named = dict(inputs)
    if cache and compare:
        from .frontends.cached import capture_cached

        return capture_cached(model, named, dynamic=dynamic)
    from .frontends.huggingface import capture_huggingface

    return capture_huggingface(model, named, dynamic=dynamic, compare=compare)


def _module(model: nn.Module, inputs: Inputs | None, dynamic: Any, compare: bool) -> Program:
    from .frontends.torch_module import capture_module

    if inputs is None:
        raise UsageError(
            f"capturing {type(model).__name__} needs an example of its inputs",
            hint="give inputs=, e.g. a tensor",
        )
    model = original(model)
    if type(model).__module__.split(".")[0] == "transformers":
        from .frontends.transformers_module import capture_transformers_module

        return capture_transformers_module(
            model, bind_inputs(model, inputs), dynamic=dynamic, compare=compare
        )
    within = wrapped(model, inputs)
    if within is not None:
        from .frontends.transformers_module import capture_wrapped

        return capture_wrapped(model, inputs, *within, dynamic=dynamic, compare=compare)
    return capture_module(model, inputs, dynamic=dynamic, compare=compare)


def optimize(
    model: Model | Program,
    passes: str | Pass | Sequence[str | Pass] = (),
    inputs: Any = None,
    *,
    dynamic: Any = "auto",
    data: Data = None,
    evaluate: Callable[[Program], float] | None = None,
    verify: Verify = "sites",
    plan: str | os.PathLike[str] | Sequence[Plan] | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    trust: bool = False,
    cache: bool = True,
    progress: Progress | None = None,
    dump: Callable[[int, str, Program], None] | None = None,
) -> Program:
    """Run passes over a model and return the resulting program; the model is not modified.

    Args:
        model: what :func:`capture` takes.
        passes: pass objects, or pipeline text such as ``"fuse-projections, skip-layers{remove=2}"``.
        inputs: example inputs of the model.
        dynamic: which sizes may vary.
        data: calibration and evaluation data: a .jsonl, .txt or .npz file, or batches of inputs by name. The
            first half is used for calibration, the second half for evaluation.
        evaluate: your own metric of a program, lower is better.
        verify: "sites" compares each rewritten site in float64, "full" also whole programs, "off" nothing.
        plan: a plan file (or plans, one per pass) to follow instead of planning.
        work_dir: where scores are saved, so that an interrupted run can resume.
        seed: for everything random.
        trust: read a ``.pt2`` file although reading can run code from it.
        cache: read and write captures in the user's cache folder.
        progress: shows long computations.
        dump: called with number, name and program after each pass.

    Raises:
        PipelineError: the pipeline is wrong, or its order cannot work.
        PassRefusedError: a pass can do nothing here.
        ContractError: a pass changed more than its contract allows; the model and everything before it are intact.
    """
    program = capture(model, inputs, dynamic=dynamic, trust=trust, cache=cache)
    steps, plans = read_steps(passes, plan)
    check_order(program, steps)
    batches = read_data(program, data, seed=seed)[0] if data is not None else []
    context = Context(batches, evaluate=evaluate, work_dir=work_dir, seed=seed, progress=progress)
    return run_passes(program, steps, context, plans=plans, verify=verify, dump=dump)


def read_steps(
    passes: str | Pass | Sequence[str | Pass], plan: str | os.PathLike[str] | Sequence[Plan] | None = None
) -> tuple[list[Pass], list[Plan] | None]:
    """Return the passes that a pipeline or a plan names, and the plans to follow, if any.

    Args:
        passes: pass objects, or pipeline text; may be left out if a plan file names them.
        plan: a plan file, or plans, one per pass.

    Raises:
        PipelineError: the pipeline is wrong.
        UsageError: the plan cannot be read, or belongs to another pipeline.
    """
    if plan is None:
        return as_passes(passes) if passes else [], None
    if isinstance(plan, (str, os.PathLike)):
        try:
            text = Path(plan).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the plan {plan}: {error}") from None
        entries = read_plans(text, str(plan))
        steps = [step for entry, _ in entries for step in as_passes(entry)]
        if passes and [str(p) for p in as_passes(passes)] != [str(p) for p in steps]:
            raise UsageError("passes and plan name different pipelines", hint="give one of them")
        return steps, [p for _, p in entries]
    return as_passes(passes), list(plan)


def run_passes(
    program: Program,
    passes: str | Pass | Sequence[str | Pass],
    context: Context,
    *,
    plans: Sequence[Plan] | None = None,
    verify: Verify = "sites",
    dump: Callable[[int, str, Program], None] | None = None,
) -> Program:
    """Run passes over a program in a context; :func:`optimize` calls this after reading its inputs.

    Raises:
        UsageError: ``verify`` has an unknown value.
    """
    inputs = None
    if verify == "full":
        inputs = context.bound(program, context.data[0]) if context.data else example_inputs(program)
        inputs = {**inputs, **{k: v for k, v in program.bind((), inputs).items() if k not in inputs}}
    elif verify not in ("sites", "off"):
        raise UsageError(f'verify must be "sites", "full" or "off", not {verify!r}')
    return run_pipeline(
        program, as_passes(passes), context, plans=plans, verify_with=verify, dump=dump, inputs=inputs
    )


def plan_passes(
    program: Program, passes: str | Pass | Sequence[str | Pass], context: Context
) -> list[tuple[Pass, Plan]]:
    """Return the plan of each pass of a pipeline, made after the passes before it ran on a copy."""
    steps = as_passes(passes)
    check_order(program, steps)
    planned: list[tuple[Pass, Plan]] = []
    current = program
    for index, step in enumerate(steps):
        plan = step.plan(current, context)
        plan.told = step.told(current, plan) if plan.sites else []
        planned.append((step, plan))
        if index + 1 < len(steps) and plan.sites:
            current, _ = run_pass(current, step, context, plan=plan, verify_with="off")
        plan.trial = None
    return planned


def load(path: str | os.PathLike[str], *, check_hashes: bool = False) -> Program:
    """Return a program saved with ``Program.save``; weights stay on disk until they are needed.

    Args:
        path: the folder.
        check_hashes: compare the weight files with the manifest first.

    Raises:
        CheckpointError: the folder is incomplete, damaged or not a saved program.
    """
    if not is_saved_program(Path(path)):
        raise CheckpointError(
            f"{path} is not a saved program", hint="graphopt.capture reads checkpoints and modules"
        )
    return load_program(path, check_hashes=check_hashes)


def _one_graph(program: Program) -> None:
    if ranks_of(program):
        raise LoweringError(
            f"the program is for {ranks_of(program)} ranks, but a file of this kind holds one graph",
            hint="save() keeps all ranks; write the program out before it is sharded",
        )


def _lower(program: Program, to: str, path: str | os.PathLike[str], **options: Any) -> Any:
    if to == "triton":
        from .backends.triton import lower_triton

        return lower_triton(program, path, **options)
    _one_graph(program)
    if to == "onnx":
        from .backends.onnx.lower import lower_onnx

        return lower_onnx(program, path, **options)
    if to == "genai":
        from .backends.onnx.genai import lower_genai

        return lower_genai(program, path, **options)
    raise LoweringError(f"programs are not lowered to {to!r}", hint="onnx, genai or triton")


def _save_pretrained(program: Program, path: str | os.PathLike[str], **options: Any) -> Any:
    from .backends.huggingface.save import save_pretrained
    from .frontends.architecture import tensor_names
    from .frontends.huggingface import capture_huggingface

    options.setdefault("recapture", lambda folder: capture_huggingface(folder, compare=False))
    options.setdefault("skeleton", tensor_names)
    return save_pretrained(program, path, **options)


def _save_gguf(program: Program, path: str | os.PathLike[str], **options: Any) -> Any:
    from .backends.gguf.save import save_gguf
    from .frontends.architecture import tensor_names
    from .frontends.gguf.splitting import SPLITTINGS
    from .frontends.huggingface import capture_huggingface

    _one_graph(program)
    known = {name: (split.expressions, split.ignore_merges) for name, split in SPLITTINGS.items()}
    options.setdefault("recapture", lambda file: capture_huggingface(file, compare=False))
    options.setdefault("skeleton", tensor_names)
    return save_gguf(program, path, pre_tokenizers=known, **options)


def _exported(program: Program, **options: Any) -> ExportedProgram:
    from .backends.torch.exported import exported_program

    _one_graph(program)
    return exported_program(program, **options)


def _as_module(program: Program, **options: Any) -> nn.Module:
    from .backends.torch.module import program_module

    return program_module(program, **options)


METHODS.update(
    capture=capture,
    save=save_program,
    lower=_lower,
    module=_as_module,
    exported_program=_exported,
    save_pretrained=_save_pretrained,
    save_gguf=_save_gguf,
)

__all__ = ["capture", "cost", "load", "optimize", "plan_passes", "read_steps", "run_passes"]
