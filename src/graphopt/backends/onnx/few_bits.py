"""Products and embeddings with weights of few bits, as ONNX Runtime's kernels for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx

from ...ir.program import Program
from ...ir.quantised.codes import CannotExpress
from ...ir.quantised.stored import quantised_or_why
from ...ir.quantised.tensor import QuantisedTensor
from ...ir.schema import arguments, is_operator
from ...ir.weights import TensorSource
from .block_matrix import BlockMatrix, NoKernel, block_matrix, layout
from .sizes import Widened

PRODUCT, LOOKUP = "MatMulNBits", "GatherBlockQuantized"
FLOAT, ROUNDED = 1, 4
"""Accuracy levels of MatMulNBits: sums in float32 of inputs as they are, or of inputs rounded to 8 bits."""


@dataclass(frozen=True)
class _Part:
    """One tensor of a matrix in the kernels' layout, made when it is read."""

    source: TensorSource
    values: torch.dtype
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def load(self) -> torch.Tensor:
        """Return the tensor."""
        part: torch.Tensor = getattr(_matrix(self.source, self.values), self.name)
        return part


def form_of(source: TensorSource, *, values: bool = True) -> QuantisedTensor | None:
    """Return the codes and scales of a weight, whose values may have been widened since.

    Raises:
        CannotExpress: it was computed from some and has none.
    """
    return quantised_or_why(source.source if isinstance(source, Widened) else source, values=values)


def _matrix(source: TensorSource, dtype: torch.dtype) -> BlockMatrix:
    form = form_of(source)
    assert form is not None
    if form.group is not None or form.among is not None:
        raise NoKernel(
            "columns choose their scales" if form.group is not None else "codes have a table of their own"
        )
    return block_matrix(
        form.codes, form.scales(), form.zero, form.offset, code=form.code, block=form.block, dtype=dtype
    )


@dataclass
class Stored:
    """A weight in the kernels' layout, as placeholders."""

    words: fx.Node
    scales: fx.Node
    zeros: fx.Node | None
    bits: int
    block: int
    columns: int


class FewBits:
    """Finds the weights of one program that are stored in few bits, and adds them in the kernels' layout."""

    def __init__(self, program: Program):
        self.program = program
        self._stored: dict[tuple[fx.Node, torch.dtype], Stored | str] = {}

    def stored(self, weight: fx.Node, dtype: torch.dtype) -> Stored | str | None:
        """Return a weight in the layout of the kernels, or why it has none; None if it is not of few bits.

        Args:
            weight: a placeholder.
            dtype: of the values that it is multiplied with.
        """
        if weight.op != "placeholder" or weight.name not in self.program.weights:
            return None
        key = (weight, dtype)
        if key not in self._stored:
            source = self.program.weights[weight.name].source
            try:
                form = form_of(source, values=False)
                if form is None:
                    return None
                layout(form.code, form.block, form.shape)
                self._stored[key] = self._add(weight, source, dtype)
            except (NoKernel, CannotExpress) as reason:
                self._stored[key] = str(reason)
        return self._stored[key]

    def _add(self, weight: fx.Node, source: TensorSource, dtype: torch.dtype) -> Stored:
        # whether there are zeros, and of which kind, is in the values
        matrix = _matrix(source, dtype)
        name = self.program.weights[weight.name].name
        nodes: dict[str, fx.Node | None] = {}
        for part in ("words", "scales", "zeros"):
            tensor: torch.Tensor | None = getattr(matrix, part)
            if tensor is None:
                nodes[part] = None
                continue
            lazy = _Part(source, dtype, part, tuple(tensor.shape), tensor.dtype)
            nodes[part] = self.program.edit.add_weight(f"{name}.{part}", lazy, kind="buffer")
        words, scales, zeros = (nodes[n] for n in ("words", "scales", "zeros"))
        assert words is not None
        assert scales is not None
        return Stored(words, scales, zeros, matrix.bits, matrix.block, matrix.columns)


def few_bit_nodes(program: Program) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the products with matrices and the look-ups in tables of a program."""
    nodes = program.graph.nodes
    return (
        [n for n in nodes if is_operator(n, "aten.linear")],
        [n for n in nodes if is_operator(n, "aten.embedding")],
    )


def layout_of(program: Program, weight: fx.Node) -> tuple[object, ...] | None:
    """Return what weights have in common that can be joined row by row; None if that is not known."""
    if weight.op != "placeholder" or weight.name not in program.weights:
        return None
    try:
        form = form_of(program.weights[weight.name].source, values=False)
    except CannotExpress:
        return None
    columns, dtype = weight.meta["val"].shape[1], weight.meta["val"].dtype
    if form is None:
        return columns, dtype
    if form.group is not None or form.divisor is not None or form.among is not None:
        return None
    beside = (form.zero is None, form.offset is None, form.scale.dtype, form.dtype, form.casts)
    return columns, dtype, form.code, form.block[1:], *beside


def round_inputs(path: Path) -> None:
    """Let the products of a file round their inputs to 8 bits."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == PRODUCT else ():
            if attribute.name == "accuracy_level":
                attribute.i = ROUNDED
    path.write_bytes(model.SerializeToString())


def value_types(program: Program) -> set[torch.dtype]:
    """Return the types that values of few-bit weights are rounded to, which kernels do not do."""
    types = set()
    for product in few_bit_nodes(program)[0]:
        weight = arguments(product)["weight"]
        if weight.op == "placeholder" and weight.name in program.weights:
            try:
                form = form_of(program.weights[weight.name].source, values=False)
            except CannotExpress:
                continue
            if form is not None:
                types |= {form.dtype, *form.casts}
    return types
