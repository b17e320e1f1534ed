"""The arguments of train_search.py and train_eval.py: DARTS's names, the published defaults."""
import math
import os
from argparse import BooleanOptionalAction, Namespace
from functools import partial
from typing import Any

from .. import genotypes, spaces
from ..alignment import KINDS
from ..architect import METHODS
from ..data import DATASETS
from ..errors import InputError, require
from .arguments import Parser, add_run_arguments, any_case
from .derived import checkpoint_file, read_trained, size_of, unfinished_search, usual_size
from .machine import pick_device

RULES = {  # for the numbers of both scripts
    "must be at least 1": (lambda value: value >= 1, (
        "batch_size", "epochs", "report_freq", "init_channels", "layers", "cutout_length",
        "image_size", "probe_batches")),
    "must be positive": (lambda value: 0 < value < math.inf, (
        "learning_rate", "arch_learning_rate", "arch_epsilon", "epsilon", "grad_clip")),
    "must not be negative": (lambda value: 0 <= value < math.inf, (
        "learning_rate_min", "momentum", "weight_decay", "arch_weight_decay", "lambda_reg", "warmup_epochs",
        "workers")),
    "must be from 0 to 1": (lambda value: 0 <= value <= 1, ("cutout_prob",)),
    "must be from 0 to below 1": (lambda value: 0 <= value < 1, ("drop_path_prob", "label_smoothing")),
}


def parse_search_args() -> Namespace:
    parser = Parser("search", description="Search for a cell with Λ-DARTS.")
    add, flag = parser.add_argument, partial(parser.add_argument, action="store_true")
    add("--data", default="data", help="folder of the data set, or its archive")
    add("--dataset", type=any_case(DATASETS), default="cifar10", help=", ".join(DATASETS))
    add("--image_size", type=int, help="pixels a side, a divisor of the set's (default: the set's own)")
    add("--search_space", type=any_case(spaces.SPACES), default="darts", help=", ".join(spaces.SPACES))
    add("--batch_size", type=int, default=64)
    add("--learning_rate", type=float, default=0.025,
        help="of SGD on w at the start; cosine down to the next")
    add("--learning_rate_min", type=float, default=0.001)
    add("--momentum", type=float, default=0.9)
    add("--weight_decay", type=float, default=3e-4)
    add("--report_freq", type=int, default=50, help="steps between two lines")
    add("--epochs", type=int, default=50)
    add("--init_channels", type=int, default=16)
    add("--layers", type=int, help="cells (default 8), or cells a stage in nasbench201 (default 5)")
    flag("--cutout", help="cutout with a probability that grows to --cutout_prob")
    add("--cutout_length", type=int, default=16)
    add("--cutout_prob", type=float, default=1.0)
    add("--save", help="name of the run (default: search- and the time)")
    add("--seed", type=int, default=0)
    add("--grad_clip", type=float, default=5.0)
    add("--train_portion", type=float, default=0.5, help="share of the training set for w; the rest is for α")
    flag("--unrolled", help="second-order α gradients")
    add("--hessian", choices=("central", "exact"), default="central", help="the second order's product")
    add("--arch_learning_rate", type=float, help="default 3e-4, in nasbench201 1e-4")
    add("--arch_weight_decay", type=float, default=1e-3)
    add("--arch_epsilon", type=float, default=1e-8,
        help="ε of Adam on α; 0.1, above the gradient: steps follow its length, not its sign alone")
    add("--lambda_reg", type=float, help="λ, reached in the last epoch; 0: plain DARTS "
                                         "(default 0.125, 0.25 on SVHN and in nasbench201)")
    add("--lambda_kind", choices=KINDS, default="cosine")
    add("--lambda_grad", choices=METHODS, default="central",
        help="how ∇Λ is computed; random: a control, a random direction as long as central's")
    add("--epsilon", type=float, help="ε₀ of central and forward (default 1e-4, 1e-3 on SVHN)")
    add("--probe_batches", type=int, help="fresh batches of each half, over which the metrics average Λ and "
                                          "the cells' gradients (default: the last batch of the epoch)")
    flag("--eigenvalue", help="log the dominant eigenvalue of ∂²L_valid/∂α² every epoch")
    flag("--plot", help="draw the cells, α and the curves anew every epoch (needs matplotlib)")
    flag("--tensorboard", help="write TensorBoard's event files into the run folder (needs tensorboard)")
    add("--graph", action=BooleanOptionalAction,
        help="a step as one CUDA graph (default: on a GPU, with one process, but for the noise of s4)")
    add_run_arguments(add)
    args = parser.parse_args()
    in_201, on_svhn = args.search_space == "nasbench201", args.dataset == "svhn"
    fill_in(args, layers=5 if in_201 else 8, arch_learning_rate=1e-4 if in_201 else 3e-4,
            lambda_reg=0.25 if in_201 or on_svhn else 0.125, epsilon=1e-3 if on_svhn and not in_201 else 1e-4)
    spaces.get(args.search_space)
    for wanted, module in (("plot", "matplotlib"), ("tensorboard", "tensorboard")):
        if getattr(args, wanted):
            require(module, f"--{wanted}")
    if in_201 and args.unrolled:
        raise InputError("--unrolled: nasbench201 is searched by first order only, as published; "
                         "leave it out")
    if args.hessian == "exact" and not args.unrolled:
        raise InputError("--hessian exact: only the second order has one; add --unrolled")
    if not 0 < args.train_portion < 1:
        raise InputError(f"--train_portion {args.train_portion}: both w and α need images; "
                         "use a share between 0 and 1")
    check_numbers(args)
    if args.amp != "none" and args.lambda_grad == "forward" and args.lambda_reg:
        raise InputError("--amp bf16 with --lambda_grad forward: it is the difference of two passes of one "
                         "precision; use central or exact")
    uses_graph(args)
    return args


def uses_graph(args: Namespace) -> bool:
    """Whether a step is a CUDA graph: as --graph says, by default where nothing hinders it.

    Not recorded with the arguments of a run, which may be continued on another device. Raises InputError for
    a --graph that can't be.
    """
    hindrance = ""
    if pick_device(args.device).type != "cuda":
        hindrance = "needs a GPU"
    elif args.search_space == "s4":
        hindrance = "the noise of s4 is drawn again for every pass of a difference, which a graph can't do"
    elif args.lambda_grad == "random" and args.lambda_reg:
        hindrance = ("--lambda_grad random draws a direction in every step, and a resumed run has to draw "
                     "the same")
    if args.graph and hindrance:
        raise InputError(f"--graph: {hindrance}; use --no-graph")
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return not (hindrance or several) if args.graph is None else args.graph


def parse_eval_args() -> tuple[Namespace, genotypes.Genotype | str, list[str]]:
    """(arguments, genotype, what the user should know of the choice of both)"""
    sets = *DATASETS, "imagenet"
    parser = Parser("eval", description="Train a derived network from scratch and test it.")
    add, flag = parser.add_argument, partial(parser.add_argument, action="store_true")
    add("--arch", help="a published name (default LAMBDA_DARTS), a search's run folder, genotype.json, a log "
                       "of DARTS, its genotypes.py:NAME, or the text of a genotype or arch string")
    add("--data", default="data", help="folder of the data set, or its archive")
    add("--dataset", type=any_case(sets), default="cifar10", help=", ".join(sets))
    add("--batch_size", type=int, help="default 96, on ImageNet 1024")
    add("--learning_rate", type=float,
        help="at the start; cosine down to 0 (0.025), on ImageNet linear (0.5)")
    add("--momentum", type=float, default=0.9)
    add("--weight_decay", type=float, help="default 3e-4, on ImageNet 3e-5")
    add("--report_freq", type=int, default=50, help="steps between two lines")
    add("--epochs", type=int, help="default 600, on ImageNet 250")
    add("--init_channels", type=int, help="default 36, on ImageNet 48; 16 for cells of S1 to S4 on CIFAR-100 "
                                          "and SVHN, and of nasbench201")
    add("--layers", type=int, help="cells: default 20, on ImageNet 14, or 8; in nasbench201 cells a stage: 5")
    add("--auxiliary", action=BooleanOptionalAction, help="auxiliary tower (default: on, off in nasbench201)")
    add("--auxiliary_weight", type=float, default=0.4)
    add("--cutout", action=BooleanOptionalAction, help="default: on, off on ImageNet")
    add("--cutout_length", type=int, default=16)
    add("--drop_path_prob", type=float, help="reached in the last epoch (default 0.2, on ImageNet 0)")
    add("--label_smoothing", type=float, help="of the training loss (default 0, on ImageNet 0.1)")
    add("--warmup_epochs", type=int, default=5, help="in which the learning rate of ImageNet grows linearly")
    add("--workers", type=int, default=4, help="processes that read ImageNet, --data/train and --data/val")
    add("--save", help="name of the run (default: eval- and the time)")
    add("--seed", type=int, default=0)
    add("--grad_clip", type=float, default=5.0)
    add("--evaluate", metavar="CHECKPOINT", type=checkpoint_file,
        help="test a run, its checkpoint, or weights from elsewhere, and stop; cell and size are theirs")
    flag("--compile", help="torch.compile the network")
    add_run_arguments(add)
    args = parser.parse_args()
    remarks = []
    if args.evaluate:
        weights, genotype = read_trained(args.evaluate, args.arch)
        C, layers = size_of(weights, isinstance(genotype, str))
        fill_in(args, init_channels=C, layers=layers)
    else:
        fill_in(args, arch="LAMBDA_DARTS")
        genotype = genotypes.load(args.resume or args.arch)  # a run folder holds its genotype
        remarks += [] if args.resume else unfinished_search(args.arch)
    in_201, imagenet = isinstance(genotype, str), args.dataset == "imagenet"
    C, layers, why = usual_size(args.arch, genotype, args.dataset)
    if inferred := [f"--{name} {value}" for name, value in (("init_channels", C), ("layers", layers))
                    if getattr(args, name) is None]:
        remarks.append(f"{' '.join(inferred)}: {why}")
    fill_in(args, init_channels=C, layers=layers)
    if imagenet:
        fill_in(args, batch_size=1024, cutout=False, learning_rate=0.5, weight_decay=3e-5, epochs=250,
                drop_path_prob=0.0, label_smoothing=0.1)
    fill_in(args, batch_size=96, cutout=True, learning_rate=0.025, weight_decay=3e-4, epochs=600,
            drop_path_prob=0.2, label_smoothing=0.0)
    if in_201 and imagenet:
        raise InputError("--dataset imagenet: the networks of nasbench201 are for 32x32 images; "
                         "use a cell of a DARTS space")
    if in_201 and args.auxiliary:
        raise InputError("--auxiliary: the networks of nasbench201 have no auxiliary tower; leave it out")
    fill_in(args, auxiliary=not in_201)
    args.auxiliary &= not args.evaluate  # no test uses it
    check_numbers(args)
    return args, genotype, remarks


def fill_in(args: Namespace, **defaults: Any) -> None:
    """Set the arguments that were left out."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def check_numbers(args: Namespace) -> None:
    """Raises InputError for the first number of which its rule does not hold."""
    for rule, (holds, names) in RULES.items():
        for name in names:
            value = getattr(args, name, None)
            if value is not None and not holds(value):
                raise InputError(f"--{name} {value}: {rule}")
