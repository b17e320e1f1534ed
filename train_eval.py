"""Train a derived network from scratch and test it.

    python train_eval.py --arch LAMBDA_DARTS                        # the published cell, the published settings
    python train_eval.py --arch runs/<search> --dataset synthetic --init_channels 8 --layers 5 --epochs 3
    python train_eval.py --arch LAMBDA_DARTS --evaluate runs/<name>/checkpoint.pt        # test only

20 cells of 36 channels, for 600 epochs; a cell of S1 to S4 on CIFAR-100 and SVHN: 8 cells of 16 channels.
"""
import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import nn

from ldarts import InputError, Network, NetworkNAS201, genotypes
from ldarts.data import DATASETS, Batches, eval_batches, load
from ldarts.model import count_multiply_adds, count_parameters
from ldarts.runs import (MEMORY_FORMATS, Clock, Meter, Parser, Run, evaluate, load_checkpoint, pick_device, script, seed_everything)


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--arch", default="LAMBDA_DARTS", help="a published name, a search's run folder, a genotype.json or an arch string")
    add("--data", default="data", help="folder of the data set")
    add("--dataset", default="cifar10", help=", ".join(DATASETS))
    add("--batch_size", type=int, default=96)
    add("--learning_rate", type=float, default=0.025, help="at the start; cosine down to 0")
    add("--momentum", type=float, default=0.9)
    add("--weight_decay", type=float, default=3e-4)
    add("--report_freq", type=int, default=50, help="steps between two lines")
    add("--epochs", type=int, default=600)
    add("--init_channels", type=int, help="default 36; 16 for cells of S1 to S4 on CIFAR-100 and SVHN, and of nasbench201")
    add("--layers", type=int, help="cells: default 20, or 8; in nasbench201 cells a stage: 5")
    add("--auxiliary", action=argparse.BooleanOptionalAction, help="auxiliary tower (default: on, off in nasbench201)")
    add("--auxiliary_weight", type=float, default=0.4)
    add("--cutout", action=argparse.BooleanOptionalAction, default=True)
    add("--cutout_length", type=int, default=16)
    add("--drop_path_prob", type=float, default=0.2, help="reached in the last epoch")
    add("--save", help="name of the run (default: eval- and the time)")
    add("--seed", type=int, default=0)
    add("--grad_clip", type=float, default=5.0)
    add("--evaluate", metavar="CHECKPOINT", help="test this checkpoint and stop")
    add("--device", default="auto")
    add("--memory_format", choices=MEMORY_FORMATS, default="channels_last", help="of images and weights")
    args = parser.parse_args()
    genotype = genotypes.load(args.arch)
    in_201 = isinstance(genotype, str)
    small = (16, 5) if in_201 else (16, 8) if searched_in(args.arch) and args.dataset in ("cifar100", "svhn") else (36, 20)
    args.init_channels = small[0] if args.init_channels is None else args.init_channels
    args.layers = small[1] if args.layers is None else args.layers
    if in_201 and args.auxiliary:
        raise InputError("--auxiliary: the networks of nasbench201 have no auxiliary tower; leave it out")
    args.auxiliary = not in_201 if args.auxiliary is None else args.auxiliary
    for name in ("batch_size", "epochs", "report_freq", "init_channels", "layers", "cutout_length"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least 1")
    for name in ("learning_rate", "grad_clip"):
        if not (getattr(args, name) > 0 and math.isfinite(getattr(args, name))):
            raise InputError(f"--{name} {getattr(args, name)}: must be positive")
    if not 0 <= args.drop_path_prob < 1:
        raise InputError(f"--drop_path_prob {args.drop_path_prob}: must be from 0 to below 1")
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
    device, layout = pick_device(args.device), MEMORY_FORMATS[args.memory_format]
    train_set, test_set = load(args.dataset, args.data, device, args.seed)
    train_batches = Batches(train_set, None, args.batch_size, args.seed, augment=True, memory_format=layout,
                            cutout_length=args.cutout_length if args.cutout else 0)
    seed_everything(args.seed)
    if isinstance(genotype, str):
        net = NetworkNAS201(args.init_channels, train_set.num_classes, args.layers, genotype)
    else:
        net = Network(args.init_channels, train_set.num_classes, args.layers, args.auxiliary, genotype)
    net.to(device, memory_format=layout)
    criterion = nn.CrossEntropyLoss()

    def test():
        net.eval()
        return evaluate(lambda x: net(x)[0], criterion, eval_batches(test_set, None, args.batch_size, memory_format=layout))

    if args.evaluate:
        try:
            net.load_state_dict(load_checkpoint(args.evaluate)["model"])
        except (RuntimeError, TypeError, AttributeError) as error:
            raise InputError(f"{args.evaluate}: weights of another network than --arch {args.arch} with {args.layers} cells "
                             f"of {args.init_channels} channels") from error
        loss, accuracy = test()
        print(f"{args.evaluate}: test loss {loss:.4f}, accuracy {accuracy:.2f} % on {len(test_set.labels)} images")
        return

    optimizer = torch.optim.SGD(net.parameters(), args.learning_rate, args.momentum, weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    size = {"parameters": count_parameters(net), "multiply_adds": count_multiply_adds(net)}
    run = Run("eval", args.save, vars(args) | size, device)
    run.write("genotype.json", genotypes.to_json(genotype))
    run.log(f"{run.path}: {args.arch} on {args.dataset}, {len(train_set.labels)} images, "
            f"{size['parameters']:,} parameters, {size['multiply_adds'] / 1e6:.1f} M multiply-adds, on {device}")
    clock, best = Clock(args.epochs * len(train_batches)), 0.0
    for epoch in range(args.epochs):
        started, meter = time.perf_counter(), Meter()
        net.train()
        for step, (x, y) in enumerate(train_batches.epoch(epoch)):
            logits, logits_aux = net(x, args.drop_path_prob * epoch / args.epochs)
            loss = criterion(logits, y)
            total = loss if logits_aux is None else loss + args.auxiliary_weight * criterion(logits_aux, y)
            optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(net.parameters(), args.grad_clip)
            optimizer.step()
            meter.update(loss, logits, y)
            clock.tick()
            if step % args.report_freq == 0 or step == len(train_batches) - 1:
                mean, accuracy = meter.read()
                run.log(f"epoch {epoch} step {step}/{len(train_batches)}: loss {mean:.4f}, accuracy {accuracy:.2f} %, {clock}")
        scheduler.step()
        train_loss, train_accuracy = meter.read()
        test_loss, test_accuracy = test()
        best = max(best, test_accuracy)
        run.metrics({"epoch": epoch, "train_loss": train_loss, "train_accuracy": train_accuracy, "test_loss": test_loss,
                     "test_accuracy": test_accuracy, "seconds": round(time.perf_counter() - started, 3)})
        run.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
                  "epoch": epoch})
        run.log(f"epoch {epoch}: test loss {test_loss:.4f}, accuracy {test_accuracy:.2f} % (best {best:.2f} %)")


if __name__ == "__main__":
    script(main)
