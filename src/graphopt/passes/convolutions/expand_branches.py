"""Adding redundant branches that contribute nothing yet to convolutions, to be trained and fused again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.errors import PipelineError
from ...ir.export_blockers import block_export
from ...ir.facts import FusedBranches
from ...ir.needs import NONZERO, SOME
from ...ir.operators.traits import Trait, has
from ...ir.option import option
from ...ir.program import Program
from ...ir.running.fold import depends_on_weights_alone
from ...ir.schema import is_operator
from ...ir.weights import Drawn, InMemory
from ..framework.base import Pass
from ..framework.contracts import Exact
from ..framework.plan import Plan, Refused, Site
from .forms import Form, extension, follow
from .geometry import Axis
from .reading import CONVOLUTIONS, NotLinear, read_operator
from .writing import CONVOLUTION, pad_source

aten = torch.ops.aten


@dataclass(frozen=True)
class _Kernel:
    """A convolution, its input, and its kernel offsets."""

    node: fx.Node
    source: fx.Node
    outputs: int
    inputs: int
    groups: int
    axes: tuple[Axis, ...]
    mode: str


@dataclass(frozen=True, kw_only=True)
class ExpandBranches(Pass):
    """Replace each convolution by a sum of itself, smaller kernels, kernels of its size and the identity.

    The inverse of fuse-branches, for training in the redundant form of RepVGG, MobileOne and RepCNN. The
    original kernel does not change; every new branch has a scale per channel that starts at zero, so that the
    outputs do not change, and random weights, so that the scale has a gradient. The program's module trains
    all branches; fuse-branches makes one convolution of them again.
    """

    name = "expand-branches"
    contract = Exact()
    invalidates = (FusedBranches,)
    paper = "arXiv 2406.02652"

    kernels: list[int] = option(  # noqa: RUF009
        [1], help="sizes of smaller kernels, one branch each; larger ones are left out", source="recalled"
    )
    copies: int = option(
        1, help="branches with a kernel of the original's size", low=0, high=16, source="paper"
    )
    identity: bool = option(True, help="a branch that is the input, where channels and stride allow it")
    align: str = option(
        "auto", help="alignment of smaller kernels: auto puts those of causal convolutions last",
        choices=("auto", "last", "centre"), needs=[{"kernels": SOME}, {"identity": True}],
    )  # fmt: skip
    which: str = option(
        "spatial", help="convolutions with several kernel offsets, or all", choices=("spatial", "all")
    )
    seed: int = option(0, help="seed of the new weights", needs=[{"kernels": SOME}, {"copies": NONZERO}])

    def validate(self) -> None:
        """Check the sizes."""
        if any(size < 1 for size in self.kernels):
            raise PipelineError(f"{self.name}: kernels are sizes from 1, not {self.kernels}")
        if not (self.kernels or self.copies or self.identity):
            raise PipelineError(f"{self.name}: there is no branch to add", hint="copies=1, or identity=true")

    def find(self, program: Program) -> Iterator[tuple[Site, Any] | Refused]:
        """Yield each convolution with weights of its own, and its kernel offsets."""
        constant = depends_on_weights_alone(program)
        for node in program.graph.nodes:
            if not is_operator(node, *CONVOLUTIONS):
                continue
            try:
                form = read_operator(node, constant)
            except NotLinear as problem:
                yield Refused(node.name, str(problem), program.source_line(node))
                continue
            if form is None or (self.which == "spatial" and all(a.count == 1 for a in form.axes)):
                continue
            kinds = self._kinds(form)
            if kinds:
                kernel = _Kernel(
                    node, form.source, form.outputs, form.inputs, form.groups, form.axes, form.mode
                )
                yield Site(node.name, branches=kinds, align=self._side(form, constant)), kernel
            else:
                yield Refused(node.name, "no branch can be added to it", program.source_line(node))

    def _kinds(self, form: Form) -> list[str]:
        """Return the branches of a convolution: ``full``, sizes of smaller kernels, ``identity``."""
        full = max(a.count for a in form.axes)
        kinds = ["full"] * self.copies
        kinds += [str(size) for size in self.kernels if size < full or (size == 1 and full == 1)]
        if self.identity and form.inputs == form.outputs and all(a.stride == 1 for a in form.axes):
            kinds.append("identity")
        return kinds

    def _side(self, form: Form, constant: set[fx.Node]) -> str:
        if self.align != "auto":
            return self.align
        padded = form
        if has(form.source, Trait.PADDING):
            pad = read_operator(form.source, constant)
            joined = follow(form, pad) if pad is not None else form
            padded = joined if isinstance(joined, Form) else form
        return "last" if any(a.low > 0 and a.high <= 0 for a in padded.axes) else "centre"

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Add the branches and sum them up."""
        if not plan.sites:
            return
        for number, (site, kernel) in enumerate(self.chosen(program, plan)):
            node = kernel.node
            with program.edit.after(node):
                total = program.edit.call(node.target, *node.args, **node.kwargs)
                for index, kind in enumerate(site["branches"]):
                    seed = self.seed * 1_000_003 + number * 101 + index
                    branch = _branch(program, kernel, str(kind), site["align"], index, seed)
                    total = program.edit.call(aten.add.Tensor, total, branch)
            program.edit.replace(node, total)
        block_export(program, "branches were added, which a checkpoint of this architecture does not hold")


def _branch(program: Program, kernel: _Kernel, kind: str, align: str, index: int, seed: int) -> fx.Node:
    """Insert one branch, scaled by zero."""
    node = kernel.node
    weight = program.weights[_weight(node).name]
    stem = f"{weight.name.removesuffix('.weight')}.branches.{index}"
    dtype = node.meta["val"].dtype
    axes = tuple(
        _axis(a, 1 if kind == "identity" else a.count if kind == "full" else int(kind), align)
        for a in kernel.axes
    )
    # its input may have been given branches before
    source, padding = pad_source(
        program, axes, extension(axes, kernel.mode or "zeros"), program.edit.now(kernel.source)
    )
    if kind == "identity":
        # padding of a single kernel offset is only ever cropped, never added
        value = source
    else:
        shape = (kernel.outputs, kernel.inputs // kernel.groups, *(a.count for a in axes))
        drawn = Drawn(shape, dtype, seed, 1 / math.sqrt(math.prod(shape[1:])))
        branch_weight = program.edit.add_weight(f"{stem}.weight", InMemory(drawn.load()))
        value = program.edit.call(
            CONVOLUTION[len(axes)], source, branch_weight, None,
            [a.stride for a in axes], padding, [a.step for a in axes], kernel.groups,
        )  # fmt: skip
    zeros = torch.zeros(kernel.outputs, *[1] * len(axes), dtype=dtype)
    return program.edit.call(aten.mul.Tensor, value, program.edit.add_weight(f"{stem}.scale", zeros))


def _weight(node: fx.Node) -> fx.Node:
    """Return the stored tensor that a convolution's kernel is, or is computed from."""
    tensor: Any = node.args[1]
    while tensor.op != "placeholder":
        tensor = tensor.all_input_nodes[0]
    return tensor  # type: ignore[no-any-return]


def _axis(axis: Axis, count: int, align: str) -> Axis:
    """Return the kernel offsets of a smaller kernel among those of a larger one."""
    count = min(count, axis.count)
    surplus = axis.count - count
    before = surplus if align == "last" else surplus // 2
    first = axis.first + axis.step * before
    return Axis(first, axis.step, count, axis.stride, axis.high - axis.step * (surplus - before))
