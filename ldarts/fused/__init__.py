"""The engine: what `model_search` defines, computed faster. Its door is `runner`.

    build, toolkit   compile and load csrc/
    recognise        what a module is, by its contents
    mixed_sum        the weighted sum
    normalised_sum   a node as one sum of terms behind batch norms
    separable        the separable convolutions that leave a state
    cell             a cell by all of these

LDARTS_FUSED=off in the environment shuts the door: every module runs as it is.
"""
import weakref
from typing import Any, Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .cell import CellPlan, Plan, State, make_plan
from .mixed_sum import compiled_for, mixed_sum
from .recognise import Reader, Unrecognised

__all__ = ["compiled_for", "coverage", "engine_supports", "mixed_sum", "runner"]


def runner(x: Tensor) -> Callable[..., Tensor]:
    """run, for one pass of a network that reads x: run(module, *inputs) is module(*inputs), computed by the
    engine where it recognises the module."""
    return Pass() if engine_supports(x) else run_plainly


def run_plainly(module: nn.Module, *inputs: Any) -> Any:
    return module(*inputs)


def engine_supports(x: Tensor) -> bool:
    """Whether the engine may compute a pass that reads x. Not where PyTorch watches or transforms every call:
    global hooks, tracing and export, torch.func and forward-mode derivatives, autocast on a CPU."""
    return (compiled_for(x.device.type) and not _has_any_global_hook()
            and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
            and torch._C._functorch.peek_interpreter_stack() is None
            and torch.autograd.forward_ad._current_level < 0
            and not (x.device.type == "cpu" and torch.is_autocast_enabled("cpu")))


class Pass:
    """run(module, *inputs) of one pass; it keeps what several modules read, the ReLU of a cell's output."""

    def __init__(self):
        self.states: dict[int, State] = {}

    def __call__(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        plan = plan_of(module) if module.training else None
        if not isinstance(plan, Plan) or not plan.fits(*inputs):
            return module(*inputs)
        return plan.run(lambda x: self.states.setdefault(id(x), State(x)), *inputs)


# Module -> what was read for its plan, and the plan or why there is none. Derived, and checked at every use.
_PLANS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def plan_of(module: nn.Module) -> Plan | str:
    """How the engine computes a module, or why it does not. Made again when the module has changed."""
    reader, plan = _PLANS.get(module, (None, None))
    if reader is None or not reader.unchanged():
        reader = Reader()
        try:
            plan = make_plan(module, reader)
        except Unrecognised as reason:
            name = type(module).__name__
            plan = name if str(reason) == name else f"{name} with {reason}"
        _PLANS[module] = reader, plan
    return plan


def coverage(cells: Sequence[nn.Module]) -> str:
    """How many operations of these cells the engine computes in training; why not the first of the others.

    cells: those of a supernet, in training mode.
    """
    plans = [plan_of(cell) for cell in cells]
    planned = [plan for plan in plans if isinstance(plan, CellPlan)]
    text = (f"{sum(plan.recognised for plan in planned)} of {sum(plan.operations for plan in planned)} "
            "operations run in the engine")
    if refused := [plan for plan in plans if not isinstance(plan, CellPlan)]:
        text += f"; {len(refused)} of {len(plans)} cells run as they are, {refused[0]}"
    if refusals := [refusal for plan in planned for refusal in plan.refusals]:
        text += f"; {refusals[0]} runs as it is"
    return text
