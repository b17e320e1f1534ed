"""Loss and accuracy over steps and processes."""
from typing import Callable, Iterable

import torch
from torch import Tensor, nn

from ..distributed import Processes
from ..errors import progress


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
def evaluate(net: Callable, criterion: nn.Module, batches: Iterable,
             processes: Processes) -> tuple[float, float]:
    """(loss, accuracy in percent) over the batches of all processes. net: x -> logits, in evaluation mode"""
    meter = Meter(processes)
    for x, y in progress(batches, "evaluation: batch"):
        logits = net(x)
        meter.update(criterion(logits, y), logits, y)
    return meter.read()[:2]
