"""Folding norms' weights into neighbouring linears and convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.facts import FoldedNorms
from ...ir.option import option
from ...ir.program import Program
from ...ir.running.fold import depends_on_weights_alone
from ...ir.running.readers import readers as readers_of
from ...ir.schema import argument, arguments, is_operator
from ..framework.base import Pass
from ..framework.contracts import Exact
from ..framework.plan import Plan, Refused, Site
from ..shared.matrices import as_type_of
from .fold_batch_norm import find_batch_norm, fold_batch_norm
from .scale_columns import Reader, matrix_readers, scale_reader

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class FoldNorms(Pass):
    """Fold what norms multiply and add into neighbouring weights.

    BatchNorm in evaluation mode is an affine map: it goes into the (transposed) convolution or linear before
    it, or into those after it if there is no padding in between; reshapes and permutations in between that keep
    channels together are allowed. The weight of an RMSNorm, and the weight and bias of a LayerNorm, go into the
    linears (and experts) that read the norm, if nothing else does. Folding happens in float64; the folded
    matrix is rounded once to its own dtype, whatever that of the norm.
    """

    name = "fold-norms"
    contract = Exact()
    provides = (FoldedNorms,)

    which: str = option("all", help="which norms", choices=("all", "batch-norm", "layer-norm", "rms-norm"))
    untie: bool = option(
        False, help="also where a matrix is tied to another use, which then keeps a copy of its own"
    )

    def find(self, program: Program) -> Iterator[tuple[Site, Any] | Refused]:
        """Yield each norm whose neighbours can absorb its weights, with those neighbours."""
        for node in program.graph.nodes:
            if is_operator(node, "aten.batch_norm") and self.which in ("all", "batch-norm"):
                site: tuple[Site, Any] | str | None = find_batch_norm(program, node, self.untie)
            elif (is_operator(node, "graphopt.rms_norm") and self.which in ("all", "rms-norm")) or (
                is_operator(node, "aten.layer_norm") and self.which in ("all", "layer-norm")
            ):
                site = self._affine(program, node)
            else:
                continue
            if site is None:
                continue
            if isinstance(site, str):
                yield Refused(node.name, site, program.source_line(node))
            else:
                yield site

    def _affine(self, program: Program, node: fx.Node) -> tuple[Site, Any] | str | None:
        args = arguments(node)
        weight, bias = args["weight"], args.get("bias")
        if weight is None and bias is None:
            return None
        constant = depends_on_weights_alone(program)
        if any(t is not None and t not in constant for t in (weight, bias)):
            return "its weight depends on the input"
        if is_operator(node, "aten.layer_norm") and len(args["normalized_shape"]) != 1:
            return "it normalises over several dimensions"
        readers = matrix_readers(program, node, constant)
        if isinstance(readers, str):
            return readers
        if bias is not None and any(is_operator(r.node, "graphopt.routed_ffn") for r in readers):
            return "the bias of a norm cannot be folded into experts"
        for reader in readers:
            shared = [u for u in readers_of(program, reader.matrix) if u is not reader.node]
            if shared and not self.untie:
                return (
                    f"{reader.matrix.name} is used by {shared[0].name} as well; untie=true gives each its own"
                )
        return Site(node.name, into=[reader.node.name for reader in readers]), (node, readers)

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Multiply matrices by the norms' weights."""
        for _, (node, readers) in self.chosen(program, plan):
            if is_operator(node, "aten.batch_norm"):
                fold_batch_norm(program, node, readers)
            else:
                _fold_affine(program, node, readers)


def _fold_affine(program: Program, node: fx.Node, readers: list[Reader]) -> None:
    args = arguments(node)
    weight, bias = args["weight"], args.get("bias")
    x = node.args[0]
    with program.edit.before(node):
        if is_operator(node, "aten.layer_norm"):
            bare = program.edit.call(
                aten.layer_norm.default, x, args["normalized_shape"], None, None, args["eps"]
            )
        else:
            bare = program.edit.call(
                torch.ops.graphopt.rms_norm.default, x, None, args["eps"], float32=argument(node, "float32")
            )
        # a weight of a wider dtype widened the norm's value
        bare = as_type_of(program, bare, node)
    _set_neutral_in_checkpoint(program, weight, 1.0)
    _set_neutral_in_checkpoint(program, bias, 0.0)
    for reader in readers:
        scale_reader(program, reader.now(program), bare, weight, bias)
    program.edit.erase_dead([node])


def _set_neutral_in_checkpoint(program: Program, tensor: fx.Node | None, value: float) -> None:
    """Replace the norm's weight in the mapping to the checkpoint by a neutral one."""
    if tensor is None:
        return
    if is_operator(tensor, "aten.add") and 1.0 in [
        float(a) for a in tensor.args if isinstance(a, (int, float))
    ]:
        # Gemma stores the weight minus one
        tensor, value = next(a for a in tensor.args if isinstance(a, fx.Node)), value - 1.0
    while is_operator(tensor, "aten.to"):
        tensor = tensor.args[0]  # type: ignore[assignment]
    for name, stored in list(program.checkpoint.items()):
        if stored is tensor:
            with program.edit.after(tensor):
                program.checkpoint[name] = program.edit.call(aten.full_like.default, tensor, value)
