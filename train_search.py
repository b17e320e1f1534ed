"""Search for a cell with Λ-DARTS.

    python train_search.py --unrolled --lambda_reg 0.125                # CIFAR-10, second order
    python train_search.py --dataset synthetic --init_channels 4 --layers 5 --epochs 3  # no download, minutes
    python train_search.py --search_space s2 --dataset svhn             # λ and ε as published for SVHN
    python train_search.py --lambda_reg 0                               # plain DARTS
    python train_search.py --resume runs/<name>                         # go on with a stopped or killed run
    torchrun --nproc_per_node=2 train_search.py --unrolled              # two processes share every batch

Writes runs/<name>/ and prints the genotype and the command that trains it. Movahedi et al., ICLR 2023.
"""
import shlex
from itertools import chain, islice
from statistics import fmean

import torch
from torch import nn

from ldarts import Architect, InputError, SearchNetwork, nasbench201, visualize
from ldarts.alignment import cell_shares
from ldarts.architect import search_step
from ldarts.capture import Captured
from ldarts.data import Batches, eval_batches, halves, load
from ldarts.distributed import Processes
from ldarts.fused import compiled_for
from ldarts.genotypes import to_json
from ldarts.runs import (Run, amp_dtype, check_images, evaluate, machine_facts, parse_search_args,
                         pick_device, safe_layout, script, script_path, seed_everything,
                         set_deterministic, uses_graph)


def measure_cells(arch, probes, kind):
    """What the normal cells' gradients g_l = ∂L/∂p_l say: values for a line of metrics.jsonl.

    probes: "train" and "valid" -> batches of that half. On each half Λ, its mean over the batches. On the
    second, whose gradient moves α, by the mean of g_l over the batches: the share of each cell in it, from
    input to output; and of each operation the mean of ∂L/∂p over cells and edges: a step raises p where it is
    lowest.
    """
    values, net = {}, arch.net
    for half, batches in probes.items():
        by_batch = [arch.cell_gradients(batch) for batch in batches]
        values[f"lambda_{half}"] = fmean(float(arch.alignment(grads, kind)[0]) for grads in by_batch)
    by_cell = zip(zip(*by_batch), net.searched_cells())
    g = torch.stack([torch.stack(grads).mean(0) for grads, cell in by_cell if not cell.reduction])
    # g: [n, edges, ops]
    values["cell_shares"] = cell_shares(g, net.edge_weights()[0].detach()).tolist()
    mean_g = g.mean(0).flatten().tolist()
    by_edge = [*zip(chain(*net.primitives.normal), mean_g, strict=True)]  # (operation, mean of g)
    values["operation_grads"] = {op: fmean(grad for name, grad in by_edge if name == op)
                                 for op in dict.fromkeys(name for name, _ in by_edge)}
    return values


def measure_alphas(net, dataset):
    """What α says: values for a line of metrics.jsonl; skip connections are those of the normal cell."""
    genotype, alphas = net.genotype(), net.arch_parameters()
    in_201 = isinstance(genotype, str)
    by_type = [p.detach() for p in net.edge_weights()]  # p [edges, ops], of any number of ops
    entropy = torch.cat([torch.special.entr(p).sum(-1) for p in by_type])
    gini = torch.cat([1 - p.square().sum(-1) for p in by_type])  # 0 where p is saturated
    truth = {}
    if in_201 and nasbench201.has(genotype):
        truth = nasbench201.look_up(genotype, dataset)._asdict()
    return {"entropy": float(entropy.mean()), "gini": float(gini.mean()),
            "skip_connections": str(genotype if in_201 else genotype.normal).count("skip_connect"),
            "alphas": [[[round(a, 6) for a in edge] for edge in alpha.tolist()] for alpha in alphas],
            **{f"true_{name}": accuracy for name, accuracy in truth.items()}}


def main():
    args = parse_search_args()
    if args.deterministic:
        set_deterministic()
    device = pick_device(args.device)
    amp, graph = amp_dtype(args.amp, device), uses_graph(args)
    processes = Processes(device)
    train_set, _ = load(args.dataset, args.data, device, args.seed, size=args.image_size)
    sides = train_set.images.shape[2:]
    check_images(*sides, args.batch_size // processes.world)
    layout, remarks = safe_layout(args.memory_format, device, args.init_channels, *sides)
    for_w, for_alpha = halves(len(train_set.labels), args.train_portion, args.seed)
    batches = {tag: Batches(train_set, half, args.batch_size, args.seed, tag=tag, memory_format=layout,
                            cutout_length=args.cutout_length if args.cutout else 0,
                            rank=processes.rank, world=processes.world)
               for tag, half in (("train", for_w), ("valid", for_alpha))}
    train_batches, valid_batches = batches.values()
    most = min(map(len, batches.values()))
    if args.probe_batches and args.probe_batches > most:
        raise InputError(f"--probe_batches {args.probe_batches}: an epoch has {most}; use at most as many")

    seed_everything(args.seed)
    net = SearchNetwork(args.init_channels, train_set.num_classes, args.layers, args.search_space)
    net.to(device, memory_format=layout)
    normal_cells = sum(not cell.reduction for cell in net.searched_cells())
    if args.lambda_reg and normal_cells < 2:
        raise InputError(f"--lambda_reg {args.lambda_reg} with {args.layers} cells: Λ compares normal cells "
                         f"and here is {normal_cells}; use --layers 4 or more, or --lambda_reg 0")
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.weight_parameters(), args.learning_rate, args.momentum,
                                weight_decay=args.weight_decay, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs, args.learning_rate_min)
    arch = Architect(net, criterion, args.arch_learning_rate, (0.5, 0.999), args.arch_weight_decay,
                     args.momentum, args.weight_decay, processes.average, amp, eps=args.arch_epsilon)

    def run_step(x, y, valid_x, valid_y, lambda_t, method):
        return search_step(arch, optimizer, (x, y), (valid_x, valid_y), unrolled=args.unrolled,
                           alpha_first=args.search_space != "nasbench201", hessian=args.hessian,
                           lambda_t=lambda_t, kind=args.lambda_kind, epsilon=args.epsilon, method=method,
                           grad_clip=args.grad_clip)

    parts = {"model": net, "optimizer": optimizer, "arch": arch.optimizer, "scheduler": scheduler}
    uses_engine = layout is torch.channels_last
    facts = machine_facts(device, uses_engine, graph)  # compiles the engine if need be
    with Run("search", args, processes, parts, len(train_batches), [train_set], facts) as run:
        weights = sum(p.numel() for p in net.weight_parameters())
        run.log(f"{run.path}: {args.search_space} on {args.dataset}, {len(for_w)} images for w and "
                f"{len(for_alpha)} for α, {weights:,} weights, on {device}", *remarks)
        if uses_engine and compiled_for(device.type):
            run.log(net.engine.coverage(net.searched_cells()))
        if args.lambda_reg and args.epochs == 1:
            run.log("warning: --epochs 1 is plain DARTS: λ grows from 0 in the first epoch")
        if graph:
            run_step = Captured(run_step, net, [optimizer, arch.optimizer], run.log)
        for epoch in range(run.epoch, args.epochs):
            lambda_t = args.lambda_reg * epoch / max(1, args.epochs - 1)
            cutout_prob = args.cutout_prob * epoch / max(1, args.epochs - 1)
            method = args.lambda_grad if lambda_t else None  # the first epoch has λ = 0
            weight = torch.tensor(lambda_t, device=device)
            net.train()
            first = run.step
            for step, train in enumerate(train_batches.epoch(epoch, cutout_prob, start=first), first):
                if step == first or step % len(valid_batches) == 0:  # α's images, each time in a new order
                    valid = valid_batches.epoch(epoch, cutout_prob, *divmod(step, len(valid_batches)))
                run.seed()
                grads = run_step(*train, *next(valid), weight, method=method)
                run.after_step(grads.loss, grads.logits, train[1], grads.clipped, Λ=grads.alignment)
            grads = None  # a graph that is captured anew takes the memory of the one before
            scheduler.step()

            run.seed()
            train_loss, train_accuracy, clipped = run.meter.read()
            # The batches of the last step, which a resumed run may not have taken itself.
            last = len(train_batches) - 1
            probes = {half: [next(of_half.epoch(epoch, cutout_prob, *divmod(last, len(of_half))))]
                      for half, of_half in batches.items()}
            loss_norm, lambda_norm = arch.gradient_norms(*probes["train"], args.lambda_kind, args.epsilon,
                                                         method)
            if args.probe_batches:  # of an epoch that no step is taken on: new crops of the same images
                probes = {half: islice(of_half.epoch(args.epochs + epoch, cutout_prob), args.probe_batches)
                          for half, of_half in batches.items()}
            of_cells = measure_cells(arch, probes, args.lambda_kind) if normal_cells > 1 else {}
            share = for_alpha[processes.rank :: processes.world]
            if args.eigenvalue:
                images = args.batch_size // processes.world
                probe = next(eval_batches(train_set, share, images, memory_format=layout))
                of_cells["alpha_eigenvalue"] = arch.alpha_eigenvalue(probe)
            held_out = eval_batches(train_set, share, args.batch_size, memory_format=layout)
            valid_loss, valid_accuracy = evaluate(net, criterion, held_out, processes)
            values = {"epoch": epoch, "train_loss": train_loss, "train_accuracy": train_accuracy,
                      "valid_loss": valid_loss, "valid_accuracy": valid_accuracy, "lambda_reg": lambda_t,
                      **of_cells, "lambda_grad_norm": lambda_t * float(lambda_norm),
                      "loss_grad_norm": float(loss_norm), "clipped": clipped,
                      **measure_alphas(net, args.dataset)}
            shown = ", ".join(f"Λ {half} {of_cells[f'lambda_{half}']:+.3f}" for half in probes
                              if f"lambda_{half}" in of_cells)
            run.log(f"epoch {epoch}: valid loss {valid_loss:.4f}, accuracy {valid_accuracy:.2f} %, "
                    f"{shown or 'no Λ'}, entropy {values['entropy']:.3f}, "
                    f"{values['skip_connections']} skip connections")
            run.write("genotype.json", to_json(net.genotype()))
            run.end_epoch(values)
            if args.plot and run.writes:
                visualize.draw_run(run.path)
        genotype = net.genotype()
        run.log(f"genotype: {genotype}")
        if args.search_space == "nasbench201" and nasbench201.has(genotype):
            run.log(nasbench201.describe(genotype, args.dataset))
        options = "--arch", str(run.path), "--dataset", args.dataset, "--data", args.data
        run.log(f"train it: python {script_path('train_eval.py')} {shlex.join(options)}")
    run_step = None  # NCCL waits for the end of the graphs that use it
    processes.close()


if __name__ == "__main__":
    script(main, "a smaller --batch_size or --init_channels, --lambda_grad central, --no-graph, another "
           "--memory_format")
