"""The processes that torchrun started, each on its share of every batch, or one alone; means over them all.

If one dies, the others fail in the next exchange. Running statistics are those of rank 0, as in torch's DDP.
If nodes do not find each other, name their network in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME. torchrun
forwards SIGUSR1 only with --signals-to-handle SIGTERM,SIGINT,SIGUSR1.
"""
import os
from datetime import timedelta
from typing import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import InputError, progress


class Processes:
    """`rank`, this process's number, and `world`, how many there are, by torchrun's environment.

    The constructor joins their group. CPU tensors always go through gloo, so that `largest` does not wait for
    a GPU.
    """

    def __init__(self, device: torch.device):
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0)) if self.world > 1 else 0
        self.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if self.world > 1:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            # The timeout is for a rank that hangs; one that dies is noticed at once.
            try:
                dist.init_process_group(backend, timeout=timedelta(minutes=10))
            except ValueError as error:  # a variable is missing
                raise InputError(f"{error}: start with torchrun, or unset WORLD_SIZE") from error

    def average(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor's mean over the processes, by one exchange (one dtype, one device); alone, itself."""
        if self.world == 1 or not tensors:
            return list(tensors)
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        means = flat.div_(self.world).split([t.numel() for t in tensors])
        # Parts of `flat` where that has the order of the tensor: thousands of copies would be launched.
        return [mean.as_strided(t.shape, t.stride()) if t.is_contiguous() else
                torch.empty_like(t).copy_(mean.view(t.shape)) for t, mean in zip(tensors, means)]

    def largest(self, *values: int) -> list[int]:
        """The largest of each value over the processes: how they agree on what to do next."""
        if self.world == 1:
            return list(values)
        agreed = torch.tensor(values)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return agreed.tolist()

    def gather(self, tensor: Tensor) -> Tensor:
        """tensor of one shape on every process -> [world, ...]"""
        if self.world == 1:
            return tensor[None]
        rows = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(rows, tensor)
        return torch.stack(rows)

    def take_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors of floats by those of rank 0."""
        floats = [t for t in tensors if t.is_floating_point()]
        if self.world > 1 and floats:
            flat = torch.cat([t.reshape(-1) for t in floats])
            dist.broadcast(flat, 0)
            for t, first in zip(floats, flat.split([t.numel() for t in floats])):
                t.copy_(first.view(t.shape))

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


class Meter:
    """Means of loss, accuracy and clipped steps over all processes. They stay on the device until read."""

    def __init__(self, processes: Processes):
        self.processes = processes
        # number of images; sums over images of loss, correct answers, clipped steps
        self.totals = torch.zeros(4, dtype=torch.float64, device=processes.device)

    def update(self, loss: Tensor, logits: Tensor, y: Tensor, clipped: Tensor | None = None) -> None:
        """loss: mean over y; logits [N, num_classes]; y [N]; clipped: [1], 1 if the gradient was clipped"""
        correct = (logits.detach().argmax(1) == y).double().mean()
        self.totals[:3] += len(y) * torch.stack([torch.ones_like(correct), loss.detach().double(), correct])
        if clipped is not None:
            self.totals[3:] += len(y) * clipped.detach().double()

    def read(self) -> tuple[float, float, float]:
        """(mean loss, accuracy in percent, share of clipped steps)"""
        count, loss, correct, clipped = self.processes.gather(self.totals).sum(0).tolist()
        return loss / count, 100 * (correct / count), clipped / count


@torch.no_grad()
def evaluate(net: nn.Module, criterion: nn.Module, batches: Iterable, processes: Processes,
             logits_of: Callable[[Tensor], Tensor] | None = None) -> tuple[float, float]:
    """(loss, accuracy in percent) over the batches of all processes, in evaluation mode, with the buffers of
    rank 0. logits_of: x -> logits, by default net"""
    net.eval()
    processes.take_from_first(net.buffers())
    meter = Meter(processes)
    for x, y in progress(batches, "evaluation: batch"):
        logits = (logits_of or net)(x)
        meter.update(criterion(logits, y), logits, y)
    return meter.read()[:2]
