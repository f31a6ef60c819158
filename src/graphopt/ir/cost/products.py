"""Formulas of matrix products and convolutions: two operations per multiplication and addition.

FLOPs of a linear operator are ``2 * in * out * rows`` (LLM-Viewer, arXiv 2402.16363); biases are not
counted, as in ``torch.utils.flop_counter``.
"""

from __future__ import annotations

from ..operators.traits import Trait, named
from ..operators.work import Call, Size, Work, moved, product
from .registry import formula


@formula("aten.linear")
def linear(call: Call) -> Work:
    """FLOPs: 2 · in · out · rows."""
    rows = product(call.tensor("input").shape[:-1])
    return moved(call, 2 * rows * call.tensor("weight").numel)


def _product(call: Call, first: str) -> Work:
    """FLOPs: 2 · inner size · elements of the result."""
    return moved(call, 2 * call.tensor(first).shape[-1] * call.output.numel)


@formula("aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot", "aten._int_mm")
def matmul(call: Call) -> Work:
    """FLOPs: 2 · inner size · elements of the result."""
    return _product(call, "self" if "self" in call.arguments else "input")


@formula("aten.addmm")
def addmm(call: Call) -> Work:
    """FLOPs: 2 · inner size · elements of the result."""
    return _product(call, "mat1")


@formula("aten.addmv")
def addmv(call: Call) -> Work:
    """FLOPs: 2 · inner size · elements of the result."""
    return _product(call, "mat")


@formula("aten.baddbmm")
def baddbmm(call: Call) -> Work:
    """FLOPs: 2 · inner size · elements of the result."""
    return _product(call, "batch1")


@formula("aten.addbmm")
def addbmm(call: Call) -> Work:
    """FLOPs: 2 · batch · inner size · elements of the result, summed over the batch."""
    first = call.tensor("batch1")
    return moved(call, 2 * first.shape[0] * first.shape[-1] * call.output.numel)


@formula(*named(Trait.CONVOLUTION), "aten.convolution")
def convolution(call: Call) -> Work:
    """FLOPs: 2 · elements of the result (of the input if transposed) · (in / groups) · kernel."""
    if call.arguments.get("transposed"):
        return transposed_convolution(call)
    return moved(call, 2 * call.output.numel * product(call.tensor("weight").shape[1:]))


@formula(*named(Trait.TRANSPOSED) - {"aten.convolution"})
def transposed_convolution(call: Call) -> Work:
    """FLOPs: 2 · elements of the input · (out / groups) · kernel."""
    return moved(call, 2 * call.tensor("input").numel * product(call.tensor("weight").shape[1:]))


@formula("aten.einsum")
def einsum(call: Call) -> Work:
    """FLOPs: operands · product of the sizes of all indices; exact for a product of two operands."""
    equation = call.arguments["equation"].replace(" ", "").split("->")[0]
    sizes: dict[str, Size] = {}
    operands = call.arguments["tensors"]
    for letters, operand in zip(equation.split(","), operands, strict=True):
        before, dots, after = letters.partition("...")
        shape = operand.shape
        broadcast = shape[len(before) : len(shape) - len(after)] if dots else ()
        names = [*before, *(f"...{len(broadcast) - i}" for i in range(len(broadcast))), *after]
        for name, size in zip(names, shape, strict=True):
            if sizes.get(name, 1) == 1:
                sizes[name] = size
    return moved(call, len(operands) * product(sizes.values()))
