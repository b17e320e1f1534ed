"""Loss and accuracy over steps and processes."""
from typing import Callable, Iterable

import torch
from torch import Tensor, nn

from ..distributed import Processes


class Meter:
    """Means of loss, accuracy and further numbers over all processes. They stay on the device until read."""

    def __init__(self, processes: Processes, means: int = 0):
        self.processes = processes
        # number of images; sums of loss, correct answers, further numbers
        self.totals = torch.zeros(3 + means, dtype=torch.float64, device=processes.device)

    def update(self, loss: Tensor, logits: Tensor, y: Tensor, means: Tensor | None = None) -> None:
        """loss: mean over y; logits [N, num_classes]; y [N]; means: the further numbers for this batch"""
        correct = (logits.detach().argmax(1) == y).double().mean()
        values = torch.stack([torch.ones_like(correct), loss.detach().double(), correct])
        self.totals += len(y) * (values if means is None else torch.cat([values, means.detach().double()]))

    def read(self) -> tuple[float, ...]:
        """(mean loss, accuracy in percent, mean of each further number)"""
        count, *sums = self.processes.gather(self.totals).sum(0).tolist()
        loss, correct, *means = (total / count for total in sums)
        return loss, 100 * correct, *means


@torch.no_grad()
def evaluate(net: Callable, criterion: nn.Module, batches: Iterable,
             processes: Processes) -> tuple[float, float]:
    """(loss, accuracy in percent) over the batches of all processes. net: x -> logits, in evaluation mode"""
    meter = Meter(processes)
    for x, y in batches:
        logits = net(x)
        meter.update(criterion(logits, y), logits, y)
    return meter.read()
