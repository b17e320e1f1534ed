"""`Architect`: the gradients of α, and ∇_w Λ; `search_step`: a step along them."""
import random
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .alignment import layer_alignment
from .errors import InputError
from .model_search import SearchNetwork

Batch = tuple[Tensor, Tensor]  # x [N, 3, H, W], y [N]
Tensors = Sequence[Tensor]
METHODS = ("central", "exact", "random")


class WeightGrads(NamedTuple):
    loss: Tensor
    logits: Tensor  # [N, num_classes], of the training pass
    dw: Tensors  # ∇_w L, or ∇_w (L − λ_t Λ)
    d_lambda: Tensors | None  # ∇_w Λ
    alignment: Tensor | None  # Λ
    clipped: Tensor | None = None  # [1], of a search step: 1 where the gradient was clipped


class Architect:
    """Computes gradients, and steps α with Adam.

    net: the supernet, or another network with arch_parameters(), weight_parameters(), cell_weights(),
    searched_cells() (Λ leaves out a cell whose `reduction` is true) and forward(x, cell_weights) -> logits;
    criterion: (logits, y) -> scalar loss; lr, betas, weight_decay, eps: of Adam on α;
    w_momentum, w_weight_decay: those of the SGD on w, which the unrolled step imitates; average: tensors ->
    their means over the processes. A gradient is averaged before anything that is not linear in it: results,
    loss included, are those of the global batch (logits: of the process). amp: the dtype of autocast, which
    is off in the passes of a finite difference.

    No method changes a weight, a buffer or a momentum, but lambda_grads and weight_grads, training passes,
    move running statistics once. Weights that do not require a gradient stay as they are and are left out of
    all lists; where the loss does not reach a weight its gradient is 0. The passes of one difference draw the
    same random numbers (of PyTorch, NumPy and Python) and begin with the same buffers. The constructor lists
    the modules of net: add none later.
    """

    def __init__(self, net: SearchNetwork, criterion: Callable[[Tensor, Tensor], Tensor], lr: float = 3e-4,
                 betas: tuple[float, float] = (0.5, 0.999), weight_decay: float = 1e-3,
                 w_momentum: float = 0.9, w_weight_decay: float = 3e-4,
                 average: Callable[[Tensors], list[Tensor]] = list, amp: torch.dtype | None = None,
                 eps: float = 1e-8):
        self.net, self.criterion, self.average, self.amp = net, criterion, average, amp
        self.w_momentum, self.w_weight_decay = w_momentum, w_weight_decay
        self.optimizer = torch.optim.Adam(net.arch_parameters(), lr, betas, eps, weight_decay)
        # Lists, because a walk through the thousands of modules of a supernet takes milliseconds.
        self._weights, modules = list(net.weight_parameters()), list(net.modules())
        # These track nothing where track_running_stats is off; the buffers of all other modules are copied.
        batch_norms = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
        self._norms = [m for m in modules if type(m) in batch_norms]
        self._buffers = [(m._buffers, name) for m in modules if type(m) not in batch_norms
                         for name in m._buffers]

    @property
    def weights(self) -> list[nn.Parameter]:
        """w: those of net.weight_parameters() that require a gradient."""
        return [p for p in self._weights if p.requires_grad]

    @property
    def alphas(self) -> list[nn.Parameter]:
        """α: those of net.arch_parameters() that require a gradient."""
        return [alpha for alpha in self.net.arch_parameters() if alpha.requires_grad]

    def step(self, grads: Tensors) -> None:
        """One step of Adam along the gradients of alpha_grads."""
        self.optimizer.zero_grad()  # of an α that was frozen since the last step
        for alpha, grad in zip(self.alphas, grads, strict=True):
            alpha.grad = grad
        self.optimizer.step()

    def alpha_grads(self, train: Batch, valid: Batch, eta: float, w_optimizer: Optimizer | None,
                    unrolled: bool, hessian: str = "central") -> list[Tensor]:
        """∂L_valid/∂α, at w or, `unrolled`, at w' = w − ξ (∇L_train + momentum · v + weight_decay · w).

        eta: ξ, the current learning rate; w_optimizer: the SGD whose momentum buffers are v (none yet: 0);
        hessian: ∂²L_train/∂α∂w · ∇_w' L_valid by a `central` difference of radius 1e-2 / ‖∇_w' L_valid‖, as
        published, or `exact` by double backward. Liu et al., 2019, eq. 6 to 8. Only `unrolled` reads train.
        """
        if hessian not in ("central", "exact"):
            raise InputError(f"unknown way {hessian!r} to the product with the Hessian: use central or exact")
        alphas, w = self.alphas, self.weights
        if not (unrolled and w and alphas):
            with self.kept():
                return self.average(gradients(self._loss(valid, amp=self.amp), alphas))
        with self.kept(grad=True):
            start = self._start(train[0].device)
            dw = gradients(self._loss(train, amp=self.amp), w, create_graph=hessian == "exact")
            with self.kept(values=self._unrolled(w, dw, eta, w_optimizer), grad=True):
                grads = self.average(gradients(self._loss(valid, amp=self.amp), [*alphas, *w]))
            d_alpha, vector = grads[: len(alphas)], grads[len(alphas) :]  # ∂L_valid(w', α), by α and by w'
            if hessian == "exact":
                product = gradients(dw, alphas, vector)
            else:
                def by_alpha(r: Tensor) -> tuple[Tensor, ...]:  # ∂L_train(w + r vector, α)/∂α
                    with self.kept(start, values=moved(w, r, vector)):
                        return gradients(self._loss(train), alphas)

                product = central_difference(by_alpha, 1e-2, nn.utils.get_total_norm(vector))
        return [d - eta * h for d, h in zip(d_alpha, self.average(product))]

    def _unrolled(self, w: Tensors, dw: Tensors, eta: float, optimizer: Optimizer | None) -> list[Tensor]:
        """w' = w − ξ (∇L_train + momentum · v + weight_decay · w)"""
        state = optimizer.state if optimizer else {}
        momenta = [state.get(p, {}).get("momentum_buffer") for p in w]
        v = [torch.zeros_like(p) if buffer is None else buffer for p, buffer in zip(w, momenta)]
        decayed = torch._foreach_mul([p.detach() for p in w], 1 - eta * self.w_weight_decay)
        stepped = moved(decayed, -eta, self.average([g.detach() for g in dw]))
        return moved(stepped, -eta * self.w_momentum, v)

    def lambda_grads(self, batch: Batch, kind: str = "cosine", epsilon: float = 1e-4,
                     method: str = "central") -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        """(L, ∇_w L, ∇_w Λ, Λ) on one training batch; gradients in the order of net.weight_parameters().

        kind: `cosine` or `sign`, see layer_alignment. With g_l = ∂L/∂p_l and u_l = ∂Λ/∂g_l over the normal
        cells, ∇_w Λ = Σ_l ∂²L/∂w∂p_l · u_l, by the method `central`, a difference of ∇_w L at p ± ε u with
        ε = epsilon / ‖u‖, as published (Movahedi et al., 2023, section 4), or `exact`, by double backward.
        `random` is a control: a random direction, another one in every call, as long as the result of
        `central` on this batch.
        """
        grads = self.weight_grads(batch, kind, epsilon, method)
        return grads.loss, grads.dw, grads.d_lambda, grads.alignment

    def weight_grads(self, batch: Batch, kind: str, epsilon: float, method: str | None,
                     lambda_t: Tensor | float | None = None) -> WeightGrads:
        """lambda_grads with the logits of the training pass; method None: ∇_w L alone, without Λ.

        With lambda_t, dw is ∇_w (L − lambda_t Λ), by `exact` in one backward pass, and d_lambda is None.
        """
        if method not in (None, *METHODS):
            raise InputError(f"unknown method {method!r} for the gradient of Λ: "
                             f"use one of {', '.join(METHODS)}")
        w, p = self.weights, self.cell_leaves()
        method = method if w else None
        start = self._start(batch[0].device)
        logits, loss = self._pass(batch, p, self.amp)
        of_w = [] if method == "exact" and lambda_t is not None else w
        own = gradients(loss, [*of_w, *(p if method else [])], create_graph=method == "exact")
        mean_loss, *means = self.average([t.detach() for t in (loss, *own)])  # over the processes
        dw, g = means[: len(of_w)], means[len(of_w) :]
        value = d_lambda = None
        if method:
            value, u = self.alignment(g, kind)
        if method == "exact":
            normal, u = zip(*((g_l, u_l) for g_l, u_l in zip(own[len(of_w) :], u) if u_l is not None))
            if lambda_t is None:
                d_lambda = self.average(gradients(normal, w, u))
            else:  # both in one backward pass
                u = [torch.ones_like(loss), *torch._foreach_mul(u, -lambda_t)]
                dw = self.average(gradients([loss, *normal], w, u))
        elif method:
            def by_w(r: Tensor) -> tuple[Tensor, ...]:  # ∇_w L at p + r u
                at = [p_l.detach() if u_l is None else p_l.detach() + r * u_l for p_l, u_l in zip(p, u)]
                with self.kept(start, grad=True):
                    return gradients(self._loss(batch, at), w)

            length = torch.linalg.vector_norm(flat(u_l for u_l in u if u_l is not None))
            d_lambda = self.average(central_difference(by_w, epsilon, length))
            if method == "random":  # every process draws its own; their mean is the same on all of them
                noise = self.average([torch.randn_like(t) for t in d_lambda])
                scale = nn.utils.get_total_norm(d_lambda) / nn.utils.get_total_norm(noise)
                d_lambda = torch._foreach_mul(noise, scale)
            if lambda_t is not None:
                dw, d_lambda = moved(dw, -lambda_t, d_lambda), None
        d_lambda = None if d_lambda is None else in_layout_of(w, d_lambda)
        return WeightGrads(mean_loss, logits.detach(), in_layout_of(w, dw), d_lambda, value)

    def cell_leaves(self) -> list[Tensor]:
        """A copy p_l of p = softmax(α) for every searched cell, each a leaf of its own."""
        return [p.detach().clone().requires_grad_() for p in self.net.cell_weights()]

    def alignment(self, grads: Tensors, kind: str) -> tuple[Tensor, list[Tensor | None]]:
        """Λ over normal cells and u_l = ∂Λ/∂g_l, None for reductions. grads: g_l of every searched cell."""
        leaves = [g.detach().requires_grad_() for g in grads]
        normal = [g for g, cell in zip(leaves, self.net.searched_cells())
                  if not getattr(cell, "reduction", False)]
        value = layer_alignment(normal, kind)
        return value.detach(), list(torch.autograd.grad(value, leaves, allow_unused=True))

    def cell_gradients(self, batch: Batch) -> list[Tensor]:
        """g_l = ∂L/∂p_l [edges, ops] of every searched cell on one batch, changing nothing."""
        with self.kept():
            p = self.cell_leaves()
            return self.average(gradients(self._loss(batch, p), p))

    def gradient_norms(self, batch: Batch, kind: str, epsilon: float, method: str | None) -> Tensors:
        """‖∇_w L‖ and ‖∇_w Λ‖ (not computed: 0) on one batch, by the passes of a step, changing nothing."""
        with self.kept(grad=True):
            grads = self.weight_grads(batch, kind, epsilon, method)
        norm = nn.utils.get_total_norm(grads.dw)
        return norm, nn.utils.get_total_norm(grads.d_lambda) if grads.d_lambda else torch.zeros_like(norm)

    def alpha_eigenvalue(self, batch: Batch, iterations: int = 20, tolerance: float = 0.01) -> float:
        """The eigenvalue of ∂²L/∂α² on one batch that is largest in magnitude, which grows when a search
        collapses (Zela et al., 2020): power iteration by double backward, from the same direction each time,
        changing nothing. Ends after `iterations`, or at a change of less than `tolerance` times the value.
        """
        if not (alphas := self.alphas):
            return 0.0
        with self.kept(self._start(batch[0].device)):
            torch.manual_seed(0)
            gradient = flat(gradients(self._loss(batch), alphas, create_graph=True))
            product, value = torch.randn_like(gradient), 0.0
            for _ in range(iterations):
                v = product / product.norm()
                product = flat(self.average(gradients(gradient, alphas, v, retain_graph=True)))
                before, value = value, float(v @ product)
                if abs(value - before) < tolerance * abs(value):
                    break
        return value

    @contextmanager
    def kept(self, start: tuple | None = None, values: Tensors | None = None, grad: bool = False) -> Iterator:
        """Within, passes leave the net as it was: batch norms track nothing, other buffers are copies.

        start: an earlier result of _start, with whose random numbers and buffers the passes begin; values:
        replace w within; grad: whether gradients w.r.t. w can be taken, which costs time.
        """
        w, tracking = self.weights, [norm for norm in self._norms if norm.track_running_stats]
        before = [p.data for p in w], self._own_buffers()
        random_states, buffers = start or ([], before[1])

        def put(values, buffers, grad, track):
            for p, value in zip(w, values):
                p.data = value
                p.requires_grad_(grad)
            for (of_module, name), buffer in zip(self._buffers, buffers):
                of_module[name] = buffer
            for norm in tracking:  # Module's own __setattr__ looks for parameters first
                object.__setattr__(norm, "track_running_stats", track)

        with ExitStack() as at_end:
            for read, write, state in random_states:
                at_end.callback(write, read())  # as if the passes had drawn nothing
                write(state)
            at_end.callback(put, *before, True, True)
            put(before[0] if values is None else values, copies(buffers), grad, False)
            yield

    def _start(self, device: torch.device) -> tuple[list, list]:
        """What a pass depends on besides w: random generators as (read, write, state), copies of buffers."""
        functions = [(random.getstate, random.setstate), (np.random.get_state, np.random.set_state),
                     (torch.get_rng_state, torch.set_rng_state)]
        # A step that draws random numbers is not captured (capture.py).
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            functions.append((lambda: torch.cuda.get_rng_state(device),
                              lambda state: torch.cuda.set_rng_state(state, device)))
        return [(read, write, read()) for read, write in functions], copies(self._own_buffers())

    def _own_buffers(self) -> list[Tensor | None]:
        return [of_module[name] for of_module, name in self._buffers]

    def _loss(self, batch: Batch, p: Tensors | None = None, amp: torch.dtype | None = None) -> Tensor:
        return self._pass(batch, p, amp)[1]

    def _pass(self, batch: Batch, p: Tensors | None, amp: torch.dtype | None) -> tuple[Tensor, Tensor]:
        x, y = batch
        # Without its cache, because a weight is read once a pass and has other values in the next.
        with torch.autocast(x.device.type, amp, cache_enabled=False) if amp else nullcontext():
            logits = self.net(x, p)
            return logits, self.criterion(logits, y)


def search_step(arch: Architect, optimizer: Optimizer, train: Batch, valid: Batch, *,
                unrolled: bool, alpha_first: bool, hessian: str = "central", **of_weights) -> WeightGrads:
    """One step: α on the validation batch, then w on the training batch (in nasbench201 w goes first).

    optimizer: of w, an SGD with one group of parameters, whose momentum and weight decay arch was told.
    of_weights: see weight_step. Never waits for the device; numbers that change from step to step, lambda_t
    and the learning rate, may be tensors. Returns the WeightGrads of the training batch.
    """
    def alpha_step():
        rate = optimizer.param_groups[0]["lr"]
        arch.step(arch.alpha_grads(train, valid, rate, optimizer, unrolled, hessian))

    if alpha_first:
        alpha_step()
    grads = weight_step(arch, optimizer, train, **of_weights)
    if not alpha_first:
        alpha_step()
    return grads


def weight_step(arch: Architect, optimizer: Optimizer, train: Batch, *, lambda_t: float | Tensor,
                kind: str, epsilon: float, method: str | None, grad_clip: float) -> WeightGrads:
    """The step of w alone, which minimises L_train - λ_t Λ. method: how ∇Λ is computed, None: without Λ"""
    grads = arch.weight_grads(train, kind, epsilon, method, lambda_t)
    for p in arch._weights:
        p.grad = None  # also of one that was frozen since the last step
    clipped, norm = clip(grads.dw, grad_clip)
    for p, grad in zip(arch.weights, clipped):
        p.grad = grad
    optimizer.step()
    return grads._replace(clipped=(norm > grad_clip).to(norm).view(1))


def clip(grads: Tensors, longest: float) -> tuple[list[Tensor], Tensor]:
    """(the gradients, scaled down if their total norm is above `longest`; that norm). As clip_grad_norm_ of
    PyTorch, but not in place: the gradients of weights that are added up are one tensor."""
    norm = nn.utils.get_total_norm(grads)
    factor = (longest / (norm + 1e-6)).clamp(max=1.0)
    return torch._foreach_mul(grads, factor) if grads else [], norm


def gradients(outputs: Tensor | Tensors, tensors: Tensors, along: Tensor | Tensors | None = None,
              **options: bool) -> Tensors:
    """Σ ∂output/∂tensor · along, for each tensor; 0 where no output reaches it. A loss needs no `along`."""
    return torch.autograd.grad(outputs, tensors, along, materialize_grads=True, **options) if tensors else ()


def central_difference(gradient: Callable[[Tensor], Tensors], epsilon: float, length: Tensor) -> Tensors:
    """[gradient(r) − gradient(−r)] / 2r with r = epsilon / length. gradient(r): at x + r v; length: ‖v‖"""
    r = epsilon / length.clamp_min(torch.finfo(length.dtype).tiny)  # the vector may be 0
    with full_float32():
        return torch._foreach_div(torch._foreach_sub(gradient(r), gradient(-r)), 2 * r)


@contextmanager
def full_float32() -> Iterator[None]:
    """Within, no product or convolution of float32 is computed in TF32 or bfloat16: with TF32's 10 bits,
    cuDNN's default for convolutions, a difference over ε₀ = 1e-4 would be one of rounding errors."""
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    parts = torch.backends.cuda.matmul, mkldnn.matmul, mkldnn.conv, cudnn.conv, cudnn.rnn
    attributes = [(cudnn, "allow_tf32", False), *((part, "fp32_precision", "ieee") for part in parts)]
    switches = [(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
                *((partial(getattr, *of), partial(setattr, *of), off) for *of, off in attributes)]
    with ExitStack() as at_end:  # which calls in reverse order
        for read, write, _ in reversed(switches):
            with suppress(RuntimeError):  # the old switches can't be read where the new ones say otherwise
                at_end.callback(write, read())
        for _, write, off in switches:
            write(off)
        yield


def copies(buffers: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [buffer if buffer is None else buffer.clone() for buffer in buffers]


def moved(tensors: Tensors, r: float | Tensor, vector: Tensors) -> list[Tensor]:
    """tensors + r · vector"""
    with torch.no_grad():
        return torch._foreach_add(tensors, torch._foreach_mul(vector, r))


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def in_layout_of(parameters: Tensors, grads: Tensors) -> list[Tensor]:
    """The gradients in the memory layout of their parameters, as backward() would leave them in `.grad`.

    A fused optimizer reads both as flat memory: with other strides it steps a weight by another's gradient.
    """
    return [grad if grad.stride() == p.stride() else torch.empty_like(p).copy_(grad)
            for p, grad in zip(parameters, grads, strict=True)]
