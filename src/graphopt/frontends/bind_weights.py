"""Connect the weights of a captured model to the tensors of its checkpoint."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from ..ir.errors import CheckpointError
from ..ir.infer import infer
from ..ir.program import Program
from ..ir.weights import Absent, Weight
from .checkpoint_files import CheckpointFiles, FileTensor
from .stamping.weight_mapping import Mapped, Recipe


def bind(program: Program, mapped: Mapped, files: CheckpointFiles) -> None:
    """Make every weight a tensor of the checkpoint, or operators on several of them.

    Raises:
        CheckpointError: a weight is missing, or its shape differs from the architecture's.
    """
    keys = dict(mapped.plain.items())
    for node in program.weight_nodes:
        weight = program.weights[node.name]
        key = next((keys[name] for name in weight.all_names if name in keys), None)
        if key is not None:
            _plain(program, node, weight, key, files.tensors[key])
    for recipe in mapped.recipes:
        _insert_conversion(program, recipe, files)
    for node in program.weight_nodes:
        weight = program.weights[node.name]
        if isinstance(weight.source, Absent) and node.users:
            raise CheckpointError(
                f"{files.folder} has no tensor for {weight.name}, which the model reads",
                hint="the checkpoint is incomplete, or belongs to another architecture",
            )


def _plain(program: Program, node: fx.Node, weight: Weight, key: str, source: FileTensor) -> None:
    value = node.meta["val"]
    if tuple(int(s) for s in value.shape) != source.shape:
        raise CheckpointError(
            f"{source.path}: {key!r} has shape {list(source.shape)}, the architecture's {weight.name} has "
            f"{[int(s) for s in value.shape]}",
            hint="config.json does not belong to these weights",
        )
    program.checkpoint[key] = node
    program.weights[node.name] = replace(weight, persistent=True)
    if value.dtype != source.dtype:
        _cast(program, node, source.dtype)


def _cast(program: Program, node: fx.Node, stored: torch.dtype) -> None:
    """Cast a weight if the checkpoint stores it in another type than the model runs in."""
    dtype = node.meta["val"].dtype
    users = list(node.users)
    node.meta["val"] = program.fake(node.meta["val"].shape, stored)
    with program.edit.after(node):
        cast = program.edit.call(torch.ops.aten.to.dtype, node, dtype)
    for user in users:
        user.replace_input_with(node, cast)


def _insert_conversion(program: Program, recipe: Recipe, files: CheckpointFiles) -> None:
    """Insert the operators that compute weights from several tensors."""
    by_name = {name: node for node in program.weight_nodes for name in program.weights[node.name].all_names}
    targets = [by_name.get(name) for name in recipe.targets]
    if not any(target is not None and target.users for target in targets):
        for key in recipe.sources:
            _keep(program, key, files)
        return
    values: dict[fx.Node, fx.Node] = {}
    keys = iter(recipe.sources)
    results: list[fx.Node] = []
    for node in recipe.graph.nodes:
        if node.op == "placeholder":
            values[node] = _keep(program, next(keys), files)
        elif node.op == "output":
            results = list(fx.map_arg(node.args[0], lambda n: values[n]))
        elif node.op == "call_function":
            last = list(program.graph.find_nodes(op="placeholder"))[-1]
            args = fx.map_arg(node.args, lambda n: values[n])
            kwargs = fx.map_arg(node.kwargs, lambda n: values[n])
            anchor = max(
                (values[n] for n in node.all_input_nodes), key=lambda n: n.op != "placeholder", default=last
            )
            with program.graph.inserting_after(last if anchor.op == "placeholder" else anchor):
                new = program.graph.call_function(node.target, args, kwargs)
            new.meta["val"] = infer(program.mode, node.target, args, kwargs)
            values[node] = new
    for name, target, result in zip(recipe.targets, targets, results, strict=True):
        if target is None:
            continue
        result.meta["custom"] = {"graphopt": {"weight": name}}
        if list(result.meta["val"].shape) != list(target.meta["val"].shape):
            raise CheckpointError(
                f"{files.folder}: the tensors for {name} make shape {list(result.meta['val'].shape)}, "
                f"the architecture has {list(target.meta['val'].shape)}"
            )
        if result.meta["val"].dtype != target.meta["val"].dtype:
            with program.graph.inserting_after(result):
                cast = program.graph.call_function(
                    torch.ops.aten.to.dtype, (result, target.meta["val"].dtype)
                )
            cast.meta["val"] = target.meta["val"]
            result = cast
        target.replace_all_uses_with(result)
        program.edit.remove_weight(target)


def _keep(program: Program, key: str, files: CheckpointFiles) -> fx.Node:
    if key not in program.checkpoint:
        program.checkpoint[key] = program.edit.add_weight(key, files.tensors[key])
    return program.checkpoint[key]
