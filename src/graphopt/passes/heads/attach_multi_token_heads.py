"""Extra heads that predict the tokens after the next one (Medusa)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import fx

from ...ir.errors import CheckpointError, PassRefusedError, UsageError
from ...ir.export_blockers import block_export
from ...ir.facts import MultiTokenHeads
from ...ir.option import option
from ...ir.program import Program
from ...ir.running.fold import computed
from ...ir.schema import arguments
from ...ir.storage.safetensors_file import read_header, write_file
from ...ir.weights import InMemory, TensorSource, Zeros
from ..framework.base import Pass
from ..framework.contracts import AddsOutputs
from ..framework.plan import Plan, Refused, Site
from .logits import Head, dtype_of, find_head, value_size

if TYPE_CHECKING:
    from ...measure.context import Context

aten = torch.ops.aten
OUTPUT = "multi_token_logits"
PREFIX = "multi_token_heads"


@dataclass(frozen=True, kw_only=True)
class AttachMultiTokenHeads(Pass):
    """Add heads on the last hidden state: head k, from 0, predicts the token k + 2 ahead (Medusa, arXiv 2401.10774).

    ``head_k(h) = W2_k (h + silu(W1_k h + b_k))``, with ``layers`` residual layers. Output
    ``multi_token_logits`` (batch, sequence, heads, vocabulary). W1 and b are initialised with zeros and W2 as a copy
    of the model's head, so that untrained heads repeat the model's own prediction; ``share`` lets all heads use the
    model's
    head itself, which adds no matrix of the vocabulary's size. Train with the recipe ``medusa``.
    """

    name = "attach-multi-token-heads"
    contract = AddsOutputs()
    together = True
    paper = "arXiv 2401.10774"
    provides = (MultiTokenHeads,)
    excludes = (MultiTokenHeads,)

    heads: int = option(4, help="how many tokens after the next are predicted", low=1, high=16)
    layers: int = option(1, help="residual layers of each head", source="code", low=1)
    share: bool = option(False, help="use the model's head instead of a matrix for each")
    weights: str | None = option(
        None, help="a safetensors file of the published layout (0.0.linear.weight, 0.1.weight, ...)"
    )

    def plan(self, program: Program, context: Context) -> Plan:
        """Find the hidden state that the model's head reads."""
        plan = Plan()
        head = find_head(program)
        if isinstance(head, str):
            plan.refused.append(Refused("head", head, ""))
            return plan
        if self.weights is not None:
            _stored_heads(
                self.weights,
                self.heads,
                self.layers,
                self.share,
                value_size(head.hidden),
                value_size(head.projection),
            )
        plan.sites.append(Site("head", hidden=head.hidden.name, size=value_size(head.hidden)))
        return plan

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Build the heads after the hidden state."""
        if not plan.sites:
            return
        head = find_head(program)
        assert isinstance(head, Head)
        size, dtype = value_size(head.hidden), dtype_of(head.hidden)
        tensors = (
            _stored_heads(
                self.weights, self.heads, self.layers, self.share, size, value_size(head.projection)
            )
            if self.weights is not None
            else {}
        )
        matrix = arguments(head.projection)["weight"]
        logits: list[fx.Node] = []
        add = program.edit.add_weight
        with program.edit.after(head.logits):
            last = None
            for number in range(self.heads):
                value = head.hidden
                for layer in range(self.layers):
                    name = f"{number}.{layer}.linear"
                    weight, bias = (
                        add(
                            f"{PREFIX}.{name}.{kind}",
                            _initial_source(tensors.get(f"{name}.{kind}"), shape, dtype),
                        )
                        for kind, shape in (("weight", (size, size)), ("bias", (size,)))
                    )
                    inner = program.edit.call(aten.linear.default, value, weight, bias)
                    value = program.edit.call(
                        aten.add.Tensor, value, program.edit.call(aten.silu.default, inner)
                    )
                vocabulary_matrix = matrix
                if not self.share:
                    name = f"{number}.{self.layers}.weight"
                    vocabulary_matrix = add(
                        f"{PREFIX}.{name}",
                        _initial_source(tensors[name], (), dtype) if tensors else _copied(program, matrix),
                    )
                logits.append(program.edit.call(aten.linear.default, value, vocabulary_matrix))
                last = logits[-1]
            assert last is not None
            stacked = program.edit.call(aten.stack.default, logits, 2)
        program.add_output(OUTPUT, stacked)
        program.facts.add(MultiTokenHeads(self.heads, self.layers, self.share))
        block_export(
            program,
            "a folder of the model has no place for heads; graphopt export --to medusa writes them alone",
        )


def _initial_source(source: TensorSource | None, shape: tuple[int, ...], dtype: torch.dtype) -> TensorSource:
    return Zeros(shape, dtype) if source is None else InMemory(source.load().to(dtype))


def _copied(program: Program, matrix: fx.Node) -> TensorSource:
    # tensors are read one at a time, since many heads of a large vocabulary do not fit into memory together
    return program.weights[matrix.name].source if matrix.op == "placeholder" else computed(program, matrix)[0]


def write_heads(program: Program, path: str | Path) -> list[str]:
    """Write the heads to a safetensors file of the published layout, read it back, and return the tensors' names.

    Raises:
        UsageError: the program has no heads, or the file exists.
        CheckpointError: a tensor that was read back differs.
    """
    arrays = {
        w.name.removeprefix(PREFIX + "."): w.source
        for w in program.weights.values()
        if w.name.startswith(PREFIX + ".")
    }
    if not arrays:
        raise UsageError("this program has no multi-token heads", hint="attach-multi-token-heads adds them")
    path = Path(path)
    if path.exists():
        raise UsageError(f"{path} exists already", hint="choose another place, or remove it")
    beside = path.with_name(path.name + ".part")
    try:
        write_file(beside, arrays)
        stored = read_header(beside)
        for name, source in arrays.items():
            if not torch.equal(stored[name].load(), source.load()):
                raise CheckpointError(f"{name} differs after it was read back")
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)
    return sorted(arrays)


def _stored_heads(
    path: str, heads: int, layers: int, share: bool, size: int, vocabulary: int
) -> dict[str, TensorSource]:
    """Return the heads in a file as unread sources, after checking that they match this model."""
    if not Path(path).is_file():
        raise PassRefusedError(f"attach-multi-token-heads: there is no file {path}")
    stored = read_header(Path(path))
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(heads):
        for layer in range(layers):
            shapes[f"{number}.{layer}.linear.weight"] = (size, size)
            shapes[f"{number}.{layer}.linear.bias"] = (size,)
        if not share:
            shapes[f"{number}.{layers}.weight"] = (vocabulary, size)
    for name, shape in shapes.items():
        if name not in stored:
            raise PassRefusedError(
                f"attach-multi-token-heads: {path} has no tensor {name}",
                hint=f"it holds {', '.join(sorted(stored)[:6])}, ...; heads= and layers= determine how many are expected",
            )
        if tuple(stored[name].shape) != shape:
            raise PassRefusedError(
                f"attach-multi-token-heads: {name} in {path} is {tuple(stored[name].shape)}, this model's is {shape}",
                hint="heads are trained on the hidden states of one model",
            )
    return {name: stored[name] for name in shapes}
