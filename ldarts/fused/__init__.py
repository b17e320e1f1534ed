"""The engine: what `model_search` defines, computed faster. Its door is `Engine.runner`.

Reading order: build, recognise, sums, normalised_sum, separable, leaving, cell.

"The gradient by x", in code `by_x`, is that with respect to x. LDARTS_FUSED=off in the environment shuts the
door: every module runs as it is.
"""
import weakref
from typing import Any, Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..operations import Zero
from .cell import Plan, make_plan
from .leaving import State
from .recognise import AS_IMPORTED, Reader, Unrecognised, pytorch
from .sums import compiled_for, mixed_sum, transformed

__all__ = ["Engine", "compiled_for", "engine_supports", "mixed_sum"]


def engine_supports(x: Tensor) -> bool:
    """Whether the engine may compute a pass that reads x. Not where somebody watches or transforms every call
    of PyTorch: other types of tensors, global hooks and patches, tracing and export, torch.func, forward
    mode, autocast on a CPU.

    FlopCounterMode hooks all modules, so it counts the plain form. A dispatch mode without hooks sees the
    engine's operators instead of PyTorch's: use LDARTS_FUSED=off with it.
    """
    return (type(x) in (Tensor, nn.Parameter) and compiled_for(x.device.type) and is_unwatched()
            and all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
            and not torch.compiler.is_compiling() and not torch.jit.is_tracing() and not transformed()
            and not (x.device.type == "cpu" and torch.is_autocast_enabled("cpu")))


def is_unwatched() -> bool:
    """Whether nobody has replaced a part of PyTorch that a pass calls, or hooked all modules."""
    return pytorch() == AS_IMPORTED and not _has_any_global_hook()


class Engine:
    """How the engine computes the modules of one network. devices: the types of device on which it does"""

    def __init__(self, devices: Sequence[str] = ("cpu", "cuda")):
        self.devices = devices
        self._plans = weakref.WeakKeyDictionary()  # of each module its Reader and Plan, checked at every use

    def __reduce__(self):  # a copy of a network has other modules
        return Engine, (self.devices,)

    def runner(self, x: Tensor) -> Callable[..., Tensor]:
        """run, for one pass of a network that reads x: run(module, *inputs) is module(*inputs), computed by
        the engine where it recognises the module."""
        supported = isinstance(x, Tensor) and x.device.type in self.devices and engine_supports(x)
        return Pass(self, x.device.type) if supported else run_plainly

    def plan_of(self, module: nn.Module) -> Plan:
        """How a module is computed. Made again when the module has changed."""
        reader, plan = self._plans.get(module, (None, None))
        if reader is None or not reader.unchanged():
            reader = Reader()
            try:
                plan = make_plan(module, reader)
            except Unrecognised as reason:
                plan = Plan(reason.of(module))
            except Exception as error:  # a module that lacks the usual parts
                plan = Plan(f"{type(module).__name__}, which cannot be read ({error!r})")
            self._plans[module] = reader, plan
        return plan

    def coverage(self, cells: Sequence[nn.Module]) -> str:
        """How many operations of these cells the engine computes; why the first of the others runs as it is.

        cells: those of a network, in training mode; blocks of other kinds do not count.
        """
        plans = [self.plan_of(cell) for cell in cells if count_operations(cell)]
        refusals = [reason for plan in plans for reason in plan.refusals]
        operations = sum(map(count_operations, cells))
        if not is_unwatched():
            return f"0 of {operations} operations run in the engine; PyTorch is patched or has a global hook"
        text = f"{sum(plan.recognised for plan in plans)} of {operations} operations run in the engine"
        return f"{text}; {refusals[0]} runs as it is, slower" if refusals else text


class Pass:
    """run(module, *inputs) of one pass. Keeps what several modules read: the ReLU of a cell's output."""

    def __init__(self, engine: Engine, device: str):
        """device: the type of those on which it was asked whether the engine computes"""
        self.engine, self.device = engine, device
        self.states: dict[tuple, State] = {}

    def __call__(self, module: nn.Module, *inputs: Any) -> Tensor:
        devices = {x.device for x in inputs if isinstance(x, Tensor)}
        if module.training and [device.type for device in devices] == [self.device]:
            plan = self.engine.plan_of(module)
            if plan.fits(*inputs):
                return plan.run(self.state_of, *inputs)
        return module(*inputs)

    def state_of(self, x: Tensor) -> State:
        """The State of x: a new one for another tensor, after a change of x in place, and where autograd does
        other things with what is computed from x: no gradients, or a checkpoint, which computes again."""
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return State(x)
        version = 0 if x.is_inference() else x._version
        modes = x.requires_grad, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return self.states.setdefault((id(x), version, *modes), State(x))


def count_operations(cell: nn.Module) -> int:
    """All but `none`, on the edges of a cell of model_search or model; 0 for other modules."""
    by_name = getattr(cell, "edges", None)
    of_attributes = getattr(cell, "_ops", by_name.values() if isinstance(by_name, nn.ModuleDict) else ())
    edges = cell if isinstance(cell, nn.ModuleList) else of_attributes
    of_edges = (edge if isinstance(edge, nn.ModuleList) else getattr(edge, "_ops", [edge]) for edge in edges)
    return sum(not isinstance(op, Zero) for ops in of_edges for op in ops)


def run_plainly(module: nn.Module, *inputs: Any) -> Any:
    return module(*inputs)
