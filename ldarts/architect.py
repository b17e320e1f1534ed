"""`Architect`: the gradients by α, and the gradient of Λ by the weights; `search_step`: a step along them."""
from contextlib import contextmanager, nullcontext
from typing import Callable, Iterator, NamedTuple, Sequence

import torch
from torch import Tensor, nn

from .alignment import layer_alignment
from .errors import InputError
from .model_search import SearchNetwork

Batch = tuple[Tensor, Tensor]  # x [N, 3, H, W], y [N]
METHODS = ("central", "exact", "random")


class WeightGrads(NamedTuple):
    loss: Tensor
    logits: Tensor  # [N, num_classes], of the training pass
    dw: Sequence[Tensor]  # ∇_w L, or ∇_w (L − λ_t Λ)
    d_lambda: Sequence[Tensor] | None  # ∇_w Λ
    alignment: Tensor | None  # Λ
    clipped: Tensor | None = None  # [1], of a search step: 1 where the gradient was clipped


class Architect:
    """Computes gradients, and steps α with Adam.

    net: the supernet; criterion: (logits, y) -> scalar loss; lr, betas, weight_decay: of Adam on α;
    w_momentum, w_weight_decay: those of the SGD on w, which the unrolled step imitates; average: tensors ->
    their means over the processes. A gradient is averaged before anything that is not linear in it: results,
    loss included, are those of the global batch (logits: of the process). amp: the dtype to which autocast
    lowers the passes that no difference is taken of. eps: of Adam; far below the gradient every α takes steps
    of one length, far above it steps of lr / eps times its gradient.

    No method changes a weight, a buffer or a momentum, but lambda_grads, a training pass, moves running
    statistics once. Weights that do not require a gradient stay as they are and are left out of all lists;
    where the loss does not reach a weight its gradient is 0. The passes of one difference draw the same
    random numbers and begin with the same buffers. The modules of net are listed once, here: build it before.
    """

    def __init__(self, net: SearchNetwork, criterion: Callable[[Tensor, Tensor], Tensor], lr: float = 3e-4,
                 betas: tuple[float, float] = (0.5, 0.999), weight_decay: float = 1e-3,
                 w_momentum: float = 0.9, w_weight_decay: float = 3e-4,
                 average: Callable[[Sequence[Tensor]], list[Tensor]] = list, amp: torch.dtype | None = None,
                 eps: float = 1e-8):
        self.net, self.criterion, self.average, self.amp = net, criterion, average, amp
        self.w_momentum, self.w_weight_decay = w_momentum, w_weight_decay
        self.optimizer = torch.optim.Adam(net.arch_parameters(), lr=lr, betas=betas,
                                          weight_decay=weight_decay, eps=eps)
        # Lists, because a walk through the thousands of modules of a supernet takes milliseconds.
        self._weights, self._statistics = list(net.weight_parameters()), RunningStatistics(net)

    @property
    def weights(self) -> list[nn.Parameter]:
        """w: those of net.weight_parameters() that require a gradient."""
        return [p for p in self._weights if p.requires_grad]

    @property
    def alphas(self) -> list[nn.Parameter]:
        """Those of net.arch_parameters() that require a gradient."""
        return [alpha for alpha in self.net.arch_parameters() if alpha.requires_grad]

    def step(self, grads: Sequence[Tensor]) -> None:
        """One step of Adam along the gradients of alpha_grads."""
        for alpha, grad in zip(self.alphas, grads, strict=True):
            alpha.grad = grad
        self.optimizer.step()

    def alpha_grads(self, train: Batch, valid: Batch, eta: float, w_optimizer: torch.optim.Optimizer | None,
                    unrolled: bool, hessian: str = "central") -> list[Tensor]:
        """∂L_valid/∂α, at w or, `unrolled`, at w' = w − ξ (∇L_train + momentum · v + weight_decay · w).

        eta: ξ, the current learning rate; w_optimizer: the SGD whose momentum buffers are v (none yet: 0);
        hessian: ∂²L_train/∂α∂w · ∇_w' L_valid by a `central` difference of radius 1e-2 / ‖∇_w' L_valid‖, as
        published, or `exact` by double backward. Liu et al., 2019, eq. 6 to 8. Only `unrolled` reads train.
        """
        if hessian not in ("central", "exact"):
            raise InputError(f"unknown way {hessian!r} to the product with the Hessian: use central or exact")
        alphas, w = self.alphas, self.weights
        with self._statistics.kept():
            if not unrolled or not w:
                with without_grad(w):  # which nobody would read
                    grads = gradients(self._loss(valid, amp=self.amp), alphas)
                    return in_layout_of(alphas, self.average(grads))
            rng, buffers = random_state(train[0].device), self._statistics.snapshot()
            loss = self._loss(train, amp=self.amp)
            dw = gradients(loss, w, create_graph=hessian == "exact")
            unrolled_w = torch._foreach_mul([p.detach() for p in w], 1 - eta * self.w_weight_decay)
            torch._foreach_sub_(unrolled_w, torch._foreach_mul([g.detach() for g in self.average(dw)], eta))
            if (momenta := self._momenta(w, w_optimizer)) is not None:
                torch._foreach_sub_(unrolled_w, torch._foreach_mul(momenta, eta * self.w_momentum))
            with temporary_values(w, unrolled_w):
                grads = self.average(gradients(self._loss(valid, amp=self.amp), [*alphas, *w]))
            d_alpha, vector = grads[: len(alphas)], grads[len(alphas) :]  # ∂L_valid(w', α), by α and by w'
            if hessian == "exact":
                product = torch.autograd.grad(dw, alphas, vector, materialize_grads=True)
            else:
                length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(vector)))
                r = 1e-2 / length.clamp_min(torch.finfo(length.dtype).tiny)

                def side(sign: int) -> tuple[Tensor, ...]:  # ∂L_train(w + sign r vector, α) by α
                    shifted = torch._foreach_add([p.detach() for p in w],
                                                 torch._foreach_mul(vector, sign * r))
                    with temporary_values(w, shifted), without_grad(w):
                        self._statistics.put_back(buffers)
                        return gradients(self._loss(train, rng=rng), alphas)

                product = [(up - down) / (2 * r) for up, down in zip(side(1), side(-1))]
        return in_layout_of(alphas, [d - eta * h for d, h in zip(d_alpha, self.average(product))])

    def lambda_grads(self, batch: Batch, kind: str = "cosine", epsilon: float = 1e-4,
                     method: str = "central") -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        """(L, ∇_w L, ∇_w Λ, Λ) on one training batch; gradients in the order of net.weight_parameters().

        kind: `cosine` or `sign`, see layer_alignment. With g_l = ∂L/∂p_l and u_l = ∂Λ/∂g_l over the normal
        cells, ∇_w Λ = Σ_l ∂²L/∂w∂p_l · u_l, by the method `central`, a difference of ∇_w L at p ± ε u with
        ε = epsilon / ‖u‖, as published (Movahedi et al., 2023, section 4), or `exact`, by double backward.
        `random` is no gradient but the control of an experiment: a direction drawn anew in every call, as
        long as what `central` gives on this batch.
        """
        if method not in METHODS:
            raise InputError(f"unknown method {method!r} for the gradient of Λ: "
                             f"use one of {', '.join(METHODS)}")
        grads = self.weight_grads(batch, kind, epsilon, method)
        return grads.loss, grads.dw, grads.d_lambda, grads.alignment

    def weight_grads(self, batch: Batch, kind: str, epsilon: float, method: str | None,
                     lambda_t: Tensor | float | None = None) -> "WeightGrads":
        """lambda_grads with the logits of the training pass; method None: ∇_w L alone, without Λ.

        lambda_t: dw is ∇_w (L − lambda_t Λ) and d_lambda None, which saves `exact` the gradients by w of its
        first backward pass.
        """
        w, p = self.weights, self.cell_leaves()
        method = method if w else None  # all of them are frozen
        rng, buffers = random_state(batch[0].device), self._statistics.snapshot()
        as_one = method == "exact" and lambda_t is not None
        logits, own_loss = self._pass(batch, p, self.amp)
        wanted = w if method is None else p if as_one else [*w, *p]
        own = gradients(own_loss, wanted, create_graph=method == "exact")  # of this process
        loss, *means = self.average([t.detach() for t in (own_loss, *own)])

        def result(dw: Sequence[Tensor], d_lambda: Sequence[Tensor] | None,
                   value: Tensor | None) -> WeightGrads:
            d_lambda = None if d_lambda is None else in_layout_of(w, d_lambda)
            return WeightGrads(loss, logits.detach(), in_layout_of(w, dw), d_lambda, value)

        if method is None:
            return result(means, None, None)
        dw, g = means[: -len(p)], own[-len(p) :]
        value, u = self.alignment(means[-len(p) :], kind)
        if method == "exact":
            normal, d = zip(*((layer, direction) for layer, direction in zip(g, u) if direction is not None))
            if as_one:
                d = [torch.ones_like(own_loss), *torch._foreach_mul(d, -lambda_t)]
                dw = torch.autograd.grad([own_loss, *normal], w, d, materialize_grads=True)
                return result(self.average(dw), None, value)
            # The last weights (the classifier's bias) may act on no g_l: their gradient is 0.
            return result(dw, self.average(torch.autograd.grad(normal, w, d, materialize_grads=True)), value)
        length = torch.linalg.vector_norm(torch.cat([d.flatten() for d in u if d is not None]))
        eps = epsilon / length.clamp_min(torch.finfo(length.dtype).tiny)  # u is 0 where all g_l are

        def shifted(sign: int) -> tuple[Tensor, ...]:  # ∇_w L at p + sign ε u
            at = [q.detach() if d is None else q.detach() + sign * eps * d for q, d in zip(p, u)]
            with self._statistics.kept():
                self._statistics.put_back(buffers)
                return gradients(self._loss(batch, at, rng=rng), w)

        d_lambda = self.average(torch._foreach_div(torch._foreach_sub(shifted(1), shifted(-1)), 2 * eps))
        if method == "random":
            d_lambda = self._random_direction(d_lambda)
        if lambda_t is None:
            return result(dw, d_lambda, value)
        dw = torch._foreach_sub(dw, torch._foreach_mul(d_lambda, lambda_t))  # w minimises L - λ Λ
        return result(dw, None, value)

    def alpha_eigenvalue(self, batch: Batch, iterations: int = 20, tolerance: float = 0.01) -> float:
        """The eigenvalue of ∂²L/∂α² on one batch that is largest in magnitude, which grows when a search
        collapses (Zela et al., 2020): power iteration by double backward, from one direction on every call,
        changing nothing. Ends after `iterations`, or at a change of less than `tolerance` times the value.
        """
        device, alphas = batch[0].device, self.alphas
        generators = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with self._statistics.kept(), without_grad(self.weights), generators:
            torch.manual_seed(0)
            gradient = gradients(self._loss(batch), alphas, create_graph=True)
            gradient = torch.cat([g.flatten() for g in gradient])
            v, value = torch.randn_like(gradient), 0.0
            for _ in range(iterations):
                v = v / v.norm()
                parts = torch.autograd.grad(gradient, alphas, v, retain_graph=True, materialize_grads=True)
                product = torch.cat([h.flatten() for h in parts])
                before, value, v = value, float(v @ product), product
                if abs(value - before) < tolerance * abs(value):
                    break
        return value

    def cell_leaves(self) -> list[Tensor]:
        """A copy p_l of p = softmax(α) for every searched cell, each a leaf of its own."""
        return [p.detach().clone().requires_grad_() for p in self.net.cell_weights()]

    def alignment(self, grads: Sequence[Tensor], kind: str) -> tuple[Tensor, list[Tensor | None]]:
        """Λ over normal cells and u_l = ∂Λ/∂g_l, None for reductions. grads: g_l of every searched cell."""
        leaves = [g.detach().requires_grad_() for g in grads]
        normal = [g for g, cell in zip(leaves, self.net.searched_cells()) if not cell.reduction]
        value = layer_alignment(normal, kind)
        u = iter(torch.autograd.grad(value, normal))
        return value.detach(), [None if cell.reduction else next(u) for cell in self.net.searched_cells()]

    def cell_gradients(self, batch: Batch) -> list[Tensor]:
        """g_l = ∂L/∂p_l [edges, ops] of every searched cell on one batch, changing nothing."""
        with self._statistics.kept(), without_grad(self.weights):
            p = self.cell_leaves()
            return self.average(gradients(self._loss(batch, p), p))

    def batch_alignment(self, batch: Batch, kind: str = "cosine") -> Tensor:
        """Λ on one batch, changing nothing."""
        return self.alignment(self.cell_gradients(batch), kind)[0]

    def gradient_norms(self, batch: Batch, kind: str, epsilon: float,
                       method: str | None) -> tuple[Tensor, Tensor]:
        """‖∇_w L‖ and ‖∇_w Λ‖ (method None: 0) on one batch, by the passes of a step, changing nothing."""
        with self._statistics.kept():
            grads = self.weight_grads(batch, kind, epsilon, method)
        norm = nn.utils.get_total_norm(grads.dw)
        return norm, nn.utils.get_total_norm(grads.d_lambda) if method else torch.zeros_like(norm)

    def _random_direction(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Normal random numbers, scaled to the norm of `like` as a whole."""
        # Every process draws its own; their mean is the same direction on all of them.
        noise = self.average([torch.randn_like(t) for t in like])
        return torch._foreach_mul(noise, nn.utils.get_total_norm(like) / nn.utils.get_total_norm(noise))

    def _loss(self, batch: Batch, p: Sequence[Tensor] | None = None, rng: list[Tensor] | None = None,
              amp: torch.dtype | None = None) -> Tensor:
        """The loss at p; rng: draw the same random numbers as a pass that began in this state."""
        if rng is not None:
            set_random_state(batch[0].device, rng)
        return self._pass(batch, p, amp)[1]

    def _pass(self, batch: Batch, p: Sequence[Tensor] | None,
              amp: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """(logits, loss)"""
        x, y = batch
        # Without its cache, because a weight is read once a pass and has other values in the next.
        with torch.autocast(x.device.type, amp, cache_enabled=False) if amp else nullcontext():
            logits = self.net(x, p)
            return logits, self.criterion(logits, y)

    @staticmethod
    def _momenta(w: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer | None) -> list[Tensor] | None:
        """SGD's momentum buffers, 0 where there is none yet; None where there is none at all."""
        buffers = [optimizer.state.get(p, {}).get("momentum_buffer") for p in w] if optimizer else []
        if all(v is None for v in buffers):
            return None
        return [torch.zeros_like(p) if v is None else v for p, v in zip(w, buffers)]


def search_step(arch: Architect, optimizer: torch.optim.Optimizer, train: Batch, valid: Batch, *,
                unrolled: bool, alpha_first: bool, hessian: str = "central", **of_weights) -> WeightGrads:
    """One step: α on the validation batch, then w on the training batch (in nasbench201 w goes first).

    of_weights: see weight_step. Waits for the device nowhere; numbers that change from step to step, lambda_t
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


def weight_step(arch: Architect, optimizer: torch.optim.Optimizer, train: Batch, *, lambda_t: float | Tensor,
                kind: str, epsilon: float, method: str | None, grad_clip: float) -> WeightGrads:
    """The step of w alone, which minimises L_train - λ_t Λ. method: how ∇Λ is computed, None: without Λ"""
    grads = arch.weight_grads(train, kind, epsilon, method, lambda_t)
    for p, grad in zip(arch.weights, grads.dw):
        p.grad = grad
    norm = nn.utils.clip_grad_norm_(arch.weights, grad_clip)
    optimizer.step()
    return grads._replace(clipped=(norm > grad_clip).to(norm).view(1))


def in_layout_of(parameters: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """The gradients in the memory layout of their parameters, as backward() would leave them in `.grad`.

    A fused optimizer reads both as flat memory: with other strides it steps a weight by another's gradient.
    """
    return [grad if grad.stride() == p.stride() else torch.empty_like(p).copy_(grad)
            for p, grad in zip(parameters, grads, strict=True)]


def gradients(loss: Tensor, tensors: Sequence[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    """∂loss/∂tensor of each, 0 where the loss does not reach it."""
    if not tensors:
        return ()
    return torch.autograd.grad(loss, tensors, create_graph=create_graph, materialize_grads=True)


def random_state(device: torch.device) -> list[Tensor] | None:
    """The states of PyTorch's random numbers on the host and on a GPU. None under a CUDA graph's capture: a
    step that draws any is not captured (capture.py)."""
    if device.type != "cuda":
        return [torch.get_rng_state()]
    if torch.cuda.is_current_stream_capturing():
        return None
    return [torch.get_rng_state(), torch.cuda.get_rng_state(device)]


def set_random_state(device: torch.device, states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


class RunningStatistics:
    """What the modules of a network track in training passes: running means and variances, other buffers."""

    def __init__(self, net: nn.Module):
        obey = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm  # the flag that stops them
        modules = list(net.modules())
        self.norms = [m for m in modules if type(m) in obey]
        self.others = [m for m in modules if type(m) not in obey and m._buffers]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within, batch norms track nothing; other buffers are put back at the end."""
        tracking = [norm for norm in self.norms if norm.track_running_stats]
        before = self.snapshot()
        for norm in tracking:
            object.__setattr__(norm, "track_running_stats", False)  # Module's own looks for parameters first
        try:
            yield
        finally:
            for norm in tracking:
                object.__setattr__(norm, "track_running_stats", True)
            self.put_back(before)

    def snapshot(self) -> list[tuple[dict, str, Tensor | None, Tensor | None]]:
        """The other buffers: for each the dictionary and name it is found by, itself, a copy of its values."""
        return [(m._buffers, name, b, None if b is None else b.clone())
                for m in self.others for name, b in m._buffers.items()]

    def put_back(self, snapshot: Sequence) -> None:
        for of_module, name, buffer, values in snapshot:
            if buffer is not None and 0 not in buffer.stride():  # an expanded one is written by nobody
                buffer.data.copy_(values)
            of_module[name] = buffer  # a module may have put another tensor in its place


@contextmanager
def temporary_values(weights: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Within, the weights have these values."""
    before = [p.data for p in weights]
    for p, value in zip(weights, values):
        p.data = value
    try:
        yield
    finally:
        for p, value in zip(weights, before):
            p.data = value


@contextmanager
def without_grad(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within, no gradient by the weights is prepared for."""
    required = [p for p in weights if p.requires_grad]
    for p in required:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in required:
            p.requires_grad_(True)
