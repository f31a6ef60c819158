"""Variants of programs for training: choices become inputs, soft mixtures, or outputs.

A variant is a separate program with the same weights under the same names; trained weights are copied back by name.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from ..ir.errors import UsageError
from ..ir.inputs import add_input
from ..ir.program import Dial, Program
from ..ir.schema import arguments, is_operator, normal_call
from ..ir.weights import InMemory
from ..measure.choices import _without_dial, nested_blocks, widths_of_choices

aten, graphopt_ops = torch.ops.aten, torch.ops.graphopt
TEMPERATURE = "temperature"
CONTINUED = "continued"


def router_weights(program: Program) -> set[str]:
    """Return the names of the weights that only routers read."""
    blocks = nested_blocks(program)
    names: set[str] = set()
    for block in blocks:
        core_args = arguments(block.parts["core"])
        work = [block.parts["router"]]
        seen: set[fx.Node] = set()
        while work:
            node = work.pop()
            if node in seen or node is core_args["x"]:
                continue
            seen.add(node)
            if node.op == "placeholder" and node.name in program.weights:
                names.update(program.weights[node.name].all_names)
            work.extend(node.all_input_nodes)
    return names


def continued(program: Program) -> Program:
    """Return the program with an input ``continued`` (batch, sequence) in place of the decoding phase.

    Marked tokens bypass the layers that are skipped after a prompt, the others go through them: a row is a prompt and its
    continuation. Keys and values of the prompt come from all layers, as in decoding.

    Raises:
        UsageError: the program skips no layers while decoding.
    """
    form = program.copy()
    points = [n for n in form.nodes if is_operator(n, "graphopt.skipped")]
    if not points:
        raise UsageError(
            "this program skips no layers after a prompt", hint="skip-layers{phase=decode} makes one"
        )
    rows = list(points[0].meta["val"].shape[:2])
    marks = add_input(form, CONTINUED, rows, torch.bool)
    for node in points:
        args = arguments(node)
        with form.edit.before(node):
            mark = form.edit.call(aten.unsqueeze.default, marks, -1)
            selected = form.edit.call(aten.where.self, mark, args["before"], args["after"])
        form.edit.replace(node, selected)
    _without_dial(form)
    return form


def shown_routers(program: Program) -> Program:
    """Return the program with every token routed to its likeliest expert, and outputs for training the routers.

    The outputs are ``router_logits`` (feed-forwards, batch, sequence, experts), and ``similarity`` of the same shape: how
    similar each width's output is to that of the whole feed-forward.

    Raises:
        UsageError: its experts do not share weights.
    """
    form = program.copy()
    blocks = nested_blocks(form)
    logits, similar = [], []
    for block in blocks:
        widths = widths_of_choices(block)
        if "other_core" in block.parts or widths[0] == 0:
            raise UsageError(
                f"{block.name}: difficulty is defined for widths of one feed-forward, without separate=true or skip=true",
                hint="use the recipes duo-distil and duo-routers for those",
            )
        choice, router = block.parts["choice"], block.parts["router"]
        core_args = dict(arguments(block.parts["core"]))
        with form.edit.before(choice):
            likeliest = form.edit.call(aten.argmax.default, router, -1)
            core_args.pop("choice")
            # labels are targets: no gradient flows through them
            for name, value in core_args.items():
                if isinstance(value, fx.Node):
                    core_args[name] = form.edit.call(aten.detach.default, value)
            args, kwargs = normal_call(graphopt_ops.nested_similarity.default, core_args)
            similar.append(form.edit.call(graphopt_ops.nested_similarity.default, *args, **kwargs))
        form.edit.replace(choice, likeliest)
        logits.append(router)
    with form.edit.before(form.output_node):
        stacked_logits = form.edit.call(aten.stack.default, [_by_row(form, n) for n in logits])
        labels = form.edit.call(aten.stack.default, [_by_row(form, n) for n in similar])
    form.add_output("router_logits", stacked_logits)
    form.add_output("similarity", labels)
    _without_dial(form)
    return form


def soft_choices(program: Program) -> Program:
    """Return the program whose tokens take all experts at once, weighted by the routers' softmax at ``temperature``.

    ``temperature`` is a run-time setting. Output ``shares`` (feed-forwards, batch, sequence, experts) has the weights.
    """
    form = program.copy()
    blocks = nested_blocks(form)
    temperature = form.add_dial(TEMPERATURE, Dial(1.0, 1e-6, 1e6, "of the routers' softmax"))
    shares_by_block = []
    for block in blocks:
        router, choice = block.parts["router"], block.parts["choice"]
        dtype = router.meta["val"].dtype
        with form.edit.before(choice):
            divisor = form.edit.call(aten.to.dtype, temperature, dtype)
            shares = form.edit.call(aten.softmax.int, form.edit.call(aten.div.Tensor, router, divisor), -1)
        shares_by_block.append(shares)
        for name in ("core", "other_core"):
            core = block.parts.get(name)
            if core is None:
                continue
            core_args = dict(arguments(core))
            core_args.pop("choice")
            core_args["shares"] = shares
            with form.edit.before(core):
                args, kwargs = normal_call(graphopt_ops.soft_nested_ffn.default, core_args)
                mixed = form.edit.call(graphopt_ops.soft_nested_ffn.default, *args, **kwargs)
            form.edit.replace(core, mixed)
    with form.edit.before(form.output_node):
        stacked = form.edit.call(aten.stack.default, [_by_row(form, n) for n in shares_by_block])
    form.add_output("shares", stacked)
    _without_dial(form)
    return form


def with_features_as_input(program: Program) -> Program:
    """Return the program with a draft that can read features from an input instead of the program's own.

    The new inputs are ``draft_given`` (batch, sequence, size), the features, and ``draft_taken`` (batch, sequence, 1), true
    where they are used.
    """
    form = program.copy()
    features = form.outputs["draft_features"]
    value = features.meta["val"]
    supplied = add_input(form, "draft_given", list(value.shape), value.dtype)
    use_supplied = add_input(form, "draft_taken", [*value.shape[:2], 1], torch.bool)
    with form.edit.after(features):
        selected = form.edit.call(aten.where.self, use_supplied, supplied, features)
    form.edit.replace(features, selected)
    form.edit.set_outputs([features if name == "draft_features" else n for name, n in form.outputs.items()])
    return form


def _by_row(form: Program, value: fx.Node) -> fx.Node:
    """Return (tokens, experts) reshaped to (batch, sequence, experts)."""
    ids = form.input_nodes.get("input_ids")
    if value.meta["val"].dim() != 2 or ids is None:
        return value
    sizes = form.size_nodes([*ids.meta["val"].shape, int(value.meta["val"].shape[-1])])
    return form.edit.call(aten.reshape.default, value, sizes)


def soft_experts(program: Program, epsilon: float) -> Program:
    """Return a program in which experts beyond the number of active ones have the weight ``epsilon`` instead of zero.

    Raises:
        UsageError: the number of active experts is not a run-time setting of the program.
    """
    form = program.copy()
    limited = [n for n in form.nodes if is_operator(n, "graphopt.active_weights")]
    if not limited or not active_dials(form):
        raise UsageError(
            "the number of active experts is not a run-time setting of this program",
            hint="run the pass dial-top-k first",
        )
    for node in limited:
        args = arguments(node)
        with form.edit.before(node):
            softened = form.edit.call(
                graphopt_ops.softened_weights.default,
                args["weights"],
                args["k"],
                args["renormalised"],
                epsilon,
            )
        form.edit.replace(node, softened)
    for node in [n for n in form.nodes if is_operator(n, "graphopt.active_experts")]:
        form.edit.replace(node, arguments(node)["experts"])
    return form


def active_dials(program: Program) -> list[str]:
    """Return the names of the run-time settings that control the number of active experts."""
    limits = {arguments(n)["k"] for n in program.nodes if is_operator(n, "graphopt.active_weights")}
    return [name for name in program.dials if program.input_nodes[name] in limits]


def with_weights(program: Program, module: nn.Module) -> Program:
    """Return a program with the module's weights of the same names; other weights are unchanged."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    result = program.copy()
    for node in result.weight_nodes:
        weight = result.weights[node.name]
        value = parameters.get(weight.name)
        if value is not None and tuple(value.shape) == tuple(weight.source.shape):
            stored = value.detach().to("cpu", weight.source.dtype, copy=True)
            result.weights[node.name] = weight.with_source(InMemory(stored))
    result.changed()
    return result
