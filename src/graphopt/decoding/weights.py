"""Weights as a decoder's graphs share them: laid out for few rows, and joined where several linears read one value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import fx
from torch.nn import functional as F

from ..ir.program import Program
from ..ir.quantised.codes import CannotExpress
from ..ir.quantised.products import FewBitProduct
from ..ir.quantised.stored import is_quantised, quantised_form
from ..ir.quantised.tensor import concatenate
from ..ir.schema import arguments, is_operator
from .large_pages import LargePages

WIDE = 1.5
"""Outputs for each input from which a matrix is stored by columns."""

Group = tuple[str, ...]


def by_columns(outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether a linear's weight is stored by columns: a product with one row then reads it almost twice as fast.

    Matrices with more inputs than outputs are read faster by rows.
    """
    return device.type == "cpu" and dtype == torch.float32 and outputs >= WIDE * inputs


def joined_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, sizes: Sequence[int]
) -> tuple[torch.Tensor, ...]:
    """Compute several linears of one value as one product.

    Args:
        x: (..., inputs).
        weight: (sum of sizes, inputs).
        bias: (sum of sizes,), or None.
        sizes: number of outputs of each.
    """
    return torch.split(F.linear(x, weight, bias), list(sizes), -1)


def few_bit_linear(
    x: torch.Tensor, product: FewBitProduct, bias: torch.Tensor | None, sizes: Sequence[int]
) -> tuple[torch.Tensor, ...]:
    """Compute linears of one value whose weights stay in few bits.

    Args:
        x: (..., inputs).
        product: with all weights, (sum of sizes, inputs).
        bias: (sum of sizes,), or None.
        sizes: number of outputs of each.

    Returns:
        The results, rounded to bfloat16 before the bias, in the type of ``x``.
    """
    result = product(x).to(x.dtype)
    return torch.split(result if bias is None else result + bias, list(sizes), -1)


def few_bit_rows(entries: torch.Tensor, product: FewBitProduct, dtype: torch.dtype) -> torch.Tensor:
    """Return rows of a table that stays in few bits, as an embedding does.

    Args:
        entries: (...), integers.
        product: the table.
        dtype: of the result.
    """
    return product.rows(entries).to(dtype)


class Weights:
    """Weights of a program that are in memory, by node name.

    What several linears read together is stored once, joined; the separate weights are then views of it.

    Args:
        device: where they are.
        plain: keep every weight as it is stored.
        exact: compute with the values of weights that are stored in few bits, in the type of the program.
    """

    def __init__(self, device: torch.device, plain: bool = False, exact: bool = False):
        self.device, self.plain = device, plain
        self.exact = exact or plain or device.type != "cpu"
        self._products: dict[Group, FewBitProduct | None] = {}
        self.loaded: dict[str, torch.Tensor] = {}
        self._joined: dict[Group, torch.Tensor] = {}
        self._memory = LargePages()

    def load(self, program: Program, node: fx.Node) -> torch.Tensor:
        """Return the value of a weight, loading it if it is not in memory."""
        if node.name not in self.loaded:
            value = program.weights[node.name].source.load().to(self.device)
            read_by_linear = any(is_operator(u, "aten.linear") and u.args[1] is node for u in node.users)
            if read_by_linear and value.dim() == 2 and not self.plain:
                self.loaded[node.name] = self._stored([value], value.shape[0])
            else:
                self.loaded[node.name] = value
        return self.loaded[node.name]

    def in_few_bits(self, program: Program, node: object) -> bool:
        """Tell whether a node is a matrix that is kept in few bits."""
        if self.exact or not isinstance(node, fx.Node) or node.name not in program.weights:
            return False
        source = program.weights[node.name].source
        return len(source.shape) == 2 and source.dtype.is_floating_point and is_quantised(source)

    def product(self, program: Program, nodes: Sequence[fx.Node]) -> FewBitProduct | None:
        """Return the product with matrices in few bits, one below another; None if they are of different codes."""
        group = tuple(n.name for n in nodes)
        if group not in self._products:
            forms = [quantised_form(program.weights[name].source) for name in group]
            known = [form for form in forms if form is not None]
            try:
                whole = known[0] if len(known) == 1 else concatenate(known, 0)
                self._products[group] = self._kept(FewBitProduct.of(whole))
            except CannotExpress:
                self._products[group] = None
        return self._products[group]

    def _kept(self, product: FewBitProduct | None) -> FewBitProduct | None:
        if product is None or product.packed is None:
            return product
        copied = self._memory.copied
        return replace(product, packed=copied(product.packed), scales=copied(product.scales))

    @property
    def few_bits(self) -> bool:
        """Whether some products are computed with weights in few bits."""
        return any(product is not None for product in self._products.values())

    def join(self, program: Program, nodes: Sequence[fx.Node]) -> torch.Tensor | None:
        """Return weights, or biases, as one, joined along their first dimension; None if some are stored otherwise."""
        group = tuple(n.name for n in nodes)
        if group not in self._joined:
            if any(name in self.loaded for name in group):
                return None
            sizes = [int(program.weights[name].source.shape[0]) for name in group]
            values = (program.weights[name].source.load().to(self.device) for name in group)
            whole = self._joined[group] = self._stored(values, sum(sizes))
            self.loaded.update(zip(group, torch.split(whole, sizes), strict=True))
        return self._joined[group]

    def _stored(self, values: Iterable[torch.Tensor], rows: int) -> torch.Tensor:
        """Put weights into one, in its layout; one of them is in memory beside the result."""
        whole: torch.Tensor | None = None
        start = 0
        for value in values:
            if whole is None:
                columns = value.shape[1] if value.dim() == 2 else 0
                if columns and by_columns(rows, columns, value.dtype, self.device):
                    whole = self._empty(value, (columns, rows)).t()
                else:
                    whole = self._empty(value, (rows, *value.shape[1:]))
            # in strips, which is twice as fast as one transposition of the whole
            for first in range(0, value.shape[0], _STRIP):
                part = value[first : first + _STRIP]
                whole[start + first : start + first + part.shape[0]] = part
            start += value.shape[0]
        assert whole is not None
        return whole

    def _empty(self, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return self._memory.empty(shape, like.dtype) if like.device.type == "cpu" else like.new_empty(shape)


_STRIP = 1024


def linears_of_one_value(nodes: Iterable[fx.Node], program: Program) -> list[list[fx.Node]]:
    """Return linears by the value that they read; those of one group can be joined.

    Their weights are of one type, all have biases or none, and each weight is in one group at most.
    """
    by_input: dict[tuple[object, ...], list[fx.Node]] = {}
    taken: set[fx.Node] = set()
    for node in nodes:
        if not is_operator(node, "aten.linear"):
            continue
        args = arguments(node)
        x, weight, bias = args["input"], args["weight"], args["bias"]
        operands = [weight] if bias is None else [weight, bias]
        if not all(isinstance(n, fx.Node) and n.name in program.weights for n in operands):
            continue
        source = program.weights[weight.name].source
        if len(source.shape) != 2 or any(n in taken for n in operands):
            continue
        taken.update(operands)
        by_input.setdefault((x, source.dtype, bias is None), []).append(node)
    return list(by_input.values())
