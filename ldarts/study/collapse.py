"""Does Λ prevent collapse? Searches with and without, judged by true accuracies of cells (NAS-Bench-201)."""
import argparse
from typing import Any, Iterator, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import nasbench201
from ..architect import Architect, Batch, WeightGrads, search_step
from ..data import Batches, ImageSet, eval_batches, load
from ..distributed import Processes
from ..model_search import SearchNetwork
from ..runs import evaluate, seed_everything


class Variant(NamedTuple):
    """What is done with the gradient of Λ; the rest of a search is the same in all."""

    method: str | None  # of Architect.weight_grads; `random`, `relative`: architects below; None: plain DARTS
    kind: str = "cosine"
    times: float = 1.0  # λ of the last epoch is this times --lambda_reg


VARIANTS = {
    "DARTS": Variant(None),
    "central": Variant("central"),  # Λ as published
    "exact": Variant("exact"),
    "sign": Variant("exact", "sign"),
    "random": Variant("random"),  # the control: noise of the length of central's term
    "random-0.1": Variant("random", times=0.1),
    "exact-0.1": Variant("exact", times=0.1),
    "exact-10": Variant("exact", times=10),
    "relative": Variant("relative", times=4),
}


class RandomDirection(Architect):
    """The control: for ∇Λ a direction drawn anew in every step, as long as the central estimate of ∇Λ.

    That length is measured in every tenth step, on its batch, and changes nothing else.
    """

    def __init__(self, *args, seed: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.generator = torch.Generator().manual_seed(seed)
        self.step_number, self.length = 0, torch.zeros(())

    def weight_grads(self, batch: Batch, kind: str, epsilon: float, method: str | None,
                     lambda_t: Tensor | float | None = None) -> WeightGrads:
        grads = super().weight_grads(batch, kind, epsilon, None)
        if method is None:
            return grads
        if self.step_number % 10 == 0:
            with self._statistics.kept():
                estimate = super().weight_grads(batch, kind, epsilon, "central")
            self.length = nn.utils.get_total_norm(estimate.d_lambda)
        self.step_number += 1
        noise = [torch.randn(g.shape, generator=self.generator).to(g) for g in grads.dw]
        scale = self.length / nn.utils.get_total_norm(noise)
        noise = [scale * n for n in noise]
        if lambda_t is None:
            return grads._replace(d_lambda=noise)
        return grads._replace(dw=[g - lambda_t * n for g, n in zip(grads.dw, noise)])


class RelativeStrength(Architect):
    """λ counts in lengths of ∇L: the step is along ∇L − λ ‖∇L‖ / ‖∇Λ‖ · ∇Λ, with ∇Λ exact."""

    def weight_grads(self, batch: Batch, kind: str, epsilon: float, method: str | None,
                     lambda_t: Tensor | float | None = None) -> WeightGrads:
        if method is None:
            return super().weight_grads(batch, kind, epsilon, None)
        grads = super().weight_grads(batch, kind, epsilon, "exact")
        scale = nn.utils.get_total_norm(grads.dw) / nn.utils.get_total_norm(grads.d_lambda)
        d_lambda = [scale * d for d in grads.d_lambda]
        if lambda_t is None:
            return grads._replace(d_lambda=d_lambda)
        return grads._replace(dw=[g - lambda_t * d for g, d in zip(grads.dw, d_lambda)], d_lambda=None)


def make_architect(args: argparse.Namespace, variant: Variant, net: SearchNetwork, seed: int) -> Architect:
    settings = dict(net=net, criterion=F.cross_entropy, lr=args.arch_learning_rate,
                    w_momentum=0.9, w_weight_decay=3e-4)
    if variant.method == "random":
        return RandomDirection(**settings, seed=seed)
    if variant.method == "relative":
        return RelativeStrength(**settings)
    return Architect(**settings)


def case(args: argparse.Namespace, space: str, variant_name: str, seed: int,
         device: torch.device) -> list[dict[str, Any]]:
    """The lines of one search, one an epoch."""
    train_set, _ = load(args.dataset, args.data, device, seed, size=args.image_size)
    return list(search(args, space, VARIANTS[variant_name], seed, train_set, device))


def search(args: argparse.Namespace, space: str, variant: Variant, seed: int, train_set: ImageSet,
           device: torch.device) -> Iterator[dict[str, Any]]:
    """A search of first order with the published settings but for the sizes in args; yields a line an epoch.

    Every line has the cell and what α says; the lines of every args.every-th epoch and of the last have what
    costs time: Λ, the eigenvalue, the supernet's accuracy and the length of the term of Λ beside that of ∇L.
    """
    layout = torch.channels_last
    halves = torch.arange(len(train_set.labels)).tensor_split(2)
    train_batches, valid_batches = (
        Batches(train_set, half, args.batch_size, seed, tag=tag, augment=True, memory_format=layout)
        for half, tag in zip(halves, ("train", "valid")))
    seed_everything(seed)
    net = SearchNetwork(args.init_channels, train_set.num_classes, args.layers, space).to(
        device, memory_format=layout)
    optimizer = torch.optim.SGD(net.weight_parameters(), 0.025, 0.9, weight_decay=3e-4, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs, 0.001)
    arch = make_architect(args, variant, net, seed)
    for epoch in range(args.epochs):
        lambda_t = variant.times * args.lambda_reg * epoch / max(1, args.epochs - 1)
        method = variant.method if lambda_t else None
        net.train()
        loss, correct = 0.0, 0
        for train, valid in zip(train_batches.epoch(epoch), valid_batches.epoch(epoch)):
            grads = search_step(arch, optimizer, train, valid, unrolled=False,
                                alpha_first=space != "nasbench201", lambda_t=lambda_t, kind=variant.kind,
                                epsilon=1e-4, method=method, grad_clip=5.0)
            loss += float(grads.loss)
            correct += int((grads.logits.argmax(1) == train[1]).sum())
        scheduler.step()
        steps = len(train_batches)
        line = {"epoch": epoch, "loss": loss / steps,
                "train_accuracy": 100 * correct / (steps * args.batch_size)}
        line |= describe_cell(net)
        if epoch % args.every == 0 or epoch == args.epochs - 1:
            fresh = [take(batches, args.epochs + epoch, args.fresh_batches)
                     for batches in (train_batches, valid_batches)]
            line |= measure(arch, variant, method, lambda_t, *fresh)
            net.eval()
            batches = eval_batches(train_set, valid_batches.indices, 250, memory_format=layout)
            line["valid_accuracy"] = evaluate(net, F.cross_entropy, batches, Processes(device))[1]
        yield {name: round(value, 6) if isinstance(value, float) else value for name, value in line.items()}


def take(batches: Batches, epoch: int, count: int) -> list[Batch]:
    """The first batches of an epoch; of one that no search reaches: new crops of the same images."""
    return [batch for batch, _ in zip(batches.epoch(epoch), range(count))]


@torch.no_grad()
def describe_cell(net: SearchNetwork) -> dict[str, Any]:
    """The derived cell; of p the entropy, and mean shares over the edges of skips (s4: noise) and `none`."""
    genotype = net.genotype()
    cell = genotype if isinstance(genotype, str) else genotype.normal
    p = net.arch_parameters()[0].softmax(-1)

    def share(*operations: str) -> float:
        chosen = [float(q) for row, names in zip(p, net.primitives.normal)
                  for q, name in zip(row, names) if name in operations]
        return sum(chosen) / len(p)

    return {"cell": cell if isinstance(cell, str) else [list(edge) for edge in cell],
            "entropy": float(torch.special.entr(p).sum(-1).mean()),
            "p_skip": share("skip_connect", "noise"), "p_none": share("none")}


def measure(arch: Architect, variant: Variant, method: str | None, lambda_t: float, train: Sequence[Batch],
            valid: Sequence[Batch]) -> dict[str, Any]:
    """In training mode: Λ on fresh batches of both halves (one is too noisy), eigenvalue, ‖λ∇Λ‖ / ‖∇L‖."""
    line: dict[str, Any] = {}
    for name, batches in (("train", train), ("valid", valid)):
        values = [float(arch.batch_alignment(batch, "cosine")) for batch in batches]
        line[f"lambda_{name}"] = sum(values) / len(values)
    line["eigenvalue"] = arch.alpha_eigenvalue(valid[0])
    loss_norm, lambda_norm = arch.gradient_norms(train[0], variant.kind, 1e-4, method)
    line["ratio"] = lambda_t * float(lambda_norm) / float(loss_norm)
    return line


def true_accuracy(line: dict[str, Any]) -> float:
    """Of a line's cell, on CIFAR-10, in percent."""
    return nasbench201.look_up(line["cell"]).cifar10


def skips(line: dict[str, Any]) -> int:
    """Skip connections (in s4: noise) among the operations of a line's cell."""
    return str(line["cell"]).count("skip_connect") + str(line["cell"]).count("noise")
