"""What a search step asks of a GPU: kernel launches and bytes, counted without a GPU.

    python tests/evidence/gpu_work.py [--search_space darts --lambda_grad exact --no-unrolled --json]

The step runs on PyTorch's `meta` device, whose tensors have shapes but no values: reading a value back and
mixing devices are errors. LDARTS_FUSED=off in the environment counts the plain form. A call of an operator
counts as what a GPU has to do at least:

    launches   1; 0 for views, metadata, and calls whose results have no elements; for the backward pass of a
               convolution 1 for each gradient; for a foreach call or a fused optimizer 1 for as many tensors
               as fit, or 1 for each if their layouts differ, as in PyTorch 2.13 with CUDA 13; for operators
               of csrc/ the number in LAUNCHES
    bytes      of the tensors that are read and of those that are written, each once; of an expanded tensor
               what it stores
    seconds    for each call the larger of launches · 2 µs, as in a CUDA graph, and bytes / 3 TB/s
"""
import argparse
import collections
import json
import math
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[2]))
from ldarts.architect import Architect, search_step  # noqa: E402
from ldarts.fused import Engine, compiled_for  # noqa: E402
from ldarts.model_search import SearchNetwork  # noqa: E402

LAUNCH_SECONDS, BYTES_PER_SECOND = 2e-6, 3e12
FOREACH = (770, 448, 336, 252, 210)  # tensors a launch, by the number of lists (MultiTensorApply.cuh)
CHUNKS, CHUNK = 2240, 65536  # a launch, of so many elements
LAUNCHES = {"channel_sums": 2}  # partial sums and their sum
KINDS = {  # of operations, by what their names contain
    "separable convolutions": ("separable_",),
    "other convolutions": ("conv", "mm"),
    "batch norm": ("batch_norm", "norm_statistics", "norm_gradients", "norm_derivatives", "lerp"),
    "sums of nodes": ("channel_sums", "affine_sums"),
    "pools": ("pool",), "ReLU": ("relu", "clamp_min", "threshold"), "optimizers": ("foreach", "sgd", "adam"),
    "copies and zeros": ("copy", "cat", "fill", "zero", "empty", "clone"),
    "other additions": ("add",), "other": ("",),
}
UNREAD = re.compile("copy_$|fill_$|zero_$|_like$|::new_")  # operators that do not read their own tensor


if compiled_for("meta"):  # what the operators of csrc/norms.cpp return, for tensors without values
    @torch.library.register_fake("ldarts::norm_statistics")
    def _(z_sums, has_norm, p, beta, z_of_term, count, eps):
        of_z = [p.new_empty(len(has_norm), 2, z_sums.shape[2]) for _ in range(2)]
        return *of_z, p.new_empty(len(z_of_term), 2, z_sums.shape[2])

    @torch.library.register_fake("ldarts::norm_gradients")
    def _(rstd_mean, p, grad_rstd_mean, sums, z_of_term, has_norm, count):
        C = rstd_mean.shape[2]
        return p.new_empty(len(p), C), p.new_empty(len(has_norm), 2, C), torch.empty_like(p)

    @torch.library.register_fake("ldarts::norm_derivatives")
    def _(rstd_mean, p, grad_rstd_mean, sums, grad_scale, grad_of_z, grad_p, z_of_term, has_norm, count):
        return tuple(map(torch.empty_like, (rstd_mean, p, rstd_mean, sums)))


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
    """Counts the operator calls in its context; calls: name -> [calls, launches, bytes, seconds].

    Raises RuntimeError if an operator mixes tensors of the CPU and of the meta device.
    """

    def __init__(self):
        super().__init__()
        self.calls = collections.defaultdict(lambda: [0, 0, 0, 0.0])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        result = STAND_INS.get(name, func)(*args, **kwargs)
        inputs = [t for t in tensors((args, kwargs)) if t.dim()]
        devices = {t.device.type for t in [*inputs, *tensors(result)]}
        if len(devices) > 1:
            raise RuntimeError(f"{name} mixes devices: {', '.join(sorted(devices))}")
        if devices == {"meta"} and not func.is_view and "empty" not in name:
            launches, size = launches_of(name, args, result), bytes_of(func, args, kwargs, result)
            counts = 1, launches, size, max(launches * LAUNCH_SECONDS, size / BYTES_PER_SECOND)
            self.calls[name] = [a + b for a, b in zip(self.calls[name], counts)]
        return result

    def total(self) -> tuple[int, int, float]:
        """Launches, bytes and seconds."""
        return tuple(sum(column) for column in zip(*self.calls.values()))[1:]


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def launches_of(name: str, args: tuple, result: Any) -> int:
    if name.startswith(("_foreach_", "_fused_")):
        lists = [tensor_list for tensor_list in map(tensors, (*args, result)) if tensor_list]
        return foreach_launches([own for own in lists if own[0].shape == lists[0][0].shape])
    results = tensors(result)
    if results and not any(t.numel() for t in results):
        return 0
    return len(results) if name == "convolution_backward" else LAUNCHES.get(name, 1)


def bytes_of(func: Callable, args: tuple, kwargs: dict, result: Any) -> int:
    """The bytes that a call reads and writes."""
    read, written = {}, {id(t): t for t in tensors(result)}
    for i, argument in enumerate(func._schema.arguments):
        value = tensors(args[i] if i < len(args) else kwargs.get(argument.name))
        writes = argument.alias_info is not None and argument.alias_info.is_write
        written |= {id(t): t for t in value if writes}
        if not UNREAD.search(func._schema.name) or argument.name != "self":
            read |= {id(t): t for t in value}
    return sum(t.element_size() * math.prod(n for n, step in zip(t.shape, t.stride()) if step)
               for t in (*read.values(), *written.values()))


def foreach_launches(lists: Sequence[Sequence[Tensor]]) -> int:
    """Launches of a foreach call. lists: its lists of tensors, results included"""
    def layout(t: Tensor) -> list[int]:
        return [step for n, step in zip(t.shape, t.stride()) if n > 1]

    if any(layout(t) != layout(row[0]) for row in zip(*lists) for t in row):
        return len(lists[0])
    chunks = sum(math.ceil(t.numel() / CHUNK) for t in lists[0])
    return max(math.ceil(len(lists[0]) / FOREACH[len(lists) - 1]), math.ceil(chunks / CHUNKS))


def step_on_meta(space: str, C: int, layers: int, batch_size: int, size: int = 32) -> Callable[..., None]:
    """A function that runs the step of train_search.py on images of size x size. Its keyword arguments are
    those of search_step: unrolled, hessian, kind, method."""
    net = SearchNetwork(C, 10, layers, space).to("meta", memory_format=torch.channels_last)
    net.engine = Engine(["meta"])
    with torch.device("meta"):
        x = torch.empty(batch_size, 3, size, size).contiguous(memory_format=torch.channels_last)
        batch = x, torch.empty(batch_size, dtype=torch.int64)
        rate, lambda_t = torch.empty(()), torch.empty(())
    optimizer = torch.optim.SGD(net.weight_parameters(), 0.025, 0.9, weight_decay=3e-4, fused=True)
    optimizer.param_groups[0]["lr"] = rate  # the constructor would read a tensor
    arch = Architect(net, F.cross_entropy)

    @as_on_a_gpu()
    def step(**options) -> None:
        search_step(arch, optimizer, batch, batch, alpha_first=space != "nasbench201", lambda_t=lambda_t,
                    epsilon=1e-4, grad_clip=5.0, **options)

    return step


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """In this context PyTorch uses its foreach and fused implementations on the meta device too."""
    names = "utils._foreach_utils._get_foreach", "optim.optimizer._get_fused"
    foreach, fused = (mock.patch(f"torch.{name}_kernels_supported_devices", lambda: ["cuda", "meta"])
                      for name in names)
    with foreach, fused:
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--search_space", default="darts")
    parser.add_argument("--layers", type=int, help="default 8, in nasbench201 5 a stage")
    parser.add_argument("--init_channels", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--unrolled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--hessian", choices=("central", "exact"), default="central")
    parser.add_argument("--lambda_grad", choices=("none", "central", "exact"), default="central")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    layers = args.layers or (5 if args.search_space == "nasbench201" else 8)
    step = step_on_meta(args.search_space, args.init_channels, layers, args.batch_size)
    method = None if args.lambda_grad == "none" else args.lambda_grad
    for unrolled, step_method in ((False, None), (args.unrolled, method)):  # the first makes optimizer state
        with Work() as work:
            step(unrolled=unrolled, hessian=args.hessian, kind="cosine", method=step_method)
    launches, size, least = work.total()
    kinds: dict[str, list[float]] = {}
    for name, counts in work.calls.items():
        kind = next(kind for kind, words in KINDS.items() if any(word in name for word in words))
        kinds[kind] = [a + b for a, b in zip(kinds.get(kind, [0, 0, 0]), counts[1:])]
    form = "fused" if compiled_for("meta") else "plain"
    if args.json:
        print(json.dumps({"launches": launches, "bytes": size, "least_seconds": least, "kinds": kinds,
                          "form": form, "torch": torch.__version__}))
        return
    print(f"{form}, counted on shapes, not run: {launches} launches, {size / 1e9:.1f} GB, at least "
          f"{1e3 * least:.0f} ms at 2 µs a launch and 3 TB/s")
    for kind, (launches, size, least) in sorted(kinds.items(), key=lambda kind: -kind[1][2]):
        print(f"{launches:8d} {size / 1e9:8.1f} GB {1e3 * least:7.1f} ms  {kind}")


if __name__ == "__main__":
    main()
