"""Capture of a Hugging Face folder, an id in the local cache or a GGUF file as a program whose weights stay on disk."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim
from torch.utils._pytree import tree_map

from ..ir.canonical import canonicalise
from ..ir.compat import FakeTensorMode, fake_copy, new_fake_mode
from ..ir.errors import CaptureError, CheckpointError, GraphoptError, UsageError
from ..ir.facts import note_capture
from ..ir.program import Origin, Program
from ..ir.signature import Fill, Input
from ..ir.structure import describe
from ..ir.weights import Absent, InMemory, TensorSource
from .accepting import typed
from .architecture import build, config_from, load_config, model_class, require_transformers
from .bind_weights import bind
from .checkpoint_files import CheckpointFiles, read_folder, read_processor
from .checkpoint_names import map_names
from .compare_checkpoint import OwnPositions, compare_with_checkpoint
from .compare_small import compare_small
from .example_inputs import Given, causal, example_inputs, with_few_rows
from .fixed_values import Joined, describe_fixed, fixing
from .frozen import note_frozen
from .gguf.checkpoint import is_gguf, read_gguf
from .lift import lift
from .quantised import dequantised, without_quantisation
from .rotary_types import refuse_varying_frequencies
from .size_limits import settle_by_guards
from .stamping.plan import exported_layers, plan_stamping, stamp
from .stamping.record import CannotStamp
from .stamping.tensors import Tensors
from .stamping.weight_mapping import Mapped
from .stored_values import computed_weights, plain_numbers, untie
from .torch_module import export
from .untraceable import broadcast_masks, traceable

ATTENTION_LADDER = ("sdpa", "eager")


def resolve(source: str | os.PathLike[str]) -> Path:
    """Return the path of a checkpoint: a given folder or GGUF file, or an id in the local Hugging Face cache.

    Raises:
        CheckpointError: there is no such folder or file, and no such id in the cache.
    """
    path = Path(source)
    if path.is_dir() or is_gguf(path):
        return path
    text = str(source)
    if path.suffix.lower() == ".gguf":
        raise CheckpointError(f"{text} does not exist", hint="give the path of a GGUF file")
    if path.exists() or text.count("/") > 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{text} is not a folder",
            hint="give a folder with config.json and safetensors files, or a GGUF file",
        )
    require_transformers()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, local_files_only=True))
    except Exception:
        raise CheckpointError(
            f"{text!r} is neither a folder nor an id in the local Hugging Face cache",
            hint="nothing is downloaded; fetch it first, for example with `hf download`",
        ) from None


def element_type(config: Any, files: CheckpointFiles | None) -> torch.dtype:
    """Return the type that a checkpoint is meant to run in: the configuration's, or that of its first float tensor."""
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if isinstance(dtype, torch.dtype):
        return dtype
    if files is not None:
        for entry in files.tensors.values():
            if entry.dtype.is_floating_point:
                return entry.dtype
    return torch.float32


def read_checkpoint(path: Path) -> CheckpointFiles:
    """Open a folder or a GGUF file; no weights are read.

    Raises:
        CheckpointError: it is damaged, incomplete or quantised in a way that cannot be read.
    """
    if not path.is_dir():
        return CheckpointFiles(path, *read_gguf(path))
    return dequantised(read_folder(path))


def capture_huggingface(
    source: str | os.PathLike[str],
    inputs: Mapping[str, Any] | None = None,
    *,
    dynamic: Any = "auto",
    compare: bool = True,
) -> Program:
    """Capture a checkpoint; weights are read only when needed.

    Args:
        source: a folder, an id in the local cache, or a GGUF file.
        inputs: an example by name; what is left out is made from the configuration. A ``torch.Size`` in place of a
            tensor asks for an example of that shape.
        dynamic: "auto", None, or sizes by input and dimension.
        compare: run the model and the program on padded and unpadded inputs of several sizes.

    Raises:
        CheckpointError: the checkpoint cannot be read, or would need to run code from it.
        CaptureError: the architecture cannot be captured, or the graph differs from the model.
    """
    files = read_checkpoint(resolve(source))
    folder = files.folder
    if folder.is_dir():
        config = without_quantisation(load_config(folder, files.config))
    else:
        config = config_from(files.config, folder)
    dtype = element_type(config, files)
    processor = read_processor(folder) if folder.is_dir() else {}
    given = Given(inputs or {}, processor, grow=dynamic == "auto")
    program = _first_matching_capture(config, dtype, given, dynamic, files, compare)
    program.origin = Origin(
        kind="huggingface",
        model_class=f"transformers:{model_class(config).__name__}",
        config=files.config,
        assets=files.assets(),
        unused=program.origin.unused,
        notes=(*program.origin.notes, *([files.note] if files.note else [])),
        padding="causal" if causal(config) else "",
    )
    return program


def capture_configuration(
    config: Any,
    inputs: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    dynamic: Any = "auto",
) -> Program:
    """Capture an architecture without weights: to inspect, plan and rewrite models of any size.

    Args:
        config: a configuration of transformers.
        inputs: an example by name; by default made from the configuration.
        dtype: of the parameters; the configuration's if None.
        dynamic: "auto", None, or sizes by input and dimension.
    """
    dtype = dtype or element_type(config, None)
    program = _first_matching_capture(
        config, dtype, Given(inputs or {}, grow=dynamic == "auto"), dynamic, None, False
    )
    program.origin = Origin(
        kind="huggingface",
        model_class=f"transformers:{model_class(config).__name__}",
        config=config.to_dict(),
        notes=program.origin.notes,
        padding="causal" if causal(config) else "",
    )
    return program


def _first_matching_capture(
    config: Any, dtype: torch.dtype, inputs: Given, dynamic: Any, files: CheckpointFiles | None, compare: bool
) -> Program:
    """Try the library's attention implementations in order and return the first capture that matches the model."""
    refuse_varying_frequencies(config)
    failures: list[str] = []

    def attempt(attention: str, without: tuple[str, ...], inputs: Given = inputs) -> Program:
        program = _capture(config, dtype, inputs, dynamic, files, attention, without)
        few = with_few_rows(inputs, {n: spec.shape for n, spec in program.signature.inputs.items()})
        if few is not None:
            return attempt(attention, without, few)
        if not compare or files is None:
            settle_by_guards(program)
            return program
        again = partial(
            _capture,
            dtype=dtype,
            inputs=inputs,
            dynamic=dynamic,
            files=None,
            attention=attention,
            without=without,
        )
        small = partial(compare_small, config=config, dtype=dtype, capture=again, given=inputs)
        compare_with_checkpoint(program, config, files, dtype, small, inputs)
        return program

    for attention in ATTENTION_LADDER:
        try:
            try:
                program = attempt(attention, ())
            except OwnPositions:
                if "position_ids" in inputs.inputs:
                    raise
                program = attempt(attention, ("position_ids",))
        except (CheckpointError, UsageError):
            raise
        except GraphoptError as error:
            failures.append(f"with {attention} attention: {error}")
            continue
        note_capture(program, attention_implementation=attention)
        return program
    raise CaptureError(f"{model_class(config).__name__} cannot be captured\n  " + "\n  ".join(failures))


def _fake(model: Any, mode: FakeTensorMode) -> None:
    """Give a model tensors without memory, of a mode."""
    # originals are kept alive, so that their ids are not reused
    fakes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fakes[id(tensor)] = fake_copy(mode, tensor), tensor
                table[name] = fakes[id(tensor)][0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _capture(
    config: Any,
    dtype: torch.dtype,
    inputs: Given,
    dynamic: Any,
    files: CheckpointFiles | None,
    attention: str,
    without: tuple[str, ...] = (),
    whole: CannotStamp | None = None,
) -> Program:
    """Capture with one attention implementation; ``whole`` is why all layers are exported, if that is known."""
    with _quiet():
        model, mode, mapped = build(config, dtype, attention), new_fake_mode(), Mapped()
        computed: dict[str, torch.Tensor] = {}
        if files is not None:
            mapped = map_names(model, files.tensors, mode)
            plain_numbers(model, mapped, files)
            untie(model, mapped, files.tensors)
            computed = computed_weights(model, mapped)
        buffers = {name: b.detach().clone() for name, b in model.named_buffers(remove_duplicate=False)}
        sources = _sources(model, buffers, mapped, files) | {n: InMemory(t) for n, t in computed.items()}
        tensors = Tensors(sources, mapped, files.tensors if files is not None else {})
        _fake(model, mode)
        made = example_inputs(model, inputs)
        example = {k: typed(v, dtype) for k, v in made.inputs.items() if k not in without}
        fixed = typed(made.fixed, dtype)
        if whole is None:
            # no size varies in that run
            with broadcast_masks(), fixing(model, fixed, made.marked):
                stamping = plan_stamping(model, example, buffers)
        else:
            stamping = whole
        with exported_layers(model, stamping), mode, torch.no_grad():
            fakes = tree_map(
                lambda v: torch.empty(v.shape, dtype=v.dtype) if isinstance(v, torch.Tensor) else v, example
            )
            with traceable(), fixing(model, fixed, made.marked):
                exported = _export(model, fakes, dynamic, made.sizes)
    program = lift(exported, fakes, sources=sources, names=_symbol_names(exported, made.sizes))
    take_fixed(program, made.fixed)
    if files is not None:
        bind(program, tensors.without(stamping), files)
        program.origin.unused = tuple(mapped.unused)
    _fill_rules(program, config)
    canonicalise(program)
    try:
        stamp(program, stamping, tensors)
    except CannotStamp as reason:
        return _capture(config, dtype, inputs, dynamic, files, attention, without, reason)
    note_frozen(program, exported, fakes)
    return program


def take_fixed(program: Program, fixed: Mapping[str, Any]) -> None:
    """Note which values a program is captured for; calls may repeat them, and no others."""
    if not fixed:
        return
    for name, value in fixed.items():
        plain = value.tolist() if isinstance(value, torch.Tensor) else value
        program.signature.parameters[name], _ = describe(plain, lambda v: False, name)
    program.origin.notes = (*program.origin.notes, describe_fixed(fixed))


def _export(
    model: Any, example: dict[str, Any], dynamic: Any, dimension_names: dict[str, dict[int, str]]
) -> Any:
    if dynamic is None:
        return export(model, example, None)
    if dynamic != "auto":
        from .torch_module import dynamic_shapes

        return export(model, example, dynamic_shapes(example, dynamic))
    sizes: dict[str, Any] = {}
    shapes = {
        name: (
            {d: sizes.setdefault(n, Dim(n, min=1)) for d, n in dimension_names[name].items()}
            if name in dimension_names
            else None
        )
        for name in example
    }
    try:
        return export(model, example, shapes)
    except CaptureError as error:
        if any(v.dim() > 2 for v in example.values() if isinstance(v, torch.Tensor)):
            with contextlib.suppress(CaptureError), Joined():
                return export(model, example, shapes)
        limits = dict(re.findall(r"(\w+) = Dim\('\w+'(?:, min=\d+)?, max=(\d+)\)", str(error.__cause__)))
        if limits:
            limited = {n: Dim(n, min=1, max=int(limits[n])) if n in limits else d for n, d in sizes.items()}
            shapes = {
                name: {d: limited[n] for d, n in dimension_names[name].items()}
                if name in dimension_names
                else None
                for name in example
            }
            with contextlib.suppress(CaptureError):
                return export(model, example, shapes)
        # torch 2.11 cannot prove some guards of a size; the other sizes keep their names
        violated = re.findall(r"Constraints violated \(([^)]*)\)", str(error.__cause__))
        doubted = {name for names in violated for name in names.split(", ")}
        if doubted and doubted < set(sizes):
            partly = {
                name: {d: Dim.AUTO if n in doubted else sizes[n] for d, n in dimension_names[name].items()}
                if name in dimension_names else None
                for name in example
            }  # fmt: skip
            with contextlib.suppress(CaptureError):
                return export(model, example, partly)
        # the model ties a size to another one or to a number; the tracer finds out which
        automatic = {
            name: dict.fromkeys(dimension_names[name], Dim.AUTO) if name in dimension_names else None
            for name in example
        }
        return export(model, example, automatic)


def _symbol_names(exported: Any, dimension_names: dict[str, dict[int, str]]) -> dict[str, str]:
    from ..ir.sizes import expression

    names: dict[str, str] = {}
    for node in exported.graph.find_nodes(op="placeholder"):
        for dim, name in dimension_names.get(node.name, {}).items():
            size = node.meta["val"].shape[dim]
            if isinstance(size, torch.SymInt):
                names.setdefault(str(expression(size)), name)
    return names


def _sources(
    model: Any, buffers: Mapping[str, torch.Tensor], mapped: Mapped, files: CheckpointFiles | None
) -> dict[str, TensorSource]:
    """Return where the values of each tensor come from: parameters, then buffers."""
    sources: dict[str, TensorSource] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        sources[name] = Absent(tuple(parameter.shape), parameter.dtype, name)
    for name, buffer in buffers.items():
        sources[name] = InMemory(buffer)
    ties: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        ties.setdefault(id(tensor), []).append(name)
    for names in ties.values():
        source = next((n for n in names if n in mapped.plain), None)
        if source is not None and files is not None:
            sources.update(dict.fromkeys(names, files.tensors[mapped.plain[source]]))
    return sources


def _fill_rules(program: Program, config: Any) -> None:
    """Define how omitted inputs are filled in; a wrong rule shows when the program is compared with the model."""
    rules = {
        "attention_mask": "ones",
        "token_type_ids": "zeros",
        "position_ids": "positions",
    }
    main = next((n for n in ("input_ids", "pixel_values") if n in program.signature.inputs), None)
    for name, rule in rules.items():
        spec = program.signature.inputs.get(name)
        # positions in several dimensions follow from images, and masks of frames are no masks of pixels
        if spec is not None and main is not None and spec.shape == program.signature.inputs[main].shape:
            fill = Fill(rule, main)  # type: ignore[arg-type]
            program.signature.inputs[name] = Input(
                spec.name, spec.dtype, spec.shape, fill, name == "position_ids"
            )
