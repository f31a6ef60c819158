"""Effects of removing layers on the checkpoint: tensors that go, and layers that are renumbered."""

from __future__ import annotations

import re

from torch import fx

from ...ir.export_blockers import block_export
from ...ir.facts import RemovedLayers, note_checkpoint
from ...ir.program import Program
from ...ir.running.readers import readers
from ..shared.unread_weights import weights_of

_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


def forget_removed(
    program: Program, before: set[fx.Node], names: list[set[str]], removed: list[int], *, whole_layers: bool
) -> None:
    """Drop the tensors that nothing reads any more, and record how the remaining layers are renumbered.

    Args:
        program: the program after the removal.
        before: weights that were read before it.
        names: the checkpoint's names by layer, before the removal.
        removed: numbers of the removed layers.
        whole_layers: whether whole layers were removed, so that a checkpoint can renumber the others.
    """
    unread = {node for node in before if not readers(program, node)}
    mapping_nodes: list[fx.Node] = []
    for name, node in list(program.checkpoint.items()):
        if node.op == "call_function" and weights_of(program, node) and weights_of(program, node) <= unread:
            # the weight mapping of a fused or scaled weight that was removed with its layer
            del program.checkpoint[name]
            mapping_nodes.append(node)
        elif (node in before and not node.users) or _feeds_only_dead_nodes(program, node, before):
            del program.checkpoint[name]
    program.edit.erase_dead(mapping_nodes)
    removed_weights = [node for node in before if not node.users and node not in program.checkpoint.values()]
    for node in removed_weights:
        program.edit.remove_weight(node)
    renumbered = numbering(names, removed) if whole_layers else None
    if renumbered is None:
        block_export(
            program,
            (
                "parts of layers were removed, which no configuration can express"
                if not whole_layers
                else "the checkpoint's names do not number its layers"
            ),
        )
        return
    note_checkpoint(program, removed_layers=tuple(renumbered))


def _feeds_only_dead_nodes(program: Program, node: fx.Node, before: set[fx.Node]) -> bool:
    """Tell whether a tensor only feeds dead nodes, such as a joined weight that was removed."""
    if node.op != "placeholder" or node not in before or not node.users:
        return False
    work, seen = list(node.users), set()
    while work:
        user = work.pop()
        if user in seen:
            continue
        seen.add(user)
        if user.op == "output" or user in program.checkpoint.values():
            return False
        if not user.users:
            continue
        work.extend(user.users)
    return all(u.users or u.op == "call_function" for u in seen) and not any(u.op == "output" for u in seen)


def numbering(names: list[set[str]], removed: list[int]) -> list[RemovedLayers] | None:
    """Return, for each stack of layers, the prefix before the number, how many there were, and which are removed.

    None if the names do not distinguish layers by a number.
    """
    stacks: dict[str, dict[int, int]] = {}
    for layer, members in enumerate(names):
        prefix_and_number = _prefix_and_number(members)
        if prefix_and_number is None:
            return None
        prefix, number = prefix_and_number
        stacks.setdefault(prefix, {})[number] = layer
    plan = []
    for prefix, layers in stacks.items():
        removed_numbers = sorted(number for number, layer in layers.items() if layer in removed)
        if sorted(layers) != list(range(len(layers))):
            return None
        if removed_numbers:
            plan.append(RemovedLayers(prefix, len(layers), tuple(removed_numbers)))
    return plan


def _prefix_and_number(members: set[str]) -> tuple[str, int] | None:
    """Return the prefix up to the layer's number that all of a layer's names share, and the number; None if none."""
    candidates: dict[tuple[str, int], int] = {}
    for name in members:
        for match in _LAYER_NUMBER.finditer(name):
            key = (name[: match.start()], int(match.group()))
            candidates[key] = candidates.get(key, 0) + 1
    shared = [key for key, count in candidates.items() if count == len(members)]
    return min(shared, key=lambda key: len(key[0])) if shared else None
