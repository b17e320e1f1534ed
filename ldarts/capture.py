"""A training step as one CUDA graph: thousands of kernels of a few microseconds each, launched at once."""
import traceback
import warnings
from contextlib import ExitStack, contextmanager
from numbers import Number
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import torch
from torch import Tensor, nn


class Captured:
    """Calls step(*inputs, **options), captured on its first call as a CUDA graph that later calls replay.

    step: from tensors to any structure of tensors, without waiting for the device; it changes nothing but the
    parameters and buffers of `net` and the state of `optimizers`, which starts as zeros. Numbers that change
    from call to call are inputs; learning rates are read from the optimizers. A graph holds addresses and
    numbers: if one has changed since the capture (a weight was frozen, its data replaced, inputs have another
    shape, an option, a momentum or a number that is an attribute of net itself another value) the step is
    captured again. It does not see other numbers, nor that a parameter or buffer of net has become another
    object. warn: called once, with a line, if a capture fails; from then on step runs without a graph. Each
    call's result overwrites the one before.
    """

    def __init__(self, step: Callable[..., Any], net: nn.Module, optimizers: Sequence[torch.optim.Optimizer],
                 warn: Callable[[str], object] = warnings.warn):
        self.step, self.net, self.optimizers, self.warn = step, net, optimizers, warn
        self.net_tensors = [*net.parameters(), *net.buffers()]
        self.rates = self.held = self.graph = None
        self.failed = False

    def __call__(self, *inputs: Tensor, **options: Any) -> Any:
        with self._numbers_on_device(inputs[0].device):
            if not self.failed and self.held != self._holds(inputs, options):
                if reason := self._capture(inputs, options):
                    self.failed = True
                    self.warn(f"warning: the step can't be a CUDA graph ({reason}); it runs without one, "
                              "slower")
                self.held = self._holds(inputs, options)
            if self.failed:
                return self.step(*inputs, **options)
            torch._foreach_copy_(self.inputs, inputs)
            self.graph.replay()
            return self.result

    @contextmanager
    def _numbers_on_device(self, device: torch.device) -> Iterator[None]:
        """Within, learning rates are tensors of the device, and so is Adam's count of steps ("capturable").

        Outside, rates are the schedulers' numbers, so that a checkpoint does not depend on a graph's use.
        """
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        if self.rates is None:
            self.rates = [torch.zeros((), device=device) for _ in groups]
        with ExitStack() as at_end:
            for group, rate in zip(groups, self.rates, strict=True):
                changed = [name for name in ("lr", "capturable") if name in group]
                at_end.callback(group.update, {name: group[name] for name in changed})
                group["lr"] = rate.fill_(group["lr"])
                if "capturable" in group:
                    group["capturable"] = True
            yield

    def _holds(self, inputs: Sequence[Tensor], options: dict[str, Any]) -> tuple:
        """The addresses and numbers that a graph captured now would hold, and what is frozen."""
        groups = [{name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
                  for optimizer in self.optimizers for group in optimizer.param_groups]
        state = [(t.data_ptr(), t.requires_grad) for t in self._state()]
        numbers = [(name, value) for name, value in vars(self.net).items() if isinstance(value, Number)]
        return state, groups, numbers, options, [(t.shape, t.dtype) for t in inputs]

    def _state(self) -> list[Tensor]:
        """The tensors that a step may change."""
        states = [values for optimizer in self.optimizers for values in optimizer.state.values()]
        return self.net_tensors + [t for values in states for t in values.values() if isinstance(t, Tensor)]

    def _capture(self, inputs: Sequence[Tensor], options: dict[str, Any]) -> str:
        """Record the graph. Returns "", or the reason why that failed, with its line of code."""
        self.graph = self.result = None  # the memory of a graph before
        for optimizer in self.optimizers:
            for p, values in optimizer.state.items():
                if "step" in values:  # on the host if no graph was used so far
                    values["step"] = values["step"].to(p.device)
        self.inputs = [t.clone() for t in inputs]
        before = {id(t): t.detach().clone() for t in self._state()}
        device = inputs[0].device
        random_numbers = torch.cuda.get_rng_state(device)
        outside, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        stream.wait_stream(outside)
        with torch.cuda.stream(stream):  # torch.cuda.graph does not leave its stream if a capture fails
            for _ in range(3):  # libraries choose and load their kernels, which a capture may not do
                self.step(*self.inputs, **options)
            with torch.no_grad():  # undo these steps
                for t in self._state():
                    t.copy_(before[id(t)]) if id(t) in before else t.zero_()
            outside.wait_stream(stream)
            if not torch.equal(torch.cuda.get_rng_state(device), random_numbers):
                torch.cuda.set_rng_state(random_numbers, device)
                return "it draws random numbers, the same ones in all passes of a difference"
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=stream):  # which computes nothing
                    self.result = self.step(*self.inputs, **options)
            except RuntimeError as error:
                while error.__context__:  # the end of a failed capture hides its reason behind another
                    error = error.__context__
                code = traceback.extract_tb(error.__traceback__)[-1]
                return f"{Path(code.filename).name}:{code.lineno} {code.line}: {str(error).splitlines()[0]}"
        self.graph = graph
        return ""
