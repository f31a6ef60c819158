"""Every value that a device computes, and every weight, in few bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..ir.errors import PassRefusedError
from ..ir.execute import interpret
from ..ir.fold import MOVEMENT
from ..ir.option import option
from ..ir.program import Program
from ..ir.schema import arguments, is_operator, operator_name
from ..ir.sides import border, host_nodes
from .base import Pass
from .carried import in_steps
from .contracts import Approximate, Contract
from .plan import Plan, Refused, Site
from .streaming import states_of

if TYPE_CHECKING:
    from .context import Context

dialect = torch.ops.graphopt
MATRICES = ("aten.linear", "aten.conv1d", "aten.conv2d", "aten.conv3d")
STORED = {8: ("uint8", 255), 16: ("uint16", 65535)}


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Store activations as integers of 8 or 16 bits and weights of 8 or 4: calibrated on data, judged on other data.

    Activations have one scale and zero point each, by the least and largest value that calibration met; values that are
    only moved keep those of what they were. Matrices have a symmetric scale for each output channel. Tables of embeddings,
    weights of norms and other constants are stored as activations are. In PyTorch the program computes what the
    integers stand for; lowering writes QuantizeLinear and DequantizeLinear, and nothing else.
    """

    name = "quantize"
    contract = Approximate()
    requires = ("canonical", "fitted")
    provides = ("quantized_values",)
    excludes = ("quantized_values",)
    needs_data = True

    weights: int = option(8, help="bits of a matrix's weight", choices=(8, 4))
    activations: int = option(16, help="bits of an activation", choices=(8, 16))
    budget: float | None = option(None, help="largest relative loss", low=0)
    metric: str = option(
        "auto", help="what the loss is measured by", choices=("auto", "perplexity", "kl", "cosine")
    )

    def promises(self) -> Contract:
        """Judged by the metric asked for."""
        return Approximate(self.metric)

    def plan(self, program: Program, context: Context) -> Plan:
        """Observe ranges on calibration data, and give each value its scale."""
        plan = Plan()
        values = _values(program)
        ranges = _observed(program, context, values)
        dtype, steps = STORED[self.activations]
        scales: dict[fx.Node, tuple[float, int]] = {}
        for node in values:
            source = _moved(node)
            if source is not None and source in scales:
                scales[node] = scales[source]
            elif node not in ranges:
                plan.refused.append(
                    Refused(node.name, "calibration never computed it", program.source_line(node))
                )
                continue
            else:
                low, high = ranges[node]
                if low == high == 0.0:
                    plan.notes.append(f"{node.name} is zero on all calibration data")
                scales[node] = _scale(low, high, steps)
            plan.sites.append(
                Site(node.name, what="value", dtype=dtype, scale=scales[node][0], zero_point=scales[node][1])
            )
        if plan.refused:
            raise PassRefusedError(
                f"{self.name}: calibration never computed {plan.refused[0].block}",
                hint="data that takes every way through the model",
            )
        plan.sites += self._constants(program, plan, dtype, steps)
        return plan

    def _constants(self, program: Program, plan: Plan, dtype: str, steps: int) -> list[Site]:
        constant, host = _settled(program), host_nodes(program)
        sites: dict[str, Site] = {}
        for node in program.nodes:
            if node in constant or node in host or node.op != "call_function":
                continue
            for name, value in arguments(node).items():
                if not isinstance(value, fx.Node) or value not in constant or value.name in sites:
                    continue
                if not value.meta["val"].dtype.is_floating_point or (
                    name == "bias" and is_operator(node, *MATRICES)
                ):
                    continue
                if name == "weight" and is_operator(node, *MATRICES):
                    stored = "int8" if self.weights == 8 else "int4"
                    sites[value.name] = Site(value.name, what="matrix", dtype=stored)
                else:
                    tensor = _constant(program, value)
                    scale, zero = _scale(float(tensor.min()), float(tensor.max()), steps)
                    sites[value.name] = Site(
                        value.name, what="constant", dtype=dtype, scale=scale, zero_point=zero
                    )
        return list(sites.values())

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Put the rounding behind each value and weight."""
        nodes = {n.name: n for n in program.graph.nodes}
        edit, host = program.edit, host_nodes(program)
        for site in plan.sites:
            node = nodes[site.block]
            if site["what"] == "matrix":
                tensor = _constant(program, node).float()
                high = 127.0 if site["dtype"] == "int8" else 7.0
                largest = tensor.flatten(1).abs().amax(1).clamp(min=1e-12)
                known = program.weights.get(node.name)
                name = f"{known.name if known is not None else node.name}_quantize_scale"
                scale = edit.add_weight(name, largest / high, kind="buffer")
                with edit.after(node):
                    made = edit.call(
                        dialect.fake_quantize_channels.default, node, scale, axis=0, dtype=site["dtype"]
                    )
            else:
                with edit.after(node):
                    made = edit.call(
                        dialect.fake_quantize.default, node, float(site["scale"]), int(site["zero_point"]),
                        dtype=site["dtype"],
                    )  # fmt: skip
            edit.replace(node, made, record=False)
            for user in [u for u in made.users if u in host]:
                # what a host makes of a value is made of it as it was
                user.replace_input_with(made, node)
        counts = {w: sum(s["what"] == w for s in plan.sites) for w in ("value", "matrix", "constant")}
        program.facts["quantized"] = {
            "weights": self.weights, "activations": self.activations, "kind": f"w{self.weights}a{self.activations}",
            **counts,
        }  # fmt: skip
        program.facts["unwritable"] = "a folder has no place for ranges of activations; lower it, or save it"


def _constant(program: Program, node: fx.Node) -> torch.Tensor:
    if node.op == "placeholder":
        return program.weights[node.name].source.load()
    found: torch.Tensor = interpret(program, {}, record=[node], stop=True)[node.name]
    return found


def _settled(program: Program) -> set[fx.Node]:
    """Return what no input reaches: weights, what is made of them, and tables of equal numbers."""
    reached: set[fx.Node] = set()
    for node in program.graph.nodes:
        given = node.op == "placeholder" and node.name not in program.weights
        if given or any(n in reached for n in node.all_input_nodes):
            reached.add(node)
    return {n for n in program.graph.nodes if n not in reached}


def _values(program: Program) -> list[fx.Node]:
    """Return the numbers that a device computes or is given, in order."""
    constant, host = _settled(program), host_nodes(program)
    given = set(border(program))
    found = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node in constant or node.op == "output" or not isinstance(value, torch.Tensor):
            continue
        numbers = value.dtype.is_floating_point and str(node.meta.get("input")) not in program.dials
        # what only a host reads, for its shape, is no value of the device
        read = any(user not in host for user in node.users)
        if numbers and read and (node not in host or node in given):
            found.append(node)
    return found


def _moved(node: fx.Node) -> fx.Node | None:
    """Return what a value was before it was moved, if that is all that happened to it."""
    if node.op != "call_function" or operator_name(node.target) not in MOVEMENT:
        return None
    sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (torch.Tensor, list, tuple))]
    if len(sources) != 1:
        return None
    (source,) = sources
    return _moved(source) if not isinstance(source.meta["val"], torch.Tensor) else source


def _observed(
    program: Program, context: Context, values: list[fx.Node]
) -> dict[fx.Node, tuple[float, float]]:
    wanted = set(values)
    ranges: dict[fx.Node, tuple[float, float]] = {}

    def see(node: fx.Node, value: Any) -> Any:
        if node in wanted and isinstance(value, torch.Tensor) and value.numel():
            low, high = (float(v) for v in value.aminmax())
            before = ranges.get(node, (low, high))
            ranges[node] = (min(low, before[0]), max(high, before[1]))
        return value

    batches, kept = context.batches(), states_of(program)
    context.progress.start("observing ranges", len(batches))
    for batch in batches:
        inputs = context.bound(program, batch)

        def step(given: dict[str, torch.Tensor]) -> Mapping[str, Any]:
            _see_inputs(program, given, see)
            return interpret(program, given, hook=see)

        if kept:
            in_steps(program, inputs, step)
        else:
            step(inputs)
        context.progress.step()
    context.progress.done()
    for name in kept:
        # what comes back has the steps it left with, or it would be rounded anew at every token
        pair = [program.input_nodes[name], program.outputs[f"next_{name}"]]
        known = [ranges[node] for node in pair if node in ranges]
        for node in pair:
            if node in ranges:
                ranges[node] = (min(low for low, _ in known), max(high for _, high in known))
    return ranges


def _see_inputs(program: Program, inputs: Mapping[str, torch.Tensor], see: Any) -> None:
    for name, node in program.input_nodes.items():
        if name in inputs:
            see(node, inputs[name])


def _scale(low: float, high: float, steps: int) -> tuple[float, int]:
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, 1e-8) / steps
    return scale, round(-low / scale)
