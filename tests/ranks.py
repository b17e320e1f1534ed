"""What test_distributed.py has two ranks compute: each writes <rank>.pt."""

import torch
import torch.nn.functional as F

from ldarts import Architect, SearchNetwork
from ldarts.architect import search_step
from ldarts.distributed import Processes

GRADIENTS = {
    "first order": lambda arch, train, valid: arch.alpha_grads(train, valid, 0.025, None, False),
    "second order": lambda arch, train, valid: arch.alpha_grads(train, valid, 0.025, None, True),
    "second order, exact":
        lambda arch, train, valid: arch.alpha_grads(train, valid, 0.025, None, True, "exact"),
    "no Λ": lambda arch, train, valid: list(weight_grads(arch, train, None)),
    **{f"Λ {kind}, {method}":
       lambda arch, train, valid, kind=kind, method=method: weight_grads(arch, train, method, kind)
       for kind in ("cosine", "sign") for method in ("central", "exact")},
    "Λ in a step": lambda arch, train, valid: list(arch.weight_grads(train, "cosine", 1e-3, "exact", 0.1).dw),
    "Λ of a batch": lambda arch, train, valid: [arch.alignment(arch.cell_gradients(train), "cosine")[0]],
}


def weight_grads(arch, batch, method, kind="cosine"):
    grads = arch.weight_grads(batch, kind, 1e-3, method)
    return [grads.loss, *grads.dw, *([] if method is None else [*grads.d_lambda, grads.alignment])]


def batch(seed):
    """Two images, as float64."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64),
            torch.randint(10, (2,), generator=generator))


def make(average=list):
    torch.manual_seed(0)
    net = SearchNetwork(2, 10, 4, "s2").double()
    return net, Architect(net, F.cross_entropy, average=average)


def three_steps(average, seed):
    """Weights and α after three search steps of second order."""
    net, arch = make(average)
    optimizer = torch.optim.SGD(net.weight_parameters(), 0.025, 0.9, weight_decay=3e-4)
    for step in range(3):
        search_step(arch, optimizer, batch(seed + 2 * step), batch(seed + 2 * step + 1), unrolled=True,
                    alpha_first=True, lambda_t=0.1, kind="cosine", epsilon=1e-3, method="central",
                    grad_clip=5.0)
    return [p.detach() for p in net.parameters()]


def gradients(average, seed, names=GRADIENTS):
    """The gradients by name, on the batches seed (to train) and seed + 1 (to validate)."""
    train, valid = batch(seed), batch(seed + 1)
    return {name: [t.detach() for t in GRADIENTS[name](make(average)[1], train, valid)] for name in names}


def random_direction(average, rank):
    """The control's direction, with other random numbers on each rank."""
    _, arch = make(average)
    torch.manual_seed(rank)
    return arch.lambda_grads(batch(0), "cosine", 1e-3, "random")[2]


def main():
    processes = Processes(torch.device("cpu"))
    own = 10 * processes.rank
    torch.save({"random": random_direction(processes.average, processes.rank),
                "gradients": gradients(processes.average, own),
                "steps, same": three_steps(processes.average, 0),
                "steps, different": three_steps(processes.average, own)}, f"{processes.rank}.pt")
    processes.close()
