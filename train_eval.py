"""Train a derived network from scratch and test it.

    python train_eval.py --arch LAMBDA_DARTS                        # the published cell, the published settings
    python train_eval.py --arch runs/<search> --dataset synthetic --init_channels 8 --layers 5 --epochs 3
    python train_eval.py --arch LAMBDA_DARTS --evaluate runs/<name>/checkpoint.pt        # test only
    python train_eval.py --resume runs/<name>                                     # continue a run that was stopped or killed
    torchrun --nproc_per_node=2 train_eval.py --arch LAMBDA_DARTS                 # two processes share every batch
    python train_eval.py --arch LAMBDA_DARTS --dataset imagenet --data IMAGENET          # folders train/ and val/

20 cells of 36 channels, for 600 epochs; a cell of S1 to S4 on CIFAR-100 and SVHN: 8 cells of 16 channels; on ImageNet
14 cells of 48 channels, for 250 epochs.
"""
import argparse
import json
import math
from pathlib import Path

import torch
from torch import nn

from ldarts import InputError, Network, NetworkImageNet, NetworkNAS201, genotypes
from ldarts.data import DATASETS, Batches, FolderBatches, eval_batches, load
from ldarts.distributed import Processes
from ldarts.model import count_multiply_adds, count_parameters
from ldarts.runs import (MEMORY_FORMATS, Parser, Run, add_run_arguments, amp_dtype, evaluate, load_checkpoint,
                         pick_device, script, seed_everything, set_deterministic)


def parse_args():
    parser = Parser("eval", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--arch", default="LAMBDA_DARTS", help="a published name, a search's run folder, a genotype.json or an arch string")
    add("--data", default="data", help="folder of the data set")
    add("--dataset", default="cifar10", help=", ".join((*DATASETS, "imagenet")))
    add("--batch_size", type=int, help="default 96, on ImageNet 1024")
    add("--learning_rate", type=float, help="at the start; cosine down to 0 (0.025), on ImageNet linear (0.5)")
    add("--momentum", type=float, default=0.9)
    add("--weight_decay", type=float, help="default 3e-4, on ImageNet 3e-5")
    add("--report_freq", type=int, default=50, help="steps between two lines")
    add("--epochs", type=int, help="default 600, on ImageNet 250")
    add("--init_channels", type=int, help="default 36, on ImageNet 48; 16 for cells of S1 to S4 on CIFAR-100 and SVHN, and of nasbench201")
    add("--layers", type=int, help="cells: default 20, on ImageNet 14, or 8; in nasbench201 cells a stage: 5")
    add("--auxiliary", action=argparse.BooleanOptionalAction, help="auxiliary tower (default: on, off in nasbench201)")
    add("--auxiliary_weight", type=float, default=0.4)
    add("--cutout", action=argparse.BooleanOptionalAction, help="default: on, off on ImageNet")
    add("--cutout_length", type=int, default=16)
    add("--drop_path_prob", type=float, help="reached in the last epoch (default 0.2, on ImageNet 0)")
    add("--label_smoothing", type=float, help="of the training loss (default 0, on ImageNet 0.1)")
    add("--warmup_epochs", type=int, default=5, help="in which the learning rate of ImageNet grows linearly")
    add("--workers", type=int, default=4, help="processes that read ImageNet, --data/train and --data/val")
    add("--save", help="name of the run (default: eval- and the time)")
    add("--seed", type=int, default=0)
    add("--grad_clip", type=float, default=5.0)
    add("--evaluate", metavar="CHECKPOINT", help="test this checkpoint and stop")
    add("--compile", action="store_true", help="torch.compile the network")
    add_run_arguments(add)
    args = parser.parse_args()
    genotype = genotypes.load(args.resume or args.arch)  # a run folder holds its genotype
    in_201 = isinstance(genotype, str)
    imagenet = args.dataset == "imagenet"
    small = searched_in(args.arch) and args.dataset in ("cifar100", "svhn")
    C, layers = (16, 5) if in_201 else (48, 14) if imagenet else (16, 8) if small else (36, 20)
    defaults = {"init_channels": C, "layers": layers, "batch_size": 1024 if imagenet else 96, "cutout": not imagenet,
                "learning_rate": 0.5 if imagenet else 0.025, "weight_decay": 3e-5 if imagenet else 3e-4,
                "epochs": 250 if imagenet else 600, "drop_path_prob": 0.0 if imagenet else 0.2,
                "label_smoothing": 0.1 if imagenet else 0.0}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if in_201 and imagenet:
        raise InputError("--dataset imagenet: the networks of nasbench201 are for 32x32 images; use a cell of a DARTS space")
    if in_201 and args.auxiliary:
        raise InputError("--auxiliary: the networks of nasbench201 have no auxiliary tower; leave it out")
    args.auxiliary = not in_201 if args.auxiliary is None else args.auxiliary
    for name in ("batch_size", "epochs", "report_freq", "init_channels", "layers", "cutout_length"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least 1")
    for name in ("learning_rate", "grad_clip"):
        if not (getattr(args, name) > 0 and math.isfinite(getattr(args, name))):
            raise InputError(f"--{name} {getattr(args, name)}: must be positive")
    for name in ("drop_path_prob", "label_smoothing"):
        if not 0 <= getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be from 0 to below 1")
    for name in ("warmup_epochs", "workers"):
        if getattr(args, name) < 0:
            raise InputError(f"--{name} {getattr(args, name)}: must not be negative")
    return args, genotype


def searched_in(arch: str) -> bool:
    """Whether a cell comes from S1 to S4, by its published name or the configuration of its run."""
    if arch in genotypes.PUBLISHED:
        return any(f"_s{i}_" in arch for i in range(1, 5))
    try:
        config = json.loads((Path(arch) / "config.json").read_text())
        return config.get("search_space") in ("s1", "s2", "s3", "s4")
    except (OSError, ValueError, AttributeError):
        return False


def main():
    args, genotype = parse_args()
    if args.deterministic:
        set_deterministic()
    device, layout = pick_device(args.device), MEMORY_FORMATS[args.memory_format]
    amp = amp_dtype(args.amp, device)
    processes = Processes(device)
    imagenet, ranks = args.dataset == "imagenet", dict(rank=processes.rank, world=processes.world)
    if imagenet:
        train_batches, test_batches = (
            FolderBatches(Path(args.data, part), args.batch_size, args.seed, train=part == "train", device=device,
                          workers=args.workers, memory_format=layout, **ranks) for part in ("train", "val"))
        images, num_classes = len(train_batches.images.files), len(train_batches.images.classes)
    else:
        train_set, test_set = load(args.dataset, args.data, device, args.seed)
        train_batches = Batches(train_set, None, args.batch_size, args.seed, augment=True, memory_format=layout,
                                cutout_length=args.cutout_length if args.cutout else 0, **ranks)
        images, num_classes = len(train_set.labels), train_set.num_classes
    seed_everything(args.seed)
    if isinstance(genotype, str):
        net = NetworkNAS201(args.init_channels, num_classes, args.layers, genotype)
    else:
        build = NetworkImageNet if imagenet else Network
        net = build(args.init_channels, num_classes, args.layers, args.auxiliary, genotype)
    net.to(device, memory_format=layout)
    run_net = torch.compile(net) if args.compile else net

    def forward(x, drop_path_prob=0.0):
        with torch.autocast(device.type, amp, enabled=amp is not None):
            return run_net(x, drop_path_prob)

    criterion, smoothed = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)

    def test():
        net.eval()
        processes.take_from_first(net.buffers())
        if imagenet:
            batches = test_batches.epoch()
        else:
            share = torch.arange(len(test_set.labels))[processes.rank :: processes.world]
            batches = eval_batches(test_set, share, args.batch_size, memory_format=layout)
        return evaluate(lambda x: forward(x)[0].float(), criterion, batches, processes)

    if args.evaluate:
        try:
            net.load_state_dict(load_checkpoint(args.evaluate)["model"])
        except (RuntimeError, TypeError, AttributeError) as error:
            raise InputError(f"{args.evaluate}: weights of another network than --arch {args.arch} with {args.layers} cells "
                             f"of {args.init_channels} channels") from error
        loss, accuracy = test()
        print(f"{args.evaluate}: test loss {loss:.4f}, accuracy {accuracy:.2f} %")
        return

    optimizer = torch.optim.SGD(net.parameters(), args.learning_rate, args.momentum, weight_decay=args.weight_decay)
    if imagenet:  # linear down to 0, times a linear warm-up
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda epoch: (1 - epoch / args.epochs) * min(1, (epoch + 1) / max(1, args.warmup_epochs)))
    else:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    size = {"parameters": count_parameters(net), "multiply_adds": count_multiply_adds(net, 224 if imagenet else 32)}
    run = Run("eval", args, processes, {"model": net, "optimizer": optimizer, "scheduler": scheduler}, len(train_batches), size)
    run.write("genotype.json", genotypes.to_json(genotype))
    run.log(f"{run.path}: {args.arch} on {args.dataset}, {images} images, "
            f"{size['parameters']:,} parameters, {size['multiply_adds'] / 1e6:.1f} M multiply-adds, on {device}")
    for epoch in range(run.epoch, args.epochs):
        net.train()
        drop_path_prob = args.drop_path_prob * epoch / args.epochs
        if args.compile and args.drop_path_prob:  # so that one compiled network serves every epoch
            drop_path_prob = torch.tensor(drop_path_prob, device=device)
        for step, (x, y) in enumerate(train_batches.epoch(epoch, start=run.step), run.step):
            run.seed()
            logits, logits_aux = forward(x, drop_path_prob)
            loss = smoothed(logits.float(), y)
            total = loss if logits_aux is None else loss + args.auxiliary_weight * smoothed(logits_aux.float(), y)
            # Where noise or nothing was chosen, weights may act on no logit: their gradient is 0.
            grads = torch.autograd.grad(total, list(net.parameters()), materialize_grads=True)
            loss, *grads = processes.average([loss.detach(), *grads])
            for p, grad in zip(net.parameters(), grads):
                p.grad = grad
            nn.utils.clip_grad_norm_(net.parameters(), args.grad_clip)
            optimizer.step()
            run.after_step(loss, logits, y)
        scheduler.step()
        run.seed()
        train_loss, train_accuracy = run.meter.read()
        test_loss, test_accuracy = test()
        best = max([test_accuracy, *(values["test_accuracy"] for values in run.history)])
        run.log(f"epoch {epoch}: test loss {test_loss:.4f}, accuracy {test_accuracy:.2f} % (best {best:.2f} %)")
        run.end_epoch({"epoch": epoch, "train_loss": train_loss, "train_accuracy": train_accuracy, "test_loss": test_loss,
                       "test_accuracy": test_accuracy})
    run.log(run.cost())
    run.close()


if __name__ == "__main__":
    script(main)
