"""Steps of fixed shapes, recorded once as CUDA graphs and replayed: one launch instead of one for each kernel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch

from .running import Running, Step

RECORDED = 64
"""Steps of more tokens (prompts) are not recorded: launching is not what takes their time."""

Outputs = dict[str, torch.Tensor]


class Recorder(ABC):
    """Runs steps of which nothing but the values changes: caches whole, and what is seen of them told by masks.

    A step is recorded anew for other shapes, outputs, or caches that lie elsewhere in memory.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], tuple[list[torch.Tensor], Callable[[], Outputs]]] = {}

    def run(self, running: Running, step: Step, inputs: Mapping[str, torch.Tensor]) -> Outputs:
        """Return the outputs of one step.

        Args:
            running: the graph.
            step: of the whole capacity, without a ``start``.
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
                # a new one each time: what is seen is computed once for every step
                fixed = Step(step.buffers, static_inputs[0], static_inputs[1], step.limit, None, mask)
                return running(fixed, named)

            self._known[key] = (static_inputs, self.record(compute))
        static_inputs, replay = self._known[key]
        for static_input, value in zip(static_inputs, values, strict=True):
            static_input.copy_(value)
        return {name: value.clone() for name, value in replay().items()}

    @abstractmethod
    def record(self, compute: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """Return what computes the same again, from the same places in memory into the same."""


class CudaRecorder(Recorder):
    """Records CUDA graphs."""

    def record(self, compute: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """Run the step apart, so that libraries make their choices, then record it."""
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
