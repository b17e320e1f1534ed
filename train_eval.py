"""Train a derived network from scratch and test it.

    python train_eval.py --arch LAMBDA_DARTS                      # the published cell, the published settings
    python train_eval.py --arch runs/<search> --dataset synthetic --init_channels 8 --layers 5 --epochs 3
    python train_eval.py --evaluate runs/<name>/checkpoint.pt      # test only
    python train_eval.py --resume runs/<name>                      # continue a stopped or killed run
    torchrun --nproc_per_node=2 train_eval.py --arch LAMBDA_DARTS  # two processes share every batch
    python train_eval.py --arch LAMBDA_DARTS --dataset imagenet --data IMAGENET   # folders train/ and val/

The network has 20 cells and 36 channels and is trained for 600 epochs; on ImageNet 14 cells, 48 channels, 250
epochs. A cell of S1 to S4 on CIFAR-100 and SVHN: 8 cells, 16 channels.
"""
import torch
from torch import nn

from ldarts import Network, NetworkImageNet, NetworkNAS201
from ldarts.architect import clip
from ldarts.data import Batches, eval_batches, folder_batches, load
from ldarts.distributed import Processes
from ldarts.fused import compiled_for
from ldarts.genotypes import to_json
from ldarts.runs import (Run, amp_dtype, check_images, count_multiply_adds, count_parameters, evaluate,
                         load_weights, machine_facts, parse_eval_args, pick_device, safe_layout, script,
                         seed_everything, set_deterministic)


def imagenet_rate(epoch, args):
    """ImageNet's rate as a share of --learning_rate: linear, flatter in the last 5 epochs, as in the code of
    Λ-DARTS."""
    if epoch < args.warmup_epochs and args.batch_size > 256:
        return (epoch + 1) / args.warmup_epochs
    left, steep = args.epochs - epoch, max(1, args.epochs - 5)
    return (left - 5) / steep if left > 5 else left / (5 * steep)


def main():
    args, genotype, remarks = parse_eval_args()
    if args.deterministic:
        set_deterministic()
    device = pick_device(args.device)
    amp = amp_dtype(args.amp, device)
    processes = Processes(device)
    imagenet, image = args.dataset == "imagenet", (3, 224, 224)
    if not imagenet:
        train_set, test_set = load(args.dataset, args.data, device, args.seed)
        image = train_set.images.shape[1:]
    check_images(*image[1:], args.batch_size // processes.world, args.auxiliary)
    layout, layout_remarks = safe_layout(args.memory_format, device, args.init_channels, *image[1:])
    options = dict(memory_format=layout, rank=processes.rank, world=processes.world)
    if imagenet:
        parts = ["val"] if args.evaluate else ["train", "val"]
        batches = folder_batches(args.data, parts, args.batch_size, args.seed, device=device,
                                 workers=args.workers, **options)
        train_batches, test_batches = batches[0], batches[-1]
        train_set, test_set = train_batches.images, test_batches.images
    elif not args.evaluate:
        train_batches = Batches(train_set, None, args.batch_size, args.seed,
                                cutout_length=args.cutout_length if args.cutout else 0, **options)
    seed_everything(args.seed)
    size = args.init_channels, train_set.num_classes, args.layers
    if isinstance(genotype, str):
        net = NetworkNAS201(*size, genotype)
    else:
        net = (NetworkImageNet if imagenet else Network)(*size, args.auxiliary, genotype)
    net.to(device, memory_format=layout)
    run_net = torch.compile(net) if args.compile else net

    def forward(x, drop_path_prob=0.0):
        with torch.autocast(device.type, amp, enabled=amp is not None):
            return run_net(x, drop_path_prob)

    criterion, smoothed = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)

    def test():
        if imagenet:
            batches = test_batches.epoch()
        else:
            share = torch.arange(len(test_set.labels))[processes.rank :: processes.world]
            batches = eval_batches(test_set, share, args.batch_size, memory_format=layout)
        return evaluate(net, criterion, batches, processes, lambda x: forward(x)[0].float())

    if args.evaluate:
        load_weights(net, args)
        loss, accuracy = test()
        if processes.rank == 0:
            print(f"{args.evaluate} on {args.dataset}: test loss {loss:.4f}, accuracy {accuracy:.2f} %")
        return processes.close()

    parameters = list(net.parameters())  # once: a walk through all modules takes milliseconds
    optimizer = torch.optim.SGD(parameters, args.learning_rate, args.momentum, weight_decay=args.weight_decay)
    if imagenet:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: imagenet_rate(epoch, args))
    else:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    uses_engine = device.type == "cpu" and layout is torch.channels_last and not args.compile
    facts = {"parameters": count_parameters(net), "multiply_adds": count_multiply_adds(net, image),
             **machine_facts(device, engine=uses_engine, graph=False)}
    parts = {"model": net, "optimizer": optimizer, "scheduler": scheduler}
    with Run("eval", args, processes, parts, len(train_batches), [train_set, test_set], facts,
             {"genotype": to_json(genotype)}) as run:
        run.write("genotype.json", to_json(genotype))
        run.log(*remarks, *layout_remarks,
                f"{run.path}: {args.arch} on {args.dataset}, {len(train_set.labels)} images, "
                f"{facts['parameters']:,} parameters, {facts['multiply_adds'] / 1e6:.1f} M multiply-adds, "
                f"on {device}")
        if uses_engine and compiled_for("cpu"):
            run.log(net.engine.coverage(net.cells))
        for epoch in range(run.epoch, args.epochs):
            net.train()
            drop_path_prob = args.drop_path_prob * epoch / args.epochs
            if args.compile and args.drop_path_prob:  # as a tensor, or every epoch would compile again
                drop_path_prob = torch.tensor(drop_path_prob, device=device)
            for x, y in train_batches.epoch(epoch, start=run.step):
                run.seed()
                logits, logits_aux = forward(x, drop_path_prob)
                loss = smoothed(logits.float(), y)
                total = loss
                if logits_aux is not None:
                    total = loss + args.auxiliary_weight * smoothed(logits_aux.float(), y)
                weights = [p for p in parameters if p.requires_grad]
                # Behind noise or `none`, weights may not reach the logits: their gradient is 0.
                grads = torch.autograd.grad(total, weights, materialize_grads=True)
                loss, *grads = processes.average([loss.detach(), *grads])
                optimizer.zero_grad()  # of weights that were frozen since the last step
                for p, grad in zip(weights, clip(grads, args.grad_clip)[0]):
                    p.grad = grad
                optimizer.step()
                run.after_step(loss, logits, y)
            scheduler.step()
            run.seed()
            train_loss, train_accuracy, _ = run.meter.read()
            test_loss, test_accuracy = test()
            best = max([test_accuracy, *(values["test_accuracy"] for values in run.history)])
            run.log(f"epoch {epoch}: test loss {test_loss:.4f}, accuracy {test_accuracy:.2f} % "
                    f"(best {best:.2f} %)")
            run.end_epoch({"epoch": epoch, "train_loss": train_loss, "train_accuracy": train_accuracy,
                           "test_loss": test_loss, "test_accuracy": test_accuracy})
    processes.close()


if __name__ == "__main__":
    script(main, "a smaller --batch_size or --init_channels, another --memory_format")
