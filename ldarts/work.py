"""What a search step asks of a GPU: kernel launches and bytes, counted without one.

The step runs on PyTorch's `meta` device, whose tensors have shapes and no values: to read one back, or to mix
devices, is an error. Every operator call is counted by what a GPU has to do at least:

    launches   1; views, metadata and calls whose results have no elements 0; the backward pass of a
               convolution 1 for each gradient; a foreach call or a fused optimizer 1 for as many tensors as
               fit, or 1 for each where their layouts differ, as in PyTorch 2.13 with CUDA 13; operators of
               csrc/ as LAUNCHES says
    bytes      of the tensors that it reads and of those that it writes, each once; of an expanded tensor what
               is there
    seconds    of each call the longer of launches · 2 µs, as in a CUDA graph, and bytes / 3 TB/s
"""
import collections
import math
import re
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Iterator, Sequence
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .architect import Architect, search_step
from .model_search import SearchNetwork

LAUNCH_SECONDS, BYTES_PER_SECOND = 2e-6, 3e12
FOREACH = (770, 448, 336, 252, 210)  # tensors a launch, by the number of lists (MultiTensorApply.cuh)
CHUNKS, CHUNK = 2240, 65536  # a launch, of so many elements
# Partial sums and their sum.
LAUNCHES = dict.fromkeys(("mixed_dot", "mixed_grads", "channel_sums", "term_gradients",
                          "term_gradients_backward"), 2)
UNREAD = re.compile("copy_$|fill_$|zero_$|_like$|::new_")  # operators that do not read their own tensor


def like_each(likes: Sequence[Tensor], mask: Sequence[bool]) -> list[Tensor | None]:
    return [torch.empty_like(like) if asked else None for like, asked in zip(likes, mask)]


def in_layout_of(weight: Tensor, t: Tensor) -> Tensor:
    last = weight.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(t, memory_format=torch.channels_last if last else torch.contiguous_format)


STAND_INS = {  # results of operators whose form on the meta device is slow, missing, or not that of cuDNN
    "_fused_sgd_": lambda *_, **__: None,
    "native_batch_norm": lambda x, *_: (torch.empty_like(x), *x.new_empty(2, x.shape[1]).unbind()),
    "native_batch_norm_backward": lambda _, x, *rest: like_each((x, rest[3], rest[3]), rest[-1]),
    "convolution": lambda x, weight, *rest: in_layout_of(weight, torch.convolution(x, weight, *rest)),
    "convolution_backward": lambda _, x, weight, *rest: like_each((in_layout_of(weight, x), weight, None),
                                                                  rest[-1]),
}


class Work(TorchDispatchMode):
    """Counts the operator calls within; calls: name -> [calls, launches, bytes, seconds].

    Raises RuntimeError where an operator reads a tensor of the host beside one of the meta device.
    """

    def __init__(self):
        super().__init__()
        self.calls = collections.defaultdict(lambda: [0, 0, 0, 0.0])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        found = STAND_INS.get(name, func)(*args, **kwargs)
        given = tensors([args, *kwargs.values()])
        devices = {t.device.type for t in [*(t for t in given if t.dim()), *tensors(found)]}
        if len(devices) > 1:
            raise RuntimeError(f"{name} mixes devices: {', '.join(sorted(devices))}")
        if devices == {"meta"} and not func.is_view and "empty" not in name:
            launches, size = launches_of(name, args, found), bytes_of(func, args, kwargs, found)
            seconds = max(launches * LAUNCH_SECONDS, size / BYTES_PER_SECOND)
            for i, value in enumerate((1, launches, size, seconds)):
                self.calls[name][i] += value
        return found

    def total(self) -> tuple[int, int, float]:
        """Launches, bytes and seconds."""
        return tuple(sum(column) for column in zip(*self.calls.values()))[1:]


def tensors(tree: Any) -> list[Tensor]:
    """Those in lists and tuples of arguments or results."""
    if isinstance(tree, (list, tuple)):
        return [t for branch in tree for t in tensors(branch)]
    return [tree] if isinstance(tree, Tensor) else []


def launches_of(name: str, args: tuple, found: Any) -> int:
    if name.startswith(("_foreach_", "_fused_")):
        lists = [one for one in map(tensors, (*args, found)) if one]
        return foreach_launches([one for one in lists if one[0].shape == lists[0][0].shape])
    if (results := tensors(found)) and not any(t.numel() for t in results):
        return 0
    return len(tensors(found)) if name == "convolution_backward" else LAUNCHES.get(name, 1)


def bytes_of(func: Callable, args: tuple, kwargs: dict, found: Any) -> int:
    """What an operator call reads and writes."""
    read, written = {}, {id(t): t for t in tensors(found)}
    for i, argument in enumerate(func._schema.arguments):
        value = tensors(args[i] if i < len(args) else kwargs.get(argument.name))
        writes = argument.alias_info is not None and argument.alias_info.is_write
        written |= {id(t): t for t in value if writes}
        if not UNREAD.search(func._schema.name) or argument.name != "self":
            read |= {id(t): t for t in value}
    return sum(t.element_size() * math.prod(n for n, step in zip(t.shape, t.stride()) if step)
               for t in (*read.values(), *written.values()))


def foreach_launches(lists: Sequence[Sequence[Tensor]]) -> int:
    """lists: all of one call, results included"""
    def layout(t: Tensor) -> list[int]:
        return [step for n, step in zip(t.shape, t.stride()) if n > 1]

    if any(layout(t) != layout(of_place[0]) for of_place in zip(*lists) for t in of_place):
        return len(lists[0])
    chunks = sum(math.ceil(t.numel() / CHUNK) for t in lists[0])
    return max(math.ceil(len(lists[0]) / FOREACH[len(lists) - 1]), math.ceil(chunks / CHUNKS))


def step_on_meta(space: str, C: int, layers: int, batch_size: int, size: int = 32) -> Callable[..., None]:
    """-> a function that takes the step of train_search.py, on images of size x size, with further arguments
    of search_step: unrolled, hessian, kind, method."""
    net = SearchNetwork(C, 10, layers, space).to("meta", memory_format=torch.channels_last)
    with torch.device("meta"):
        x = torch.empty(batch_size, 3, size, size).contiguous(memory_format=torch.channels_last)
        batch = x, torch.empty(batch_size, dtype=torch.int64)
        rate, lambda_t = torch.empty(()), torch.empty(())
    optimizer = torch.optim.SGD(net.weight_parameters(), 0.025, 0.9, weight_decay=3e-4, fused=True)
    optimizer.param_groups[0]["lr"] = rate  # which the constructor would read
    arch = Architect(net, F.cross_entropy)

    def step(**options) -> None:
        with as_on_a_gpu():
            search_step(arch, optimizer, batch, batch, alpha_first=space != "nasbench201", lambda_t=lambda_t,
                        epsilon=1e-4, grad_clip=5.0, **options)

    return step


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within, PyTorch takes its foreach and fused ways on the meta device too."""
    with ExitStack() as stack:
        for kind, module in (("foreach", "utils._foreach_utils"), ("fused", "optim.optimizer")):
            name = f"torch.{module}._get_{kind}_kernels_supported_devices"
            stack.enter_context(mock.patch(name, lambda: ["cuda", "meta"]))
        yield
