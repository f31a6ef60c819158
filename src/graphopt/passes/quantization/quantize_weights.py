"""Weights alone in few bits, with scales for groups of inputs; activations stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ...ir.errors import PipelineError
from ...ir.export_blockers import block_export
from ...ir.facts import Canonical
from ...ir.operators.traits import Trait, has
from ...ir.option import option
from ...ir.program import Program
from ...ir.quantised.stored import Packed, is_quantised, packed
from ...ir.quantised.tensor import QuantisedTensor
from ...ir.running.fold import EXACT, computed, depends_on_weights_alone
from ...ir.running.invert import invert
from ...ir.schema import argument, is_operator
from ...measure.metrics import METRICS
from ..framework.base import Pass
from ..framework.contracts import Approximate
from ..framework.kept_tensors import keep, kept
from ..framework.plan import Plan, Refused, Site
from .expert_moments import expert_moments
from .few_bits import channel_scales, fitted, half_quadratic, nearest, output_error
from .rounding import Moments
from .values import constant_value

if TYPE_CHECKING:
    from ...measure.context import Context

aten = torch.ops.aten
_LEAST_MEMORY = 64 << 20
METHODS = ("rtn", "gptq", "awq", "hqq")


@dataclass
class _Matrix:
    """A matrix, or a stack of experts' matrices, and how it is multiplied.

    Attributes:
        node: the value that products read.
        axis: its dimension of inputs.
        kind: "matrix", "experts", "head" or "embedding".
        readers: the nodes that multiply it, or look it up.
    """

    node: fx.Node
    axis: int
    kind: str
    readers: list[fx.Node] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Pass):
    """Store the weights of matrices in few bits, with a scale for each group of inputs, and leave activations alone.

    ``rtn`` rounds to the nearest code. ``gptq`` (arXiv 2210.17323) fits codes to the inputs of each matrix, and ``awq``
    (arXiv 2306.00978) scales input channels with large inputs up before rounding, both on calibration data. ``hqq`` moves
    zeros so that most weights lose little, without data. The program computes with the dequantised values; folders, ONNX
    files and the decoding loop keep the codes. Matrices that are quantised already are left as they are.
    """

    name = "quantize-weights"
    contract = Approximate()
    requires = (Canonical,)
    metric_calibrates = True
    paper = "arXiv 2210.17323, 2306.00978"

    bits: int = option(4, help="bits of a weight", choices=(8, 4, 2))
    group: int = option(32, help="inputs that share a scale; 0: all of an output", low=0)
    method: str = option("rtn", help="how weights are rounded", choices=METHODS)
    symmetric: bool = option(True, help="0 stands for 0, and no zeros are stored")
    ordered: bool = option(True, help="round columns with large inputs first (gptq)")
    head: int = option(
        0,
        help="bits of matrices outside all blocks, such as the output head; 0 leaves them",
        choices=(0, 8, 4),
    )
    embedding: int = option(
        0, help="bits of tables that are only looked up; 0 leaves them", choices=(0, 8, 4)
    )
    sensitive: float = option(
        0.0, help="share of the weights, those that lose most by measurement, that keep 8 bits", low=0, high=1
    )
    skip: tuple[str, ...] = option((), help="matrices to leave, by name or part of a name")
    metric: str = option("auto", help="metric of the loss", choices=("auto", *METRICS))

    def validate(self) -> None:
        """Require options that go together."""
        if self.method == "hqq" and self.symmetric:
            raise PipelineError(
                f"{self.name}: hqq chooses zeros, and symmetric codes have none",
                hint="quantize-weights{method=hqq symmetric=false}",
            )
        if not self.ordered and self.method != "gptq":
            raise PipelineError(f"{self.name}: ordered is for method=gptq alone")
        if self.sensitive and self.bits == 8:
            raise PipelineError(f"{self.name}: sensitive keeps weights at 8 bits, which all have")

    def find(self, program: Program) -> Iterator[tuple[Site, Any] | Refused]:
        """Yield matrices with what they multiply, and those that cannot be stored in codes."""
        for matrix in matrices_of(program):
            node, kind = matrix.node, matrix.kind
            bits = {"head": self.head, "embedding": self.embedding}.get(kind, self.bits)
            if not bits:
                continue
            label = node.name
            if any(part in _names(program, node) for part in self.skip):
                yield Refused(label, "left alone by the option skip", program.source_line(node))
                continue
            reason = self._refusal(program, matrix)
            if reason:
                yield Refused(label, reason, program.source_line(node))
                continue
            inputs = int(node.meta["val"].shape[matrix.axis])
            fits = kind == "matrix" or (kind == "experts" and self.method == "gptq")
            method = self.method if fits or self.method == "hqq" else "rtn"
            yield (
                Site(label, bits=bits, group=self.group or inputs, method=method, symmetric=self.symmetric),
                matrix,
            )

    def _refusal(self, program: Program, matrix: _Matrix) -> str:
        node = matrix.node
        inputs = int(node.meta["val"].shape[matrix.axis])
        if self.group and inputs % self.group:
            return f"groups of {self.group} do not divide its {inputs} inputs"
        source = program.weights[node.name].source if node.op == "placeholder" else computed(program, node)[0]
        if is_quantised(source):
            return "it is stored in few bits already; rounding twice loses more than once"
        if node.op != "placeholder":
            graph = computed(program, node)[0].graph
            moves = all(has(n, EXACT | Trait.CAST) for n in graph.nodes if n.op == "call_function")
            if not moves:
                return "it is computed from other weights"
        return ""

    def plan(self, program: Program, context: Context) -> Plan:
        """Choose the codes of methods that need data, and the matrices that keep eight bits."""
        plan = super().plan(program, context)
        matrices = dict(self.findings(program).work)
        if self.method == "awq" and any(m.kind == "experts" for m in matrices.values()):
            plan.notes.append("experts are rounded to the nearest codes: their inputs differ by expert")
        if self.sensitive:
            self._keep_eight(program, context, plan, matrices)
        if self.method in ("gptq", "awq"):
            self._fit(program, context, plan, matrices)
        return plan

    def _keep_eight(
        self, program: Program, context: Context, plan: Plan, matrices: dict[str, _Matrix]
    ) -> None:
        by_name = {s.block: s for s in plan.sites if s["bits"] < 8}

        def few(edited: Program, name: str) -> None:
            node = next(n for n in edited.graph.nodes if n.name == name)
            matrix = replace(matrices[name], node=node)
            self._replace(edited, matrix, _rounded(edited, matrix, by_name[name]))

        judged = "kl" if self.metric == "auto" else self.metric
        alone = context.score(program, list(by_name), few, metric=judged, key=f"{self}")
        sizes = {name: matrices[name].node.meta["val"].numel() for name in by_name}
        left = self.sensitive * sum(sizes.values())
        for name in sorted(by_name, key=lambda n: (-alone[n] / sizes[n], n)):
            if sizes[name] <= left:
                left -= sizes[name]
                by_name[name].choices["bits"] = 8
        plan.scores = dict(alone)
        eight = sum(s["bits"] == 8 for s in by_name.values())
        plan.notes.append(f"{eight} of {len(by_name)} matrices keep 8 bits")

    def _fit(self, program: Program, context: Context, plan: Plan, matrices: dict[str, _Matrix]) -> None:
        sites = {s.block: s for s in plan.sites if matrices[s.block].kind in ("matrix", "head")}
        stored: dict[str, Tensor] = {}
        # those that read one value come together
        waiting: dict[str, tuple[list[str], Tensor]] = {}
        # a large model has large moments: as much memory as a share of its weights, and a run over the data for each part
        memory = max(_LEAST_MEMORY, sum(w.bytes for w in program.weights.values()) // 8)
        for node, moments in Moments(program, context, memory).each(matrices[name].node for name in sites):
            site = sites[node.name]
            if self.method == "gptq" or matrices[node.name].kind == "head":
                weight = constant_value(program, node)
                form = fitted(
                    weight, moments[0], site["bits"], site["group"], site["symmetric"], self.ordered
                )
                stored |= _parts(node.name, form)
                plan.scores[node.name] = output_error(weight, form.dequantise(), moments[0])
                site.choices["method"] = "gptq"
            else:
                source = argument(matrices[node.name].readers[0], "input")
                waiting.setdefault(source.name, ([], moments[0]))[0].append(node.name)
        if self.method == "gptq":
            stacks = [matrices[s.block] for s in plan.sites if matrices[s.block].kind == "experts"]
            self._fit_experts(program, context, plan, stacks, memory, stored)
        if self.method == "awq":
            self._scale(program, plan, sites, matrices, waiting, stored)
        if stored:
            where = keep(stored, context.work_dir, "codes")
            for name, site in ((s.block, s) for s in plan.sites):
                if f"{name}.codes" in stored or f"{name}.factors" in stored:
                    site.choices["fitted"] = where

    def _fit_experts(
        self, program: Program, context: Context, plan: Plan, stacks: list[_Matrix], memory: int,
        stored: dict[str, Tensor],
    ) -> None:  # fmt: skip
        """Fit each expert's matrices to the tokens that reach it; those that none reaches are rounded to the nearest."""
        by_name = {s.block: s for s in plan.sites}
        forms: dict[fx.Node, QuantisedTensor] = {}
        errors: dict[fx.Node, list[float]] = {}
        reached: dict[fx.Node, set[int]] = {}
        axes = {stack.node: stack.axis for stack in stacks}
        for node, expert, moments, _ in expert_moments(program, context, axes, memory):
            site = by_name[node.name]
            weight = constant_value(program, node)
            if axes[node] == 1:
                weight = weight.mT
            if node not in forms:
                forms[node] = nearest(weight, site["bits"], site["group"], site["symmetric"])
            alone = weight[expert]
            form = fitted(alone, moments, site["bits"], site["group"], site["symmetric"], self.ordered)
            for name in ("codes", "scale", "zero"):
                part = getattr(form, name)
                if part is not None:
                    getattr(forms[node], name)[expert] = part
            errors.setdefault(node, []).append(output_error(alone, form.dequantise(), moments))
            reached.setdefault(node, set()).add(expert)
        unreached = 0
        for node in axes:
            if node in forms:
                stored |= _parts(node.name, forms[node])
                plan.scores[node.name] = max(errors[node])
            unreached += int(node.meta["val"].shape[0]) - len(reached.get(node, ()))
        if unreached:
            plan.notes.append(
                f"{unreached} matrices of experts that no token of the data reached are rounded to the nearest codes"
            )

    def _scale(
        self, program: Program, plan: Plan, sites: dict[str, Site], matrices: dict[str, _Matrix],
        waiting: dict[str, tuple[list[str], Tensor]], stored: dict[str, Tensor],
    ) -> None:  # fmt: skip
        """Choose factors of input channels where the value that is read comes from a norm of its own."""
        nodes = {n.name: n for n in program.graph.nodes}
        unscaled = 0
        for source, (names, moments) in waiting.items():
            norm = nodes[source]
            readers = {id(r) for name in names for r in matrices[name].readers}
            if _norm_weight(program, norm) is None or any(id(user) not in readers for user in norm.users):
                unscaled += len(names)
                for name in names:
                    sites[name].choices["method"] = "rtn"
                continue
            site = sites[names[0]]
            weights = [constant_value(program, nodes[name]) for name in names]
            factors = channel_scales(weights, moments, 1, site["bits"], site["group"], site["symmetric"])
            factors = factors.to(weights[0].dtype)
            for name, weight in zip(names, weights, strict=True):
                stored[f"{name}.factors"] = factors
                form = nearest(
                    weight.float() * factors.float(), site["bits"], site["group"], site["symmetric"]
                )
                plan.scores[name] = output_error(weight, form.dequantise().float() / factors.float(), moments)
        if unscaled:
            plan.notes.append(
                f"{unscaled} matrices read no value of a norm, and are rounded to the nearest codes"
            )

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Store each planned matrix as codes."""
        scaled: set[fx.Node] = set()
        for site, matrix in self.chosen(program, plan):
            tensors = kept(str(site["fitted"])) if "fitted" in site.choices else {}
            factors = tensors.get(f"{site.block}.factors")
            if factors is not None:
                self._divide_norm(program, matrix, factors, scaled)
            form = _rounded(program, matrix, site, tensors, factors)
            self._replace(program, matrix, form)

    def told(self, program: Program, plan: Plan) -> list[str]:
        """Return how the bytes of the planned matrices change."""
        nodes = {n.name: n for n in program.graph.nodes}
        shapes = [(nodes[s.block].meta["val"], s) for s in plan.sites if s.block in nodes]
        before = sum(v.numel() * v.dtype.itemsize for v, _ in shapes)
        after = sum(
            v.numel() * s["bits"] / 8
            + v.numel() / s["group"] * (v.dtype.itemsize + (0 if s["symmetric"] else 1))
            for v, s in shapes
        )
        return (
            [f"{len(shapes)} matrices take {before / 1e6:.1f} MB before and {after / 1e6:.1f} MB after"]
            if shapes
            else []
        )

    @staticmethod
    def _divide_norm(program: Program, matrix: _Matrix, factors: Tensor, scaled: set[fx.Node]) -> None:
        reader = next(r for r in matrix.readers if is_operator(r, "aten.linear"))
        norm = argument(reader, "input")
        if norm in scaled:
            return
        scaled.add(norm)
        weight = _norm_weight(program, norm)
        assert weight is not None
        name = program.weights[weight.name].name
        by = program.edit.add_weight(f"{name}_channel_factors", factors, kind="buffer")
        with program.edit.before(norm):
            divided = program.edit.call(aten.div.Tensor, weight, by)
        program.edit.change(norm, weight=divided)
        bias = _norm_bias(norm)
        if bias is not None:
            with program.edit.before(norm):
                other = program.edit.call(aten.div.Tensor, bias, by)
            program.edit.change(norm, bias=other)
            _map(program, bias, other)
        _map(program, weight, divided)

    @staticmethod
    def _replace(program: Program, matrix: _Matrix, form: QuantisedTensor) -> None:
        """Let what reads a matrix read its codes' values, and the checkpoint's tensors map to them."""
        node = matrix.node
        stored = program.weights.get(node.name)
        source = packed(form)
        new = program.edit.add_weight(f"{stored.name if stored else node.name}.quantised", source)
        # also where parts of it are the checkpoint's tensors
        for user in list(node.users):
            user.replace_input_with(node, new)
        if stored is not None:
            _map(program, node, new)
            program.edit.remove_weight(node)
            program.weights[new.name] = replace(stored, source=source)
        else:
            graph = computed(program, node)[0].graph
            with program.edit.after(new):
                found = invert(program, graph, new)
            keys = {n.name: key for key, n in program.checkpoint.items()}
            names = {n.name for n in graph.find_nodes(op="placeholder")} & set(keys)
            if names - set(found):
                block_export(program, f"{node.name} is made of tensors that its codes do not give back")
            for name in names & set(found):
                program.checkpoint[keys[name]] = found[name]
            program.edit.erase_dead([node])
        program.changed()


def matrices_of(program: Program) -> Iterator[_Matrix]:
    """Yield the matrices that products and look-ups read, each once."""
    constant = depends_on_weights_alone(program)
    inside = {node for block in program.anatomy.blocks for node in block.nodes}
    found: dict[fx.Node, _Matrix] = {}
    for node in program.nodes:
        for name, axis in _operands(node):
            matrix = argument(node, name)
            if not isinstance(matrix, fx.Node) or matrix not in constant:
                continue
            if not matrix.meta["val"].dtype.is_floating_point or matrix.meta["val"].dim() < 2:
                continue
            if is_operator(node, "aten.embedding"):
                kind = "embedding"
            elif is_operator(node, "graphopt.routed_ffn"):
                kind = "experts"
            else:
                kind = "matrix" if node in inside else "head"
            entry = found.setdefault(matrix, _Matrix(matrix, axis, kind))
            entry.readers.append(node)
            # a table that is looked up and multiplied is both: what multiplies it decides
            if entry.kind == "embedding":
                entry.kind = "head" if kind != "embedding" else kind
            elif kind == "embedding":
                entry.kind = "head"
    yield from found.values()


def _operands(node: fx.Node) -> list[tuple[str, int]]:
    if is_operator(node, "aten.linear", "aten.embedding"):
        return [("weight", 1)]
    if is_operator(node, "graphopt.routed_ffn"):
        axis = 1 if argument(node, "transposed") else 2
        return [("up", axis), ("down", axis)]
    return []


def _names(program: Program, node: fx.Node) -> str:
    if node.op == "placeholder":
        return " ".join((node.name, *program.weights[node.name].all_names))
    return " ".join([node.name, *(w.name for w in computed(program, node)[1])])


def _norm_weight(program: Program, norm: fx.Node) -> fx.Node | None:
    """Return the weight of a norm that is a tensor of its own, else None."""
    if not is_operator(norm, "graphopt.rms_norm", "aten.layer_norm"):
        return None
    weight = argument(norm, "weight")
    if not isinstance(weight, fx.Node) or weight.op != "placeholder" or weight.name not in program.weights:
        return None
    return weight if len(weight.users) == 1 else None


def _norm_bias(norm: fx.Node) -> fx.Node | None:
    bias = argument(norm, "bias") if is_operator(norm, "aten.layer_norm") else None
    return bias if isinstance(bias, fx.Node) else None


def _map(program: Program, old: fx.Node, new: fx.Node) -> None:
    for key, mapped in list(program.checkpoint.items()):
        if mapped is old:
            program.checkpoint[key] = new


def _parts(name: str, form: QuantisedTensor) -> dict[str, Tensor]:
    source = packed(form)
    parts = {f"{name}.codes": source.words, f"{name}.scale": form.scale}
    return parts | ({} if form.zero is None else {f"{name}.zero": form.zero})


def _rounded(
    program: Program,
    matrix: _Matrix,
    site: Site,
    tensors: dict[str, Tensor] | None = None,
    factors: Tensor | None = None,
) -> QuantisedTensor:
    """Return a matrix as codes: those that planning fitted, or rounded now."""
    bits, group, symmetric = site["bits"], site["group"], site["symmetric"]
    described = matrix.node.meta["val"]
    axis = matrix.axis % described.dim()
    order = [d for d in range(described.dim()) if d != axis] + [axis]
    back = [order.index(d) for d in range(described.dim())]
    if tensors and f"{site.block}.codes" in tensors:
        shape = [int(described.shape[d]) for d in order]
        form = nearest(torch.empty(shape, dtype=described.dtype, device="meta"), bits, group, symmetric)
        words, scale, zero = (tensors.get(f"{site.block}.{n}") for n in ("codes", "scale", "zero"))
        assert words is not None
        assert scale is not None
        if tuple(scale.shape) != tuple(form.scale.shape) or words.shape != packed(form).words.shape:
            raise PipelineError(
                f"the codes of {site.block} were fitted with other bits or groups than the plan has",
                hint="plan again with the bits and groups that you want, or remove fitted from the site",
            )
        return Packed(words, replace(form, scale=scale, zero=zero)).quantised().permute(back)
    value = constant_value(program, matrix.node)
    value = value if factors is None else (value.float() * factors.float()).to(value.dtype)
    moved = value.permute(order)
    if site["method"] == "hqq":
        form = half_quadratic(moved, bits, group)
    else:
        form = nearest(moved, bits, group, symmetric)
    return form.permute(back)


__all__ = ["QuantizeWeights"]
