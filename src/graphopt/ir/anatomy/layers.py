"""Grouping of the blocks of streams into repeating layers."""

from __future__ import annotations

from collections.abc import Callable

from .blocks import Block, Layer, Stream

_POSITIONS = ("attention", "mixer")


def find_layers(streams: list[Stream], within: Callable[[Block], list[Stream]]) -> list[Layer]:
    """Return the layers of streams, of which no two contain the same block.

    The layers within a composite block are layers where there are several; a single one makes it a part of a layer
    of the stream around it.

    Args:
        streams: those outside of all blocks, or those within one block.
        within: the streams directly within a block.
    """
    layers: list[Layer] = []
    for stream in streams:
        pending: list[list[Block]] = []
        for step in _steps(stream):
            inner = [find_layers(within(b), within) for b in step if b.kind == "composite"]
            if any(len(found) > 1 for found in inner):
                layers += [*group_layers(pending), *(layer for found in inner for layer in found)]
                pending = []
            else:
                pending.append(step)
        layers += group_layers(pending)
    return layers


def _steps(stream: Stream) -> list[list[Block]]:
    """Return the blocks of a stream, those that share an addition together."""
    steps: list[list[Block]] = []
    for block in stream.blocks:
        if steps and steps[-1][0].add is block.add:
            steps[-1].append(block)
        else:
            steps.append([block])
    return steps


def group_layers(steps: list[list[Block]]) -> list[Layer]:
    """Return the layers of a stream: occurrences of the shortest pattern of blocks that repeats along all of it.

    Blocks that share an addition are never separated. Where nothing repeats, a layer begins at each block that
    mixes positions and follows a feed-forward.

    Args:
        steps: the blocks at each addition, in order.
    """
    marks = ["".join(sorted({mark for b in step for mark in _marks(b)})) for step in steps]
    for period in range(1, len(steps) // 2 + 1):
        if len(steps) % period == 0 and all(m == marks[i % period] for i, m in enumerate(marks)):
            return [_layer(steps[i : i + period]) for i in range(0, len(steps), period)]
    layers: list[list[list[Block]]] = []
    marked: list[str] = []
    for step, mark in zip(steps, marks, strict=True):
        has_ffn = bool(layers) and "F" in marked[-1]
        if not layers or ("T" in mark and (has_ffn or "F" not in "".join(marks))):
            layers.append([])
            marked.append("")
        layers[-1].append(step)
        marked[-1] += mark
    return [_layer(layer) for layer in layers]


def _marks(block: Block) -> set[str]:
    if block.kind == "composite":
        return {mark for inner in block.inner for mark in _marks(inner)}
    if block.kind in ("adapter", "connection"):
        return set()  # beside what makes a layer
    return {"T" if block.kind in _POSITIONS else "F"}


def _layer(steps: list[list[Block]]) -> Layer:
    return Layer([each for step in steps for block in step for each in _with_inner(block)])


def _with_inner(block: Block) -> list[Block]:
    return [*(each for inner in block.inner for each in _with_inner(inner)), block]
