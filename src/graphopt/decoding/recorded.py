"""Steps of fixed shapes, recorded once as CUDA graphs and replayed: one launch instead of one per kernel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch

from .running import Running
from .step import Step

RECORDED = 64
"""Steps of more tokens (prompts) are not recorded, because launches do not dominate their time."""

Outputs = dict[str, torch.Tensor]


class Recorder(ABC):
    """Runs steps in which only values change: they read whole caches, and masks select the visible slots.

    A step is recorded again for other shapes or outputs, or if the caches have moved in memory.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], tuple[list[torch.Tensor], Callable[[], Outputs]]] = {}

    def run(self, running: Running, step: Step, inputs: Mapping[str, torch.Tensor]) -> Outputs:
        """Return the outputs of one step.

        Args:
            running: the graph.
            step: over the whole capacity, without a ``start``.
            inputs: by name.
        """
        values = [step.positions, step.slots, *inputs.values()]
        if step.step_mask is not None:
            values.append(step.step_mask)
        addresses = tuple(buffer.data_ptr() for buffer in step.buffers.values())
        key = (id(running), addresses, step.step_mask is None, *((tuple(v.shape), v.dtype) for v in values))
        if key not in self._known:
            static_inputs = [value.clone() for value in values]
            named = dict(zip(inputs, static_inputs[2:], strict=False))
            mask = None if step.step_mask is None else static_inputs[-1]

            def compute() -> Outputs:
                # a new Step each time, because it computes visibility only once
                fixed = Step(step.buffers, static_inputs[0], static_inputs[1], step.limit, None, mask)
                return running(fixed, named)

            self._known[key] = (static_inputs, self.record(compute))
        static_inputs, replay = self._known[key]
        for static_input, value in zip(static_inputs, values, strict=True):
            static_input.copy_(value)
        return {name: value.clone() for name, value in replay().items()}

    @abstractmethod
    def record(self, compute: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """Return a function that repeats the computation on the same input and output memory."""


class CudaRecorder(Recorder):
    """Records CUDA graphs."""

    def record(self, compute: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """Run the step on a side stream, so that libraries choose their kernels, then record it."""
        warm_up = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            for _ in range(2):
                compute()
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = compute()

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay
