"""A training step as one CUDA graph: thousands of kernels of a few microseconds each, launched at once."""
from typing import Any, Callable, Sequence

import torch
from torch import Tensor


class Captured:
    """Calls step(*inputs), captured on its first call as a CUDA graph that later calls replay.

    step: from tensors that keep their shapes to any structure of tensors, without waiting for the device; it
    changes no tensors but those that `state` lists. Numbers that change between calls have to be tensors.
    state: () -> those tensors, of which an optimizer may add some, all zero, in its first step
    The result lies in the same memory after every call.
    """

    def __init__(self, step: Callable[..., Any], state: Callable[[], Sequence[Tensor]]):
        self.step, self.state = step, state
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        if self.graph is None:
            self._capture(inputs)
        for held, given in zip(self.inputs, inputs):
            held.copy_(given)
        self.graph.replay()
        return self.result

    def _capture(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = [t.clone() for t in inputs]
        before = {id(t): t.detach().clone() for t in self.state()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose and load their kernels, which a capture may not do
                self.step(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():  # as if nothing had been
            for t in self.state():
                t.copy_(before[id(t)]) if id(t) in before else t.zero_()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = self.step(*self.inputs)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What a step of the optimizer changes beside the parameters."""
    return [t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
