"""Whether one attention can read the keys and values of another: sizes, positions, masks, biases and sinks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.operators.traits import Trait, has
from ...ir.running.expressions import Expressions
from ...ir.schema import arguments, is_operator, operator_name
from ...ir.sizes import expression
from ...ir.weights import Absent, digest

if TYPE_CHECKING:
    from ...ir.program import Program


class Likeness:
    """Compares the attentions of one program; what was computed for one comparison serves the next.

    Args:
        program: must not change meanwhile.
    """

    def __init__(self, program: Program):
        self.program = program
        starts = {stream.start for stream in program.anatomy.streams}
        # what comes after the beginning of a stream belongs to tokens, the rest to positions, masks and weights
        self.of_tokens: set[fx.Node] = set(starts)
        for node in program.graph.nodes:
            holds = isinstance(node.meta.get("val"), (torch.Tensor, list, tuple))
            if (
                node.op == "call_function"
                and holds
                and any(n in self.of_tokens for n in node.all_input_nodes)
            ):
                self.of_tokens.add(node)
        self.computations = Expressions(partial(_leaf, program))

    def difference(self, leader: fx.Node, follower: fx.Node, name: str) -> str:
        """Return why an attention cannot read what an earlier one reads; empty if it can.

        Args:
            leader: the attention whose keys and values are read.
            follower: the other.
            name: of the leader, for the reason.
        """
        theirs, own = arguments(leader), arguments(follower)
        return (
            _sizes(theirs, own, name)
            or self._positions(theirs["k"], own["k"], name)
            or _window(theirs["window"], own["window"], name)
            or self._masks(theirs, own, name)
        )

    def _positions(self, theirs: fx.Node, own: fx.Node, name: str) -> str:
        first, second = self._form(theirs), self._form(own)
        if first == second:
            return ""
        if "rotary" in (text := f"{first} {second}") and text.count("rotary") % 2 == 0:
            return f"its keys are rotated by other angles, or in other entries, than those of {name}"
        return f"positions reach its keys in another way than those of {name}"

    def _form(self, node: fx.Node) -> Any:
        """Return what is done to keys behind their projection as far as it depends on positions or selects entries."""
        if self._moves_alone(node):
            return "projection", str(node.meta["val"].shape[-1])
        if node not in self.of_tokens:
            held = node.meta.get("val")
            depends = isinstance(held, torch.Tensor) and any(isinstance(s, torch.SymInt) for s in held.shape)
            # scales and weights of norms go with the keys
            return ("computed", self.computations(node)) if depends else "constant"
        args = arguments(node)
        if is_operator(node, "graphopt.rotary"):
            angles = self.computations(args["cos"]), self.computations(args["sin"])
            return "rotary", args["interleaved"], angles, self._form(args["x"])
        if has(node, Trait.RESHAPE | Trait.REORDER | Trait.REPEAT | Trait.IDENTITY | Trait.CAST | Trait.NORM):
            return self._form(node.args[0])  # type: ignore[arg-type]
        plain = [a for a in (*node.args, *node.kwargs.items()) if not isinstance(a, fx.Node)]
        settings = [str(a) for a in plain if "%" not in str(a) and not isinstance(a, (list, tuple))]
        return operator_name(node.target), settings, [self._form(n) for n in node.all_input_nodes]

    def _moves_alone(self, node: fx.Node) -> bool:
        """Tell whether nothing but norms and movement lies between a value and its projection."""
        while not has(node, Trait.MIXING):
            inputs = [n for n in node.all_input_nodes if n in self.of_tokens]
            passing = Trait.VIEW | Trait.IDENTITY | Trait.CAST | Trait.NORM
            if len(inputs) != 1 or not has(node, passing):
                return False
            node = inputs[0]
        return True

    def _masks(self, theirs: dict[str, Any], own: dict[str, Any], name: str) -> str:
        if theirs["causal"] != own["causal"]:
            return f"one of it and {name} sees later tokens, the other does not"
        for what in ("key_mask", "segments", "visible"):
            if theirs[what] is not own[what]:
                return f"it hides other keys than {name} ({what})"
        if (theirs["sinks"] is None) != (own["sinks"] is None):
            return f"one of it and {name} has sinks, the other has none"
        biases = theirs["bias"], own["bias"]
        if biases[0] is biases[1]:
            return ""
        if not all(isinstance(b, fx.Node) and b not in self.of_tokens for b in biases) or (
            self.computations(biases[0]) != self.computations(biases[1])
        ):
            return f"its scores get another bias than those of {name}"
        return ""


def _leaf(program: Program, node: fx.Node) -> Any:
    """Return what a node is told apart by: a weight by its values if it has any, a size by what it is, an input by name."""
    if isinstance(node.meta.get("val"), torch.SymInt):
        return str(expression(node.meta["val"]))
    if node.op == "call_function":
        return None
    weight = program.weights.get(node.name)
    if weight is None or isinstance(weight.source, Absent):
        return node.name
    return digest(weight.source.load())


def _sizes(theirs: dict[str, Any], own: dict[str, Any], name: str) -> str:
    for what, label in (("k", "keys"), ("v", "values")):
        first, second = theirs[what].meta["val"], own[what].meta["val"]
        if str(first.shape[1]) != str(second.shape[1]):
            return f"it has {second.shape[1]} key-value heads, {name} has {first.shape[1]}"
        if str(first.shape[3]) != str(second.shape[3]):
            return f"its {label} have {second.shape[3]} entries, those of {name} have {first.shape[3]}"
        if first.dtype != second.dtype:
            return f"its {label} are {second.dtype}, those of {name} are {first.dtype}".replace("torch.", "")
        if any(expression(a) != expression(b) for a, b in zip(first.shape, second.shape, strict=True)):
            return f"its {label} are of other tokens than those of {name}"
    return ""


def _window(theirs: int | None, own: int | None, name: str) -> str:
    if theirs is None or (own is not None and own <= theirs):
        return ""
    seen = "all tokens" if own is None else f"{own} tokens"
    return f"it sees {seen}, while {name}, whose keys it would read, has a window of {theirs}"


__all__ = ["Likeness"]
