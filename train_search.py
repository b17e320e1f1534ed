"""Search for a cell with Λ-DARTS.

    python train_search.py --unrolled --lambda_reg 0.125                      # CIFAR-10, the published settings
    python train_search.py --dataset synthetic --init_channels 4 --layers 5 --epochs 3    # no download, minutes
    python train_search.py --search_space s2 --dataset svhn                   # λ and ε as published for SVHN
    python train_search.py --lambda_reg 0                                     # plain DARTS
    python train_search.py --resume runs/<name>                               # continue a run that was stopped or killed
    torchrun --nproc_per_node=2 train_search.py --unrolled                    # two processes share every batch

Writes runs/<name>/ and prints the genotype and the command that trains it. Movahedi et al., ICLR 2023.
"""
import argparse
import math
import os

import torch
from torch import nn

from ldarts import Architect, InputError, SearchNetwork, nasbench201, spaces, visualize
from ldarts.alignment import KINDS
from ldarts.architect import METHODS
from ldarts.capture import Captured, optimizer_tensors
from ldarts.data import DATASETS, Batches, eval_batches, load
from ldarts.distributed import Processes
from ldarts.errors import require
from ldarts.genotypes import to_json
from ldarts.fused import compiled_for
from ldarts.runs import (MEMORY_FORMATS, Parser, Run, add_run_arguments, amp_dtype, evaluate, pick_device, script,
                         seed_everything, set_deterministic)


def parse_args():
    parser = Parser("search", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", default="data", help="folder of the data set")
    add("--dataset", default="cifar10", help=", ".join(DATASETS))
    add("--search_space", default="darts", help=", ".join(spaces.SPACES))
    add("--batch_size", type=int, default=64)
    add("--learning_rate", type=float, default=0.025, help="of SGD on w at the start; cosine down to the next")
    add("--learning_rate_min", type=float, default=0.001)
    add("--momentum", type=float, default=0.9)
    add("--weight_decay", type=float, default=3e-4)
    add("--report_freq", type=int, default=50, help="steps between two lines")
    add("--epochs", type=int, default=50)
    add("--init_channels", type=int, default=16)
    add("--layers", type=int, help="cells (default 8), or cells a stage in nasbench201 (default 5)")
    add("--cutout", action="store_true", help="cutout with a probability that grows to --cutout_prob")
    add("--cutout_length", type=int, default=16)
    add("--cutout_prob", type=float, default=1.0)
    add("--save", help="name of the run (default: search- and the time)")
    add("--seed", type=int, default=0)
    add("--grad_clip", type=float, default=5.0)
    add("--train_portion", type=float, default=0.5, help="share of the training set for w; the rest is for α")
    add("--unrolled", action="store_true", help="second-order α gradients")
    add("--hessian", choices=("central", "exact"), default="central", help="the second order's product")
    add("--arch_learning_rate", type=float, help="default 3e-4, in nasbench201 1e-4")
    add("--arch_weight_decay", type=float, default=1e-3)
    add("--lambda_reg", type=float, help="λ, reached in the last epoch; 0: plain DARTS "
                                         "(default 0.125, 0.25 on SVHN and in nasbench201)")
    add("--lambda_kind", choices=KINDS, default="cosine")
    add("--lambda_grad", choices=METHODS, default="central", help="how ∇Λ is computed")
    add("--epsilon", type=float, help="ε₀ of central and forward (default 1e-4, 1e-3 on SVHN)")
    add("--eigenvalue", action="store_true", help="log the dominant eigenvalue of ∂²L_valid/∂α² every epoch")
    add("--plot", action="store_true", help="draw the cells, α and the curves anew every epoch (needs matplotlib)")
    add("--tensorboard", action="store_true", help="write TensorBoard's event files into the run folder (needs tensorboard)")
    add("--graph", action=argparse.BooleanOptionalAction,
        help="a step as one CUDA graph (default: on a GPU, with one process, but for the noise of s4)")
    add_run_arguments(add)
    args = parser.parse_args()
    in_201, on_svhn = args.search_space == "nasbench201", args.dataset == "svhn"
    defaults = {"layers": 5 if in_201 else 8, "arch_learning_rate": 1e-4 if in_201 else 3e-4,
                "lambda_reg": 0.25 if in_201 or on_svhn else 0.125, "epsilon": 1e-3 if on_svhn and not in_201 else 1e-4}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check(args)
    if args.graph is None:
        args.graph = graph_hinders(args) is None
    elif args.graph and (reason := graph_hinders(args)):
        raise InputError(f"--graph: {reason}; use --no-graph")
    return args


def graph_hinders(args) -> str | None:
    """Why the step can't be a CUDA graph."""
    if pick_device(args.device).type != "cuda":
        return "needs a GPU"
    if args.search_space == "s4":
        return "the noise of s4 is drawn again for every pass of a difference, which a graph can't do"
    return "several processes exchange gradients within the step" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else None


def check(args) -> None:
    """Raises InputError for values that make no search."""
    spaces.get(args.search_space)
    for name, module in (("plot", "matplotlib"), ("tensorboard", "tensorboard")):
        if getattr(args, name):
            require(module, f"--{name}")
    if args.search_space == "nasbench201" and args.unrolled:
        raise InputError("--unrolled: nasbench201 is searched by first order only, as published; leave it out")
    if args.hessian == "exact" and not args.unrolled:
        raise InputError("--hessian exact: only the second order has one; add --unrolled")
    if not 0 < args.train_portion < 1:
        raise InputError(f"--train_portion {args.train_portion}: both w and α need images; use a share between 0 and 1")
    for name in ("batch_size", "epochs", "report_freq", "init_channels", "layers", "cutout_length"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least 1")
    for name in ("learning_rate", "arch_learning_rate", "epsilon", "grad_clip"):
        if not (getattr(args, name) > 0 and math.isfinite(getattr(args, name))):
            raise InputError(f"--{name} {getattr(args, name)}: must be positive")
    for name in ("learning_rate_min", "momentum", "weight_decay", "arch_weight_decay", "lambda_reg"):
        if not (getattr(args, name) >= 0 and math.isfinite(getattr(args, name))):
            raise InputError(f"--{name} {getattr(args, name)}: must not be negative")
    if args.amp != "none" and args.lambda_grad == "forward" and args.lambda_reg:
        raise InputError("--amp bf16 with --lambda_grad forward: it is the difference of two passes of one precision; use central "
                         "or exact")
    if not 0 <= args.cutout_prob <= 1:
        raise InputError(f"--cutout_prob {args.cutout_prob}: must be from 0 to 1")


def search_step(arch, optimizer, train, valid, *, unrolled, alpha_first, lambda_t, kind, epsilon, method, grad_clip,
                hessian="central"):
    """One step: α on the validation batch, then w on the training batch (in nasbench201 w goes first).

    method: how ∇Λ is computed, None: a step without Λ. Waits for the device nowhere; numbers that change from step to step,
    lambda_t and the learning rate, may be tensors. Returns the WeightGrads of the training batch.
    """
    def alpha_step():
        arch.step(arch.alpha_grads(train, valid, optimizer.param_groups[0]["lr"], optimizer, unrolled, hessian))

    if alpha_first:
        alpha_step()
    grads = weight_step(arch, optimizer, train, lambda_t=lambda_t, kind=kind, epsilon=epsilon, method=method, grad_clip=grad_clip)
    if not alpha_first:
        alpha_step()
    return grads


def weight_step(arch, optimizer, train, *, lambda_t, kind, epsilon, method, grad_clip):
    """The step of w alone, which minimises L_train - λ_t Λ."""
    grads = arch.weight_grads(train, kind, epsilon, method, lambda_t)
    for p, grad in zip(arch.weights, grads.dw):
        p.grad = grad
    norm = nn.utils.clip_grad_norm_(arch.weights, grad_clip)
    optimizer.step()
    return grads._replace(clipped=(norm > grad_clip).to(norm).view(1))


def skip_connections(genotype) -> int:
    """Number of skip connections in the normal cell (in nasbench201: in the cell)."""
    return str(genotype if isinstance(genotype, str) else genotype.normal).count("skip_connect")


def main():
    args = parse_args()
    if args.deterministic:
        set_deterministic()
    device, layout = pick_device(args.device), MEMORY_FORMATS[args.memory_format]
    amp = amp_dtype(args.amp, device)
    processes = Processes(device)
    train_set, _ = load(args.dataset, args.data, device, args.seed)
    images = len(train_set.labels)
    split = int(args.train_portion * images)
    options = dict(augment=True, memory_format=layout, cutout_length=args.cutout_length if args.cutout else 0,
                   rank=processes.rank, world=processes.world)
    train_batches = Batches(train_set, torch.arange(split), args.batch_size, args.seed, tag="train", **options)
    valid_batches = Batches(train_set, torch.arange(split, images), args.batch_size, args.seed, tag="valid", **options)

    seed_everything(args.seed)
    net = SearchNetwork(args.init_channels, train_set.num_classes, args.layers, args.search_space).to(
        device, memory_format=layout)
    normal_cells = sum(not cell.reduction for cell in net.searched_cells())
    if args.lambda_reg and normal_cells < 2:
        raise InputError(f"--lambda_reg {args.lambda_reg} with {args.layers} cells: Λ compares normal cells and here is "
                         f"{normal_cells}; use --layers 4 or more, or --lambda_reg 0")
    criterion = nn.CrossEntropyLoss()
    # In a graph, numbers that change have to be tensors.
    rate = torch.tensor(args.learning_rate, device=device) if args.graph else args.learning_rate
    optimizer = torch.optim.SGD(net.weight_parameters(), rate, args.momentum, weight_decay=args.weight_decay, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs, args.learning_rate_min)
    arch = Architect(net, criterion, args.arch_learning_rate, (0.5, 0.999), args.arch_weight_decay, args.momentum,
                     args.weight_decay, processes.average, amp, capturable=args.graph)

    def state():
        return [*net.parameters(), *net.buffers(), *optimizer_tensors(optimizer), *optimizer_tensors(arch.optimizer)]

    def step_by(method):
        def take(x, y, valid_x, valid_y, lambda_t):
            return search_step(arch, optimizer, (x, y), (valid_x, valid_y), unrolled=args.unrolled,
                               alpha_first=args.search_space != "nasbench201", lambda_t=lambda_t, kind=args.lambda_kind,
                               epsilon=args.epsilon, method=method, grad_clip=args.grad_clip, hessian=args.hessian)

        return Captured(take, state) if args.graph else take

    compiled_for(device.type)  # a first compilation is no time of the run's steps
    run = Run("search", args, processes, {"model": net, "optimizer": optimizer, "arch": arch.optimizer,
                                          "scheduler": scheduler}, len(train_batches), means=1)
    run.log(f"{run.path}: {args.search_space} on {args.dataset}, {split} images for w and {images - split} for α, "
            f"{sum(p.numel() for p in net.weight_parameters()):,} weights, on {device}")
    if args.tensorboard and run.writes:
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(run.path)
    probe = next(eval_batches(train_set, valid_batches.indices, args.batch_size, memory_format=layout))
    method = take = None
    for epoch in range(run.epoch, args.epochs):
        lambda_t = args.lambda_reg * epoch / max(1, args.epochs - 1)
        grown = args.cutout_prob * epoch / max(1, args.epochs - 1)
        net.train()
        if take is None or method != (args.lambda_grad if lambda_t else None):  # the first epoch has λ = 0
            method = args.lambda_grad if lambda_t else None
            take = step_by(method)
        weight = torch.tensor(lambda_t, device=device)
        for step, train in enumerate(train_batches.epoch(epoch, grown, run.step), run.step):
            if step == run.step or step % len(valid_batches) == 0:  # the α half starts over where it is the smaller one
                valid_stream = valid_batches.epoch(epoch, grown, step % len(valid_batches))
            run.seed()
            grads = take(*train, *next(valid_stream), weight)
            run.after_step(grads.loss, grads.logits, train[1], grads.clipped, Λ=grads.alignment)
        scheduler.step()

        run.seed()
        train_loss, train_accuracy, clipped = run.meter.read()
        last, alignment = len(train_batches) - 1, {}
        # The batches of the last step, which a resumed run may not have taken itself.
        loss_norm, lambda_norm = arch.gradient_norms(next(train_batches.epoch(epoch, grown, last)), args.lambda_kind, args.epsilon, method)
        if normal_cells > 1:
            alignment = {f"lambda_{name}": float(arch.batch_alignment(
                next(batches.epoch(epoch, grown, last % len(batches))), args.lambda_kind))
                for name, batches in (("train", train_batches), ("valid", valid_batches))}
        curvature = {"alpha_eigenvalue": arch.alpha_eigenvalue(probe)} if args.eigenvalue else {}
        net.eval()
        processes.take_from_first(net.buffers())
        share = valid_batches.indices[processes.rank :: processes.world]
        valid_loss, valid_accuracy = evaluate(
            net, criterion, eval_batches(train_set, share, args.batch_size, memory_format=layout), processes)
        genotype = net.genotype()
        p = torch.cat([torch.softmax(alpha.detach(), -1) for alpha in net.arch_parameters()])
        values = {"epoch": epoch, "train_loss": train_loss, "train_accuracy": train_accuracy, "valid_loss": valid_loss,
                  "valid_accuracy": valid_accuracy, "lambda_reg": lambda_t, **alignment, **curvature,
                  "lambda_grad_norm": lambda_t * float(lambda_norm), "loss_grad_norm": float(loss_norm), "clipped": clipped,
                  "entropy": float(torch.special.entr(p).sum(-1).mean()), "skip_connections": skip_connections(genotype),
                  "alphas": [[[round(a, 6) for a in edge] for edge in alpha.tolist()] for alpha in net.arch_parameters()]}
        if args.search_space == "nasbench201":
            values |= {f"true_{name}": value for name, value in nasbench201.look_up(genotype)._asdict().items()}
        shown = ", ".join(f"Λ {name[7:]} {value:+.3f}" for name, value in alignment.items())
        run.log(f"epoch {epoch}: valid loss {valid_loss:.4f}, accuracy {valid_accuracy:.2f} %, {shown or 'no Λ'}, "
                f"entropy {values['entropy']:.3f}, {values['skip_connections']} skip connections")
        run.write("genotype.json", to_json(genotype))
        run.end_epoch(values)
        if args.tensorboard and run.writes:
            for name in values.keys() - {"epoch", "alphas"}:
                writer.add_scalar(name, values[name], epoch)
            writer.flush()
        if args.plot and run.writes:
            visualize.draw_run(run.path)
    report(run, net.genotype(), args)
    run.close()


def report(run, genotype, args):
    """What a search ends in."""
    run.log(run.cost())
    if isinstance(genotype, str):
        run.log(f"genotype: {genotype}")
    else:
        for name in ("normal", "reduce"):
            run.log(f"{name}: " + ", ".join(f"{op} {state}" for op, state in getattr(genotype, name)))
    run.log(f"skip connections: {skip_connections(genotype)}")
    if "lambda_train" in run.history[-1]:
        shown = run.history[:: max(1, len(run.history) // 10)]
        run.log("Λ by epoch: " + ", ".join(f"{values['lambda_train']:+.3f}" for values in shown))
    if args.search_space == "nasbench201":
        run.log(nasbench201.describe(genotype))
    run.log(f"train it: python train_eval.py --arch {run.path} --dataset {args.dataset} --data {args.data}")


if __name__ == "__main__":
    script(main)
